"""A language made by the code: words of a few tokens, a grammar of classes, phrases that return."""

from __future__ import annotations

import numpy as np
import torch

VOCABULARY = 256
WORDS, CLASSES = 400, 8
RETURNS = 0.08  # how often a phrase of this document comes again


class Language:
    """An endless text.

    A word is two to four tokens, belongs to a class, and is as frequent in it as Zipf's law says;
    the class of a word depends on that of the word before. Now and then a phrase that was in the
    last 40 words comes again, so that attention has something to find.

    Args:
        seed: of words and grammar.
    """

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.words = [rng.integers(VOCABULARY, size=rng.integers(2, 5)) for _ in range(WORDS)]
        self.follows = rng.dirichlet(np.full(CLASSES, 0.3), CLASSES).cumsum(1)
        self.members = rng.permutation(WORDS).reshape(CLASSES, -1)
        frequency = 1 / np.arange(1, WORDS // CLASSES + 1)
        self.frequency = (frequency / frequency.sum()).cumsum()

    def text(self, tokens: int, rng: np.random.Generator) -> torch.Tensor:
        """Return [tokens] int64 of a new text."""
        said: list[int] = []
        found: list[int] = []
        kind = 0
        while len(found) < tokens:
            if len(said) > 20 and rng.random() < RETURNS:
                start = int(rng.integers(max(0, len(said) - 40), len(said) - 6))
                phrase = said[start : start + int(rng.integers(3, 7))]
            else:
                kind = min(int(np.searchsorted(self.follows[kind], rng.random())), CLASSES - 1)
                place = int(np.searchsorted(self.frequency, rng.random()))
                phrase = [int(self.members[kind, min(place, WORDS // CLASSES - 1)])]
            for word in phrase:
                said.append(word)
                found += self.words[word].tolist()
        return torch.tensor(found[:tokens])

    def batch(self, sequences: int, length: int, rng: np.random.Generator) -> torch.Tensor:
        """Return [sequences, length] int64, each row a text of its own."""
        return torch.stack([self.text(length, rng) for _ in range(sequences)])
