"""Methods that normalize weights or units, or the change of the weights."""

from __future__ import annotations

import torch
from torch import nn

from .base import Method, mlp_layers
from .penalties import matrices


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
        for linear, act in mlp_layers(model, "layer_norm"):
            layers += [linear, nn.LayerNorm(linear.out_features), act]
        return nn.Sequential(model[0], *layers, model[-1])


class WeightProjection(Method):
    """Every matrix is scaled back to its initial Frobenius norm after each step."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return Adam; record the norms."""
        self.matrices = matrices(self.model)
        self.norms = [float(torch.linalg.vector_norm(w.detach())) for w in self.matrices]
        return super().build_optimizer()

    @torch.no_grad()
    def after_step(self, inputs: torch.Tensor) -> None:
        """Scale."""
        for weight, norm in zip(self.matrices, self.norms, strict=True):
            weight.mul_(norm / torch.linalg.vector_norm(weight))


class NormalizeAndProject(WeightProjection, LayerNorm):
    """LayerNorm before every ReLU, and weight projection (NaP, Lyle et al., arXiv 2407.01800)."""


class Muon(Method):
    """Muon for the hidden matrices of an MLP, Adam for everything else (Jordan et al., 2024).

    As torch.optim.Muon with nesterov momentum, changes as large as Adam's ("match_rms_adamw") and
    without weight decay, but orthogonalized in float32: torch's bfloat16 makes a step fifty times
    as long on a CPU without such instructions.
    """

    momentum = 0.95

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return Adam of everything else; hidden matrices change after its step."""
        self.matrices = [linear.weight for linear, _ in mlp_layers(self.model, "muon")[1:]]
        self.momenta = [torch.zeros_like(w) for w in self.matrices]
        others = [p for p in self.model.parameters() if all(p is not w for w in self.matrices)]
        return torch.optim.Adam(others, lr=self.lr, fused=True)

    @torch.no_grad()
    def after_step(self, inputs: torch.Tensor) -> None:
        """Take the step of the hidden matrices."""
        for weight, momentum in zip(self.matrices, self.momenta, strict=True):
            momentum.lerp_(weight.grad, 1 - self.momentum)
            change = orthogonalized(weight.grad.lerp(momentum, self.momentum))
            weight.sub_(change, alpha=self.lr * 0.2 * max(weight.shape) ** 0.5)
            weight.grad = None


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Return ``matrix`` with singular values near 1, by five steps of Newton and Schulz."""
    a, b, c = 3.4445, -4.775, 2.0315
    x = matrix / matrix.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
