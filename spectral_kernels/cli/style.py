"""Shared by the plots: colours, and names shortened to fit."""

from __future__ import annotations

import re
from collections.abc import Sequence

# With nine markers, pairs of colour and marker repeat only after 72 kinds.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")


def layers_of(names: Sequence[str]) -> list[str | None]:
    """Return each name's layer: the part up to its first component that is a number, or None."""
    found = [re.match(r"(?:.*?\.)?\d+(?=\.)", name) for name in names]
    return [match[0] if match else None for match in found]


def shortened(text: str, most: int = 44) -> str:
    """Return ``text`` without its middle if it is longer than ``most`` characters."""
    half = most // 2 - 1
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def apart(names: Sequence[str], most: int = 44) -> dict[str, str]:
    """Return each name shortened to at most ``most`` characters, so that few become the same.

    Names of layers mostly begin alike, so long ones keep their end, or else both ends.
    """
    ends = {n: n if len(n) <= most else f"...{n[3 - most :]}" for n in names}
    both = {n: shortened(n, most) for n in names}
    return max((ends, both), key=lambda found: len(set(found.values())))
