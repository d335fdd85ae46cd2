"""``python -m bench.checkpoints``: what looking into a checkpoint costs.

A checkpoint with the shapes of a Llama (bfloat16, a file per two layers, random weights) is read,
checked with ``inspect --check``, measured with ``inspect``, and with ``inspect --values 8``: whole
commands, in turn. Then the seven matrices of one layer are measured by ``inspect``, by a loop of
``torch.linalg.svdvals``, and by WeightWatcher (``pip install weightwatcher``; left out if it is
missing) in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from statistics import median

import torch
from pytest_benchmark.utils import get_commit_info
from torch import nn

from spectral_kernels import cli, open_checkpoint
from spectral_kernels.cli.env import processor

from ..report.results import commit_name

HIDDEN, INNER, KEYS, VOCABULARY = 2048, 5632, 512, 32000
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
CONFIG = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
          "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}  # fmt: skip


def layer(number: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return the weights of a layer."""
    found = {
        f"model.layers.{number}.{name}.weight": _weight(shape, generator)
        for name, shape in MATRICES.items()
    }
    for name in ("input_layernorm", "post_attention_layernorm"):
        found[f"model.layers.{number}.{name}.weight"] = 1 + _weight((HIDDEN,), generator)
    return found


def _weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def save(folder: Path, n_layers: int) -> int:
    """Write a checkpoint of several files with an index; return its number of weights."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def parts() -> Iterator[dict[str, torch.Tensor]]:
        yield {"model.embed_tokens.weight": _weight((VOCABULARY, HIDDEN), generator)}
        for first in range(0, n_layers, 2):
            both = range(first, min(first + 2, n_layers))
            yield {name: t for i in both for name, t in layer(i, generator).items()}
        yield {"lm_head.weight": _weight((VOCABULARY, HIDDEN), generator)}

    weight_map, total = {}, 0
    for number, tensors in enumerate(parts()):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.numel() for t in tensors.values())
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return total


# A process begins with the memory of the one that starts it as its maximum, so a small one does.
_LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
seconds = time.perf_counter() - start
print(json.dumps([code, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


def command(*arguments: str) -> tuple[float, float]:
    """Run a command; return its seconds and the most megabytes that it held."""
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, *arguments]
    done = subprocess.run(launcher, capture_output=True, text=True, check=True)
    code, seconds, kilobytes = json.loads(done.stdout)
    if code:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {code}: {done.stderr[-300:]}")
    return seconds, kilobytes / 1e3


def commands(folder: Path, rounds: int) -> dict[str, tuple[float, float]]:
    """Return medians of seconds and megabytes of the commands, which take turns."""
    inspect = [sys.executable, "-m", "spectral_kernels", "inspect", str(folder)]
    contenders = {
        "read (cat)": ["cat", *map(str, sorted(folder.glob("*.safetensors")))],
        "inspect --check": [*inspect, "--check"],
        "inspect": inspect,
        "inspect --values 8": [*inspect, "--values", "8"],
    }
    command(*contenders["read (cat)"])  # into the page cache
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, arguments in contenders.items():
            found[name].append(command(*arguments))
    return {
        name: (median(seconds for seconds, _ in runs), max(held for _, held in runs))
        for name, runs in found.items()
    }


def of_one_layer(folder: Path, rounds: int) -> dict[str, float]:
    """Return medians of seconds for the matrices of one layer, in one process."""
    from safetensors.torch import save_file

    path = folder / "layer.safetensors"
    save_file(layer(0, torch.Generator().manual_seed(1)), path)
    weights = {n: t.read() for n, t in open_checkpoint(path) if len(t.shape) == 2}
    contenders: dict[str, Callable[[], object]] = {
        "inspect": lambda: _inspected(path),
        "inspect --values 8": lambda: _inspected(path, "--values", "8"),
        "torch.linalg.svdvals": lambda: [torch.linalg.svdvals(w.float()) for w in weights.values()],
    }
    if importlib.util.find_spec("weightwatcher") is not None:
        contenders["WeightWatcher"] = lambda: watched(weights)
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, contender in contenders.items():
            if number and name == "WeightWatcher":  # minutes; once is enough
                continue
            start = time.perf_counter()
            contender()
            found[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in found.items()}


def _inspected(path: Path, *arguments: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(["inspect", str(path), *arguments, "--json", "-"])
    if code:
        raise RuntimeError(f"inspect: exit code {code}")


def watched(weights: Mapping[str, torch.Tensor]):
    """Return WeightWatcher's table of these weights: norms, ranks, and the fits of alpha."""
    logging.disable(logging.WARNING)
    import weightwatcher

    model = nn.ModuleDict()
    for name, weight in weights.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.float())
        model[name.replace(".", "_")] = linear
    return weightwatcher.WeightWatcher(model=model).analyze()


def report(
    n_weights: int, whole: Mapping[str, tuple[float, float]], parts: Mapping[str, float]
) -> str:
    """Return the report as Markdown."""
    read = whole["read (cat)"][0]
    lines = [
        f"# Looking into a checkpoint, {date.today()}", "",
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit "
        f"{commit_name(get_commit_info())}; `python -m bench.checkpoints`.", "",
        f"A checkpoint with the shapes of a Llama, {n_weights / 1e9:.2f} G weights, bfloat16, in "
        "the page cache; whole commands in turn, medians; memory includes what is mapped.", "",
        "| command | s | of a read | MB |", "|---|---|---|---|",
        *(f"| {n} | {s:.2f} | {s / read:.1f} | {mb:.0f} |" for n, (s, mb) in whole.items()), "",
        f"The {len(MATRICES)} matrices of one layer, in one process:", "",
        "| what | s | of inspect |", "|---|---|---|",
        *(f"| {n} | {s:.2f} | {s / parts['inspect']:.1f} |" for n, s in parts.items()), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    """Measure, and write report.md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of report.md; printed if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=20, help="51 M weights each, beside 131 M")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        n_weights = save(Path(folder), given.layers)
        whole = commands(Path(folder), given.rounds)
    with tempfile.TemporaryDirectory() as folder:
        parts = of_one_layer(Path(folder), given.rounds)
    text = report(n_weights, whole, parts)
    if given.out is None:
        print(text)
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "report.md").write_text(text, encoding="utf-8")
    print(f"{given.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
