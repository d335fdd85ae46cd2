"""Labelled images, generated or shipped with scikit-learn: nothing is downloaded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits

from spectral_kernels.cli.demo import experiment

CLASSES = 10


class Images(NamedTuple):
    """Images [n, channels, height, width] and their classes [n], for training and held out."""

    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


def digits(generator: torch.Generator) -> Images:
    """Return scikit-learn's handwritten digits, 1 x 8 x 8: 1,280 to train on, 517 held out.

    Standardized per pixel; constant pixels are 0.
    """
    found = load_digits()
    x = experiment.standardized(torch.from_numpy(found.data)).view(-1, 1, 8, 8)
    y = torch.from_numpy(found.target).long()
    order = torch.randperm(len(x), generator=generator)
    return Images(x[order[:1280]], y[order[:1280]], x[order[1280:]], y[order[1280:]])


def textures(generator: torch.Generator) -> Images:
    """Return generated images, 3 x 16 x 16: 1,280 to train on, 640 held out.

    Each class is a pattern of two waves across the image, each wave with its own colour. An image
    shows the pattern shifted cyclically by any number of pixels, scaled by 0.5 to 1.5, under noise
    three times as strong: single pixels carry no information, shapes do.
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
