"""Uses of the public API as type checkers see them; it is checked, not run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from typing_extensions import assert_type

from spectral_kernels import (
    SpectralAdamW,
    SpectralRegularizer,
    SpectralSGD,
    __version__,
    diagnostics,
    spectral_norms,
)
from spectral_kernels.backends.base import Backend, Reference
from spectral_kernels.regularizer import Attachment, LayerReading, LoadResult, Strength, Target


def regularizers(model: nn.Module, strength: torch.Tensor) -> Iterator[SpectralRegularizer]:
    yield SpectralRegularizer(model)
    yield SpectralRegularizer(model.named_parameters(), 1, 2.5, "initial", "auto")
    yield SpectralRegularizer(
        model,
        {"head.*": 0, "*": 1e-3},
        target={"head.*": "initial", "*": 1.0},
        n_power_iterations=2,
        n_vectors=4,
        biases=False,
        norms=False,
        include="*.weight",
        exclude=["a", "b"],
        splits={"*.qkv.weight": 3, "*.kv.weight": (4, 8)},
        stacked=("experts.*",),
        warmup=20,
        backend="cpu",
        seed=3,
    )
    yield SpectralRegularizer(model, side="above", target="2*mup", convolutions="operator")
    yield SpectralRegularizer(list(model.named_parameters()), strength, backend=Reference())


def ways(reg: SpectralRegularizer, optimizer: torch.optim.Optimizer) -> None:
    assert_type(reg.penalty(), torch.Tensor)
    reg.accumulate_grad_()
    reg.accumulate_grad_(grad_scale=2.0)
    reg.accumulate_grad_(torch.tensor(2.0))
    assert_type(reg.attach(optimizer), Attachment)
    reg.attach(optimizer).remove()
    reg.attach(optimizer, decoupled=True, constraint="sphere").remove()


def assignments(reg: SpectralRegularizer | SpectralAdamW, strength: Strength, t: Target) -> None:
    assert_type(reg.exponent, float)
    assert_type(reg.n_vectors, int)
    reg.strength = strength
    reg.strength = {"*": 0.5}
    reg.target = t
    reg.target = "initial"
    reg.exponent = 3
    reg.n_power_iterations = "auto"
    reg.n_vectors = 4


def readings(reg: SpectralRegularizer | SpectralSGD) -> None:
    assert_type(reg.names, list[str])
    assert_type(reg.sigma, torch.Tensor)
    assert_type(reg.residual, torch.Tensor)
    assert_type(reg.singular_values, torch.Tensor)
    assert_type(reg.residuals, torch.Tensor)
    assert_type(reg.report(), list[LayerReading])
    assert_type([(row.name, row.sigma) for row in reg.report()], list[tuple[str, float]])
    assert_type(reg.metrics(), dict[str, float])
    assert_type(reg.metrics(per_layer=True, prefix="actor"), dict[str, float])
    log = reg.log_to("run.csv", every=10)
    log(3)


def states(reg: SpectralRegularizer) -> None:
    result = reg.load_state_dict(reg.state_dict())
    assert_type(result, LoadResult)
    assert_type(result.missing_keys, list[str])
    reg.check_ranks()


def optimizers(model: nn.Module, backend: Backend) -> None:
    adamw = SpectralAdamW(
        model,
        lr=torch.tensor(1e-3),
        betas=[0.9, 0.99],
        strength=1e-3,
        target="initial",
        n_power_iterations="auto",
        state_dtype=torch.float32,
        decoupled=True,
        include=["*.weight"],
        biases=False,
        warmup=3,
        backend=backend,
        fused=True,
        foreach=None,
        capturable=True,
        amsgrad=False,
    )
    sgd = SpectralSGD(model.parameters(), 0.1, 0.9, nesterov=True, model=model, fused=False)
    SpectralSGD(model.named_parameters())
    SpectralAdamW([{"params": list(model.parameters()), "lr": 1e-4}], model=model)
    assert_type(adamw.regularizer, SpectralRegularizer)
    assert_type(adamw.step(), None)
    assert_type(sgd.step(lambda: torch.zeros(())), torch.Tensor)
    sgd.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    sgd.refresh()
    adamw.load_state_dict(adamw.state_dict())
    torch.optim.lr_scheduler.StepLR(adamw, 10).step()
    SpectralRegularizer(model).attach(torch.optim.SGD(model.parameters()))


def measurements(model: nn.Module, x: torch.Tensor) -> str:
    assert_type(spectral_norms(model), dict[str, float])
    assert_type(spectral_norms(model.state_dict().items(), 1e-3), dict[str, float])
    assert_type(spectral_norms(model, n_vectors=4), dict[str, tuple[float, ...]])
    assert_type(
        spectral_norms(model, include="a", stacked=["b"], backend="reference"), dict[str, float]
    )
    assert_type(diagnostics.spectra(model, exclude="a"), dict[str, diagnostics.Spectrum])
    assert_type(diagnostics.gradient_diversity(model, x, x), float)
    assert_type(diagnostics.dormant_units(model, x), dict[str, diagnostics.Dormant])
    assert_type(diagnostics.weight_norm(model), float)
    assert_type(diagnostics.accuracy(model, x, x), float)
    return __version__
