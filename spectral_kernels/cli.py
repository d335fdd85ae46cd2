"""The command ``spectral-kernels``: what runs here, a demo, checkpoints, pictures of logs."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch

from . import backends, inspection, plotting
from ._version import __version__
from .inspection_rows import SORTS

_INTERRUPTED = 130  # as a shell reports a process that SIGINT has ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except KeyboardInterrupt:
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spectral-kernels", description="Spectral regularization for PyTorch."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    env = commands.add_parser("env", help="print versions, backends and instruction sets")
    env.set_defaults(command=_env)
    demo = commands.add_parser(
        "demo",
        help="continual learning with no regularizer, L2 and spectral regularization",
        description=(
            "Train one network on task after task of random labels for the same images, with no "
            "regularizer, with L2, and with spectral regularization attached to Adam and inside "
            "SpectralAdamW. Ctrl-C keeps what is finished."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--tasks", type=_at_least(1), default=30, help="how often labels change")
    demo.add_argument("--epochs", type=_at_least(1), default=40, help="epochs per task")
    demo.add_argument("--seed", type=_at_least(0), default=0, help="of data, weights and batches")
    demo.add_argument("--out", type=_png, default="demo.png", help="where the picture goes")
    demo.set_defaults(command=_demo)
    _add_inspect(commands)
    plot = commands.add_parser(
        "plot",
        help="the picture of a log of log_to(): sigma and residuals over the steps",
        description="Draw sigma_1 of every matrix over the steps, also of a run that goes on.",
    )
    plot.add_argument("log", type=Path, metavar="LOG", help=".csv or .jsonl file")
    plot.add_argument("--out", type=_png, metavar="FILE.png", help="default: beside the log")
    plot.set_defaults(command=plotting.run)
    return parser


def _add_inspect(commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="largest singular values and stable ranks of the matrices of a checkpoint",
        description=(
            "Measure the matrices of a checkpoint, or compare two by name. Every tensor with two "
            "or more dimensions is a matrix (dim 0, rest). PATTERN is a glob pattern of names, as "
            "'*.mlp.*', and such options may be repeated."
        ),
        epilog="Exit codes: 0 fine, 1 could not read or write, 2 wrong usage, 3 --fail-above.",
    )
    inspect.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT",
        help=".safetensors, .pt, .pth, .bin or .ckpt file, *.index.json, or a directory of them",
    )  # fmt: skip
    inspect.add_argument("other", type=Path, nargs="?", metavar="OTHER",
                         help="a second checkpoint: changes from the first to it")  # fmt: skip
    several = {"action": "append", "metavar": "PATTERN"}
    inspect.add_argument("--include", "--filter", **several, help="take these only")
    inspect.add_argument("--exclude", **several, default=[], help="leave these out")
    inspect.add_argument(
        "--splits", action="append", default=[], type=_split, metavar="PATTERN=N",
        help="divide dim 0 into N equal parts, or by sizes: '*.qkv.weight=768,256,256'",
    )  # fmt: skip
    inspect.add_argument("--stacked", **several, default=[], help="E matrices from (E, out, in)")
    inspect.add_argument("--sort", choices=SORTS,
                         help="largest first (default: as the layers come)")  # fmt: skip
    inspect.add_argument("--top", type=_at_least(1), metavar="N",
                         help="the first N after sorting, by default by sigma")  # fmt: skip
    inspect.add_argument("--json", type=_writable, metavar="FILE", help="- for standard output")
    inspect.add_argument("--csv", type=_writable, metavar="FILE", help="- for standard output")
    inspect.add_argument("--plot", type=_png, metavar="FILE.png", help="sigma_1 over depth")
    inspect.add_argument("--fail-above", type=_limit, metavar="X",
                         help="exit code 3 if a sigma_1 is above X or not finite")  # fmt: skip
    inspect.set_defaults(command=inspection.run)


def _at_least(least: int):
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"got {text!r}; accepted are integers >= {least}")
        return value

    return integer


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted are names that end in .png")
    return _writable(text)


def _writable(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"got {text!r}; cannot write to folder '{path.parent}'")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}; it is a directory")
    return path


def _split(text: str) -> tuple[str, int | tuple[int, ...]]:
    pattern, _, sizes = text.rpartition("=")
    try:
        numbers = tuple(map(int, sizes.split(",")))
    except ValueError:
        numbers = ()
    if not pattern or not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; accepted are PATTERN=N and PATTERN=SIZE,SIZE,..."
        )
    return pattern, numbers[0] if len(numbers) == 1 else numbers


def _limit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted are numbers from 0 on")
    return value


def _env(arguments: argparse.Namespace) -> int:
    rows = [
        ("spectral_kernels", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", triton_version()),
        ("numpy", numpy.__version__),
        ("platform", platform.platform()),
        ("processor", processor()),
        ("threads", str(torch.get_num_threads())),
    ]
    for name in backends.NAMES:
        reason = backends.unavailable(name)
        if reason is None and name in ("triton", "cuda") and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
            reason = backends.failed_check(name, device, torch.float32)
        rows.append((f"backend {name}", "works" if reason is None else f"no: {reason}"))
    if backends.unavailable("cpu") is None:
        cpu = backends.native_module().cpu
        rows.append(("instruction set", f"{cpu.level()} (available: {', '.join(cpu.levels())})"))
        rows.append(("openmp", "yes" if cpu.openmp else "no"))
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:{width}}  {value}")
    return 0


def triton_version() -> str:
    """Return Triton's version, or why there is none."""
    try:
        import triton
    except ImportError as error:
        return f"none ({error})"
    return triton.__version__


def processor() -> str:
    """Return the name of the processor, as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _demo(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    try:
        from rich.console import Console

        from . import demo, plots
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("sklearn", "matplotlib", "rich"):
            raise
        print(
            f"spectral-kernels: the demo needs {missing}: pip install 'spectral_kernels[demo]'",
            file=sys.stderr,
        )
        return 1

    tasks, epochs, seed = arguments.tasks, arguments.epochs, arguments.seed
    console = Console()
    try:
        if sys.stdout.isatty() and not console.is_dumb_terminal:
            with demo.bars(console, tasks, epochs) as display:
                results = demo.run(tasks, epochs, seed, display)
        else:
            results = demo.run(tasks, epochs, seed, demo.lines(tasks))
    except demo.WorkerError as error:
        print(f"spectral-kernels: {error}", file=sys.stderr)
        return 1
    finished = any(results.arms.values())
    if finished:
        plots.draw(results, arguments.out)
        console.print(demo.table(results))
        print(f"picture: {arguments.out}")
    print(f"total time: {time.perf_counter() - start:.1f} s", flush=True)
    if results.interrupted:
        before = "" if finished else " before any task was finished"
        print(f"spectral-kernels: interrupted{before}", file=sys.stderr)
        return _INTERRUPTED
    return 0
