"""What the pictures share: colours, and names cut to fit."""

from __future__ import annotations

import re
from collections.abc import Sequence

# With as many shapes, so that pairs of both repeat only after 72 kinds.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")


def layers_of(names: Sequence[str]) -> list[str | None]:
    """Return what comes up to the first number that stands alone in a name: its layer."""
    found = [re.match(r"(?:.*?\.)?\d+(?=\.)", name) for name in names]
    return [match[0] if match else None for match in found]


def shortened(text: str, most: int = 44) -> str:
    """Return ``text`` with its middle left out where it is longer than ``most``."""
    half = most // 2 - 1
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def apart(names: Sequence[str], most: int = 44) -> dict[str, str]:
    """Return a text of ``most`` characters at most for each name, so cut that few become the same.

    Names of layers mostly begin alike, so it is the ends of long ones that stay, or else both ends.
    """
    ends = {n: n if len(n) <= most else f"...{n[3 - most :]}" for n in names}
    both = {n: shortened(n, most) for n in names}
    return max((ends, both), key=lambda found: len(set(found.values())))
