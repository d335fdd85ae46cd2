"""Do two steps of an optimizer agree with the reference's here? On the problem of self_check.py."""

from __future__ import annotations

import torch

from .self_check import small_model

STRENGTH, STEPS = 0.5, 2
# So large that a step is more than the rounding of a 16-bit weight, and that the sign of a gradient
# near zero does not decide about AdamW's direction.
LR, EPS = 0.1, 0.1


def disagreement(
    optimizer: type, backend: str, device: torch.device, dtype: torch.dtype, r: int = 1
):
    """Return how the parameters or sigma differ after two steps by ``backend``, or None.

    Without any effect on torch's random numbers. Waits for the device.

    Args:
        optimizer: SpectralAdamW or SpectralSGD.
        backend: name of the one to check.
        device: where.
        dtype: of the parameters.
        r: vectors per matrix.
    """
    try:
        found = _steps(optimizer, backend, device, dtype, r)
    except Exception as error:  # whatever a compiler or driver has to say
        return f"{type(error).__name__}: {error}"
    truth = _steps(optimizer, "reference", device, dtype, r)
    for name, own in found.items():
        expected = truth[name].double()
        # A step may be rounded to the parameter's type one way or the other.
        unit = max(2 * torch.finfo(dtype).eps, 1e-4)
        error, size = (own.double() - expected).abs().max(), expected.abs().max()
        if not error <= unit * size:  # NaN is a disagreement
            return f"{name} is wrong by {float(error / size):.1e} of its size after two steps"
    return None


def _steps(optimizer: type, backend: str, device, dtype, r) -> dict[str, torch.Tensor]:
    model = small_model(device, dtype).requires_grad_(True)
    own = optimizer(model, LR, strength=STRENGTH, backend=backend, n_vectors=r)
    for group in own.param_groups:
        group.update({"eps": EPS} if "eps" in group else {"momentum": 0.9})
    for p in model.parameters():
        p.grad = p.detach().flip(0) * p.shape[-1] ** 0.5
    for _ in range(STEPS):
        own.step()
    return {**{name: p.detach() for name, p in model.named_parameters()}, "sigma": own.sigma}
