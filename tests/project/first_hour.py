"""What a new user does, timed: ``python -m tests.project.first_hour``, with ``--without-compiler``.

Clones the last commit into an empty folder and runs the README's demo command there, one step after
the other, in the virtual environment that it makes; then, from another folder, the README's
quickstart, and `spectral-kernels env`. The exit code is that of the first step that fails.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import ROOT
from tests.support import documents

COMPILERS = re.compile(r"(.*-)?(c\+\+|g\+\+|gcc|cc|c89|c99|clang|clang\+\+|nvcc)(-[\d.]+)?$")


def main() -> int:
    """Do all of it and print the seconds of each step."""
    parser = argparse.ArgumentParser(prog="python -m tests.project.first_hour", description=__doc__)
    parser.add_argument(
        "--without-compiler", action="store_true", help="hide every C, C++ and CUDA compiler"
    )
    given = parser.parse_args()
    command, _ = documents.installations()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SPECTRAL_")}
        if given.without_compiler:
            environment["PATH"] = str(without_compilers(folder / "tools", environment["PATH"]))
        clone = folder / "clone"
        steps = [(f"git clone --quiet {ROOT} {clone}", folder)]
        steps += [(step, clone) for step in command.split(" && ")]
        (folder / "mine").mkdir()
        (folder / "mine" / "mine.py").write_text(documents.quickstart())
        steps += [("python mine.py", folder / "mine"), ("spectral-kernels env", folder / "mine")]
        lines, begin = [], time.monotonic()
        for step, where in steps:
            if step.startswith(". "):  # the virtual environment: for the steps that follow
                environment["VIRTUAL_ENV"] = str(clone / ".venv")
                path = [str(clone / ".venv" / "bin"), environment["PATH"]]
                environment["PATH"] = os.pathsep.join(path)
                continue
            print("$", step, flush=True)
            start = time.monotonic()
            done = subprocess.run(step, shell=True, cwd=where, env=environment, check=False)
            now = time.monotonic()
            if done.returncode:
                print(f"failed: {step}", file=sys.stderr)
                return done.returncode
            shown = step.replace(str(ROOT), "URL").replace(str(clone), "spectral_kernels")
            lines.append(f"{now - start:8.1f} {now - begin:8.1f}  {shown}")
        if not (clone / "demo.png").stat().st_size:
            print("failed: the picture is empty", file=sys.stderr)
            return 1
    print("\n       s      sum", *lines, sep="\n")
    return 0


def without_compilers(folder: Path, path: str) -> Path:
    """Fill a folder with links to all programs of a PATH that are no compilers."""
    folder.mkdir()
    for place in filter(os.path.isdir, path.split(os.pathsep)):
        for program in os.scandir(place):
            link = folder / program.name
            if not COMPILERS.match(program.name) and not os.path.lexists(link):
                link.symlink_to(program.path)
    return folder


if __name__ == "__main__":
    sys.exit(main())
