"""The penalty as a torch.autograd.Function."""

from __future__ import annotations

import torch

from ..backends.reference import differentiable_penalty
from ..selection import transforms
from ..sharding import shards
from .attach import mark_backward
from .bucket import Bucket
from .model_buckets import ModelBuckets


class SpectralPenalty(torch.autograd.Function):
    """The sum of strength * R over all matrices and elementwise parameters, exact given v.

    The forward pass runs the power iterations, whose vectors count as constants. The backward pass
    returns strength * dR/dW at the vectors of its own forward pass, even if others ran in between.
    """

    @staticmethod
    def forward(ctx, buckets: ModelBuckets, iterations: int, *weights: torch.Tensor):
        """Run the power iterations of every bucket and return the penalty, 0-d.

        Args:
            ctx: context of the backward pass.
            buckets: the buckets of the weights, bound.
            iterations: number of power iterations.
            weights: all parameters, bucket by bucket.
        """
        total = None
        ctx.parts, ctx.buckets, ctx.is_idle = [], buckets, []
        for bucket in buckets.buckets:
            ctx.is_idle += [i in bucket.idle for i in range(len(bucket.plan.refs))]
            bucket.advance(iterations)
            state = bucket.state.snapshot()
            ctx.parts.append((bucket, state))
            value = bucket.value(state)
            bucket.settle(iterations)
            total = value if total is None else total + value.to(total.device)
        ctx.save_for_backward(*weights)
        return total

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        """Return upstream * strength * dR/dW for every weight that requires a gradient.

        Those whose strength is the number 0 get none, as if they were excluded.
        """
        weights = list(ctx.saved_tensors)
        needed = [
            wanted and not is_idle
            for wanted, is_idle in zip(ctx.needs_input_grad[2:], ctx.is_idle, strict=True)
        ]
        mark_backward(ctx.buckets, [w for w, wanted in zip(weights, needed, strict=True) if wanted])
        if torch.is_grad_enabled():
            return None, None, *_differentiable(ctx.parts, weights, needed, upstream)
        with ctx.buckets.lock:
            return None, None, *_gradients(ctx.parts, weights, needed, upstream)


def _gradients(parts, weights, needed, upstream) -> list[torch.Tensor | None]:
    """Return upstream * strength * dR/dW for every weight that is ``needed``."""
    grads: list[torch.Tensor | None] = []
    for bucket, state in parts:
        own = slice(len(grads), len(grads) + len(bucket.plan.refs))
        local = [shards.local_of(weight) for weight in weights[own]]
        if not bucket.plan.bind_weights(local):
            raise RuntimeError(
                f"{_changed(bucket, local)} has another shape, dtype, device or layout than when "
                "penalty() was called; call backward() before such a change"
            )
        fresh = [
            torch.empty_like(weight) if wanted else None
            for weight, wanted in zip(local, needed[own], strict=True)
        ]
        bucket.plan.bind_grads(fresh)
        state.set_scale(upstream)
        bucket.add_gradient(state, fresh, accumulate=False)
        grads += [
            None if grad is None else shards.like(weight, grad)
            for weight, grad in zip(weights[own], fresh, strict=True)
        ]
    return grads


def _changed(bucket: Bucket, tensors: list[torch.Tensor]) -> str:
    """Return the name of the first parameter that does not fit the tables of ``bucket``."""
    plan = bucket.plan
    for i, (now, before) in enumerate(zip(tensors, plan.tensors, strict=True)):
        same = (now.shape, now.stride()) == (before.shape, before.stride())
        if not same or (now.dtype, now.device) != (plan.dtype, plan.device):
            return plan.name(i)
    return plan.name(0)


def _differentiable(parts, weights, needed, upstream):
    """Return the same gradients, with a graph that autograd can differentiate again."""
    total, start = 0, 0
    for bucket, state in parts:
        _check_unsharded(
            bucket, "second derivatives of its penalty", "backward() without create_graph"
        )
        own = weights[start : start + len(bucket.plan.refs)]
        total = total + differentiable_penalty(bucket.plan, state, own).to(upstream.device)
        start += len(own)
    chosen = [w for w, wanted in zip(weights, needed, strict=True) if wanted]
    if not chosen:
        return [None] * len(weights)
    found = iter(torch.autograd.grad(total, chosen, upstream, create_graph=True))
    return [next(found) if wanted else None for wanted in needed]


def _check_unsharded(bucket: Bucket, what: str, instead: str) -> None:
    if bucket.is_sharded:
        raise RuntimeError(
            f"parameter {bucket.plan.refs[0].name!r} is sharded, and {what} are not supported; "
            f"use {instead}"
        )


def penalty(model_buckets: ModelBuckets, iterations: int) -> torch.Tensor:
    """Return the penalty of all buckets, 0-d: differentiable, or evaluated in no-grad mode."""
    if transforms.is_active():
        return _transformed(model_buckets, iterations)
    buckets = model_buckets.bound()
    if torch.is_grad_enabled():
        model_buckets.searches.count(buckets)
        weights = [tensor for bucket in buckets for tensor in bucket.parameters]
        return SpectralPenalty.apply(model_buckets, iterations, *weights)
    values = [bucket.value(bucket.evaluated()) for bucket in buckets]
    return sum((v.to(values[0].device) for v in values[1:]), values[0])


def _transformed(model_buckets: ModelBuckets, iterations: int) -> torch.Tensor:
    """Return the penalty by operations of PyTorch, which every transform can differentiate.

    The power iterations use the plain values of the weights.
    """
    model_buckets.follow()
    weights, iterates = model_buckets.tensors(), torch.is_grad_enabled()
    parts = []
    with transforms.suspended():
        named = zip(model_buckets.refs, weights, strict=True)
        buckets = model_buckets.bound([transforms.value_of(o.name, w) for o, w in named])
        for bucket in buckets:
            _check_unsharded(bucket, "transforms of torch.func", "penalty() outside of them")
        for bucket in buckets:
            if iterates:
                bucket.advance(iterations)
                parts.append(bucket.state.snapshot())
                bucket.settle(iterations)
            else:
                parts.append(bucket.evaluated())
    values = [
        differentiable_penalty(
            bucket.plan, state, [w.detach() if i in bucket.idle else w for i, w in enumerate(own)]
        )
        for (bucket, own), state in zip(model_buckets.with_tensors(weights), parts, strict=True)
    ]
    return sum((v.to(values[0].device) for v in values[1:]), values[0])
