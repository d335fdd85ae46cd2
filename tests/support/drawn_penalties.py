"""The penalty of weights of any shape, strides, dtype and size, against float64."""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from spectral_kernels import SpectralRegularizer

from . import guarded
from .forked import Failed
from .surgery.on_parameters import strides_of
from .surgery.subject import BACKENDS, recording
from .surgery.tolerance import RELATIVE, apart

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16,
          "float16": torch.float16}  # fmt: skip
STRENGTH, ITERATIONS = 0.3, 40


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        shape: of it; one dimension: a bias.
        dtype: a key of DTYPES.
        strides: "contiguous", "columns" (column by column, channels_last) or "gaps" (rows apart).
        content: "random", "separated" (each singular value half of the one before), "repeated" (all
            alike), "rank one", "zeros", or "nan" (one element).
        size: its largest singular value, about.
        cut: None, "splits" (into two) or "stacked" (a matrix per index of dim 0).
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    strides: str = "contiguous"
    content: str = "random"
    size: float = 1.0
    cut: str | None = None

    @property
    def is_cut(self) -> bool:
        """Whether it is more than one matrix: splits need an even number of rows."""
        if self.cut == "stacked":
            return len(self.shape) > 2 and self.shape[0] > 0
        return (
            self.cut == "splits" and len(self.shape) > 1 and self.shape[0] % 2 == 0 != self.shape[0]
        )

    def matrices(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the matrices of ``tensor``, shaped like this, by the suffix of their names."""
        if not self.is_cut:
            return {"": tensor.flatten(1)}
        parts = tensor.unbind(0) if self.cut == "stacked" else tensor.chunk(2)
        return {f"[{i}]": part.flatten(1) for i, part in enumerate(parts)}

    @property
    def may_be_refused(self) -> bool:
        """Whether its strides may be more than kernels can use in place."""
        if len(self.shape) == 1:
            return self.strides == "gaps"
        return self.strides != "contiguous" and (self.is_cut or len(self.shape) > 2)


@dataclass(frozen=True)
class Case:
    """A regularizer of some weights, and how it is used: ``way`` is "penalty" or "accumulate"."""

    weights: list[Weight]
    way: str = "penalty"
    exponent: float = 2
    target: float = 1.0
    n_vectors: int = 1
    n_power_iterations: int | str = 1
    biases: bool = True
    backend: str = BACKENDS[0]
    at_end: bool = True
    seed: int = 0
    names: list[str] = field(init=False)

    def __post_init__(self):
        names = [f"{i}.{'bias' if len(w.shape) == 1 else 'weight'}"
                 for i, w in enumerate(self.weights)]  # fmt: skip
        object.__setattr__(self, "names", names)


def values(weight: Weight, generator: torch.Generator) -> torch.Tensor:
    """Return float64 numbers for a weight; the matrix they form is (dim 0, rest)."""
    x = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    if x.numel() == 0 or x.dim() == 1 or weight.content == "zeros":
        return x * (0 if weight.content == "zeros" else weight.size / max(1, x.numel()) ** 0.5)
    flat = x.flatten(1)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    if weight.content == "separated":
        s = 0.5 ** torch.arange(len(s), dtype=s.dtype)
    elif weight.content == "repeated":
        s = torch.ones_like(s)
    elif weight.content == "rank one":
        s = (torch.arange(len(s)) == 0).to(s)
    else:
        s = s / s[0]
    found = (weight.size * (u * s) @ v).reshape(x.shape)
    if weight.content == "nan":
        found.view(-1)[found.numel() // 2] = torch.nan
    return found


class Penalties:
    """Checks a :class:`Case` at a time."""

    def check(self, case: Case) -> str:
        """Apply the penalty and compare it; return "taken" or "refused".

        Raises:
            Failed: something is not as it should be.
        """
        torch.set_num_threads(1 + case.seed % 2)
        self.case, self.generator = case, torch.Generator().manual_seed(case.seed)
        self.parameters = [nn.Parameter(self._placed(w)) for w in case.weights]
        self.truths = [p.detach().to(torch.float64, copy=True) for p in self.parameters]
        self.recorder = recording(case.backend)
        try:
            value, memory = self._apply()
        except ValueError as error:  # by the constructor or by the step
            refused = [n for n, w in zip(case.names, case.weights, strict=True)
                       if w.may_be_refused and n in str(error)]  # fmt: skip
            if refused:
                return "refused"
            raise
        written = [p.grad for p in self.parameters if p.grad is not None]
        if (where := memory.written_outside(written)) is not None:
            raise Failed(f"memory outside of the gradients was written: {where}")
        self._check_sigma()
        self._check_gradients(value)
        return "taken"

    def _placed(self, weight: Weight, is_gradient: bool = False) -> torch.Tensor:
        dtype, shape = DTYPES[weight.dtype], weight.shape
        strides = torch.empty(shape, device="meta").stride()
        if weight.strides == "gaps" or (weight.strides == "columns" and len(shape) > 1):
            strides = strides_of(shape, weight.strides)
        found = guarded.empty(shape, strides, dtype, self.case.at_end)
        if is_gradient:
            return found.copy_(torch.randn(shape, generator=self.generator))
        return found.copy_(values(weight, self.generator))

    def _apply(self) -> tuple[torch.Tensor | None, guarded.Bytes]:
        case, names = self.case, self.case.names
        regularizer = SpectralRegularizer(
            zip(names, self.parameters, strict=True), STRENGTH, case.exponent, case.target,
            case.n_power_iterations, n_vectors=case.n_vectors, biases=case.biases, include=["*"],
            splits={n: 2 for n, w in zip(names, case.weights, strict=True)
                    if w.is_cut and w.cut == "splits"},
            stacked=[n for n, w in zip(names, case.weights, strict=True)
                     if w.is_cut and w.cut == "stacked"],
            warmup=ITERATIONS, backend=self.recorder, seed=case.seed,
        )  # fmt: skip
        self.regularizer, self.before = regularizer, [None] * len(names)
        if case.way == "accumulate":
            for i, (p, w) in enumerate(zip(self.parameters, case.weights, strict=True)):
                p.grad = self._placed(w, is_gradient=True)
                self.before[i] = p.grad.to(torch.float64, copy=True)
        memory, value = guarded.Bytes(), None
        if case.way == "accumulate":
            regularizer.accumulate_grad_()
        else:
            value = regularizer.penalty()
            value.backward()
        return value, memory

    def _check_sigma(self) -> None:
        """Check every estimate against the SVD, and that vectors of a bad matrix stay good."""
        for name, v in self.regularizer.state_dict()["vectors"].items():
            if not bool(torch.isfinite(v).all()):
                raise Failed(f"{name}: its vectors are not finite")
        readings = self.regularizer
        found = dict(zip(readings.names, zip(readings.singular_values.double(),
                                             readings.residual.double(), strict=True),
                         strict=True))  # fmt: skip
        for name, weight, truth in zip(
            self.case.names, self.case.weights, self.truths, strict=True
        ):
            if truth.dim() < 2:
                continue
            for suffix, matrix in weight.matrices(truth).items():
                problem = _sigma_problem(weight, matrix, *found[name + suffix])
                if problem:
                    raise Failed(f"{name}{suffix}: {problem}")

    def _check_gradients(self, value) -> None:
        total, terms_of_total, known = 0.0, 0.0, True
        for i, (name, weight) in enumerate(zip(self.case.names, self.case.weights, strict=True)):
            penalty, gradient, value_terms, terms = self._penalty_of(i, name, weight)
            total, terms_of_total = total + penalty, terms_of_total + value_terms
            known = known and terms == terms
            grad = self.parameters[i].grad
            self._check_gradient(name, weight, grad, gradient, terms, self.before[i])
        if value is None:
            return
        # Parts in float32 and float64 are added to a float64 number.
        wide = all(w.dtype == "float64" for w in self.case.weights)
        state, value = torch.float64 if wide else torch.float32, float(value.detach())
        is_close = abs(value - total) <= RELATIVE[state] * terms_of_total + 1e-37
        may_overflow = not known or terms_of_total > torch.finfo(state).max
        if not is_close and not (may_overflow and not math.isfinite(value)):
            raise Failed(f"penalty() is {value}, in float64 {total}")

    def _penalty_of(self, i: int, name: str, weight: Weight):
        """Return penalty and gradient, and for each the size of the terms that cancel in it."""
        case, k = self.case, self.case.exponent
        leaf = self.truths[i].requires_grad_()
        if leaf.dim() == 1:
            if not case.biases:
                return 0.0, torch.zeros_like(leaf), 0.0, 0.0
            penalty = STRENGTH * (leaf * leaf).sum() ** k
            (gradient,) = torch.autograd.grad(penalty, leaf)
            value = float(penalty.detach())
            return value, gradient, value, float(gradient.norm())
        penalty, terms, value_terms = 0.0 * leaf.sum().nan_to_num(), 0.0, 0.0
        for suffix, matrix in weight.matrices(leaf).items():
            v, is_left = self.recorder.vectors[name + suffix]
            s = matrix.mT @ v if is_left else matrix @ v
            sigma = torch.linalg.vector_norm(s)
            penalty = penalty + STRENGTH * (sigma**k - case.target**k) ** 2
            size = float(sigma.detach())
            most = size**k + case.target**k
            terms = max(terms, STRENGTH * 2 * k * most * size ** (k - 1)) if size == size else size
            value_terms += STRENGTH * most**2
        (gradient,) = torch.autograd.grad(penalty, leaf)
        return float(penalty.detach()), gradient, value_terms, terms

    def _check_gradient(self, name, weight, grad, gradient, terms, before) -> None:
        dtype = DTYPES[weight.dtype]
        limit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max
        if not terms < limit / 10 or not bool(torch.isfinite(gradient).all()):
            return  # the penalty is not finite
        if before is not None:
            gradient = gradient + before
        elif grad is None:
            if bool(gradient.any()):
                raise Failed(f"{name}: no gradient")
            return
        tiny = torch.finfo(dtype)
        relative = RELATIVE[dtype] if dtype in RELATIVE else RELATIVE[torch.float32]
        noise = relative * terms + tiny.tiny * tiny.eps
        fits = gradient.abs() < tiny.max * 0.99
        if problem := apart(grad.detach()[fits], gradient[fits], noise + 0 * gradient[fits]):
            raise Failed(f"{name}: the gradient {problem}")


def _sigma_problem(weight: Weight, matrix: torch.Tensor, sigmas, residual) -> str | None:
    """Return what is wrong with the estimates of a float64 matrix, or None."""
    if matrix.numel() == 0 or weight.content == "zeros":
        return f"sigma is {sigmas.tolist()}, expected 0" if sigmas.any() else None
    if not bool(torch.isfinite(matrix).all()):
        return f"sigma is {float(sigmas[0])}, expected NaN or inf" if sigmas[0].isfinite() else None
    values = torch.linalg.svdvals(matrix)
    truth = torch.zeros_like(sigmas)
    n = min(len(values), len(sigmas))
    truth[:n] = values[:n]
    rounded = 1e-12 if weight.dtype == "float64" else 2e-6
    above = sigmas > truth + rounded * values[0]
    if bool(above.any()) or not bool(torch.isfinite(sigmas).all()):
        return f"estimates {sigmas.tolist()} are above the singular values {truth.tolist()}"
    nearest = float((values - sigmas[0]).abs().min())
    if not nearest <= float(residual) + rounded**0.5 * 4 * float(values[0]):
        return f"sigma is {float(sigmas[0])} +- {float(residual)}, the nearest is {nearest} away"
    # One half of the next one, to the power of ITERATIONS, or all alike to a rounding of the dtype.
    allowed = {"separated": 1e-4, "rank one": 1e-4, "repeated": 1e-4}.get(weight.content, 1.0)
    if weight.content == "repeated" and weight.dtype.endswith("16"):
        allowed = 0.1
    # Rows of a matrix of rank one have rank one; matrices along its dim 0 are any.
    if weight.is_cut and (weight.cut == "stacked" or weight.content != "rank one"):
        allowed = 1.0
    if not float(sigmas[0]) >= (1 - allowed) * float(values[0]):
        return f"sigma is {float(sigmas[0])} after {ITERATIONS} iterations, SVD {float(values[0])}"
    return None
