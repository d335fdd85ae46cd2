"""Tables and plots from pytest-benchmark's JSON: ``python -m bench.report RESULT.json...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .results import Run, load
from .tables import summary, tables


def write(run: Run, folder: Path) -> None:
    """Write report.md and its plots into ``folder``."""
    from . import plots  # matplotlib takes a second to load

    folder.mkdir(parents=True, exist_ok=True)
    names = plots.draw(run, folder)
    pictures = "".join(f"\n![{name}]({name})\n" for name in names)
    (folder / "report.md").write_text(tables(run) + pictures)


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the report of the files named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", help="files that --benchmark-json wrote")
    parser.add_argument("--summary", action="store_true", help="print the README's table only")
    parser.add_argument("--dtype", default="float32", help="of the README's table")
    parser.add_argument("--out", type=Path, help="write report.md and plots into this folder")
    arguments = parser.parse_args(argv)
    try:
        run = load(arguments.files)
        text = summary(run, arguments.dtype) if arguments.summary else tables(run)
        if arguments.out is not None:
            write(run, arguments.out)
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.report: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if arguments.out is None:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
