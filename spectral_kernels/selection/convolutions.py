"""Convolutions as the operators they are: which tap of a kernel meets which part of an image.

A kernel K [rows, channels, taps...] multiplies at the frequency theta, where it acts as a complex
matrix F(theta). The norm of the operator on an unbounded image is the maximum of sigma_1(F(theta))
over theta (Sedghi, Gupta and Long, "The Singular Values of Convolutional Layers", ICLR 2019).

With a stride, taps that differ by less than a period meet different elements of the image, as
channels of their own would: of a dimension, tap p is tap p // period of the phase p % period. A
dilation only scales frequencies. Where no two taps meet the same element, as in a kernel of one tap
or in one that is no larger than the stride, the operator has the singular values of the flattened
kernel. A transposed convolution is the adjoint of one.
"""

from __future__ import annotations

import math

import torch

from .arguments import check_word
from .layers import CONVOLUTIONS, TRANSPOSED
from .parameters import ParameterRef

CHOICES = ("flattened", "operator")
MOST_DIMENSIONS = 3  # of an image


def check_convolutions(convolutions) -> bool:
    """Return whether convolutions are to be operators; TypeError or ValueError if unknown."""
    return check_word("convolutions", convolutions, CHOICES) == "operator"


def periods_of(ref: ParameterRef, tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the period of each dimension of a kernel's taps, or None if it is no kernel.

    () if no two taps meet the same element: the operator then has the singular values of the matrix
    (dim 0, rest), of a transposed convolution too. Without its module, a parameter of three to five
    dimensions is the kernel of a convolution with stride 1 and one group.
    """
    module, sizes = ref.module, tuple(tensor.shape[2:])
    n = len(sizes)
    if not 1 <= n <= MOST_DIMENSIONS:
        return None
    if module is None:
        periods = (1,) * n
    elif isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and ref.attribute == "weight":
        periods = tuple(
            stride // math.gcd(stride, dilation)
            for stride, dilation in zip(module.stride, module.dilation, strict=True)
        )
    else:
        return None
    if all(size <= period for size, period in zip(sizes, periods, strict=True)):
        return ()
    return periods
