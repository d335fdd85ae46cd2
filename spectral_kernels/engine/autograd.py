"""The penalty as a torch.autograd.Function."""

from __future__ import annotations

import torch

from ..backends.reference import differentiable_penalty
from ..sharding import shards
from .bucket import Bucket


class SpectralPenalty(torch.autograd.Function):
    """sum of strength * R over all matrices and elementwise parameters, exact given v.

    The forward pass runs the power iterations, which count as constants; the backward pass writes
    strength * dR/dW with the vectors of its own forward pass, whatever ran in between.
    """

    @staticmethod
    def forward(ctx, buckets: list[Bucket], iterations: int, *weights: torch.Tensor):
        """Advance every bucket and return the penalty, 0-d.

        Args:
            ctx: what the backward pass will find.
            buckets: what the weights belong to.
            iterations: power iterations to run.
            weights: the parameter of every parameter, bucket by bucket.
        """
        total = None
        ctx.parts = []
        for bucket in buckets:
            bucket.iterate(iterations)
            state = bucket.state.snapshot()
            ctx.parts.append((bucket, state))
            value = bucket.value(state)
            bucket.settle(iterations)
            total = value if total is None else total + value.to(total.device)
        ctx.save_for_backward(*weights)
        return total

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        """Return upstream * strength * dR/dW for every weight that requires a gradient."""
        weights = list(ctx.saved_tensors)
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_differentiable(ctx.parts, weights, needed, upstream)
        grads: list[torch.Tensor | None] = []
        for bucket, state in ctx.parts:
            own = slice(len(grads), len(grads) + len(bucket.plan.refs))
            local = [shards.local_of(weight) for weight in weights[own]]
            fresh = [
                torch.empty_like(weight) if wanted else None
                for weight, wanted in zip(local, needed[own], strict=True)
            ]
            state.set_scale(upstream)
            bucket.plan.bind_weights(local)
            bucket.plan.bind_grads(fresh)
            bucket.add_gradient(state, fresh, accumulate=False)
            grads += [
                None if grad is None else shards.like(weight, grad)
                for weight, grad in zip(weights[own], fresh, strict=True)
            ]
        return None, None, *grads


def _differentiable(parts, weights, needed, upstream):
    """Return the same gradients as functions that autograd can differentiate again."""
    total, start = 0, 0
    for bucket, state in parts:
        if bucket.is_sharded:
            raise RuntimeError(
                f"parameter {bucket.plan.owners[0].name!r} is sharded: of its penalty there are no "
                "second derivatives; call backward() without create_graph"
            )
        own = weights[start : start + len(bucket.plan.refs)]
        total = total + differentiable_penalty(bucket.plan, state, own).to(upstream.device)
        start += len(own)
    chosen = [w for w, wanted in zip(weights, needed, strict=True) if wanted]
    found = iter(torch.autograd.grad(total, chosen, upstream, create_graph=True))
    return [next(found) if wanted else None for wanted in needed]


def penalty(buckets: list[Bucket], iterations: int) -> torch.Tensor:
    """Return the penalty of all buckets, 0-d: differentiable, or only evaluated without grad."""
    if torch.is_grad_enabled():
        weights = [tensor for bucket in buckets for tensor in bucket.parameters]
        return SpectralPenalty.apply(buckets, iterations, *weights)
    values = [bucket.value(bucket.evaluated()) for bucket in buckets]
    return sum((v.to(values[0].device) for v in values[1:]), values[0])
