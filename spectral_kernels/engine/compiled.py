"""The penalty as custom operators (``torch.ops.spectral_kernels``) in graphs of torch.compile.

Eager calls go straight to a backend: for a small model, torch's dispatcher takes as long to pass
the parameters as the kernels take. A graph needs operators: every tensor that one reads or writes
is an argument, and those it writes are marked as mutated, so that the compiler keeps the order.
Tables and backend are not tensors: an operator finds them by the number of the regularizer's
``ModelBuckets`` and a bucket's index. Small buckets need none but ``settle``: see ``traced``.

This module is imported at the first trace, because its imports from torch take a second.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..selection.changes import Follower
from ..tables.device import fill
from ..tables.state import State
from .attach import mark_backward, once
from .bucket import Bucket
from .model_buckets import ModelBuckets
from .traced import step

_LIBRARY = torch.library.Library("spectral_kernels", "DEF")
# cudagraph_unsafe keeps the operators out of the CUDA graphs of mode="reduce-overhead": a replay
# does not compare addresses with tensors; power_iteration mutates v, v_next, s and scalars, inputs
# that the graph does not own, which inductor does not record; and each recording, of which inductor
# may make many without an eager step between them, would take spare tables (see tables/device.py).
# Tagged operators run eagerly between the recorded parts of the graph. A graph that a user captures
# (torch.cuda.graph) may contain them.
# needs_exact_strides: inputs have the strides that were traced.
_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.needs_exact_strides)


def _bucket(number: int, index: int, weights: list[Tensor]) -> Bucket:
    """Return a bucket whose tables point at ``weights``, one per parameter."""
    buckets = ModelBuckets.by_number.get(number)
    if buckets is None:
        raise RuntimeError(
            "the SpectralRegularizer whose penalty() was compiled is gone; keep it until after "
            "backward()"
        )
    found = (buckets.buckets or ())[index : index + 1]
    if not found or not found[0].bind(weights):
        raise RuntimeError(
            "the parameters have another device, dtype, shape or layout than when penalty() was "
            "compiled, or than in its forward pass. They may change between two steps; torch up to "
            "2.11 does not recompile for other strides: call torch.compiler.reset() there"
        )
    return found[0]


def power_iteration(
    weights: list[Tensor], v: Tensor, v_next: Tensor, s: Tensor, scalars: Tensor,
    strength: Tensor | None, number: int, index: int, iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run power iterations from ``v_next``; return the penalty and what its gradient needs.

    Args:
        weights: the parameters of the bucket; constants for differentiation.
        v: [sum of r * N], overwritten with the vectors of the last iteration.
        v_next: [sum of r * N], the vectors to start from; overwritten with the next ones.
        s: [sum of r * M], overwritten.
        scalars: ``State.scalars``; all but strength and target are overwritten.
        strength: 0-d, replaces all strengths, or None.
        number: number of the ``ModelBuckets``.
        index: index of the bucket among them.
        iterations: number of iterations, 1 or more.

    Returns:
        The sum of strength * R, 0-d; copies of v, s and scalars after the last iteration.

    Raises:
        RuntimeError: the bucket is gone or does not fit ``weights``.
    """
    bucket, buffers = _bucket(number, index, weights), (v, v_next, s, scalars)
    if strength is not None:
        own = State(bucket.plan, *buffers, bucket.state.exponent).check_sizes().strength
        fill(own, strength)
        bucket.leave_out_frozen(own)
    if not bucket.warm:
        _iterate(bucket, buffers, ModelBuckets.by_number[number].settings.warmup)
        bucket.warm = True
    value = _iterate(bucket, buffers, iterations)
    torch.autograd.graph.increment_version(buffers)  # kernels write to addresses
    return value, v.clone(), s.clone(), scalars.clone()


def _iterate(bucket: Bucket, buffers: tuple[Tensor, ...], n: int) -> Tensor:
    """Run ``n`` power iterations on v, v_next, s and scalars, and return the penalty.

    ``v`` is then the one that s was computed from.
    """
    v, v_next, *others = buffers
    if n % 2:  # every iteration swaps them
        v.copy_(v_next)
        v, v_next = v_next, v
    own = bucket.state
    bucket.state = State(bucket.plan, v, v_next, *others, own.exponent).check_sizes()
    try:
        bucket.advance(n)
        return bucket.value(bucket.state)
    finally:
        bucket.state = own


def _power_iteration_fake(weights, v, v_next, s, scalars, strength, number, index, iterations):
    return scalars.new_empty(()), *map(torch.empty_like, (v, s, scalars))


def settle(weights: list[Tensor], found: Tensor, wanted: Tensor, number: int, index: int) -> Tensor:
    """Return what power iterations in plain PyTorch arrive at, warmed up if that is needed.

    Args:
        weights: the parameters of the bucket; constants for differentiation.
        found: v, s, scalars and v_next after the iterations, flat.
        wanted: 0-d; if it is false, a copy of ``found`` is all there is to do.
        number: number of the ``ModelBuckets``.
        index: index of the bucket among them.

    Raises:
        RuntimeError: the bucket is gone or does not fit ``weights``.
    """
    if not wanted:
        return found.clone()
    bucket = _bucket(number, index, weights)
    plan, own = bucket.plan, bucket.state
    sizes = plan.v_size, plan.s_size, sum(plan.scalar_sizes), plan.v_size
    v, s, scalars, v_next = (part.clone() for part in found.split(sizes))
    bucket.state = State(plan, v, v_next, s, scalars, own.exponent).check_sizes()
    try:
        if bucket.warm:
            bucket.recover()
        else:  # it does not matter which of the iterations are called the warm-up
            bucket.iterate(bucket.warmup)
        bucket.warm = bucket.measured = True
        bucket.traceable.unsettled.fill_(False)
        return torch.cat((bucket.state.v, s, scalars, bucket.state.v_next))
    finally:
        bucket.state = own


def _settle_fake(weights, found, wanted, number, index):
    return torch.empty_like(found)


def mark(upstream: Tensor, number: int) -> Tensor:
    """Return ``upstream``; leave a mark that a gradient of the penalty goes into ``.grad``."""
    if (buckets := ModelBuckets.by_number.get(number)) is not None:
        _mark(buckets)
    return upstream.clone()


def _mark_fake(upstream, number):
    return torch.empty_like(upstream)


def _mark(buckets: ModelBuckets) -> None:
    # A graph may pass other objects for the parameters.
    mark_backward(buckets, [p for own, tensors in buckets.with_tensors()
                            for i, p in enumerate(tensors) if i not in own.idle])  # fmt: skip


def evaluate(
    weights: list[Tensor], v_next: Tensor, scalars: Tensor, strength: Tensor | None,
    number: int, index: int,
) -> Tensor:  # fmt: skip
    """Return the penalty at ``v_next``, 0-d, and change nothing; see ``power_iteration``."""
    bucket = _bucket(number, index, weights)
    v, v_next = torch.empty_like(v_next), v_next.clone()
    s, scalars = torch.empty_like(bucket.state.s), scalars.clone()
    state = State(bucket.plan, v, v_next, s, scalars, bucket.state.exponent).check_sizes()
    if strength is not None:
        fill(state.strength, strength)
        bucket.leave_out_frozen(state.strength)
    if not bucket.warm:
        _iterate(bucket, (v, v_next, s, scalars), ModelBuckets.by_number[number].settings.warmup)
    return bucket.value(bucket.evaluated(state))


def _evaluate_fake(weights, v_next, scalars, strength, number, index):
    return scalars.new_empty(())


def penalty(
    weights: list[Tensor], value: Tensor, v: Tensor, s: Tensor, scalars: Tensor,
    number: int, index: int,
) -> Tensor:  # fmt: skip
    """Return ``value``, the penalty that ``power_iteration`` has returned, 0-d.

    This operator carries the gradient: exact in ``weights``, given v.
    """
    return value.clone()


def _penalty_fake(weights, value, v, s, scalars, number, index):
    return torch.empty_like(value)


def penalty_backward(
    weights: list[Tensor], v: Tensor, s: Tensor, scalars: Tensor, upstream: Tensor,
    wanted: list[bool], number: int, index: int,
) -> list[Tensor]:  # fmt: skip
    """Return upstream * strength * dR/dW of the ``wanted`` weights."""
    bucket = _bucket(number, index, weights)
    _mark(ModelBuckets.by_number[number])
    state = State(bucket.plan, v, None, s, scalars, bucket.state.exponent).check_sizes()
    grads = [torch.empty_like(w) if x else None for w, x in zip(weights, wanted, strict=True)]
    state.set_scale(upstream)
    bucket.plan.bind_grads(grads)
    bucket.add_gradient(state, grads, accumulate=False)
    return [grad for grad in grads if grad is not None]


def _penalty_backward_fake(weights, v, s, scalars, upstream, wanted, number, index):
    return [torch.empty_like(w) for w, x in zip(weights, wanted, strict=True) if x]


def _setup_context(ctx, inputs, output):
    weights, _, v, s, scalars, ctx.number, ctx.index = inputs
    ctx.save_for_backward(v, s, scalars, *weights)


def _backward(ctx, upstream):
    v, s, scalars, *weights = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[0])
    grads = torch.ops.spectral_kernels.penalty_backward(
        weights, v, s, scalars, upstream, wanted, ctx.number, ctx.index
    )
    found = iter(grads)
    return [next(found) if x else None for x in wanted], *[None] * 6


def _define(schema: str, kernel, fake, number: int = -2) -> None:
    """Define the operator ``kernel``; ``number`` is the place of its argument of that name."""

    @functools.wraps(kernel)
    def one_at_a_time(*args):
        buckets = ModelBuckets.by_number.get(args[number])
        with contextlib.nullcontext() if buckets is None else buckets.lock:
            return kernel(*args)

    name = kernel.__name__
    _LIBRARY.define(name + schema, tags=_TAGS)
    _LIBRARY.impl(name, one_at_a_time, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spectral_kernels::{name}", fake, lib=_LIBRARY)


_WHERE = "SymInt number, int index"
_define(
    "(Tensor[] weights, Tensor(a!) v, Tensor(b!) v_next, Tensor(c!) s, Tensor(d!) scalars, "
    f"Tensor? strength, {_WHERE}, int iterations) -> (Tensor, Tensor, Tensor, Tensor)",
    power_iteration,
    _power_iteration_fake,
    number=-3,
)
_define(
    f"(Tensor[] weights, Tensor found, Tensor wanted, {_WHERE}) -> Tensor",
    settle,
    _settle_fake,
)
_define("(Tensor upstream, SymInt number) -> Tensor", mark, _mark_fake, number=-1)
_define(
    f"(Tensor[] weights, Tensor v_next, Tensor scalars, Tensor? strength, {_WHERE}) -> Tensor",
    evaluate,
    _evaluate_fake,
)
_define(
    f"(Tensor[] weights, Tensor value, Tensor v, Tensor s, Tensor scalars, {_WHERE}) -> Tensor",
    penalty,
    _penalty_fake,
)
_define(
    "(Tensor[] weights, Tensor v, Tensor s, Tensor scalars, Tensor upstream, bool[] wanted, "
    f"{_WHERE}) -> Tensor[]",
    penalty_backward,
    _penalty_backward_fake,
)
torch.library.register_autograd(
    "spectral_kernels::penalty", _backward, setup_context=_setup_context, lib=_LIBRARY
)
# The vectors are constants for differentiation, and so is a penalty that is only evaluated.
for _name in ("power_iteration", "settle", "evaluate"):
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")


# ------------------------------------------------------------------------------- what is traced

torch.compiler.assume_constant_result(ModelBuckets.ready_to_trace)
torch.compiler.allow_in_graph(step)  # there would be a guard for every function that it calls


@torch.compiler.disable(
    reason="spectral_kernels: graphs can contain only penalty() of parameters that are not sharded;"
    " with fullgraph=True, call this outside of the compiled function"
)
def outside(function: Callable, *args, **kwargs):
    """Call ``function`` eagerly, between two graphs."""
    return function(*args, **kwargs)


def has_changed(follower: Follower) -> bool:
    """Return ``follower.has_changed()``, in a form that the compiler guards: then it retraces."""
    for edge in follower.edges:
        if edge.parent._modules.get(edge.key) is not edge.child:
            return True
    return any(ref.module._parameters[ref.attribute].requires_grad for ref in follower.frozen)


def traced_penalty(buckets: ModelBuckets, iterations: int, strength: Tensor | None) -> Tensor:
    """Return the penalty of all buckets, 0-d, as ``autograd.penalty`` does, in a traced function.

    The buckets must be ready to trace and not sharded. The compiler guards every attribute read
    here and retraces when one changes, so none of them may change from step to step.
    """
    own, number, total = torch.ops.spectral_kernels, buckets.number, None
    if buckets.selection.follower is not None and has_changed(buckets.selection.follower):
        raise RuntimeError(
            "the model has changed while penalty() was compiled; change it between two calls"
        )
    for index, (bucket, weights) in enumerate(buckets.with_tensors()):
        state, where = bucket.state, (number, index)
        if torch.is_grad_enabled() and bucket.traceable is not None and not bucket.extra_iterations:
            value = _plain(bucket, weights, strength, iterations, *where)
        elif torch.is_grad_enabled():
            found = own.power_iteration(
                weights, state.v, state.v_next, state.s, state.scalars, strength, *where, iterations
            )
            if bucket.idle:
                weights = [w.detach() if i in bucket.idle else w for i, w in enumerate(weights)]
            value = own.penalty(weights, *found, *where)
        else:
            value = own.evaluate(weights, state.v_next, state.scalars, strength, *where)
        total = value if total is None else total + value.to(total.device)
    return total


def _plain(bucket, weights, strength, iterations, number, index) -> Tensor:
    """Return the penalty of a traceable bucket, as ``traced.step`` does."""
    form, state = bucket.traceable, bucket.state
    trained = tuple([w.requires_grad and i not in bucket.idle for i, w in enumerate(weights)])
    if strength is not None:
        strength = strength.detach().to(state.scalars).expand(form.n_entries).clone()
        bucket.leave_out_frozen(strength)
    return step(
        form.key, iterations, number, index, trained, once.adds_in_steps, strength,
        state.v, state.v_next, state.s, state.scalars, form.ratios, form.options, form.unsettled,
        *weights,
    )  # fmt: skip
