"""What a method is, and what several of them need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

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

    def penalty(self) -> torch.Tensor | None:
        """Return a term of the loss of the forward pass that was just done, None for none."""
        return None


class Hidden:
    """A hidden layer: its linear layer, the activation, and the layer that reads it.

    ``units`` are the activation's outputs, [batch, units], of the last forward pass with gradients.
    """

    def __init__(self, linear: nn.Linear, act: nn.Module, following: nn.Linear):
        self.linear, self.following = linear, following
        self.units = torch.zeros(0)
        with torch.no_grad():
            self.bound = math.sqrt(3) * float(linear.weight.std())  # uniform, of the same spread
        act.register_forward_hook(self._keep)

    def _keep(self, act: nn.Module, inputs: tuple, outputs: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            self.units = outputs

    def __deepcopy__(self, memo: dict) -> Hidden:
        """Return this object: a copy of the model, which is made to be measured, has its hooks."""
        return self

    def renew(self, chosen: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Reinitialize units: fresh incoming weights, outgoing ones of zero, moments of zero.

        Args:
            chosen: bool [units].
            optimizer: Adam, of all parameters.
        """
        fresh = torch.empty_like(self.linear.weight).uniform_(-self.bound, self.bound)
        replace(self.linear.weight, fresh, chosen[:, None], optimizer)
        replace(self.linear.bias, torch.zeros(()), chosen, optimizer)
        replace(self.following.weight, torch.zeros(()), chosen[None, :], optimizer)


def replace(
    parameter: nn.Parameter, values: torch.Tensor, where: torch.Tensor,
    optimizer: torch.optim.Optimizer,
) -> None:  # fmt: skip
    """Set some elements of a parameter to ``values`` and their moments to zero."""
    parameter.copy_(torch.where(where, values, parameter))
    for moment in ("exp_avg", "exp_avg_sq"):
        optimizer.state[parameter][moment].masked_fill_(where, 0)


def hidden_layers(model: nn.Module, method: str) -> list[Hidden]:
    """Return the hidden layers of an MLP, or of policy and value network of Stable-Baselines3.

    Raises:
        ValueError: another model.
    """
    if hasattr(model, "mlp_extractor"):
        parts = [(model.mlp_extractor.policy_net, model.action_net),
                 (model.mlp_extractor.value_net, model.value_net)]  # fmt: skip
        return [layer for body, head in parts for layer in _chain([*body, head])]
    pairs = mlp_layers(model, method)
    return _chain([*(module for pair in pairs for module in pair), model[-1]])


def _chain(modules: Sequence[nn.Module]) -> list[Hidden]:
    """Return the hidden layers of linear layers and activations in turn."""
    return [Hidden(*modules[i : i + 3]) for i in range(0, len(modules) - 2, 2)]


def mlp_layers(model: nn.Module, method: str) -> list[tuple[nn.Linear, nn.Module]]:
    """Return the hidden layers of an MLP as pairs of linear layer and activation."""
    kinds = [type(module) for module in model] if isinstance(model, nn.Sequential) else []
    n = (len(kinds) - 2) // 2
    if kinds != [nn.Flatten, *[nn.Linear, nn.ReLU] * n, nn.Linear]:
        raise ValueError(f"model: expected 'mlp' for the method {method!r}, got another model")
    return [(model[2 * i + 1], model[2 * i + 2]) for i in range(n)]
