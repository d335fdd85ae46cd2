"""Images with classes, made or shipped: nothing is downloaded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits

from spectral_kernels.cli.demo import experiment

CLASSES = 10


class Images(NamedTuple):
    """Images [n, channels, height, width] and their classes [n], to learn from and held out."""

    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


def digits(generator: torch.Generator) -> Images:
    """Return scikit-learn's handwritten digits, 1 x 8 x 8: 1,280 and 517 held out.

    Standardized per pixel; a pixel that is the same in all images is 0.
    """
    found = load_digits()
    x = experiment.standardized(torch.from_numpy(found.data)).view(-1, 1, 8, 8)
    y = torch.from_numpy(found.target).long()
    order = torch.randperm(len(x), generator=generator)
    return Images(x[order[:1280]], y[order[:1280]], x[order[1280:]], y[order[1280:]])


def textures(generator: torch.Generator) -> Images:
    """Return images made here, 3 x 16 x 16: 1,280 and 640 held out.

    Every class is a pattern of two waves across the image with a colour each. An image shows it
    moved by any number of pixels (around the edges), 0.5 to 1.5 times as strong, under noise three
    times as strong as the pattern: a single pixel says nothing, shapes do.
    """
    size, n, n_test = 16, 1280, 640
    place = torch.arange(size) * (2 * torch.pi / size)
    patterns = torch.zeros(CLASSES, 3, size, size)
    for pattern in patterns:
        for _ in range(2):
            across, down = torch.randint(-4, 5, (2,), generator=generator).tolist()
            if (across, down) == (0, 0):
                across = 1
            phase = 2 * torch.pi * torch.rand((), generator=generator)
            wave = torch.cos(across * place[None, :] + down * place[:, None] + phase)
            pattern += torch.randn(3, 1, 1, generator=generator) * wave
    patterns /= patterns.flatten(1).std(dim=1).view(-1, 1, 1, 1)
    y = torch.randint(CLASSES, (n + n_test,), generator=generator)
    moves = torch.randint(size, (n + n_test, 2), generator=generator).tolist()
    strength = 0.5 + torch.rand(n + n_test, 1, 1, 1, generator=generator)
    shown = torch.stack([patterns[c].roll(tuple(move), (1, 2))
                         for c, move in zip(y, moves, strict=True)])  # fmt: skip
    x = shown * strength + 3 * torch.randn(shown.shape, generator=generator)
    x /= x.std()
    return Images(x[:n], y[:n], x[n:], y[n:])


DATA = {"digits": digits, "textures": textures}
