"""Methods that replace parameters, or units that are of little use."""

from __future__ import annotations

import torch
from torch import nn

from .base import FOUR, Method, hidden_layers, mlp_layers, replace


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


class ReDo(Method):
    """ReDo: reinitialize dormant units of an MLP (Sokar et al., arXiv 2302.12902).

    Every 1,000 steps each unit whose score (see diagnostics.dormant_units) on the batch is at most
    ``strength`` gets fresh incoming weights and zero outgoing ones; its moments are reset.
    """

    strengths = (0.01, 0.1)
    period = 1000

    def prepare(self, model: nn.Module) -> nn.Module:
        """Find the layers."""
        self.hidden, self.steps = mlp_layers(model, "redo"), 0
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
                replace(parameter, value, where, self.optimizer)


class ContinualBackprop(Method):
    """Continual backpropagation (Dohare et al., Nature 632, 2024): replace units of little use.

    The utility of a unit is a running mean of |output| times the sum of |outgoing weights|. Of the
    units that have seen ``maturity`` steps a share of ``strength`` per step is replaced, those of
    the least utility; the mean output of what is replaced goes to the biases behind it.
    """

    strengths = (1e-5, 1e-4, 1e-3)
    decay, maturity = 0.99, 100

    def prepare(self, model: nn.Module) -> nn.Module:
        """Find the layers; ages, utilities, mean outputs and the number of units due are 0."""
        self.hidden = hidden_layers(model, "continual_backprop")
        widths = [layer.linear.out_features for layer in self.hidden]
        self.ages, self.utilities, self.means = (
            [torch.zeros(n) for n in widths] for _ in range(3)
        )  # fmt: skip
        self.due = [0.0] * len(widths)
        return model

    @torch.no_grad()
    def after_step(self, inputs: torch.Tensor) -> None:
        """Update utilities, and replace what is due."""
        for i, layer in enumerate(self.hidden):
            age, utility, mean = self.ages[i], self.utilities[i], self.means[i]
            age += 1
            use = layer.units.abs().mean(0) * layer.following.weight.abs().sum(0)
            utility.lerp_(use, 1 - self.decay)
            mean.lerp_(layer.units.mean(0), 1 - self.decay)
            mature = age > self.maturity
            self.due[i] += self.strength * int(mature.sum())
            if (n := int(self.due[i])) == 0:
                continue
            self.due[i] -= n
            seen = 1 - self.decay**age
            least = torch.where(mature, utility / seen, torch.inf).topk(n, largest=False).indices
            chosen = torch.zeros_like(mature).index_fill_(0, least, True)
            layer.following.bias += layer.following.weight @ torch.where(chosen, mean / seen, 0)
            layer.renew(chosen, self.optimizer)
            for state in (age, utility, mean):
                state.masked_fill_(chosen, 0)


class MatureBackprop(ContinualBackprop):
    """Continual backpropagation with a maturity of 10,000 steps, as its paper has it for PPO."""

    maturity = 10_000


class SelfNormalizedResets(Method):
    """Replace units that are silent for longer than they used to be (SNR, arXiv 2410.20098).

    Farias and Jozefiak, 2024. A step is silent for a unit whose output is 0 for the whole batch; a
    wait are the silent steps between two others. A unit is replaced once it has been silent for
    longer than all but a share of ``strength`` of its own waits so far, and than ``patience``
    steps, or for longer than ``longest``. The source lets limits also grow by a factor of two.
    """

    strengths = (0.001, 0.01, 0.05)
    patience, longest, period = 10, 1000, 100

    def prepare(self, model: nn.Module) -> nn.Module:
        """Find the layers; nothing has been counted."""
        self.hidden, self.steps = hidden_layers(model, "snr"), 0
        widths = [layer.linear.out_features for layer in self.hidden]
        self.silent = [torch.zeros(n, dtype=torch.long) for n in widths]
        self.waits = [torch.zeros(n, self.longest + 1) for n in widths]
        self.limits = [torch.full((n,), self.longest - 1) for n in widths]
        return model

    @torch.no_grad()
    def after_step(self, inputs: torch.Tensor) -> None:
        """Count, and replace; limits are computed anew every ``period`` steps."""
        self.steps += 1
        for layer, silent, waits, limit in zip(
            self.hidden, self.silent, self.waits, self.limits, strict=True
        ):
            fires = (layer.units > 0).any(0)
            waits.scatter_add_(1, silent[:, None], fires[:, None].float())
            silent.add_(1).masked_fill_(fires, 0).clamp_(max=self.longest)
            if self.steps % self.period == 0:
                seen = waits[:, 1:].cumsum(1)
                enough = seen >= (1 - self.strength) * seen[:, -1:]
                found = (enough.float().argmax(1) + 1).clamp_(min=self.patience)
                limit.copy_(torch.where(seen[:, -1] > 0, found, self.longest - 1))
            late = silent > limit
            if bool(late.any()):
                layer.renew(late, self.optimizer)
                silent.masked_fill_(late, 0)
                waits.masked_fill_(late[:, None], 0)
                limit.masked_fill_(late, self.longest - 1)
