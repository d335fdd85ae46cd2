"""The model and the optimizer that surgery is done on."""

from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD
from spectral_kernels.backends import choice
from spectral_kernels.backends.base import Reference
from spectral_kernels.backends.native import Cpu
from spectral_kernels.tables.native import native_module

from .. import guarded

BACKENDS = [name for name in ("cpu", "reference") if choice.unavailable(name) is None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
ADAMW, SGD = {"weight_decay": 0.1, "eps": 1e-6}, {"weight_decay": 0.05}
WAYS = {
    "SpectralAdamW": (SpectralAdamW, ADAMW),
    "SpectralSGD": (SpectralSGD, SGD),
    "SpectralSGD, momentum": (SpectralSGD, {**SGD, "momentum": 0.9, "dampening": 0.25}),
    "SpectralSGD, nesterov": (SpectralSGD, {**SGD, "momentum": 0.8, "nesterov": True}),
    "AdamW, attached": (torch.optim.AdamW, ADAMW),
    "SGD, attached": (torch.optim.SGD, {**SGD, "momentum": 0.9}),
}
# What the penalty does to each parameter: "matrix", "shift", "gain", or None.
KINDS = {
    "emb.weight": None,
    "lin.weight": "matrix", "lin.bias": "shift",
    "norm.weight": "gain", "norm.bias": "shift",
    "conv.weight": "matrix", "conv.bias": "shift",
    "column.weight": "matrix", "row.weight": "matrix",
    "frozen.weight": "matrix",
}  # fmt: skip
NAMES = list(KINDS)


@dataclass(frozen=True)
class Setting:
    """What is built.

    Attributes:
        way: a key of WAYS.
        sizes: two widths, the rows and the columns of the embedding table.
        dtype: of the parameters, a key of DTYPES.
        wide_moments: whether ``state_dtype`` is float32.
        decoupled: whether the penalty acts beside the rule.
        groups: number of parameter groups.
        n_vectors: per matrix.
        exponent, tau, strength: of the penalty.
        backend: one of BACKENDS.
        at_end: whether tensors lie at the end of their memory regions, not at the beginning.
        threads: of torch and the kernels.
    """

    way: str = "SpectralAdamW"
    sizes: tuple[int, int, int, int] = (5, 7, 6, 3)
    dtype: str = "float32"
    wide_moments: bool = False
    decoupled: bool = False
    groups: int = 1
    n_vectors: int = 1
    exponent: float = 2
    tau: float = 1.0
    strength: float = 0.1
    backend: str = BACKENDS[0]
    at_end: bool = True
    threads: int = 1


class _Recorder:
    """Keeps the vectors from which a backend computes each matrix's gradient.

    ``vectors`` has, by the matrix's name, v [N] in the parameter's own order, and whether it is a
    left vector.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.vectors: dict[str, tuple[torch.Tensor, bool]] = {}

    def update(self, step) -> None:
        if step.plan is not None:
            self._record(step.plan, step.state)
        super().update(step)

    def rank_one(self, plan, state, grads, accumulate: bool) -> None:
        super().rank_one(plan, state, grads, accumulate)
        self._record(plan, state)

    def _record(self, plan, state) -> None:
        for i, (matrix, layout) in enumerate(zip(plan.matrices, plan.layouts, strict=True)):
            v = state.columns(i, state.v)[:1].double()
            is_left = layout.side == "left"
            self.vectors[matrix.name] = (v if is_left else layout.to_logical(v))[0].clone(), is_left


class RecordingCpu(_Recorder, Cpu):
    """The C++ backend."""


class RecordingReference(_Recorder, Reference):
    """The reference."""


def recording(backend: str):
    """Return backend "cpu" or "reference" as one that keeps ``vectors``."""
    return RecordingCpu(native_module().cpu) if backend == "cpu" else RecordingReference()


class Model(nn.Module):
    """A parameter of every kind; there is no forward pass, gradients are random."""

    def __init__(self, sizes):
        super().__init__()
        a, b, rows, cols = sizes
        self.emb = nn.Embedding(rows, cols)
        self.lin = nn.Linear(a, b)
        self.norm = nn.LayerNorm(b)
        self.conv = nn.Conv2d(1 + a % 5, 1 + b % 7, (3, 2))
        self.column = nn.Linear(1, b, bias=False)
        self.row = nn.Linear(a, 1, bias=False)
        self.frozen = nn.Linear(a, cols, bias=False).requires_grad_(False)


class Subject:
    """Model, optimizer and regularizer.

    ``held`` are the Parameter objects that the optimizer was given, by name; the model may have
    others by now. ``first`` are those at construction.
    """

    def __init__(self, setting: Setting):
        torch.set_num_threads(setting.threads)
        self.setting = setting
        self.generator = torch.Generator().manual_seed(0)
        self.is_attached = setting.way.endswith("attached")
        self.model = Model(setting.sizes)
        for name in NAMES:
            p = self.get(name)
            p.data = self.values(p.shape, DTYPES[setting.dtype], size=1.5 / p.shape[-1] ** 0.5)
        self.held = {name: self.get(name) for name in NAMES}
        self.first = dict(self.held)
        self.shapes = {name: p.shape for name, p in self.held.items()}
        self.strength: float | dict[str, float] = setting.strength
        self.recorder = recording(setting.backend)
        kind, options = WAYS[setting.way]
        penalty = {
            "strength": setting.strength, "exponent": setting.exponent, "target": setting.tau,
            "n_vectors": setting.n_vectors, "backend": self.recorder,
        }  # fmt: skip
        names = [NAMES[i :: setting.groups] for i in range(setting.groups)]
        groups = [{"params": [self.held[name] for name in own], "lr": 0.01 * (1 + i)}
                  for i, own in enumerate(names)]  # fmt: skip
        if self.is_attached:
            self.optimizer = kind(groups, **options)
            self.regularizer = SpectralRegularizer(self.model, **penalty)
            self.regularizer.attach(self.optimizer)
        else:
            wide = torch.float32 if setting.wide_moments else None
            self.optimizer = kind(groups, **options, **penalty, model=self.model,
                                  decoupled=setting.decoupled, state_dtype=wide)  # fmt: skip
            self.regularizer = self.optimizer.regularizer

    def get(self, name: str) -> nn.Parameter:
        """Return the model's present parameter of this name."""
        return self.model.get_parameter(name)

    def put(self, name: str, parameter: nn.Parameter) -> None:
        """Replace a parameter in its module."""
        module, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(module), attribute, parameter)

    def kind(self, name: str) -> str | None:
        """Return what the penalty does to a parameter of this name, or None.

        One that is frozen at first is selected once it is not.
        """
        if name != "frozen.weight" or self.get(name).requires_grad:
            return KINDS.get(name)
        names = [matrix.ref.name for matrix in self.regularizer._selection.matrices]
        return KINDS[name] if name in names else None

    def strengths(self) -> dict[str, float]:
        """Return the strength of every parameter."""
        if not isinstance(self.strength, dict):
            return dict.fromkeys(NAMES, self.strength)
        patterns = self.strength.items()
        return {n: next(x for pattern, x in patterns if fnmatch(n, pattern)) for n in NAMES}

    def empty(self, shape, dtype: torch.dtype, strides=None) -> torch.Tensor:
        """Return a tensor in a memory region of its own; contiguous without ``strides``."""
        if strides is None:
            strides = torch.empty(shape, device="meta").stride()
        return guarded.empty(shape, strides, dtype, self.setting.at_end)

    def values(self, shape, dtype: torch.dtype, strides=None, size: float = 1.0) -> torch.Tensor:
        """Return random numbers in a memory region of their own."""
        random = size * torch.randn(tuple(shape), generator=self.generator)
        return self.empty(shape, dtype, strides).copy_(random)

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy in a memory region of its own."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor.detach())

    def tracked(self) -> dict[str, nn.Parameter]:
        """Return the parameters that a step is about: all of the groups, by name."""
        names = {id(p): name for name, p in self.held.items()}
        return {
            names.get(id(p), f"group {i}, place {j}"): p
            for i, group in enumerate(self.optimizer.param_groups)
            for j, p in enumerate(group["params"])
        }

    def stepped(self) -> dict[str, nn.Parameter]:
        """Return the parameters whose step is compared: the model's if the penalty is attached."""
        return {name: self.get(name) for name in NAMES} if self.is_attached else self.tracked()

    @property
    def readings(self):
        """Return what has sigma."""
        return self.regularizer if self.is_attached else self.optimizer

    def moments(self, p: nn.Parameter) -> dict[str, torch.Tensor]:
        """Return the moments in the optimizer's state of ``p``."""
        names = ("exp_avg", "exp_avg_sq", "momentum_buffer")
        state = self.optimizer.state.get(p, {})
        return {n: state[n] for n in names if isinstance(state.get(n), torch.Tensor)}

    def has_freed(self) -> bool:
        """Return whether a weight, gradient or moment cannot be read: torch crashes at it."""
        every = (*self.tracked().values(), *(self.get(name) for name in NAMES))
        return not all(
            is_readable(x) for p in every for x in (p, p.grad, *self.moments(p).values())
            if x is not None
        )  # fmt: skip

    def tensors(self) -> list[torch.Tensor]:
        """Return every weight, gradient and moment that can be read."""
        found = {}
        for p in (*self.tracked().values(), *(self.get(name) for name in NAMES)):
            for tensor in (p, p.grad, *self.moments(p).values()):
                if tensor is not None and is_readable(tensor):
                    found[id(tensor)] = tensor
        return list(found.values())


def is_readable(tensor: torch.Tensor) -> bool:
    """Return whether the storage is as long as the elements of ``tensor`` reach."""
    n = guarded.reach(tensor.shape, tensor.stride())
    n += tensor.storage_offset() if n else 0
    return n * tensor.itemsize <= tensor.untyped_storage().nbytes()
