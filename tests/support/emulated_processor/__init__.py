"""The C++ kernels of a CPU in a process of their own, which may be a program of another processor.

``python -m pytest -p tests.support.emulated_processor --processor NAME --built FOLDER FILES``
builds kernels.cpp with csrc/cpu in FOLDER, and runs the tests of backend "cpu" in FILES with it:
"aarch64" is emulated by QEMU, "here" is this processor's. What a call is given, tables and all they
point to, is copied into a file that both processes map, at addresses of its own; afterwards it is
copied back. The bytes in between are those of NaN, and have to be the same after the call.

What runs that way is the baseline level, one call at a time. Not seen are reads beyond a tensor
whose values are not used, and what an emulator does otherwise than a processor: the order in which
threads see each other's accesses to memory. Nothing is said about speed.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from spectral_kernels.backends import choice
from spectral_kernels.backends.native import Cpu
from tests import ROOT

from ..compiling import objects, run
from .memory import ADDRESS, SIZE, Memory, Reach

HERE, CSRC = Path(__file__).parent, ROOT / "csrc"
LEVEL = ("gram_matvec", "partials", "rank_one", "update")  # files that are compiled per level
FLAGS = ("-std=gnu++17", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
         "-fopenmp", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-DSPECTRAL_LEVEL=baseline",
         f"-I{CSRC}")  # fmt: skip
# The compiler of each processor, and what runs its programs.
PROCESSORS = {
    "here": (os.environ.get("CXX") or "g++", []),
    "aarch64": ("aarch64-linux-gnu-g++", ["qemu-aarch64"]),
}


def missing(processor: str) -> str | None:
    """Return which program that a processor needs is missing here, or None."""
    compiler, emulator = PROCESSORS[processor]
    absent = [name for name in (compiler, *emulator) if shutil.which(name) is None]
    return f"there is no {' and no '.join(absent)}" if absent else None


def build(processor: str, folder: Path) -> Path:
    """Compile in ``folder`` what has changed since the last build; return the program's path."""
    compiler, _ = PROCESSORS[processor]
    sources = [HERE / "kernels.cpp", CSRC / "cpu" / "backend.cpp",
               *(CSRC / "cpu" / f"{name}.cpp" for name in LEVEL)]  # fmt: skip
    made = objects(compiler, folder, dict.fromkeys(sources, FLAGS), CSRC.rglob("*.h"))
    # Without libraries of the other processor, which would have to be found.
    run(compiler, "-static", "-fopenmp", *made, "-o", folder / "kernels")
    return folder / "kernels"


class Kernels:
    """The functions of the compiled module that backend "cpu" calls, in another process.

    Args:
        program: see :func:`build`.
        processor: what it was built for.
    """

    def __init__(self, program: Path, processor: str):
        path = program.with_name("memory")
        self._memory = Memory(path)
        command = [*PROCESSORS[processor][1], program, path, str(ADDRESS), str(SIZE)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.n_calls = 0
        self._answer()  # it is ready

    def gram_matvec(self, header: int, threads: int) -> None:
        self._call("gram_matvec", threads, Reach(header), header)

    def transposed(self, header: int, threads: int) -> None:
        self._call("transposed", threads, Reach(header), header)

    def collect(self, header: int, t: int, gram: int, threads: int) -> None:
        reach = Reach(header)
        reach.add(t, reach.n_v * reach.number)
        reach.add(gram, reach.n_gram * 8)
        self._call("collect", threads, reach, header, t, gram)

    def normalize(self, header: int, threads: int) -> None:
        self._call("normalize", threads, Reach(header), header)

    def rank_one(self, header: int, accumulate: bool, threads: int) -> None:
        self._call("rank_one", threads, Reach(header), header, numbers=(int(accumulate),))

    def update(self, header: int, update: int, threads: int) -> None:
        self._call("update", threads, Reach(header, update), header, update)

    def jumps(self, header: int, ratios: int, least: float, factor: float) -> bool:
        reach = Reach(header)
        reach.add(ratios, 8 * len(reach.matrices))
        return self._call("jumps", 1, reach, header, ratios, numbers=(least, factor)) != "0"

    def _call(self, name: str, threads: int, reach: Reach, *addresses: int, numbers=()) -> str:
        """Run a function on copies of what it reaches, and return its result."""
        self._memory.send(reach)
        there = map(self._memory.there, addresses)
        print(name, threads, *there, *numbers, file=self._process.stdin, flush=True)
        result = self._answer()
        self._memory.receive()
        self.n_calls += 1
        return result

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with code {self._process.wait()}")
        return line.strip()

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


class Elsewhere(Cpu):
    """Backend "cpu", call by call in another process; no other code takes steps of this type."""


def pytest_addoption(parser):
    parser.addoption("--processor", choices=PROCESSORS, help="whose kernels run", required=True)
    parser.addoption("--built", type=Path, required=True, help="folder to build the program in")


def pytest_configure(config):
    if config.option.help:
        return
    folder, processor = config.getoption("--built"), config.getoption("--processor")
    folder.mkdir(parents=True, exist_ok=True)
    kernels = Kernels(build(processor, folder), processor)

    def end():
        kernels.close()
        assert kernels.n_calls, "no test has called the kernels of the program"

    config.add_cleanup(end)
    patch = pytest.MonkeyPatch()
    patch.setattr(choice, "Cpu", lambda _: Elsewhere(kernels))


def pytest_collection_modifyitems(config, items):
    def is_of_this_level(item):
        given = item.callspec.params if hasattr(item, "callspec") else {}
        return given.get("backend") == "cpu-baseline"

    config.hook.pytest_deselected(items=[x for x in items if not is_of_this_level(x)])
    items[:] = filter(is_of_this_level, items)
