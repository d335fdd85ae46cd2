"""What a step may refuse, and what it must: from what the tensors are at this moment."""

import torch

from .. import guarded
from .subject import KINDS, NAMES, Subject, is_readable

# Memory that torch does not read either: a step must refuse it.
FREED = "storage shorter than the tensor"
REPLACED = "replaced in its module"


def reasons(subject: Subject) -> dict[str, list[str]]:
    """Return why a step may be refused, by the name of the parameter that may be named."""
    found: dict[str, list[str]] = {}
    tracked = subject.tracked()
    for name, p in tracked.items():
        own = [*_of_weight(name, p), *_of_grad(p), *_of_state(subject, p)]
        if own:
            found[name] = own
    for name in NAMES:
        p = subject.get(name)
        if subject.kind(name) is not None and p.dim() != len(subject.shapes[name]):
            found.setdefault(name, []).append("weight: another number of dimensions")
        if p is not tracked.get(name):
            found.setdefault(name, []).append(REPLACED)
            if subject.kind(name) is not None:  # else no step touches it
                found[name] += [*_of_weight(name, p), *_of_grad(p)]
    for name, reason in _shared(subject, tracked):
        found.setdefault(name, []).append(reason)
    return found


def must(subject: Subject, found: dict[str, list[str]]) -> list[str]:
    """Return the reasons for which a step must be refused, whatever torch does."""
    has = [f"{n}: {r}" for n, own in found.items() if _acts(subject, n)
           for r in own if r.endswith(FREED)]  # fmt: skip
    tracked, strengths = subject.tracked(), subject.strengths()
    if subject.is_attached:
        # The gradient is written before torch's step sees it.
        has += [f"{n}: {r}" for n, own in found.items()
                if subject.kind(n) is not None and subject.get(n).requires_grad and strengths[n]
                for r in own if r == "gradient: another shape"]  # fmt: skip
    return has + [
        f"{n}: {REPLACED}" for n in NAMES
        if subject.kind(n) is not None and subject.get(n) is not tracked.get(n, subject.get(n))
    ]  # fmt: skip


def is_named(error: Exception, found: dict[str, list[str]]) -> bool:
    """Return whether an error names a parameter that has a reason.

    The optimizers know no name of a parameter that they were not built with, and say "?".
    """
    return any(
        name in str(error) or ((name not in KINDS or REPLACED in own) and "?" in str(error))
        for name, own in found.items()
    )


def _acts(subject: Subject, name: str) -> bool:
    """Return whether a step changes a parameter."""
    p = subject.stepped().get(name)
    if p is None:
        return False
    return p.grad is not None or (subject.kind(name) is not None and p.requires_grad)


def _of_tensor(tensor: torch.Tensor, what: str) -> list[str]:
    found = []
    if tensor.is_neg():
        found.append(f"{what}: negative bit")
    if not is_readable(tensor):
        found.append(f"{what}: {FREED}")
    return found


def _of_weight(name: str, p: torch.Tensor) -> list[str]:
    found = _of_tensor(p, "weight")
    if torch.empty_like(p, device="meta").stride() != p.stride():
        found.append("weight: gaps, or elements that share memory")
    elif not p.is_contiguous():
        is_transposed = p.dim() == 2
        is_channels_last = p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
        if not is_transposed and not is_channels_last:
            found.append("weight: neither its rows nor its columns are contiguous")
    return found


def _of_grad(p: torch.Tensor) -> list[str]:
    grad = p.grad
    if grad is None:
        return []
    found = _of_tensor(grad, "gradient")
    if grad.shape != p.shape:
        found.append("gradient: another shape")
    elif grad.stride() != p.stride():
        found.append("gradient: other strides")
    if grad.dtype != p.dtype:
        found.append("gradient: another dtype")
    return found


def _of_state(subject: Subject, p: torch.Tensor) -> list[str]:
    found, state, kept = [], subject.optimizer.state.get(p, {}), subject.moments(p)
    wide = subject.setting.wide_moments and p.dtype.itemsize == 2
    dtype = torch.float32 if wide else p.dtype
    for name, moment in kept.items():
        found += _of_tensor(moment, name)
        if moment.shape != p.shape:
            found.append(f"{name}: another shape")
        elif moment.stride() != p.stride():
            found.append(f"{name}: other strides")
        if moment.dtype != dtype:
            found.append(f"{name}: another dtype")
    if "Adam" in subject.setting.way and state:
        names = "exp_avg", "exp_avg_sq", "step"
        present = [name for name in names if name in state]
        if present:
            found += [f"{name} is missing" for name in names if name not in state]
    return found


def _shared(subject: Subject, tracked):
    """Yield (name, reason) of every parameter that has memory in common with another tensor."""
    pieces, seen = [], set()
    own = {**{f"{n} in its module": subject.get(n) for n in NAMES}, **tracked}
    for name, p in own.items():
        if id(p) in seen:
            continue
        seen.add(id(p))
        name = name.removesuffix(" in its module")
        for what, tensor in (("weight", p), ("gradient", p.grad), *subject.moments(p).items()):
            if tensor is None or tensor.numel() == 0:
                continue
            n = guarded.reach(tensor.shape, tensor.stride()) * tensor.itemsize
            pieces.append((tensor.data_ptr(), tensor.data_ptr() + n, name, what))
    pieces.sort()
    for i, (_, end, name, what) in enumerate(pieces):
        for start, _, other, other_what in pieces[i + 1 :]:
            if start >= end:
                break
            reason = f"{what}: memory in common with {other_what} of {other}"
            yield name, reason
            yield other, reason
