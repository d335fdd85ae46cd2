"""Real models with random weights, built from their configurations, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import nn


@dataclass(frozen=True)
class Model:
    """``build`` makes the model; ``inputs`` draws the ``batch`` examples of a step."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], torch.Tensor]
    batch: int = 32
    devices: tuple[str, ...] = ("cpu", "cuda")

    def make(self, device: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
        """Return the model, always with the same weights, and a batch for it."""
        torch.manual_seed(0)
        model, x = self.build().to(device, dtype), self.inputs(self.batch).to(device)
        return model, x.to(dtype) if x.is_floating_point() else x


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return an arbitrary loss of the model, 0-d."""
    out = model(x)
    return getattr(out, "logits", out).square().mean()


def mlp() -> nn.Module:
    """MLP 784-100-100-100-10."""
    layers = [nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(),
              nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)]  # fmt: skip
    return nn.Sequential(*layers)


def policy() -> nn.Module:
    """A policy of two layers of 64 units, as in reinforcement learning."""
    layers = [nn.Linear(17, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 6)]
    return nn.Sequential(*layers)


def resnet18() -> nn.Module:
    """ResNet-18."""
    config = transformers.ResNetConfig(
        hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000
    )
    return transformers.ResNetForImageClassification(config)


def vit(width: int, heads: int) -> nn.Module:
    """Vision transformer of twelve layers."""
    config = transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=12, num_attention_heads=heads,
        intermediate_size=4 * width, num_labels=1000,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def gpt2() -> nn.Module:
    """GPT-2 124M."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))


def llama_1b() -> nn.Module:
    """A model like Llama 3.2 1B, its head tied to the embedding."""
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def images(batch: int) -> torch.Tensor:
    """Draw images."""
    return torch.randn(batch, 3, 224, 224)


def tokens(vocabulary: int, length: int) -> Callable[[int], torch.Tensor]:
    """Return a function that draws sequences of tokens."""
    return lambda batch: torch.randint(vocabulary, (batch, length))


GPU = ("cuda",)
MODELS = {
    "policy": Model(policy, lambda batch: torch.randn(batch, 17)),
    "mlp": Model(mlp, lambda batch: torch.randn(batch, 784)),
    "resnet18": Model(resnet18, images),
    "vit_tiny": Model(lambda: vit(192, 3), images),
    "vit_b": Model(lambda: vit(768, 12), images, devices=GPU),
    "gpt2": Model(gpt2, tokens(50257, 1024), batch=8, devices=GPU),
    "llama_1b": Model(llama_1b, tokens(128256, 1024), batch=4, devices=GPU),
}
