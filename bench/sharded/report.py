"""``python -m bench.sharded.report FOLDER``: deviations of a sharded model from an unsharded one.

Writes sharded.md, with the largest deviations by placement and the collectives of a step, and
losses.png, with the training losses of the same model sharded and unsharded.
"""

import sys
from datetime import date
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pytest_benchmark.utils import get_commit_info

from bench.report.results import commit_name
from bench.sharded import scale_model
from spectral_kernels.cli.env import processor
from tests.support import sharded_models, sharded_runs
from tests.support.ranks import Ranks

STEPS = 50
CURVES = ("fsdp", "tensor parallel", "fsdp and tensor parallel")


def largest(results):
    """Return the largest deviation of each quantity over ranks and calls."""
    found = {}
    for one in results:
        for name, value in one.items():
            found[name] = max(found.get(name, 0.0), value)
    return found


def main(folder):
    """Run everything, on four ranks."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = Ranks(4)
    names = "sigma", "squared", "evaluated", "penalty", "grad"
    lines = [
        f"Four gloo processes on an {processor()}, torch {torch.__version__}, commit "
        f"{commit_name(get_commit_info())}, {date.today()}: `python -m bench.sharded.report`.", "",
        "Largest deviation from the same model in one piece after three iterations, relative to "
        "the largest element of each quantity (squared residuals: to sigma^2).", "",
        "| placement | dtype | vectors | sigma | residual^2 | penalty, evaluated | penalty() | "
        "gradient |", "|---" * 8 + "|",
    ]  # fmt: skip
    for dtype in (torch.float32, torch.float64):
        for placement in sharded_models.PLACEMENTS:
            for n_vectors in (1, 4):
                results = []
                for way in ("accumulate", "penalty"):
                    options = {"n_vectors": n_vectors}
                    results += ranks.call(sharded_runs.compare, placement, way, options, dtype)
                found = largest(results)
                cells = [placement, str(dtype).removeprefix("torch."), str(n_vectors)]
                lines.append(
                    "| " + " | ".join([*cells, *(f"{found[n]:.0e}" for n in names)]) + " |"
                )
    lines += [
        "",
        "Collectives of one step (`accumulate_grad_()`) with one vector, and their bytes:",
        "",
        "| placement | 2 blocks, 14 matrices | 6 blocks, 38 matrices |",
        "|---|---|---|",
    ]
    for placement in sharded_models.PLACEMENTS:
        cells = [placement]
        for blocks in (2, 6):
            _, seen, _ = ranks.call(sharded_runs.counted, placement, blocks, 1, "accumulate")[0]
            cells.append(f"{len(seen)} all-reduces: " + ", ".join(str(size) for _, size in seen))
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "64 ranks of torch's fake process group against bench/sharded/scale_model.py:",
        "",
    ]
    for n, found, predicted in scale_model.check():
        sizes = ", ".join(str(size) for _, size in found)
        expected = ", ".join(map(str, predicted))
        lines.append(f"* {n} vector(s): {len(found)} all-reduces of {sizes} bytes; {expected}")
    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    worst = {}
    for ax, placement in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        for way, color in (("attach", "#0072B2"), ("SpectralAdamW", "#D55E00")):
            alone, sharded = ranks.call(sharded_runs.losses, placement, way, STEPS)[0]
            ax.plot(alone, color=color, linewidth=4, alpha=0.3, label=f"{way}, one piece")
            ax.plot(sharded, color=color, linewidth=1.2, label=f"{way}, 4 ranks")
            worst[placement, way] = max(abs(a - b) / a for a, b in zip(alone, sharded, strict=True))
        ax.set(title=placement, xlabel="step", ylabel="task loss")
        ax.grid(color="0.92")
    ax.legend(frameon=False)
    figure.savefig(folder / "losses.png", format="png")
    lines += ["", f"Losses over {STEPS} steps, largest relative difference: " + "; ".join(
        f"{placement}, {way} {value:.0e}" for (placement, way), value in worst.items()) + ".",
        "", "![Losses, sharded and in one piece](losses.png)", ""]  # fmt: skip
    ranks.close()
    (folder / "sharded.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1])
