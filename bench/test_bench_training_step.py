"""A whole training step of a real model, with the regularizer attached and without."""

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralRegularizer

from . import baselines

transformers = pytest.importorskip("transformers", reason="needs the bench extra")


def mlp():
    """MLP 784-100-100-100-10 and its input."""
    layers = [nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(),
              nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)]  # fmt: skip
    return nn.Sequential(*layers), lambda batch: torch.randn(batch, 784)


def vit_tiny():
    """ViT-tiny with random weights and its input."""
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768,
        num_labels=1000,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), lambda b: torch.randn(b, 3, 224, 224)


def resnet18():
    """ResNet-18 with random weights and its input."""
    config = transformers.ResNetConfig(
        hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000
    )
    return transformers.ResNetForImageClassification(config), lambda b: torch.randn(b, 3, 224, 224)


MODELS = {"mlp": mlp, "resnet18": resnet18, "vit_tiny": vit_tiny}
BATCH = 32


def training_step(make, contender):
    """Build a model and return a function that trains it one step on the same batch.

    "attach_alone" is only what attach() adds to a step, without the noise of the rest.
    """
    torch.manual_seed(0)
    model, inputs = make()
    x = inputs(BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    if contender.startswith("attach"):
        reg = SpectralRegularizer(model)
        if contender == "attach_alone":
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            return reg.accumulate_grad_
        reg.attach(optimizer)
    weights = [p for p in model.parameters() if p.dim() >= 2]
    loop = None
    if contender == "autograd_loop":
        flat = [w.flatten(1) for w in weights]
        vectors = baselines.start_vectors(flat)

        def loop():
            return baselines.loop_penalty([w.flatten(1) for w in weights], vectors)

    def step():
        optimizer.zero_grad()
        out = model(x)
        loss = getattr(out, "logits", out).square().mean()
        if loop is not None:
            loss = loss + 1e-3 * loop()
        loss.backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("contender", ["without", "attach", "attach_alone", "autograd_loop"])
@pytest.mark.parametrize("case", MODELS)
def test_training_step(case, contender, compete):
    def fill(group, names):
        group.time({name: training_step(MODELS[case], name) for name in names})

    compete(fill, suite="training_step", dtype="float32", batch=BATCH)
