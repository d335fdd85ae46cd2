"""``python -m spectral_kernels`` is the command ``spectral-kernels``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
