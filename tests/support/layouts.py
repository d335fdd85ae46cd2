"""Weights in every supported memory layout, for tests of layouts and plans."""

import math

import pytest
import torch
from torch import nn

from .buckets import bucket_of


def strided(shape, strides, dtype=torch.float32):
    """Random numbers with these strides, in a buffer that is NaN everywhere else."""
    reach = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    view = torch.full((reach + 7,), math.nan, dtype=dtype).as_strided(shape, strides, 3)
    return view.copy_(torch.randn(shape))


def contiguous(*shape):
    return torch.empty(shape, device="meta").stride()


def channels_last(*shape):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return torch.empty(shape, device="meta", memory_format=formats[len(shape)]).stride()


class Conv1D(nn.Module):
    """Like Conv1D of transformers: the weight is stored (in, out)."""

    def __init__(self):
        super().__init__()
        self.nf = 1


# kind -> a module, the name of its parameter, options of the selection, its matrices.
KINDS = {
    "linear": (lambda: nn.Linear(1, 1, bias=False), "weight", {}, lambda w: [w]),
    "conv": (lambda: nn.Conv2d(1, 1, 1, bias=False), "weight", {}, lambda w: [w.flatten(1)]),
    "up": (
        lambda: nn.ConvTranspose2d(1, 1, 1, bias=False), "weight", {},
        lambda w: [w.transpose(0, 1).flatten(1)],
    ),
    "split up": (
        lambda: nn.ConvTranspose2d(1, 1, 1, bias=False), "weight", {"splits": {"weight": 2}},
        lambda w: w.transpose(0, 1).flatten(1).chunk(2),
    ),
    "attention": (
        lambda: nn.MultiheadAttention(1, 1, bias=False), "in_proj_weight",
        {"include": ["in_proj_weight"]}, lambda w: w.chunk(3),
    ),
    "in, out": (
        Conv1D, "weight", {"splits": {"weight": [6, 3, 3]}},
        lambda w: [part.T for part in w.split([6, 3, 3], dim=1)],
    ),
    "stack": (nn.Module, "weight", {"stacked": ["weight"]}, list),
    "stack of splits": (
        nn.Module, "weight", {"stacked": ["weight"], "splits": {"weight": [2, 4]}},
        lambda w: [part for expert in w for part in expert.split([2, 4])],
    ),
}  # fmt: skip


def module_with(kind, weight):
    """A module of this kind with ``weight`` as its parameter, and the options that select it."""
    make, name, options, _ = KINDS[kind]
    module = make()
    setattr(module, name, nn.Parameter(weight))
    return module, options


def matrices_of(kind, weight):
    return list(KINDS[kind][3](weight))


LAYOUTS = {
    "contiguous": ("linear", (7, 5), (5, 1)),
    "contiguous, several tiles": ("linear", (300, 37), (37, 1)),
    "rows apart": ("linear", (7, 33), (40, 1)),
    "transposed": ("linear", (33, 7), (1, 33)),
    "transposed, several tiles": ("linear", (9, 300), (1, 9)),
    "transposed, columns apart": ("linear", (33, 7), (1, 41)),
    "one column": ("linear", (33, 1), (1, 1)),
    "one column of several": ("linear", (33, 1), (4, 1)),
    "one row": ("linear", (1, 33), (33, 1)),
    "one row, elements apart": ("linear", (1, 33), (66, 2)),
    "one element": ("linear", (1, 1), (5, 3)),
    "conv1d": ("conv", (6, 4, 3), contiguous(6, 4, 3)),
    "conv2d": ("conv", (6, 4, 3, 2), contiguous(6, 4, 3, 2)),
    "conv2d channels_last": ("conv", (6, 4, 3, 2), channels_last(6, 4, 3, 2)),
    "conv2d channels_last, several tiles": ("conv", (260, 3, 2, 2), channels_last(260, 3, 2, 2)),
    "conv2d channels_last, filters apart": ("conv", (6, 4, 3, 2), (31, 1, 8, 4)),
    "conv2d channels_last 1 x 1": ("conv", (6, 4, 1, 1), channels_last(6, 4, 1, 1)),
    "conv2d channels apart": ("conv", (6, 4, 3, 2), (32, 8, 2, 1)),
    "conv2d kernel turned": ("conv", (6, 4, 3, 2), (24, 6, 1, 3)),
    "conv2d outputs last": ("conv", (6, 4, 3, 2), (1, 6, 48, 24)),
    "conv2d one input channel": ("conv", (6, 1, 3, 2), channels_last(6, 1, 3, 2)),
    "conv2d one output channel": ("conv", (1, 4, 3, 2), channels_last(1, 4, 3, 2)),
    "conv3d": ("conv", (6, 4, 3, 2, 2), contiguous(6, 4, 3, 2, 2)),
    "conv3d channels_last": ("conv", (6, 4, 3, 2, 2), channels_last(6, 4, 3, 2, 2)),
    "up1d": ("up", (4, 6, 3), contiguous(4, 6, 3)),
    "up1d, kernel of one": ("up", (4, 6, 1), contiguous(4, 6, 1)),
    "up2d": ("up", (4, 6, 3, 2), contiguous(4, 6, 3, 2)),
    "up2d, several tiles": ("up", (3, 300, 2, 2), contiguous(3, 300, 2, 2)),
    "up2d channels_last": ("up", (4, 6, 3, 2), channels_last(4, 6, 3, 2)),
    "up2d one input": ("up", (1, 6, 3, 2), contiguous(1, 6, 3, 2)),
    "up2d one output channels_last": ("up", (4, 1, 3, 2), channels_last(4, 1, 3, 2)),
    "up3d channels_last": ("up", (4, 6, 3, 2, 2), channels_last(4, 6, 3, 2, 2)),
    "split up2d": ("split up", (4, 6, 3, 2), contiguous(4, 6, 3, 2)),
    "split up2d channels_last": ("split up", (4, 6, 3, 2), channels_last(4, 6, 3, 2)),
    "attention": ("attention", (36, 12), contiguous(36, 12)),
    "attention transposed": ("attention", (36, 12), (1, 36)),
    "in, out": ("in, out", (5, 12), contiguous(5, 12)),
    "stack": ("stack", (3, 6, 5), contiguous(3, 6, 5)),
    "stack transposed": ("stack", (3, 6, 5), (30, 1, 6)),
    "stack of splits": ("stack of splits", (3, 6, 5), contiguous(3, 6, 5)),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def bucket_in(layout, backend, dtype=torch.float32, **options):
    """A bucket over one weight of this layout, the weight, and its matrices as users see them."""
    kind, shape, strides = LAYOUTS[layout]
    weight = strided(shape, strides, dtype)
    module, selection = module_with(kind, weight)
    bucket = bucket_of(module, backend, **options, **selection)
    assert bucket.plan.tensors[0].data_ptr() == weight.data_ptr()
    return bucket, weight, matrices_of(kind, weight)


def oriented(bucket, i, matrix):
    """The matrix, or its transpose if the bucket iterates with that."""
    return matrix.mT if bucket.plan.layouts[i].side == "left" else matrix


def logical(bucket, i, v):
    """Vector of matrix ``i`` in the order of the columns that users see, float64."""
    how, v = bucket.plan.layouts[i], bucket.state.columns(i, v)
    return (v if how.side == "left" else how.to_logical(v))[0].double()
