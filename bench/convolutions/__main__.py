"""``python -m bench.convolutions``: norms of convolutions, ours beside other ways to find them.

For the kernels of a ResNet-18 and a ConvNeXt, with random weights, it compares

* exact: the largest sigma_1 over all frequencies of a 32 x 32 image, by FFT and eigenvalues;
* ours: a step of the regularizer after 50 of them, and spectral_norms;
* image: a step of power iteration on a 32 x 32 image, by convolution and transposed convolution;
* bound: sqrt(h w) times the spectral norm of the kernel as a tensor (Grishina et al., "Tight and
  Efficient Upper Bound on Spectral Norm of Convolutional Layers", arXiv 2409.11859).

Then it times the penalty step of all of ResNet-18 with flattened kernels and with operators.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch
from pytest_benchmark.utils import get_commit_info
from torch import nn

from spectral_kernels import SpectralRegularizer, spectral_norms
from spectral_kernels.cli.env import processor

from ..report.results import commit_name
from ..support import interleave
from ..support.models import resnet18

SIZE = 32  # of the image
# Of ResNet-18 (He et al.) and ConvNeXt-T (Liu et al.): channels in and out, size, stride, groups.
KERNELS = {
    "ResNet-18 stem": (3, 64, 7, 2, 1), "ResNet-18 stage 1": (64, 64, 3, 1, 1),
    "ResNet-18 stage 2": (128, 128, 3, 1, 1), "ResNet-18 stage 3, first": (128, 256, 3, 2, 1),
    "ResNet-18 stage 4": (512, 512, 3, 1, 1), "ConvNeXt-T stage 1": (96, 96, 7, 1, 96),
    "ConvNeXt-T downsampling": (96, 192, 2, 2, 1),
}  # fmt: skip


def made(name: str) -> nn.Conv2d:
    """Return a convolution with random weights of which some frequencies count more than others."""
    channels, out, size, stride, groups = KERNELS[name]
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, out, size, stride, size // 2, groups=groups, bias=False)
    with torch.no_grad():
        conv.weight.mul_(0.2 + torch.rand(size, size))
    return conv


def exact(conv: nn.Conv2d) -> float:
    """Return the largest sigma_1 over the frequencies of the image, the strides' phases apart."""
    s = conv.stride[0]
    parts = []
    for kernel in conv.weight.detach().double().chunk(conv.groups):
        phases = [kernel[:, :, i::s, j::s] for i in range(s) for j in range(s)]
        sizes = SIZE, SIZE
        spectrum = torch.cat([torch.fft.rfft2(x, s=sizes) for x in phases if x.numel()], 1)
        f = spectrum.flatten(2).permute(2, 0, 1)
        gram = f @ f.mH if f.shape[1] < f.shape[2] else f.mH @ f
        parts.append(float(torch.linalg.eigvalsh(gram)[:, -1].max().sqrt()))
    return max(parts)


class OnImage:
    """Power iteration on an image."""

    def __init__(self, conv: nn.Conv2d):
        self.conv = conv
        self.x = torch.randn(1, conv.in_channels, SIZE, SIZE)
        self.x /= self.x.norm()

    @torch.no_grad()
    def step(self) -> float:
        """Run one iteration and return its estimate."""
        y = self.conv(self.x)
        x = torch.nn.grad.conv2d_input(
            self.x.shape, self.conv.weight, y, self.conv.stride, self.conv.padding,
            groups=self.conv.groups,
        )  # fmt: skip
        self.x = x / x.norm()
        return float(y.norm())


def tensor_bound(conv: nn.Conv2d, iterations: int = 50, starts: int = 4) -> float:
    """Return the bound; the tensor's norm by alternating iteration from a few random starts."""
    best = 0.0
    for kernel in conv.weight.detach().chunk(conv.groups):
        k = kernel.to(torch.complex64)
        for _ in range(starts):
            vectors = [torch.randn(n, dtype=torch.complex64) for n in k.shape]
            vectors = [v / v.norm() for v in vectors]
            value = 0.0
            for _ in range(iterations):
                for d in range(4):
                    x = k
                    for e in reversed([e for e in range(4) if e != d]):
                        x = torch.tensordot(x, vectors[e], ([e], [0]))
                    value = float(x.norm())
                    vectors[d] = x.conj() / value
            best = max(best, value)
    return best * conv.kernel_size[0]


def seconds(function: Callable[[], object], rounds: int = 5) -> tuple[float, object]:
    """Return the median time of a call, and what it returns."""
    times, found = [], None
    for _ in range(rounds):
        start = time.perf_counter()
        found = function()
        times.append(time.perf_counter() - start)
    return median(times), found


def row(name: str) -> dict[str, float | str]:
    """Return values and times of one kernel."""
    conv = made(name)
    exact_time, truth = seconds(lambda: exact(conv), 1)
    reg = SpectralRegularizer(conv, strength=1e-3, convolutions="operator", biases=False)
    start = time.perf_counter()
    reg.sigma  # noqa: B018 (builds tables and searches)
    first = time.perf_counter() - start
    conv.weight.grad = torch.zeros_like(conv.weight)
    for _ in range(50):
        reg.accumulate_grad_()
    ours, _ = seconds(reg.accumulate_grad_, 21)
    norm_time, norms = seconds(
        lambda: max(spectral_norms(conv, convolutions="operator").values()), 1
    )
    image = OnImage(conv)
    for _ in range(50):
        image.step()
    image_time, on_image = seconds(image.step, 21)
    bound_time, bound = seconds(lambda: tensor_bound(conv), 1)
    flattened = max(spectral_norms(conv).values())
    return {
        "kernel": name, "flattened": flattened, "exact, 32 x 32": truth,
        "ours": float(reg.sigma.max()), "spectral_norms": norms, "image, 50 steps": on_image,
        "tensor bound": bound, "ms exact": 1e3 * exact_time, "ms first": 1e3 * first,
        "ms ours": 1e3 * ours, "ms spectral_norms": 1e3 * norm_time,
        "ms image": 1e3 * image_time, "ms bound": 1e3 * bound_time,
    }  # fmt: skip


def penalty_steps(rounds: int) -> dict[str, float]:
    """Return medians of the penalty step of ResNet-18, in ms."""
    model = resnet18()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    steps = {}
    for kind in ("flattened", "operator"):
        reg = SpectralRegularizer(model, strength=1e-6, convolutions=kind)
        steps[kind] = reg.accumulate_grad_
    found = interleave.measure(steps, rounds)
    return {name: 1e3 * median(times) for name, times in found.items()}


def shown(value: float | str) -> str:
    """Return a cell of the table."""
    return value if isinstance(value, str) else f"{value:.3g}"


def report(rows: list[dict], steps: dict[str, float], threads: int) -> str:
    """Return the report as Markdown."""
    names = list(rows[0])
    lines = [
        f"# Convolutions as operators, {date.today()}", "",
        f"{processor()}, {threads} threads, torch {torch.__version__}, float32, commit "
        f"{commit_name(get_commit_info())}; `python -m bench.convolutions`.", "",
        "Values: flattened kernel; the exact maximum over the frequencies of a 32 x 32 image, "
        "which an operator's norm may exceed a little; ours after 50 steps; spectral_norms; power "
        "iteration on an image after 50 steps; the bound by the tensor's norm. Times in ms: exact; "
        "our first step with its search; one step of ours, with its gradient; spectral_norms; one "
        "step on the image, without a gradient; the bound.", "",
        "| " + " | ".join(names) + " |", "|" + "---|" * len(names),
        *("| " + " | ".join(shown(x) for x in one.values()) + " |" for one in rows), "",
        f"Penalty step of ResNet-18: flattened {steps['flattened']:.3g} ms, operator "
        f"{steps['operator']:.3g} ms, ratio {steps['operator'] / steps['flattened']:.2f}.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    """Measure, and write report.md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of report.md; printed if not given")
    parser.add_argument("--rounds", type=int, default=15, help="of the penalty step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kernels", nargs="*", default=list(KERNELS), choices=list(KERNELS))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    text = report([row(name) for name in given.kernels], penalty_steps(given.rounds), given.threads)
    if given.out is None:
        print(text)
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "report.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
