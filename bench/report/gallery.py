"""Figures of real architectures in training: ``python -m bench.report.gallery FOLDER``.

A GPT-2 and a ResNet, built from their configurations with random weights, are trained briefly
without and with the penalty, each with a learning rate that is too large for it. FOLDER gets the
checkpoints, the logs, and their figures by ``spectral-kernels inspect`` and ``spectral-kernels
plot``. Takes three minutes on two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from sklearn.datasets import load_digits
from torch import nn

from spectral_kernels import SpectralRegularizer

STEPS, EVERY = 300, 3


def gpt2():
    """Return a small GPT-2 and a function that returns its loss on repeating sequences."""
    config = transformers.GPT2Config(
        vocab_size=500, n_positions=64, n_embd=128, n_layer=4, n_head=4, use_cache=False
    )
    model = transformers.GPT2LMHeadModel(config)

    def loss():
        tokens = torch.randint(500, (16, 16)).repeat(1, 3)
        return model(tokens, labels=tokens).loss

    return model, loss


def resnet():
    """Return a small ResNet and a function that returns its loss on handwritten digits."""
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2],
        layer_type="basic", num_labels=10, downsample_in_first_stage=False,
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)

    def loss():
        batch = torch.randint(len(x), (64,))
        images = nn.functional.interpolate(x[batch], scale_factor=4)
        return model(images, labels=y[batch]).loss

    return model, loss


MODELS = {"gpt2": (gpt2, 3e-3), "resnet": (resnet, 1e-2)}


def train(name: str, strength: float, folder: Path) -> str:
    """Train a model; return the name of its log and checkpoint files, without suffix."""
    make, lr = MODELS[name]
    torch.manual_seed(0)
    model, loss_of = make()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    splits = {"*.c_attn.weight": 3} if name == "gpt2" else None
    reg = SpectralRegularizer(model, strength, splits=splits)
    reg.attach(optimizer)
    arm = f"{name}_{'with' if strength else 'without'}"
    (folder / f"{arm}.csv").unlink(missing_ok=True)
    log = reg.log_to(folder / f"{arm}.csv", every=EVERY)
    for step in range(STEPS):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log(step)
    print(f"{arm} the penalty: loss {float(loss.detach()):.3f}", flush=True)
    torch.save(model.state_dict(), folder / f"{arm}.pt")
    return arm


def main(argv: list[str] | None = None) -> None:
    """Train the models and draw the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.report.gallery", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        arms = [train(name, strength, folder) for strength in (0.0, 1e-2)]
        for command in (
            ["inspect", *(f"{arm}.pt" for arm in arms), "--top", "12", "--plot", f"{name}.png"],
            *(["plot", f"{arm}.csv", "--out", f"{arm}_log.png"] for arm in arms),
        ):
            print("$ spectral-kernels", *command, flush=True)
            subprocess.run(
                [sys.executable, "-m", "spectral_kernels", *command], cwd=folder, check=True
            )


if __name__ == "__main__":
    main()
