"""How far a kernel may be from the truth in float64.

A kernel is judged against PyTorch's own code in the dtype of the state: it may be half again as
wrong, plus a floor for the cases in which PyTorch happens to be exact (in float64, where truth and
comparison are one and the same, always).
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

    ``of`` is what errors are relative to, for sums whose terms cancel.
    """
    state_dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    error, allowed = relative_error(value, truth, of), relative_error(same_dtype, truth, of)
    floor = 8 * EPSILON[state_dtype] if state_dtype == torch.float32 else 64 * EPSILON[state_dtype]
    assert error <= 1.5 * allowed + floor, f"{what}: error {error:.2e}, PyTorch's {allowed:.2e}"
