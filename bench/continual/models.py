"""Small networks, with and without normalization."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import nn

from . import own

WIDTH = 128


def mlp(shape: tuple[int, ...], outputs: int, norm: bool = False) -> nn.Sequential:
    """Return an MLP with three hidden layers of 128 units, ReLU, LayerNorm if ``norm``."""
    layers: list[nn.Module] = [nn.Flatten()]
    widths = math.prod(shape), WIDTH, WIDTH, WIDTH
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), *([nn.LayerNorm(fan_out)] * norm), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, outputs))


class Block(nn.Module):
    """Residual block: two 3 x 3 convolutions and a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, channels: int, out: int, stride: int, norm: bool):
        super().__init__()

        def normed(layer: nn.Module) -> nn.Module:
            return nn.Sequential(layer, nn.BatchNorm2d(out)) if norm else layer

        self.first = normed(nn.Conv2d(channels, out, 3, stride, 1, bias=not norm))
        self.second = normed(nn.Conv2d(out, out, 3, 1, 1, bias=not norm))
        self.act, self.act_out = nn.ReLU(), nn.ReLU()
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else normed(
            nn.Conv2d(channels, out, 1, stride, bias=not norm)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, out, height / stride, width / stride]."""
        return self.act_out(self.second(self.act(self.first(x))) + self.shortcut(x))


def resnet(shape: tuple[int, ...], outputs: int, norm: bool = True) -> nn.Sequential:
    """Return a ResNet of three blocks with 16, 32 and 64 channels, with BatchNorm if ``norm``."""
    stem = nn.Conv2d(shape[0], 16, 3, padding=1, bias=not norm)
    return nn.Sequential(
        stem, *([nn.BatchNorm2d(16)] * norm), nn.ReLU(),
        Block(16, 16, 1, norm), Block(16, 32, 2, norm), Block(32, 64, 2, norm),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, outputs),
    )  # fmt: skip


class Layer(nn.Module):
    """Transformer layer: attention and an MLP, LayerNorm before each."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, tokens, width]."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """A vision transformer (Dosovitskiy et al., arXiv 2010.11929) on 16 patches."""

    def __init__(self, shape: tuple[int, ...], outputs: int, width: int = 64, layers: int = 3):
        super().__init__()
        patch = shape[-1] // 4
        self.patches = nn.Conv2d(shape[0], width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.layers = nn.Sequential(*(Layer(width, 4) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, outputs]."""
        tokens = self.patches(x).flatten(2).mT + self.positions
        return self.head(self.norm(self.layers(tokens)).mean(1))


def vgg(shape: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Return six 3 x 3 convolutions in three stages without normalization or shortcuts.

    After Simonyan and Zisserman, arXiv 1409.1556.
    """
    layers: list[nn.Module] = []
    for channels, out in itertools.pairwise((shape[0], 16, 32, 64)):
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(out, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, outputs))


# A transformer without normalization hardly learns, so it is left out.
MODELS = {
    "mlp": mlp,
    "mlp_norm": lambda shape, outputs: mlp(shape, outputs, norm=True),
    "resnet": resnet,
    "resnet_plain": lambda shape, outputs: resnet(shape, outputs, norm=False),
    "vgg_plain": vgg,
    "vit": Vit,
}


def lipschitz(model: nn.Module, sigmas: Mapping[str, float], name: str = "") -> float:
    """Return a Lipschitz bound of ``model``: the product over layers, sums over residual branches.

    Args:
        model: of linear layers, convolutions, blocks, and functions of Lipschitz constant one.
        sigmas: the operators' largest singular values by name of the weight.
        name: of ``model`` in the whole, for ``sigmas``.

    Returns:
        The bound, for the Euclidean norm; nan for a model with other layers (attention and norms
        have none that holds for every input).
    """
    if isinstance(model, nn.Linear | nn.Conv2d):
        return sigmas.get(f"{name}weight", math.nan)  # a weight that is shared has one name
    if not isinstance(model, Block | nn.Sequential):
        one = nn.ReLU, nn.Flatten, nn.Identity, nn.MaxPool2d, nn.AdaptiveAvgPool2d
        return 1.0 if isinstance(model, one) else math.nan
    inner = {key: lipschitz(child, sigmas, f"{name}{key}.") for key, child in
             model.named_children()}  # fmt: skip
    if isinstance(model, Block):
        return inner["first"] * inner["second"] + inner["shortcut"]
    return math.prod(inner.values())


def build(name: str, shape: tuple[int, ...], outputs: int, generator: torch.Generator) -> nn.Module:
    """Return a model by its name with initial weights drawn from ``generator``.

    A class of one's own is built with (shape, outputs), an nn.Module. Kernels of convolutions of
    the bench's models are channels_last, which saves a sixth to a quarter of a step.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = own.find(MODELS, name)(shape, outputs)
    return model.to(memory_format=torch.channels_last) if name in MODELS else model
