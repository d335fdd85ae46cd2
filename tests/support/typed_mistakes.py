"""Mistakes that type checkers find: one in every line that ends with "# wrong". It is not run."""

from __future__ import annotations

from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD, spectral_norms


def construct(model: nn.Module) -> None:
    SpectralRegularizer(model, strenght=1e-3)  # wrong
    SpectralRegularizer(model, strength="1e-3")  # wrong
    SpectralRegularizer(model, target=("mup", 2))  # wrong
    SpectralRegularizer(model, side="below")  # wrong
    SpectralRegularizer(model, convolutions="circular")  # wrong
    SpectralRegularizer(model, n_power_iterations="often")  # wrong
    SpectralRegularizer(model, backend="cuda9")  # wrong
    SpectralRegularizer(model, exclude=3)  # wrong
    SpectralRegularizer(model, splits=["a"])  # wrong
    SpectralRegularizer(model.parameters())  # wrong
    SpectralRegularizer(model, biases="no")  # wrong
    SpectralAdamW(model, lr_=1)  # wrong
    SpectralAdamW(model, lr="1e-3")  # wrong
    SpectralAdamW(model, amsgrad=True)  # wrong
    SpectralAdamW(model, maximize=True)  # wrong
    SpectralAdamW(model, warmup="10")  # wrong
    SpectralAdamW(model, betas=0.9)  # wrong
    SpectralAdamW(model, decoupled=True, constraint="ball")  # wrong
    SpectralAdamW(3)  # wrong
    SpectralSGD(model, capturable=True)  # wrong
    SpectralSGD(model, state_dtype="float32")  # wrong


def assign(reg: SpectralRegularizer, optimizer: SpectralAdamW) -> None:
    reg.strenght = 0.0  # wrong
    reg.exponent = "2"  # wrong
    reg.target = None  # wrong
    reg.n_vectors = [4]  # wrong
    reg.names = []  # wrong
    optimizer.strength = "1"  # wrong


def call(reg: SpectralRegularizer, optimizer: SpectralAdamW, model: nn.Module) -> None:
    reg.penalty(2)  # wrong
    reg.accumulate_grad_("2")  # wrong
    reg.attach(model)  # wrong
    reg.metrics(prefix=3)  # wrong
    reg.log_to("run.csv", ever=3)  # wrong
    reg.sigma.item() + "2"  # wrong
    reg.report()[0].sigmas  # wrong  # noqa: B018
    optimizer.step(3)  # wrong
    optimizer.refresh(True)  # wrong
    reg.load_state_dict(3)  # wrong


def measure(model: nn.Module) -> None:
    spectral_norms(model)["a"][0]  # wrong
    spectral_norms(model, n_vectors=4)["a"] + 1.0  # wrong
    spectral_norms(model, 1e-4, 4)  # wrong
    spectral_norms(model, biases=True)  # wrong
    spectral_norms(model.state_dict())  # wrong
