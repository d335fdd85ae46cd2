"""Buckets of elementwise parameters that are written down by hand, and their truth in float64."""

import torch
from torch import nn

from spectral_kernels.backends import choice
from spectral_kernels.engine.bucket import Bucket
from spectral_kernels.selection.matrices import Elementwise, Selection, refs_of
from spectral_kernels.selection.parameters import ParameterRef
from spectral_kernels.tables.plan import Plan


def entry(name, tensor, kind, length=1, target=None, module=None):
    """An elementwise parameter; with a module, ``name`` is an attribute of it."""
    ref = ParameterRef(name, module, name, None if module is not None else tensor)
    return Elementwise(name, ref, kind, length, target)


def bucket_of_entries(entries, backend, exponent=2, strength=0.5, targets=None):
    """A bucket of elementwise parameters alone; ``targets`` as for ``Plan.set_targets``."""
    weights = [ref.get() for ref in refs_of([], entries)]
    chosen = choice.choose(backend, weights[0].device, weights[0].dtype, 1)
    bucket = Bucket(Plan([], entries, weights), chosen, exponent)
    bucket.state.strength.fill_(strength)
    if targets is not None:
        bucket.set_targets(targets)
    return bucket


def penalty_of(x, kind, length, target, exponent):
    """R of a float64 tensor, from the SVD of each row; ``target`` is a number or [n]."""
    target = torch.as_tensor(target, dtype=torch.float64, device=x.device)
    if kind == "gain":
        values = x.abs().flatten()
    elif kind == "shift":
        values = torch.linalg.svdvals(x.reshape(1, 1, -1)).flatten()
    else:
        values = torch.linalg.svdvals(x.reshape(-1, 1, length)).flatten()
    return ((values**exponent - target**exponent) ** 2).sum()


class Mixed(nn.Module):
    """A linear layer, a norm, a depthwise kernel (6, 1, 3, 3) and a stack of biases (4, 5)."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.kernel = nn.Parameter(0.4 * torch.randn(6, 1, 3, 3))
        self.biases = nn.Parameter(0.3 * torch.randn(4, 5))
        with torch.no_grad():
            self.norm.weight.copy_(torch.randn(7))
            self.norm.bias.copy_(0.3 * torch.randn(7))
        self.to(dtype)

    def forward(self, x):
        """[n, 5] -> [n]; every parameter has a gradient."""
        x = x @ self.biases.mT @ self.biases + x
        x = self.norm(self.linear(x)).sum(1)
        return x * self.kernel.flatten(1).pow(3).sum()


class MixedSelection:
    """``rules.select`` that takes the two parameters of Mixed that it does not know as rows."""

    def __init__(self, select):
        self.select = select

    def __call__(self, model, **options):
        found = self.select(model, **{**options, "exclude": ["kernel", "biases"]})
        root = found.root
        rows = [entry("kernel", None, "rows", 9, module=root),
                entry("biases", None, "rows", 5, 0.0, module=root)]  # fmt: skip
        kept = [x for x in found.skipped if x[0] not in ("kernel", "biases")]
        return Selection(found.matrices, [*found.elementwise, *rows], kept, root)
