"""The penalty as operators of torch (``torch.ops.spectral_kernels``), for graphs of torch.compile.

Eager calls go straight to a backend: torch's dispatcher takes as long to pass the parameters of a
small model as its kernels take. A graph needs operators, though: all that one reads or writes is an
argument, and what it writes is marked, so that the compiler keeps the order. Tables and backend are
no tensors: it finds them by the number of the regularizer's ``ModelBuckets`` and a bucket's index.

This module is imported when a call is traced first: what it needs of torch takes a second to load.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..tables.device import fill
from ..tables.state import State
from .bucket import Bucket
from .model_buckets import ModelBuckets

_LIBRARY = torch.library.Library("spectral_kernels", "DEF")
# Why not in the CUDA graphs of mode="reduce-overhead": a replay compares no address with a tensor;
# power_iteration writes v, v_next, s and scalars, inputs that the graph does not own, and inductor
# records nothing that writes such; and each recording, of which inductor may make many without an
# eager step between them, would take spare tables of its own (see device_tables.py). What is
# tagged runs eagerly between two parts of the graph, and the parts are recorded. A graph that a
# user captures (torch.cuda.graph) may hold the operators.
# The strides of what comes in are those that were traced.
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
            "compiled, or than in its forward pass. Between two steps they may change; torch up to "
            "2.11 compiles nothing anew for other strides, call torch.compiler.reset() there"
        )
    return found[0]


def power_iteration(
    weights: list[Tensor], v: Tensor, v_next: Tensor, s: Tensor, scalars: Tensor,
    strength: Tensor | None, number: int, index: int, iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run power iterations from ``v_next``; return the penalty and what its gradient needs.

    Args:
        weights: the parameter of every parameter of the bucket; constants for differentiation.
        v: [sum of r * N], overwritten with what the last iteration has multiplied.
        v_next: [sum of r * N], where to start; then where to go on.
        s: [sum of r * M], overwritten.
        scalars: of the state, see there; all but strength and target are overwritten.
        strength: 0-d, written over all strengths, or None.
        number: of the ``ModelBuckets``.
        index: of the bucket among them.
        iterations: how many, 1 or more.

    Returns:
        Sum of strength * R, 0-d; copies of v, s and scalars as they are then.

    Raises:
        RuntimeError: the bucket is gone or does not go with ``weights``.
    """
    bucket, buffers = _bucket(number, index, weights), (v, v_next, s, scalars)
    if strength is not None:
        fill(State(bucket.plan, *buffers, bucket.state.exponent).strength, strength)
    if not bucket.warm:
        _iterate(bucket, buffers, ModelBuckets.by_number[number].settings.warmup)
        bucket.warm = True
    value = _iterate(bucket, buffers, iterations)
    torch.autograd.graph.increment_version(buffers)  # the kernels know addresses alone
    return value, v.clone(), s.clone(), scalars.clone()


def _iterate(bucket: Bucket, buffers: tuple[Tensor, ...], n: int) -> Tensor:
    """Run ``n`` power iterations on v, v_next, s and scalars, and return the penalty.

    After them, v is what has made s.
    """
    v, v_next, *others = buffers
    if n % 2:  # every iteration swaps them
        v.copy_(v_next)
        v, v_next = v_next, v
    own = bucket.state
    bucket.state = State(bucket.plan, v, v_next, *others, own.exponent)
    try:
        bucket.iterate(n)
        return bucket.value(bucket.state)
    finally:
        bucket.state = own


def _power_iteration_fake(weights, v, v_next, s, scalars, strength, number, index, iterations):
    return scalars.new_empty(()), *map(torch.empty_like, (v, s, scalars))


def evaluate(
    weights: list[Tensor], v_next: Tensor, scalars: Tensor, strength: Tensor | None,
    number: int, index: int,
) -> Tensor:  # fmt: skip
    """Return the penalty at ``v_next``, 0-d, and change nothing; arguments as above."""
    bucket = _bucket(number, index, weights)
    v, v_next = torch.empty_like(v_next), v_next.clone()
    s, scalars = torch.empty_like(bucket.state.s), scalars.clone()
    state = State(bucket.plan, v, v_next, s, scalars, bucket.state.exponent)
    if strength is not None:
        fill(state.strength, strength)
    if not bucket.warm:
        _iterate(bucket, (v, v_next, s, scalars), ModelBuckets.by_number[number].settings.warmup)
    return bucket.value(bucket.evaluated(state))


def _evaluate_fake(weights, v_next, scalars, strength, number, index):
    return scalars.new_empty(())


def penalty(
    weights: list[Tensor], value: Tensor, v: Tensor, s: Tensor, scalars: Tensor,
    number: int, index: int,
) -> Tensor:  # fmt: skip
    """Return the penalty, 0-d, of what ``power_iteration`` has returned, as ``value``.

    This is where its gradient comes in: exact in ``weights``, given v.
    """
    return value.clone()


def _penalty_fake(weights, value, v, s, scalars, number, index):
    return torch.empty_like(value)


def penalty_backward(
    weights: list[Tensor], v: Tensor, s: Tensor, scalars: Tensor, upstream: Tensor,
    wanted: list[bool], number: int, index: int,
) -> list[Tensor]:  # fmt: skip
    """Return upstream * strength * dR/dW of those weights that are ``wanted``."""
    bucket = _bucket(number, index, weights)
    state = State(bucket.plan, v, None, s, scalars, bucket.state.exponent)
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


def _define(schema: str, kernel, fake) -> None:
    name = kernel.__name__
    _LIBRARY.define(name + schema, tags=_TAGS)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spectral_kernels::{name}", fake, lib=_LIBRARY)


_WHERE = "SymInt number, int index"
_define(
    "(Tensor[] weights, Tensor(a!) v, Tensor(b!) v_next, Tensor(c!) s, Tensor(d!) scalars, "
    f"Tensor? strength, {_WHERE}, int iterations) -> (Tensor, Tensor, Tensor, Tensor)",
    power_iteration,
    _power_iteration_fake,
)
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
# The vectors are constants for differentiation, and so is what is only evaluated.
for _name in ("power_iteration", "evaluate"):
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")


# ------------------------------------------------------------------------------- what is traced

torch.compiler.assume_constant_result(ModelBuckets.ready_to_trace)


@torch.compiler.disable(
    reason="of spectral_kernels, graphs hold only penalty() of parameters that are not sharded; "
    "with fullgraph=True, call this outside of the compiled function"
)
def outside(function: Callable, *args, **kwargs):
    """Call ``function`` between two graphs."""
    return function(*args, **kwargs)


def traced_penalty(buckets: ModelBuckets, iterations: int, strength: Tensor | None) -> Tensor:
    """Return the penalty of all buckets, 0-d, as ``autograd.penalty`` does, in a traced function.

    They are ready to trace, and none is sharded. The compiler guards all that is read here and
    traces again where it has changed: what changes from step to step is no attribute among it.
    """
    own, number, total = torch.ops.spectral_kernels, buckets.number, None
    for index, (bucket, weights) in enumerate(buckets.with_tensors()):
        state, where = bucket.state, (number, index)
        if torch.is_grad_enabled():
            found = own.power_iteration(
                weights, state.v, state.v_next, state.s, state.scalars, strength, *where, iterations
            )
            value = own.penalty(weights, *found, *where)
        else:
            value = own.evaluate(weights, state.v_next, state.scalars, strength, *where)
        total = value if total is None else total + value.to(total.device)
    return total
