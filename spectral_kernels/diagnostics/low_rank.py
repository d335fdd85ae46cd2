"""Singular values of a product of two thin matrices, which is not formed."""

from __future__ import annotations

import torch


def product_singular_values(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return the singular values of B A: those of R_B R_A^T of the QR factors of B and A^T.

    Args:
        b: B [M, r].
        a: A [r, N].

    Returns:
        The min(M, N, r) largest ones, the largest first, float64; all others are zero. nan if an
        element is not finite.
    """
    b, a = b.double(), a.double()
    if not (bool(torch.isfinite(b).all()) and bool(torch.isfinite(a).all())):
        return b.new_full((min(b.shape[0], *a.shape),), torch.nan)
    left = torch.linalg.qr(b, mode="r").R
    right = torch.linalg.qr(a.T, mode="r").R
    return torch.linalg.svdvals(left @ right.T)
