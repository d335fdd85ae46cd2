"""Surgery on the optimizer's state and groups."""

import copy
import math
import warnings
from collections import defaultdict

import torch
from torch import nn

from ..forked import Failed
from .refusals import reasons
from .steps import Bits, check_refusal
from .subject import WAYS, Subject, is_readable


class OnState:
    """Operations on the optimizer of ``subject``."""

    subject: Subject
    saved: tuple | None  # state_dict of the optimizer and of the regularizer

    def clear_state(self, how: str, name: str) -> None:
        """Forget the state: "clear", "new" (another dict), or of one parameter: "pop", "empty"."""
        optimizer, p = self.subject.optimizer, self.subject.held[name]
        if how == "clear":
            optimizer.state.clear()
        elif how == "new":
            optimizer.state = defaultdict(dict)
        elif how == "pop":
            optimizer.state.pop(p, None)
        else:
            optimizer.state[p] = {}

    def replace_moment(self, name: str, which: int, how: str) -> None:
        """Replace a moment by another tensor.

        Args:
            name: of the parameter.
            which: which of its moments.
            how: "zeros", "copy", "dtype" (another one), "rows" (one more), "fewer" (one row fewer),
                "strides" (those of the transposed), "expanded" (one element), "negative" (the
                negative bit), "gone" (deleted), "weight" (the weight's memory), "moment" (that of
                another moment of the parameter), "freed".
        """
        subject, p = self.subject, self.subject.held[name]
        kept = subject.moments(p)
        if not kept or (how == "freed" and subject.is_attached):  # which torch alone reads
            return
        keys = sorted(kept)
        key = keys[which % len(keys)]
        if how == "gone":
            del subject.optimizer.state[p][key]
            return
        other = kept[keys[(which + 1) % len(keys)]] if how == "moment" else kept[key]
        if not is_readable(other):
            return
        subject.optimizer.state[p][key] = self._other_moment(p, other, how)

    def _other_moment(self, p, old, how: str) -> torch.Tensor:
        subject = self.subject
        if how == "zeros":
            return torch.zeros_like(subject.empty(old.shape, old.dtype))
        if how == "copy":
            return subject.empty(old.shape, old.dtype, old.stride()).copy_(old)
        if how == "dtype":
            other = torch.float64 if old.dtype == torch.float32 else torch.float32
            return subject.empty(old.shape, other).copy_(old)
        if how in ("rows", "fewer"):
            rows = max(0, old.shape[0] + (1 if how == "rows" else -1))
            return subject.values((rows, *old.shape[1:]), old.dtype).abs_()
        if how == "strides":
            strides = torch.empty(old.shape[::-1], device="meta").stride()[::-1]
            return subject.empty(old.shape, old.dtype, strides).copy_(old)
        if how == "expanded":
            return subject.empty((1,) * old.dim(), old.dtype).fill_(0.5).expand(old.shape)
        if how == "negative":
            return torch._neg_view(subject.empty(old.shape, old.dtype).copy_(-old))
        if how == "freed":
            moment = old.detach().clone()
            moment.untyped_storage().resize_(0)
            return moment
        return old if how == "moment" else p.detach().view_as(p)

    def change_step(self, name: str, how: str) -> None:
        """Delete the step count of a parameter ("gone"), or replace AdamW's: "zero", "late"."""
        state = self.subject.optimizer.state.get(self.subject.held[name], {})
        if "step" not in state:
            return
        if how == "gone":
            del state["step"]
        elif "Adam" in self.subject.setting.way:  # torch's SGD has none
            state["step"] = torch.tensor(0.0 if how == "zero" else 1000.0)

    def change_options(self, group: int, lr: float, strength, as_tensor: bool) -> None:
        """Change learning rate and strength."""
        subject, groups = self.subject, self.subject.optimizer.param_groups
        given = torch.tensor(lr, dtype=torch.float64) if as_tensor else lr
        groups[group % len(groups)]["lr"] = given
        subject.strength = strength
        if as_tensor and not isinstance(strength, dict):
            strength = torch.tensor(strength, dtype=torch.float64)
        subject.readings.strength = strength

    def change_momentum(self, group: int, momentum: float) -> None:
        """Change SGD's momentum or AdamW's first beta, of one group."""
        groups = self.subject.optimizer.param_groups
        own = groups[group % len(groups)]
        if "betas" in own:
            own["betas"] = (momentum, own["betas"][1])
        elif not own["nesterov"]:
            own["momentum"] = momentum

    def change_groups(self, how: str, name: str, other: str) -> None:
        """Change ``param_groups``.

        Args:
            how: "exchange" the places of two parameters, "reverse" the groups, "reorder" the
                parameters in each, "replace" a group by a copy with another lr, "merge" all into
                the first, "add" one with a new parameter, "remove" a parameter from its group.
            name: of a parameter.
            other: of another one.
        """
        subject, groups = self.subject, self.subject.optimizer.param_groups
        a, b = subject.held[name], subject.held[other]
        if how == "exchange":
            turned = {id(a): b, id(b): a}
            for group in groups:
                group["params"] = [turned.get(id(p), p) for p in group["params"]]
        elif how == "reverse":
            groups.reverse()
        elif how == "reorder":
            for group in groups:
                group["params"].reverse()
        elif how == "replace":
            groups[0] = {**groups[0], "lr": 0.03}
        elif how == "merge":
            groups[0]["params"] += [p for group in groups[1:] for p in group["params"]]
            del groups[1:]
        elif how == "add":
            new = nn.Parameter(subject.values((3, 4), a.dtype))
            subject.optimizer.add_param_group({"params": [new], "lr": 0.05})
        elif how == "remove":
            for group in groups:
                group["params"] = [p for p in group["params"] if p is not a]
            subject.optimizer.state.pop(a, None)  # which torch's state_dict would not expect

    def zero_grad(self, set_to_none: bool) -> None:
        """Call the optimizer's ``zero_grad``."""
        if not set_to_none and any("gradient" in r for own in reasons(self.subject).values()
                                   for r in own):  # fmt: skip
            return  # torch cannot write to all of them
        self.subject.optimizer.zero_grad(set_to_none=set_to_none)

    # -------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Save the states of the optimizer and the regularizer."""
        self.saved = self._states() or self.saved

    def _states(self) -> tuple[dict, dict] | None:
        """Return copies of both states, or None where there is a reason to refuse it."""
        subject = self.subject
        if subject.has_freed():
            return None
        try:
            states = subject.optimizer.state_dict(), subject.regularizer.state_dict()
        except (ValueError, RuntimeError) as error:
            check_refusal(reasons(subject), error)
            return None
        return copy.deepcopy(states)

    def load(self, which: str) -> None:
        """Load a checkpoint.

        Args:
            which: the "own" one that was saved, one of "torch", or the present one with a "moment"
                or the "vectors" of a parameter in another shape.
        """
        subject = self.subject
        if subject.has_freed():
            return
        if which == "own":
            if self.saved is None:
                return
            found, vectors = copy.deepcopy(self.saved)
        elif (states := self._states()) is not None:
            found, vectors = states
        else:
            return
        if which == "torch":
            found = self._of_torch()
        wrong = self._cut(found, vectors, which) if which in ("moment", "vectors") else None
        bits = Bits(subject)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # without vectors in the checkpoint
                subject.optimizer.load_state_dict(copy.deepcopy(found))
                if subject.is_attached:
                    subject.regularizer.load_state_dict(vectors)
        except Exception as error:
            self._check_refused_load(found, vectors, wrong, bits, error)
            return
        if wrong is not None and which == "vectors":
            raise Failed(f"vectors of {wrong} in another shape were loaded without an error")
        self._check_loaded(found)

    def _of_torch(self) -> dict:
        """Return the state_dict of torch's optimizer after a step."""
        subject = self.subject
        kind = torch.optim.AdamW if "Adam" in subject.setting.way else torch.optim.SGD
        groups = []
        for group in subject.optimizer.param_groups:
            own = [nn.Parameter(p.detach().clone()) for p in group["params"]]
            for p in own:
                p.grad = torch.randn_like(p)
            groups.append({"params": own, "lr": group["lr"]})
        torchs = kind(groups, **WAYS[subject.setting.way][1])
        torchs.step()
        return torchs.state_dict()

    def _cut(self, found: dict, vectors: dict, which: str) -> str | None:
        """Give one entry of a checkpoint another shape; return the name of its parameter."""
        subject = self.subject
        if which == "vectors" and subject.is_attached:
            name = next(iter(vectors["vectors"]))
            vectors["vectors"][name] = torch.ones(1, 99)
            return name
        names = {i: n for i, n in enumerate(subject.tracked())}
        keys = {"vectors": ("spectral_vectors",)}
        for i, state in found["state"].items():
            for key in keys.get(which, ("exp_avg", "momentum_buffer")):
                if isinstance(state.get(key), torch.Tensor):
                    state[key] = torch.ones(*state[key].shape[:-1], 99).to(state[key])
                    return names.get(i, "?")
        return None

    def _check_refused_load(self, found, vectors, wrong, bits: Bits, error: Exception) -> None:
        subject, said = self.subject, f"{type(error).__name__}: {error}"
        sizes = [len(g["params"]) for g in found["param_groups"]]
        if sizes != [len(g["params"]) for g in subject.optimizer.param_groups]:
            return  # torch refuses it
        without_step = any(x and "step" not in x for x in found["state"].values())
        if subject.is_attached and isinstance(error, KeyError) and without_step:
            return  # so does torch's AdamW, whose error it is
        if not isinstance(error, ValueError | RuntimeError):
            raise Failed(f"load_state_dict failed: {said}") from error
        misfits = {wrong, *self._misfits(found)} - {None}
        if subject.is_attached:  # whose vectors may be those of the shapes in the last step
            misfits |= {name for name, v in vectors["vectors"].items()
                        if v.shape[-1] != math.prod(subject.get(name).shape[1:])}  # fmt: skip
        if not any(name in str(error) for name in misfits):
            raise Failed(f"load_state_dict was refused, but no parameter that does not fit "
                         f"({misfits}) is named: {said}")  # fmt: skip
        if not subject.is_attached and (changes := bits.changes(False)):
            raise Failed(f"load_state_dict was refused after changes: {changes}\n{said}")

    def _misfits(self, found) -> set[str]:
        """Return the parameters whose entries have another shape than they have now."""
        names, misfits = dict(enumerate(self.subject.tracked().items())), set()
        for i, state in found["state"].items():
            name, p = names.get(i, ("?", None))
            for key, x in state.items():
                if key in ("exp_avg", "exp_avg_sq", "momentum_buffer") and x is not None:
                    misfits |= {name} if p is not None and x.shape != p.shape else set()
                if key.startswith("spectral_vectors") and p is not None:
                    n = math.prod(p.shape[1:])
                    misfits |= {name} if x.shape[-1] != n else set()
        return misfits

    def _check_loaded(self, found) -> None:
        """Check that state and options are those of the checkpoint."""
        subject = self.subject
        for i, (name, p) in enumerate(subject.tracked().items()):
            saved = found["state"].get(i, {})
            now = subject.optimizer.state.get(p, {})
            for key in ("exp_avg", "exp_avg_sq", "momentum_buffer", "step"):
                x, y = saved.get(key), now.get(key)
                if x is None or (key == "step" and "Adam" not in subject.setting.way):
                    continue
                if y is None or not torch.equal(y.double(), x.to(y.dtype).double()):
                    raise Failed(f"after load_state_dict {key} of {name} is not the saved one")
        for group, saved in zip(subject.optimizer.param_groups, found["param_groups"], strict=True):
            for key in ("lr", "betas", "momentum", "weight_decay"):
                if key in saved and saved[key] != group[key]:
                    raise Failed(f"after load_state_dict {key} is {group[key]}, not {saved[key]}")
