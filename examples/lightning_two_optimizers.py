"""A small GAN in Lightning: two optimizers by hand, a callback for each.

Shows: ``SpectralCallback(optimizer=0, ...)`` and ``optimizer=1``, strengths and metrics per
network. The discriminator is held below 1 (``side="above"``), the generator pulled gently.

    pip install 'spectral_kernels[lightning]'
    python examples/lightning_two_optimizers.py --steps 300
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import nn

from spectral_kernels import spectral_norms
from spectral_kernels.integrations.lightning import SpectralCallback


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                         nn.Linear(64, outputs))  # fmt: skip


class GAN(lightning.LightningModule):
    """Points on a circle."""

    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = mlp(8, 2), mlp(2, 1)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.Adam(self.generator.parameters(), 1e-3),
                torch.optim.Adam(self.discriminator.parameters(), 1e-3)]  # fmt: skip

    def training_step(self, batch, _):
        (real,) = batch
        first, second = self.optimizers()
        made = self.generator(torch.randn(len(real), 8, device=self.device))
        softplus = nn.functional.softplus

        second.zero_grad()
        found, wrong = self.discriminator(real), self.discriminator(made.detach())
        self.manual_backward(softplus(-found).mean() + softplus(wrong).mean())
        second.step()

        first.zero_grad()
        self.manual_backward(softplus(-self.discriminator(made)).mean())
        first.step()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300, help="of each optimizer")
    parser.add_argument("--strength", type=float, default=1e-2, help="of the discriminator")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    lightning.seed_everything(options.seed, verbose=False)

    # include: what the optimizer holds. prefix: of the metrics, which go to the Trainer's loggers.
    generator = SpectralCallback(
        optimizer=0, include="generator.*", prefix="generator", strength=1e-4
    )
    discriminator = SpectralCallback(
        optimizer=1, include="discriminator.*", prefix="discriminator", side="above",
        strength=options.strength,
    )  # fmt: skip
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=2 * options.steps, callbacks=[generator, discriminator],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    angle = 2 * torch.pi * torch.rand(4096)
    circle = torch.utils.data.TensorDataset(torch.stack((angle.cos(), angle.sin()), 1))
    model = GAN()
    before = spectral_norms(model)
    trainer.fit(model, torch.utils.data.DataLoader(circle, 64, shuffle=True))

    found = {}
    for callback in (generator, discriminator):
        name = callback.prefix
        found |= callback.regularizer.metrics(prefix=name)
        first = max(sigma for key, sigma in before.items() if key.startswith(name))
        print(f"{name:13}  largest sigma {first:.3f} -> {found[f'{name}/sigma_max']:.3f}")
    with torch.no_grad():
        radius = model.generator(torch.randn(1000, 8)).norm(dim=1)
    print(f"radius of what is generated: {float(radius.mean()):.2f} ± {float(radius.std()):.2f}")
    return found


if __name__ == "__main__":
    main()
