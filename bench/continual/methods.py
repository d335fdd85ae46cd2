"""The methods that are compared, one class each; all use Adam."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer

FOUR = (1e-5, 1e-4, 1e-3, 1e-2)


class Method:
    """Base class of the methods, and the one without a regularizer.

    A method sees every step and is not told when a task ends. ``strengths`` are the default ones;
    a method without any has no strength.

    Args:
        model: to be trained.
        strength: of the penalty, or of what the method does instead.
        lr: of Adam.

    Raises:
        ValueError: a model that the method cannot be used with.
    """

    strengths: ClassVar[tuple[float, ...]] = ()

    def __init__(self, model: nn.Module, strength: float, lr: float):
        self.strength, self.lr = strength, lr
        self.model = self.prepare(model)
        self.optimizer = self.build_optimizer()

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the model that is trained."""
        return model

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.Adam(self.model.parameters(), lr=self.lr, fused=True)

    def before_step(self) -> None:
        """Change the gradients."""

    def after_step(self, inputs: torch.Tensor) -> None:
        """Change the model after a step on ``inputs``."""


class L2(Method):
    """strength * sum of squares of all parameters."""

    strengths = FOUR

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return Adam with the gradient of the penalty, 2 * strength * parameter."""
        return torch.optim.Adam(
            self.model.parameters(), lr=self.lr, weight_decay=2 * self.strength, fused=True
        )


class L2Init(Method):
    """strength * squared distance from the initial parameters (Kumar et al., arXiv 2308.11958)."""

    strengths = FOUR

    def prepare(self, model: nn.Module) -> nn.Module:
        """Record the initial parameters."""
        self.initial = [p.detach().clone() for p in model.parameters()]
        return model

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the gradient of the penalty."""
        for p, initial in zip(self.model.parameters(), self.initial, strict=True):
            p.grad.add_(p - initial, alpha=2 * self.strength)


class ShrinkAndPerturb(Method):
    """Shrink and perturb: mix fresh parameters in (Ash and Adams, arXiv 1910.08475).

    After each step p <- (1 - strength) p + strength q, with q drawn from a normal distribution with
    the parameter's initial mean and standard deviation.
    """

    strengths = FOUR

    def prepare(self, model: nn.Module) -> nn.Module:
        """Record initial means and spreads; norms have no spread: they shrink to their start."""
        self.initial = [(float(p.detach().mean()), float(p.detach().std(correction=0)))
                        for p in model.parameters()]  # fmt: skip
        return model

    @torch.no_grad()
    def after_step(self, inputs: torch.Tensor) -> None:
        """Shrink and perturb."""
        for p, (mean, spread) in zip(self.model.parameters(), self.initial, strict=True):
            p.lerp_(torch.randn_like(p).mul_(spread).add_(mean), self.strength)


class SpectralNorm(Method):
    """torch's spectral_norm: every weight divided by its sigma_1 (Miyato et al., 1802.05957)."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Parametrize every weight of linear layers, convolutions and attention."""
        for module in list(model.modules()):
            for name in ("weight", "in_proj_weight"):
                weight = getattr(module, name, None)
                if isinstance(weight, nn.Parameter) and weight.dim() > 1:
                    nn.utils.parametrizations.spectral_norm(module, name)
        return model


class LayerNorm(Method):
    """LayerNorm before every ReLU of a plain MLP (Lyle et al., arXiv 2303.01486)."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the model with the norms inserted."""
        layers: list[nn.Module] = []
        for linear, act in _hidden(model, "layer_norm"):
            layers += [linear, nn.LayerNorm(linear.out_features), act]
        return nn.Sequential(model[0], *layers, model[-1])


class ReDo(Method):
    """ReDo: reinitialize dormant units of an MLP (Sokar et al., arXiv 2302.12902).

    Every 1,000 steps each unit whose score (see diagnostics.dormant_units) on the batch is at most
    ``strength`` gets fresh incoming weights and zero outgoing ones; its moments are reset.
    """

    strengths = (0.01, 0.1)
    period = 1000

    def prepare(self, model: nn.Module) -> nn.Module:
        """Find the layers."""
        self.hidden, self.steps = _hidden(model, "redo"), 0
        return model

    @torch.no_grad()
    def after_step(self, inputs: torch.Tensor) -> None:
        """Reinitialize dormant units every ``period`` steps."""
        self.steps += 1
        if self.steps % self.period:
            return
        above = [linear for linear, _ in self.hidden[1:]] + [self.model[-1]]
        h = inputs.flatten(1)
        for (linear, act), following in zip(self.hidden, above, strict=True):
            h = act(linear(h))
            size = h.abs().mean(0)
            dormant = size <= self.strength * size.mean()
            fresh = nn.Linear(linear.in_features, linear.out_features)
            for parameter, value, where in (
                (linear.weight, fresh.weight, dormant[:, None]),
                (linear.bias, fresh.bias, dormant),
                (following.weight, torch.zeros(()), dormant[None, :]),
            ):
                parameter.copy_(torch.where(where, value, parameter))
                for moment in ("exp_avg", "exp_avg_sq"):
                    kept = self.optimizer.state[parameter][moment]
                    kept.masked_fill_(where, 0)


class Spectral(Method):
    """Spectral regularization, attached to Adam: one power iteration and exponent 2."""

    strengths = FOUR
    options: ClassVar[dict] = {}

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return Adam with the regularizer attached."""
        optimizer = super().build_optimizer()
        SpectralRegularizer(self.model, self.strength, **self.options).attach(optimizer)
        return optimizer


class Spectral1(Spectral):
    """Spectral regularization with exponent 1."""

    options: ClassVar[dict] = {"exponent": 1}


class Spectral4(Spectral):
    """Spectral regularization with exponent 4."""

    options: ClassVar[dict] = {"exponent": 4}


class Spectral8(Spectral):
    """Spectral regularization with exponent 8."""

    options: ClassVar[dict] = {"exponent": 8}


class SpectralSharp(Spectral):
    """Spectral regularization with four vectors per matrix and "auto" iterations."""

    options: ClassVar[dict] = {"n_vectors": 4, "n_power_iterations": "auto"}


class SpectralOperator(Spectral):
    """Spectral regularization of convolutions as the operators that they are."""

    options: ClassVar[dict] = {"convolutions": "operator"}


class InOptimizer(Spectral):
    """SpectralAdamW without weight decay: the penalty inside the optimizer's step."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return SpectralAdamW."""
        return SpectralAdamW(self.model, lr=self.lr, weight_decay=0.0, strength=self.strength)


METHODS: dict[str, type[Method]] = {
    "none": Method, "l2": L2, "l2_init": L2Init, "shrink_perturb": ShrinkAndPerturb,
    "spectral_norm": SpectralNorm, "layer_norm": LayerNorm, "redo": ReDo, "spectral": Spectral,
    "spectral_k1": Spectral1, "spectral_k4": Spectral4, "spectral_k8": Spectral8,
    "spectral_sharp": SpectralSharp, "spectral_operator": SpectralOperator,
    "spectral_adamw": InOptimizer,
}  # fmt: skip


def _hidden(model: nn.Module, method: str) -> list[tuple[nn.Linear, nn.Module]]:
    """Return the hidden layers of an MLP as pairs of linear layer and activation."""
    kinds = [type(module) for module in model] if isinstance(model, nn.Sequential) else []
    n = (len(kinds) - 2) // 2
    if kinds != [nn.Flatten, *[nn.Linear, nn.ReLU] * n, nn.Linear]:
        raise ValueError(f"model: expected 'mlp' for the method {method!r}, got another model")
    return [(model[2 * i + 1], model[2 * i + 2]) for i in range(n)]
