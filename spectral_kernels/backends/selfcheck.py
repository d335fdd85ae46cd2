"""Checks of a backend, and of an optimizer's steps with it, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..selection.matrices import Elementwise, refs_of
from ..selection.parameters import ParameterRef
from ..selection.rules import select
from ..tables import device as device_tables
from ..tables.plan import Plan
from ..tables.state import Ratios, State
from . import formulas, operators, reference
from .base import Backend, Reference

# (M, N): short and long rows that allow vector loads, rows that do not, several tiles, and several
# tiles together with several chunks.
SHAPES = ((70, 192), (5, 2048), (130, 31), (3, 9000))
KERNELS = (
    (nn.Conv2d, (20, 70, 3), {"bias": False}),
    (nn.Conv2d, (3, 5, 7), {"bias": False, "stride": 2}),
    (nn.Conv1d, (160, 9, 4), {"bias": False}),
    (nn.Conv3d, (2, 3, (2, 3, 2)), {"bias": False}),
)
EXPONENT, STRENGTH, TARGET = 2.0, 0.5, 0.7


def disagreement(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    r: int = 1,
    operators: bool = False,
) -> str | None:
    """Return how ``backend`` differs from the reference on ``device``, or None if it agrees.

    Runs two power iterations with ``r`` vectors per matrix, or of ``operators`` of convolutions
    instead of matrices, at random weights; after the first, the penalty's gradient is added to
    gradients and written over others. torch's random state does not change. Calls every method of a
    Backend but ``update``, for which there is :func:`step_disagreement`. Synchronizes the device.
    """
    model = small_model(device, dtype, operators)
    return _difference(lambda own: _steps(model, own, r), backend)


def _difference(steps: Callable, backend, dtype: torch.dtype | None = None, when: str = ""):
    """Return how the tensors that ``steps(backend)`` returns by name differ from the reference's.

    Sums are in another order, then each side rounds once: to the tensor's dtype, or to ``dtype``.
    """
    try:
        found = steps(backend)
    except Exception as error:  # any error of a compiler or driver
        return f"{type(error).__name__}: {error}"
    truth = steps(Reference())
    for name, own in found.items():
        expected = truth[name].double()
        unit = max(2 * torch.finfo(dtype or own.dtype).eps, 1e-4)
        error, size = (own.double() - expected).abs().max(), expected.abs().max()
        if not error <= unit * size:  # NaN is a disagreement
            return f"{name} is wrong by {float(error / size):.1e} of its size{when}"
    return None


def small_model(device: torch.device, dtype: torch.dtype, convolutions: bool = False) -> nn.Module:
    """Return a model with matrices of SHAPES, or KERNELS, frozen, the same at every call."""

    def fresh(kind, *sizes, **given):
        return nn.utils.skip_init(kind, *sizes, **given, device=device, dtype=dtype)

    if convolutions:
        layers = [fresh(kind, *sizes, **given) for kind, sizes, given in KERNELS]
    else:
        layers = [*(fresh(nn.Linear, n, m) for m, n in SHAPES), fresh(nn.LayerNorm, 40)]
    model = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            values = torch.randn(p.shape, generator=generator, device="cpu") / p.shape[-1] ** 0.5
            p.copy_(values)
    return model.requires_grad_(False)


def _more_elementwise(model: nn.Module) -> list[Elementwise]:
    """Return short and long rows, a shift and a gain with targets of their own."""
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(2)
    found = []
    for name, kind, shape in (
        ("short rows", "rows", (300, 9)), ("long rows", "rows", (3, 700)),
        ("a shift", "shift", (1, 70)), ("a gain", "gain", (70, 1)),
    ):  # fmt: skip
        x = torch.randn(shape, generator=generator, device="cpu") / shape[1] ** 0.5
        ref = ParameterRef(name, None, name, x.to(like))
        found.append(Elementwise(name, ref, kind, shape[1], TARGET))
    return found


def _steps(model: nn.Module, backend, r: int) -> dict[str, torch.Tensor]:
    """Return the results of two iterations, by name."""
    selection = select(model, trainable_only=False, convolutions="operator")
    elementwise = []  # operators have a plan of their own
    if not any(matrix.periods for matrix in selection.matrices):
        elementwise = [*selection.elementwise, *_more_elementwise(model)]
    refs = refs_of(selection.matrices, elementwise)
    tensors = [ref.get() for ref in refs]
    plan = Plan(selection.matrices, elementwise, tensors, r)
    state = State.allocate(plan, EXPONENT)
    state.strength.fill_(STRENGTH)
    state.target.fill_(TARGET)
    generator = torch.Generator().manual_seed(1)
    for i, layout in enumerate(plan.layouts):
        x = torch.randn(plan.r, layout.cols, generator=generator, dtype=torch.float64, device="cpu")
        if plan.operators is None:
            v = formulas.orthonormal_rows(x)
        else:
            taps = reference.taps(plan, i)
            v = operators.projected(x.to(plan.device).view(2, -1, taps.n), taps).flatten(1)
        state.columns(i, state.v).copy_(v)
    grads = [0.1 * t.flip(0) for t in tensors]
    plan.bind_grads(grads)
    backend.gram_matvec(plan, state)
    backend.finish(plan, state, grads, True)
    made = {"sigma": state.sigma.clone(), "the residual": state.residual.clone(),
            "the penalty": state.raw_penalty.clone()}  # fmt: skip
    if r == 1:
        made["the next v"] = state.v_next.clone()
    made.update({f"the gradient of {ref.name}": grad
                 for ref, grad in zip(refs, grads, strict=True)})  # fmt: skip
    written = [torch.full_like(t, torch.nan) for t in tensors]
    plan.bind_grads(written)
    backend.rank_one(plan, state, written, False)
    made.update({f"the gradient of {ref.name}, written over": grad
                 for ref, grad in zip(refs, written, strict=True)})  # fmt: skip
    state.swap()
    backend.gram_matvec(plan, state)
    # The calls for sharded weights: W^T s again, and sums over the tiles.
    t = torch.full_like(state.v, torch.nan)
    n = plan.r
    gram = plan.gram_partial.new_full((len(plan.matrices) * n * n,), torch.nan)
    for parts in (plan.t_partial, plan.gram_partial):
        parts.fill_(torch.nan)
    backend.transposed(plan, state)
    backend.collect(plan, state, t, gram)
    made["the collected s^T s"] = gram.view(-1, n, n).diagonal(dim1=1, dim2=2).sum(1)
    if r == 1:
        made["the collected t"] = t
    backend.normalize(plan, state)
    if device_tables.shares_memory(plan.device) and not backend.scalars_on_device:
        ratios = Ratios(len(plan.matrices))
        found = [backend.jumps(state, ratios, 0.0, 1.0)]
        found.append(torch.allclose(ratios.values, reference.ratios_of(state).double()))
        ratios.values /= 2
        found.append(backend.jumps(state, ratios, 0.0, 1.0))
        made["what jumps"] = torch.tensor(found, dtype=torch.float32, device="cpu")
    sigmas = state.sigmas[: r * len(plan.matrices)]
    return {**made, "the next sigmas": sigmas}  # do not depend on the basis v_next


STEPS = 2
# Large enough that a step exceeds the rounding of a 16-bit weight, and that the sign of a gradient
# near zero does not decide AdamW's direction.
LR, EPS = 0.1, 0.1


def step_disagreement(
    optimizer: type, backend: str | Backend, device: torch.device, dtype: torch.dtype, r: int = 1
):
    """Return how the parameters or sigma differ after two steps with ``backend``, or None.

    torch's random state does not change. Synchronizes the device.

    Args:
        optimizer: SpectralAdamW or SpectralSGD.
        backend: the backend to check, or its name.
        device: device of the parameters.
        dtype: dtype of the parameters.
        r: singular vectors per matrix.
    """
    return _difference(
        lambda own: _optimizer_steps(optimizer, own, device, dtype, r), backend, dtype,
        " after two steps",
    )  # fmt: skip


def _optimizer_steps(optimizer: type, backend, device, dtype, r) -> dict[str, torch.Tensor]:
    model = small_model(device, dtype).requires_grad_(True)
    # The norm is held: it has targets of its own.
    target = {f"{len(SHAPES)}.*": "initial", "*": 1.0}
    own = optimizer(model, LR, strength=STRENGTH, target=target, backend=backend, n_vectors=r)
    for bucket in own._buckets.bound():
        bucket.warmup = 0  # from here on: that of replaced matrices would mend wrong products
    for group in own.param_groups:
        group.update({"eps": EPS} if "eps" in group else {"momentum": 0.9})
    for p in model.parameters():
        p.grad = p.detach().flip(0) * p.shape[-1] ** 0.5
    for _ in range(STEPS):
        own.step()
    return {**{name: p.detach() for name, p in model.named_parameters()}, "sigma": own.sigma}
