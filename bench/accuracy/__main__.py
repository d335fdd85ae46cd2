"""``python -m bench.accuracy``; apart, since the workers import the module that they run."""

import sys

from .measure import main

if __name__ == "__main__":
    sys.exit(main())
