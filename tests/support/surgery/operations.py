"""Surgery on a subject: each method of :class:`Surgery` is one operation."""

import torch

from ..forked import Failed
from . import steps
from .on_parameters import OnParameters
from .on_state import OnState
from .refusals import REPLACED, reasons
from .subject import NAMES, Setting, Subject, is_readable


class Surgery(OnParameters, OnState):
    """A subject, made by :meth:`build`, and what is done to it between steps."""

    def build(self, **setting) -> None:
        """Make the subject."""
        self.subject, self.saved, self.given = Subject(Setting(**setting)), None, set()

    def step(self, without, fresh: bool, size: float) -> str:
        """Take a step, and repair what it refuses; return how it ended.

        Args:
            without: names of parameters without a gradient.
            fresh: whether trainable parameters get new gradients; otherwise ``.grad`` stays.
            size: of the gradients.
        """
        subject = self.subject
        if fresh:
            for name, p in subject.tracked().items():
                if name in self.given:
                    continue
                p.grad = None
                if name not in without and p.requires_grad:
                    strides = torch.empty_like(p, device="meta").stride()
                    p.grad = subject.values(p.shape, p.dtype, strides, size)
        outcome = steps.take(subject)
        if outcome != "taken":
            again = steps.take(subject)
            if again.partition(":")[0] != outcome.partition(":")[0]:
                raise Failed(f"refused once ({outcome}), and then {again}")
            self._repair()
        for name in self.given:
            subject.get(name).grad = None
        self.given.clear()
        self._keep_small()
        return outcome

    def _repair(self) -> None:
        """Do what a refusal asks for: plain parameters and gradients, moments that fit."""
        subject = self.subject
        for _ in range(3):  # a weight of another shape makes moments that do not fit
            for name, found in reasons(subject).items():
                if name in NAMES:
                    self._repair_one(name, " ".join(found))
                    continue
                if "gradient" in " ".join(found):
                    subject.tracked()[name].grad = None
                if any(reason.startswith(("exp_avg", "momentum_buffer")) for reason in found):
                    subject.optimizer.state.pop(subject.tracked()[name], None)
        if left := reasons(subject):
            raise AssertionError(f"not repaired: {left}")

    def _repair_one(self, name: str, found: str) -> None:
        subject, p = self.subject, self.subject.get(name)
        if REPLACED in found:
            p = subject.first[name]
            subject.put(name, p)
            held = subject.held[name]
            if subject.tracked().get(name) is not p:
                for group in subject.optimizer.param_groups:
                    group["params"] = [x for x in group["params"] if x is not p and x is not held]
                subject.optimizer.state.pop(held, None)
                subject.optimizer.param_groups[0]["params"].append(p)
                subject.held[name] = p
        if "weight" in found:
            is_like_first = p.dim() == len(subject.shapes[name])
            shape = p.shape if is_like_first else subject.shapes[name]
            p.data = subject.values(shape, p.dtype, size=0.5)
        if "gradient" in found:
            p.grad = None
        if any(word in found for word in ("exp_avg", "momentum_buffer", "step is")):
            subject.optimizer.state.pop(p, None)

    def _keep_small(self) -> None:
        """Bring weights that the penalty or the steps have made large back."""
        subject = self.subject
        for p in subject.tracked().values():
            if p.numel() and is_readable(p) and not float(p.detach().abs().max()) < 20:
                with torch.no_grad():
                    p.copy_(subject.values(p.shape, p.dtype, size=0.3))

    def look(self, what: str) -> None:
        """Read something between steps; it may be refused like a step, and changes nothing.

        Args:
            what: "state_dict", "sigma", "report", "metrics", "repr", "vectors" or "penalty".
        """
        subject, found, bits = self.subject, reasons(self.subject), steps.Bits(self.subject)
        readings, regularizer = subject.readings, subject.regularizer
        calls = {
            "state_dict": subject.optimizer.state_dict, "sigma": lambda: readings.sigma,
            "report": readings.report, "metrics": readings.metrics,
            "repr": regularizer.__repr__, "vectors": regularizer.state_dict,
            "penalty": torch.no_grad()(regularizer.penalty),
        }  # fmt: skip
        try:
            calls[what]()
        except Exception as error:
            steps.check_refusal(found, error)
        if changes := bits.changes():
            raise Failed(f"{what} has changed something: {', '.join(changes)}")

    def penalize(self, between: str | None, name: str) -> None:
        """Take ``penalty()`` and its gradient, if there is nothing to refuse.

        Args:
            between: what happens to a parameter between forward and backward: None, "smaller"
                (through ``.data``), "freed", or "dtype".
            name: of the parameter.
        """
        subject = self.subject
        if reasons(subject):
            return
        steps.penalize(subject, lambda: self._between(between, name), between is not None)
        for p in subject.tracked().values():
            p.grad = None
        self.given.clear()

    def _between(self, what: str | None, name: str) -> None:
        p = self.subject.get(name)
        if what == "smaller":
            p.data = p.data[: len(p) // 2].clone()
        elif what == "freed":
            self.free_storage(name, offset=3, keep=False)
        elif what == "dtype":
            p.data = p.data.to(torch.float64 if p.dtype == torch.float32 else torch.float32)
