"""Vectors that the power iteration of a bucket starts from, and those to continue from."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..backends import reference
from ..backends.formulas import orthonormal, orthonormal_if_finite
from ..tables.layout import Layout
from .bucket import Bucket
from .operators import search_again


def left_of(bucket: Bucket) -> dict[str, torch.Tensor]:
    """Return copies of the left vectors [r, M] of matrices that are stored column by column."""
    state = bucket.state
    v = state.v if bucket.is_ahead else state.v_next
    return {
        matrix.name: state.columns(i, v).clone()
        for i, (matrix, layout) in enumerate(
            zip(bucket.plan.matrices, state.plan.layouts, strict=True)
        )
        if layout.side == "left"
    }


def right_of(bucket: Bucket) -> dict[str, torch.Tensor]:
    """Return copies of the right vectors [r, N], in logical order, of those that have some.

    Where matrices are stored column by column they are s, which is spread over ranks if these are
    sharded.
    """
    state, found = bucket.state, {}
    v_next = state.v if bucket.is_ahead else state.v_next
    for i, (matrix, layout) in enumerate(
        zip(bucket.plan.matrices, state.plan.layouts, strict=True)
    ):
        is_left = layout.side == "left"
        if is_left and bucket.is_sharded:
            continue
        v = orthonormal_if_finite(state.rows(i)) if is_left else state.columns(i, v_next)
        if v is not None:
            found[matrix.name] = layout.to_logical(v).clone()
    return found


def triplets_of(
    bucket: Bucket,
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return u [M], sigma (0-d) and v [N] of every matrix; see ``Readings.singular_vectors``."""
    state, found = bucket.state, {}
    sigmas = state.sigmas.view(state.plan.r, -1)
    for i, (matrix, layout) in enumerate(
        zip(bucket.plan.matrices, state.plan.layouts, strict=True)
    ):
        sigma, s, v = sigmas[:, i], state.rows(i), state.columns(i, bucket.v_of_s)
        if bucket.plan.operators is not None:
            sigma, v = sigma[0], layout.to_logical(v)
            u = torch.complex(
                *torch.where(sigma == 0, 0.0, s / torch.where(sigma == 0, 1.0, sigma))
            )
            found[matrix.name] = u, sigma, torch.complex(*v)
            continue
        u = torch.where(sigma == 0, 0.0, s.mT / torch.where(sigma == 0, 1.0, sigma)).mT
        left, right = (u, v) if layout.side == "right" else (v, u)
        three = left, sigma, layout.to_logical(right)
        found[matrix.name] = three if state.plan.r > 1 else tuple(x[0] for x in three)
    return found


@dataclass
class Start:
    """Vectors to start from, by name of the matrix.

    Attributes:
        seed: of random vectors; each matrix has its own stream, keyed by its name.
        n_vectors: per matrix, r.
        right: right singular vectors [r, N], in logical order.
        left: where matrices are stored column by column: v as it is, left vectors [r, M].
    """

    seed: int
    n_vectors: int
    right: Mapping[str, torch.Tensor] = field(default_factory=dict)
    left: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def write(self, bucket: Bucket) -> bool:
        """Write the vectors of ``bucket``; return whether all of them were known."""
        if bucket.plan.operators is not None:
            return self._write_operators(bucket)
        state, all_known = bucket.state, True
        for i, (matrix, layout) in enumerate(
            zip(bucket.plan.matrices, state.plan.layouts, strict=True)
        ):
            v = self._known(i, matrix.name, layout, bucket)
            if v is None or len(v) < self.n_vectors:
                all_known = False
                random = self._random(matrix.name, layout.cols)
                if layout.side == "right":
                    random = layout.from_logical(random)
                if v is not None:
                    random[: len(v)] = v
                v = orthonormal(random)
            bucket.put_vectors(i, v)
        return all_known

    def _write_operators(self, bucket: Bucket) -> bool:
        """Write the vectors of operators: unknown ones are the best on a grid of frequencies."""
        state, least = bucket.state, torch.full_like(bucket.state.sigma, torch.inf)
        for i, (matrix, layout) in enumerate(zip(bucket.matrices, state.plan.layouts, strict=True)):
            v = self.right.get(matrix.name)
            if v is not None and v.shape == (2, layout.cols):
                bucket.put_vectors(i, layout.from_logical(v.to(state.v)))
            else:
                least[i] = torch.nan
        if is_new := bool(least.isnan().any()):
            search_again(bucket, least)
            state.v.copy_(state.v_next)
        return not is_new

    def _known(self, i: int, name: str, layout: Layout, bucket: Bucket) -> torch.Tensor | None:
        """Return vectors [r, N] to start matrix ``i`` of ``bucket`` from, if some are known."""
        state, r = bucket.state, self.n_vectors
        if layout.side == "left":
            left = self.left.get(name)
            if left is not None and left.shape[-1] == layout.cols:
                return left[:r].to(state.v)
        v = self.right.get(name)
        n = layout.rows if layout.side == "left" else layout.cols
        if v is None or v.shape[-1] != n:
            return None
        v = layout.from_logical(v[:r].to(state.v))
        if layout.side == "right":
            return v
        if bucket.is_sharded:
            return None  # left vectors would need a sum over ranks
        return orthonormal_if_finite(v @ reference.matrix(bucket.plan, i))

    def _random(self, name: str, cols: int) -> torch.Tensor:
        # torch's CPU generator uses 32 bits of the seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
        shape = self.n_vectors, cols
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
