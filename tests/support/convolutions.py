"""Convolutions of every kind, and the exact norms of the operators that they are."""

import torch
from torch import nn

# name -> (a module, the size of an image that it accepts)
KINDS = {
    "3x3": (lambda: nn.Conv2d(5, 7, 3, padding=1), (9, 9)),
    "many channels": (lambda: nn.Conv2d(40, 33, 3, padding=1), (6, 6)),
    "flat": (lambda: nn.Conv2d(4, 6, (1, 5), padding=(0, 2)), (3, 12)),
    "stride 2": (lambda: nn.Conv2d(3, 8, 7, stride=2, padding=3), (12, 12)),
    "strides": (lambda: nn.Conv2d(4, 4, (3, 4), stride=(2, 1), padding=1), (10, 8)),
    "dilated": (lambda: nn.Conv2d(4, 3, 3, dilation=2, padding=2), (10, 10)),
    "dilated by a stride": (lambda: nn.Conv2d(3, 4, 3, stride=2, dilation=2), (12, 12)),
    "groups": (lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), (8, 8)),
    "depthwise": (lambda: nn.Conv2d(5, 5, 5, groups=5, padding=2), (11, 11)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1), (6, 6)),
    "transposed by groups": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (6, 6)),
    "one dimension": (lambda: nn.Conv1d(6, 5, 9, padding=4), (24,)),
    "one channel": (lambda: nn.Conv1d(1, 1, 3, padding=1), (24,)),
    "three dimensions": (lambda: nn.Conv3d(3, 4, (3, 2, 3), padding=1), (5, 5, 5)),
    "three dimensions, stride 2": (lambda: nn.Conv3d(2, 4, 3, stride=(1, 2, 2)), (4, 7, 7)),
}
# Their operators are flattened kernels, or a row per group.
AS_MATRICES = {
    "1x1": (lambda: nn.Conv2d(5, 7, 1), (4, 4)),
    "patches": (lambda: nn.Conv2d(3, 8, 4, stride=4), (8, 8)),
    "1x1 transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (3, 3)),
}


def made(name, dtype=torch.float64, seed=0):
    """A convolution with random weights."""
    torch.manual_seed(seed)
    return {**KINDS, **AS_MATRICES}[name][0]().to(dtype)


def image_of(name):
    return {**KINDS, **AS_MATRICES}[name][1]


def matrix_on(conv, size):
    """The matrix that a convolution without its bias is, on images of a size."""
    zero = torch.zeros(1, conv.in_channels, *size, dtype=conv.weight.dtype)

    def linear(x):
        return (conv(x) - conv(zero)).flatten()

    with torch.no_grad():
        return torch.func.jacrev(linear)(zero).flatten(1)


def norm_on(conv, size):
    """The largest singular value of that matrix."""
    return float(torch.linalg.svdvals(matrix_on(conv, size))[0])


def phases_of(kernel, conv):
    """The kernels [M, C, taps...] of stride 1 whose channels together are those of ``kernel``.

    Output n sums K[p] x[s n + d p], so x falls into s images by position modulo s.
    """
    parts = kernel[:, :, None]
    for d, (stride, dilation) in enumerate(zip(conv.stride, conv.dilation, strict=True)):
        dim = 3 + d
        others = [n for e, n in enumerate(parts.shape[2:], 2) if e != dim]
        length = (parts.shape[dim] - 1) * dilation // stride + 1
        found = parts.new_zeros(*parts.shape[:2], stride, *others, length)
        for p in range(parts.shape[dim]):
            at, phase = p * dilation // stride, p * dilation % stride
            found[:, :, phase, ..., at] += parts.select(dim, p)
        parts = found.movedim(-1, dim + 1).flatten(2, 3)
    return parts.flatten(1, 2)


def norm_over_frequencies(kernel, conv, n=None):
    """The largest sigma_1 over ``n`` frequencies per dimension, by FFT, in float64."""
    parts = phases_of(kernel.detach().double(), conv)
    dims = tuple(range(2, parts.dim()))
    n = n or {1: 1024, 2: 96, 3: 24}[len(dims)]
    sizes = [n if parts.shape[d] > 1 else 1 for d in dims]
    spectrum = torch.fft.fftn(parts, s=sizes, dim=dims).flatten(2).permute(2, 0, 1)
    gram = spectrum @ spectrum.mH if parts.shape[0] < parts.shape[1] else spectrum.mH @ spectrum
    return float(torch.linalg.eigvalsh(gram)[:, -1].max().sqrt())


def kernels_of(conv):
    """The kernel of each group."""
    return conv.weight.detach().chunk(conv.groups)
