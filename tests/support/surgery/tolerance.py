"""How far a step may be from torch's in float64."""

import torch

from .oracle import Expected

# Of sums in the dtype of the state.
RELATIVE = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float64: 1e-12}


def apart(found, truth, noise, before=None, lr=None) -> str | None:
    """Return how ``found`` differs from ``truth`` by more than one rounding and the noise."""
    found = found.detach()
    allowed = 0.51 * torch.finfo(found.dtype).eps * truth.abs() + noise + 1e-37
    off = (found.double() - truth).abs()
    wrong = ~(off <= allowed) & ~(found.isnan() & truth.isnan())
    if not bool(wrong.any()):
        return None
    i = tuple(int(x) for x in wrong.nonzero()[0])
    text = (
        f"differs in {int(wrong.sum())} of {found.numel()} elements; at {i} it is "
        f"{float(found[i]):.9g}, torch's {float(truth[i]):.9g}, allowed {float(allowed[i]):.1e}"
    )
    if before is not None:
        moved, should = float(found[i]) - float(before[i]), float(truth[i] - before[i])
        text += f"; it moved by {moved:.4g} instead of {should:.4g} (lr {lr:g})"
    return text


class Noise:
    """Rounding errors to allow in a weight and its moments, beside one rounding of the result.

    The gradient with the penalty in it may be off by ``dg``; moments by ``relative``, and by a
    rounding of the dtype that they are kept in where they have another one before the step.
    """

    def __init__(self, expected: Expected, penalties, name: str, p: torch.Tensor):
        before, self.group, self.state = expected.before, expected.group(name), expected.state(name)
        relative, twin = RELATIVE[p.dtype], expected.twins[name].detach()
        g = expected.combined.get(name)
        self.g = torch.zeros_like(twin) if g is None else g.detach().abs()
        terms = penalties[name][1] if name in penalties else 0.0
        self.dg = relative * (terms + (float(self.g.max()) if p.numel() else 0.0))
        self.relative = relative + _conversion(before, name, p.dtype)
        self.old = {n: m.abs() for n, m in before.moments[False].get(name, {}).items()
                    if m.shape == twin.shape}  # fmt: skip
        self.weight = relative * twin.abs() + 4 * self.group["lr"] * self.dg
        if "exp_avg" in self.state:
            self._adamw()
        else:
            old = self.old.get("momentum_buffer", 0)
            self.weight = self.weight + 4 * self.group["lr"] * self.relative * (self.g + old)
            noise = self.relative * (old + self.g) + 2 * self.dg
            self.moments = {"momentum_buffer": noise}

    def _adamw(self) -> None:
        (beta1, beta2), n = self.group["betas"], float(self.state["step"])
        m1, m2 = self.state["exp_avg"].abs(), self.state["exp_avg_sq"]
        c1, c2 = 1 - beta1**n, 1 - beta2**n
        root = (m2 / c2).sqrt() + self.group["eps"]
        old1, old2 = (self.old.get(name, 0) for name in ("exp_avg", "exp_avg_sq"))
        # How the direction m1 / root moves with the gradient, by m1 and by the root.
        slope = (1 - beta1) / root + m1 / root**2 * ((1 - beta2) / c2) ** 0.5
        size = (old1 + self.g + m1) / root
        self.weight = self.weight + self.group["lr"] / c1 * (
            slope * self.dg + 2 * self.relative * size
        )
        self.moments = {
            "exp_avg": self.relative * (old1 + self.g) + self.dg,
            "exp_avg_sq": self.relative * (old2 + self.g**2) + 2 * self.g * self.dg + self.dg**2,
        }


def _conversion(before, name: str, dtype: torch.dtype) -> float:
    """Return the unit of the moments' dtype where they are converted to it, or 0."""
    own = torch.float32 if before.setting.wide_moments and dtype.itemsize == 2 else dtype
    given = [x.dtype for n, x in before.states[name].items()
             if isinstance(x, torch.Tensor) and n in before.moments[False][name]]  # fmt: skip
    return torch.finfo(own).eps if any(x != own for x in given) else 0.0
