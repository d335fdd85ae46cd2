"""Everything that needs a GPU, in one call: ``python -m bench.on_gpu FOLDER [pytest options]``.

Builds the package, runs the tests marked gpu and the suites on the GPU, and leaves in FOLDER the
environment (env.txt), the outputs (build.txt, tests.txt, bench.txt), result.json and the report.
Options after FOLDER go to the suites: ``-k "penalty_step and llama"`` or ``--rounds 7``. A step
that fails does not keep the next ones from running; the exit code is that of the first failure.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def steps(folder: Path, options: list[str]) -> dict[str, list[str]]:
    """Return the arguments of ``python`` by the name of the file that takes the output."""
    result = str(folder / "result.json")
    return {
        "build": ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."],
        "env": ["-m", "spectral_kernels", "env"],
        "tests": ["-m", "pytest", "-m", "gpu"],
        "bench": ["-m", "pytest", "bench", "-m", "gpu", "-q", "--benchmark-columns=median,rounds",
                  f"--benchmark-json={result}", *options],
        "table": ["-m", "bench.report", result, "--out", str(folder)],
        "summary": ["-m", "bench.report", result, "--summary", "--dtype=bfloat16"],
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the steps."""
    if not argv or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("bench.on_gpu: torch finds no CUDA device", file=sys.stderr)
        return 2
    folder, first_failure = Path(argv[0]).resolve(), 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, arguments in steps(folder, argv[1:]).items():
        print(f"$ python {' '.join(arguments)}", flush=True)
        with (folder / f"{name}.txt").open("w") as output:
            code = subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                check=False,
            ).returncode  # fmt: skip
        text = (folder / f"{name}.txt").read_text()
        print(text if name == "summary" else "\n".join(text.splitlines()[-12:]), flush=True)
        if code:
            print(f"failed with {code}: {name}", flush=True)
            first_failure = first_failure or code
    return first_failure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
