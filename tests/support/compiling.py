"""C++ programs of the tests, compiled by a compiler that is called as such."""

import os
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def objects(
    compiler: str, folder: Path, options: Mapping[Path, Iterable], headers: Iterable[Path]
) -> list[Path]:
    """Compile in ``folder`` what has changed since the last time; return the object files.

    Args:
        compiler: name of the compiler.
        folder: where the object files are, each named by its source and the folder of that.
        options: the sources, with the options of each.
        headers: files whose changes concern every source.
    """
    newest = max(x.stat().st_mtime for x in headers)

    def compiled(source: Path) -> Path:
        made = folder / f"{source.parent.name}_{source.name}.o"
        if not made.exists() or made.stat().st_mtime < max(newest, source.stat().st_mtime):
            run(compiler, *options[source], "-c", source, "-o", made)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, options))


def run(compiler: str, *arguments) -> None:
    """Run the compiler; the error, if it fails, has its output."""
    command = [compiler, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
