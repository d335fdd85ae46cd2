"""Shapes for tests and benches: a ragged zoo, and the weights of real models."""

import os

import torch

ZOO = [
    (1, 1), (1, 2), (2, 1), (1, 7), (7, 1), (2, 2), (3, 5), (5, 3), (8, 8), (1, 129), (129, 1),
    (10, 100), (100, 100), (16, 27), (17, 19), (31, 33), (33, 31), (64, 64), (63, 65), (100, 784),
    (127, 128), (128, 127), (128, 151), (129, 256), (151, 1134), (192, 768), (256, 31), (257, 100),
    (300, 300), (512, 64), (513, 33), (768, 192), (1134, 151), (1000, 192), (1024, 4096),
    (40, 20000), (6, 4104), (2, 4097),
]  # fmt: skip
if os.environ.get("TRITON_INTERPRET") == "1":  # each operation of a program takes microseconds
    ZOO = [(m, n) for m, n in ZOO if m * n <= 10_000 or (n > 4096 and m < 8)]


def mlp() -> list[tuple[int, ...]]:
    """MLP 784-100-100-100-10."""
    return [(100, 784), (100, 100), (100, 100), (10, 100)]


def resnet18() -> list[tuple[int, ...]]:
    """ResNet-18 for ImageNet, flattened convolutions: 11.7 M weights."""
    shapes, inside = [(64, 3 * 49)], 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, inside * 9), (width, width * 9)]
            if block == 0 and inside != width:
                shapes.append((width, inside))
            inside = width
    return [*shapes, (1000, 512)]


def vit(width: int, depth: int) -> list[tuple[int, ...]]:
    """Vision transformer with 16 x 16 patches and a head of 1,000 classes."""
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [(width, 3 * 256), *block * depth, (1000, width)]


def gpt2() -> list[tuple[int, ...]]:
    """GPT-2 124M with its head, weights stored (in, out) as transformers does."""
    block = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
    return [*block * 12, (50257, 768)]


def llama(width, inside, kv_width, depth, vocabulary) -> list[tuple[int, ...]]:
    """Llama with its head, without the embedding table."""
    attention = [(width, width), (kv_width, width), (kv_width, width), (width, width)]
    block = [*attention, (inside, width), (inside, width), (width, inside)]
    return [*block * depth, (vocabulary, width)]


def equal(weights: float, matrices: int) -> list[tuple[int, ...]]:
    """Equal square matrices, ``matrices`` of them, with about ``weights`` elements in all."""
    side = max(1, round((weights / matrices) ** 0.5))
    return [(side, side)] * matrices


CASES = {
    "mlp": mlp,
    "resnet18": resnet18,
    "vit_tiny": lambda: vit(192, 12),
    "vit_b": lambda: vit(768, 12),
    "gpt2": gpt2,
    "many_small": lambda: [(64, 64)] * 500,
    "one_huge": lambda: [(8192, 28672)],
    "llama_1b": lambda: llama(2048, 8192, 512, 16, 128256),
    "llama_7b": lambda: llama(4096, 11008, 4096, 32, 32000),
}
LARGE = ("llama_1b", "llama_7b")  # for GPUs, in bfloat16


def random_weights(shapes, dtype=torch.float32, seed=0, device=None) -> list[torch.Tensor]:
    """Draw weights with the usual scale of an initialization, 1 / sqrt(fan in)."""
    device = torch.get_default_device() if device is None else device
    generator = torch.Generator(device).manual_seed(seed)
    return [
        (torch.randn(shape, generator=generator, device=device) / shape[-1] ** 0.5).to(dtype)
        for shape in shapes
    ]
