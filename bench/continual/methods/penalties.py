"""Penalties on parameters or features that are added to the loss, and one beside it."""

from __future__ import annotations

import torch
from torch import nn

from .base import FOUR, Method, hidden_layers


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


class L2EffectiveRank(L2):
    """L2, and a reward for the effective rank of features (L2-ER, He et al., arXiv 2509.22335).

    strength * sum of squares, minus 0.01 * log of the effective rank of each hidden layer's units
    on the batch; that is the exponential of the entropy of their normalized singular values. The
    second term is taken every tenth step, ten times as strong, since it costs more than the step.
    """

    strengths = FOUR
    reward, period = 0.01, 10

    def prepare(self, model: nn.Module) -> nn.Module:
        """Find the layers."""
        self.hidden, self.steps = hidden_layers(model, "l2_er"), 0
        return model

    def penalty(self) -> torch.Tensor | None:
        """Return the negative reward."""
        self.steps += 1
        if self.steps % self.period:
            return None
        ranks = [log_effective_rank(layer.units) for layer in self.hidden]
        return -self.reward * self.period * torch.stack(ranks).sum()


def log_effective_rank(units: torch.Tensor) -> torch.Tensor:
    """Return the entropy of the normalized singular values of [batch, units]."""
    share = torch.linalg.svdvals(units + 1e-6 * torch.randn_like(units))  # distinct ones
    share = share / share.sum()
    return torch.special.entr(share.clamp_min(1e-12)).sum()


class Parseval(Method):
    """Rows that are orthogonal (Parseval regularization, Chung et al., arXiv 2412.07224).

    strength * |W W^T - 2 I|^2 for all matrices but the last, W^T W where that is the smaller one;
    they begin orthogonal, with gain sqrt(2).
    """

    strengths = FOUR
    scale = 2.0

    def prepare(self, model: nn.Module) -> nn.Module:
        """Initialize all matrices but the last."""
        self.matrices = matrices(model)[:-1]
        for weight in self.matrices:
            fresh = torch.empty(weight.shape)  # contiguous, which a kernel may not be
            weight.data.copy_(nn.init.orthogonal_(fresh, self.scale**0.5))
        return model

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the gradient of the penalty."""
        for weight in self.matrices:
            weight.grad.add_(isometry_gradient(weight, self.scale), alpha=self.strength)


class Isometry(Method):
    """Singular values of 1, beside Adam's step (AdamO, Rosseau et al., arXiv 2606.09762).

    W <- W - lr * strength * gradient of |W W^T - I|^2, of W^T W where that is the smaller one, for
    every matrix.
    """

    strengths = (1e-2, 1e-1, 1.0, 10.0)

    @torch.no_grad()
    def after_step(self, inputs: torch.Tensor) -> None:
        """Take the step of the penalty."""
        for weight in matrices(self.model):
            weight.sub_(isometry_gradient(weight, 1.0), alpha=self.lr * self.strength)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of linear layers and convolutions, in order."""
    return [p for p in model.parameters() if p.dim() in (2, 4)]


def isometry_gradient(weight: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the gradient of |W W^T - scale I|^2, or of |W^T W - scale I|^2 if that is smaller."""
    flat = weight.flatten(1)
    tall = flat.mT if flat.shape[0] > flat.shape[1] else flat
    gram = tall @ tall.mT
    gram.diagonal().sub_(scale)
    found = 4 * (gram @ tall)
    return (found.mT if tall is not flat else found).reshape(weight.shape)
