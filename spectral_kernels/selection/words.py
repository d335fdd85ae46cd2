"""What the words of a parameter's name say about it."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What a parameter is that is no weight, and the words that say so.
_MEANINGS = {
    "a logarithm": "log logstd logsigma logvar logits",
    "a standard deviation": "std stds stddev sigma sigmas variance",
    "a time step": "dt delta deltas",
    "a decay": "decay decays",
    "a frequency": "freq freqs frequencies omega phase",
    "a table": "table tables codebook codebooks codes",
    "an embedding": "embed embeds embedded embedding embeddings emb embs",
    "a position": "pos pe position positions positional rel relative",
    "a token": "token tokens cls mask prompt prompts register registers query queries latent "
    "latents anchor anchors sink sinks newline init initial memory memories",
    "a scale": "scale scales scaling scaler temperature temperatures temp tau gamma gammas "
    "lambda lambdas alpha alphas slope slopes ls",
}
_SAID = {word: meaning for meaning, words in _MEANINGS.items() for word in words.split()}
# Last words of a weight, whatever is before: pos_proj, token_weight, decay_w1.
_WEIGHT = frozenset(["weight", "weights", "w", "kernel", "proj", "projection", "matrix"])
_FACTS = frozenset(("a logarithm", "a standard deviation", "a table"))  # true of a weight, too
_BIAS = frozenset(("bias", "biases"))
_TABLES = frozenset(
    ("embedding", "embeddings", "embed", "encoding", "encodings", "codebook", "table")
)


def words_of(name: str) -> list[str]:
    """Return the words of an identifier in lower case, without numbers: "rel_posH1" is rel pos h.

    Capital letters begin a word, and several of them are one: "RMSNormGated" is rms norm gated.
    """
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return [word.lower() for word in found]


def meaning_of(words: Sequence[str]) -> str | None:
    """Return what the words say that is no weight, such as "a scale", or None."""
    is_weight = bool(words) and words[-1] in _WEIGHT and words[-1] != "w"  # rel_pos_w: width
    for word in words:
        meaning = _SAID.get(word)
        if meaning is not None and (meaning in _FACTS or not is_weight):
            return meaning
    return None


def is_weight(words: Sequence[str]) -> bool:
    """Return whether the words begin or end as those of a weight do: weight_mu, gate_w1."""
    return bool(words) and (words[0] in _WEIGHT or words[-1] in _WEIGHT)


def is_bias(words: Sequence[str]) -> bool:
    """Return whether the words begin or end as those of a bias do: q_bias, bias_hh."""
    return bool(words) and (words[0] in _BIAS or words[-1] in _BIAS)


def is_norm(class_name: str) -> bool:
    """Return whether "norm" is a word of a class's name: RMSNormGated, but not NormalHead."""
    return re.search(r"[nN]orm(?![a-z])", class_name) is not None


def is_table(class_name: str) -> bool:
    """Return whether a class's name ends as one that holds a table: VocabParallelEmbedding."""
    words = words_of(class_name)
    return bool(words) and words[-1] in _TABLES
