"""Tolerances of kernels against float64.

The error of a kernel may be 1.5 times that of PyTorch's own code in the dtype of the state, plus a
floor for the cases in which PyTorch happens to be exact (in float64 always, where it is the truth).
"""

import torch

EPSILON = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def relative_error(value: torch.Tensor, truth: torch.Tensor, of=None) -> float:
    """Largest deviation over the largest magnitude of the truth, or of ``of``."""
    if truth.numel() == 0:
        return 0.0
    scale = (
        (truth if of is None else of)
        .double()
        .abs()
        .max()
        .clamp(min=torch.finfo(torch.float64).tiny)
    )
    return float((value.double() - truth.double()).abs().max() / scale)


def assert_as_good(value, same_dtype, truth, what: str, of=None) -> None:
    """Assert that ``value`` is about as close to ``truth`` as PyTorch's ``same_dtype`` result.

    Errors are relative to ``of``, if given, for sums whose terms cancel.
    """
    state_dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    error, allowed = relative_error(value, truth, of), relative_error(same_dtype, truth, of)
    floor = 8 * EPSILON[state_dtype] if state_dtype == torch.float32 else 64 * EPSILON[state_dtype]
    assert error <= 1.5 * allowed + floor, f"{what}: error {error:.2e}, PyTorch's {allowed:.2e}"
