"""Shared by the plots: colours, names that are safe and fit, log axes of any range, and files."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import IO

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullFormatter

from ..diagnostics.checkpoints.entries import natural

# With nine markers, pairs of colour and marker repeat only after 72 kinds.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")

# Powers of ten that a float64 can hold.
_LEAST_EXPONENT, _MOST_EXPONENT = -323, 308
_SMALLEST = math.ulp(0.0)
# Between labelled powers of ten.
_STRIDES = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200)


# ----------------------------------------------------------------------------------------- names


def layers_of(names: Sequence[str]) -> list[str | None]:
    """Return each name's layer: the part up to its first number that stands alone, or None.

    Such a number has dots, underscores or slashes around it: the layer of ``h.3.fc.weight`` is
    ``h.3``, that of ``layers_3_attention`` is ``layers_3``, and ``fc1.weight`` has none.
    """
    found = [re.match(r"(?:.*?[._/])?\d+(?=[._/])", name) for name in names]
    return [match[0] if match else None for match in found]


def stack_of(layer: str) -> tuple[str, str]:
    """Return what stands before a layer's number, and the number: ``"h."`` and ``"3"``."""
    stem = layer.rstrip("0123456789")
    return stem, layer[len(stem) :]


def in_layers(names: Sequence[str]) -> list[int]:
    """Return the order of names in which layers are together and ascend by number.

    Stacks of layers, such as those of an encoder and a decoder, stay where their first layer is;
    names without a layer, and those of one layer among themselves, keep their order.
    """
    places: dict[str, int] = {}
    keys: list[tuple[int, list]] = []
    for i, layer in enumerate(layers_of(names)):
        if layer is None:
            keys.append((i, []))
        else:
            stack = re.sub(r"\d+", "*", stack_of(layer)[0])
            keys.append((places.setdefault(stack, i), natural(layer)))
    return sorted(range(len(names)), key=keys.__getitem__)


def shortened(text: str, most: int = 44) -> str:
    """Return ``text`` for a picture: without its middle if it is longer than ``most`` characters.

    matplotlib shows what is returned as it is: no part of it is a formula, and characters that the
    font does not have are escaped.
    """
    return _literal(_without_middle(_drawable(text), most))


def apart(names: Sequence[str], most: int = 44) -> dict[str, str]:
    """Return each name :func:`shortened`, so that few become the same.

    Names of layers mostly begin alike, so long ones keep their end, or else both ends.
    """
    drawable = {n: _drawable(n) for n in names}
    ends = {n: d if len(d) <= most else f"...{d[3 - most :]}" for n, d in drawable.items()}
    both = {n: _without_middle(d, most) for n, d in drawable.items()}
    best = max((ends, both), key=lambda found: len(set(found.values())))
    return {n: _literal(text) for n, text in best.items()}


def _without_middle(text: str, most: int) -> str:
    half = most // 2 - 1
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def _drawable(text: str) -> str:
    glyphs = _glyphs()
    if text.isprintable() and glyphs.issuperset(map(ord, text)):
        return text
    return "".join(c if c.isprintable() and ord(c) in glyphs else ascii(c)[1:-1] for c in text)


@functools.cache
def _glyphs() -> frozenset[int]:
    """Return the characters of the font, as code points."""
    path = font_manager.findfont(font_manager.FontProperties())
    return frozenset(font_manager.get_font(path).get_charmap())


def _literal(text: str) -> str:
    """Return ``text`` so that matplotlib takes a dollar sign for one.

    The space keeps a name in the legend, which leaves out what begins with an underscore.
    """
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text or "''"


# -------------------------------------------------------------------------------------- log axes


def set_log_scale(axes, values: np.ndarray, most: int = 9) -> None:
    """Give the y axis a log scale for those ``values`` that are finite and above 0, if there are.

    Args:
        axes: the panel.
        values: of any shape, from the smallest float64 to the largest.
        most: number of labels, about; at least 4.
    """
    limits = log_limits(values)
    if limits is None:
        return
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    ticks, labels, between = log_ticks(*limits, most)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FixedFormatter(labels))
    axes.yaxis.set_minor_locator(FixedLocator(between))
    axes.yaxis.set_minor_formatter(NullFormatter())


def log_limits(values: np.ndarray, margin: float = 0.05) -> tuple[float, float] | None:
    """Return ends of an axis, low < high, for those ``values`` that are finite and above 0.

    Args:
        values: of any shape.
        margin: at both ends, as a fraction of the axis.

    Returns:
        None if there is no such value.
    """
    good = values[np.isfinite(values) & (values > 0)]
    if not good.size:
        return None
    least, largest = float(good.min()), float(good.max())
    begin, end = math.log10(least), math.log10(largest)
    beside = max(margin * (end - begin), 0.01)
    # In these bounds a power of ten is neither 0 nor inf.
    low = min(least, 10.0 ** max(begin - beside, _LEAST_EXPONENT))
    high = max(largest, 10.0 ** min(end + beside, _MOST_EXPONENT))
    # Below the normal floats there may be none in between; three labels need some.
    return low, max(high, low + 4 * _SMALLEST)


def log_ticks(low: float, high: float, most: int = 9) -> tuple[list[float], list[str], list[float]]:
    """Return round numbers on a log axis from ``low`` to ``high``, their labels, and ticks between.

    Args:
        low, high: ends of the axis, as :func:`log_limits` returns them.
        most: number of labels, about; at least 4.

    Returns:
        At least three numbers and labels, and the ticks without a label.
    """
    first = max(math.floor(math.log10(low)), _LEAST_EXPONENT)
    exponents = range(first, min(math.ceil(math.log10(high)), _MOST_EXPONENT) + 1)

    def within(factors: Sequence[int]) -> list[float]:
        found = [m * 10.0**e for e in exponents for m in factors]
        return [x for x in found if low <= x <= high]

    if high / 1e3 >= low:
        inside = [e for e in exponents if low <= 10.0**e <= high]
        strides = [(n, [e for e in inside if e % n == 0]) for n in _STRIDES]
        strides = [(n, powers) for n, powers in strides if len(powers) >= 3]
        every, powers = next((s for s in strides if len(s[1]) <= most), strides[-1])
        labels = [f"$10^{{{e}}}$" for e in powers]
        return [10.0**e for e in powers], labels, within(range(2, 10)) if every == 1 else []
    choices = [c for c in (within((1, 2, 5)), within((1, 3))) if len(c) >= 3]
    if choices:
        ticks = next((c for c in choices if len(c) <= most), choices[-1])
        between = [x for x in within(range(1, 10)) if x not in ticks]
    else:
        ticks, between = _linear_ticks(low, high, most), []
    return ticks, [f"{t:g}" for t in ticks], between


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Return at least three numbers at even distances, for an axis shorter than a decade."""
    # Near either end of the floats, only numbers near one can be divided evenly.
    unit = 10.0 ** max(math.floor(math.log10(high)), _LEAST_EXPONENT)
    locator = MaxNLocator(min(most, 5), steps=(1, 2, 2.5, 5, 10), min_n_ticks=3)
    ticks = {unit * float(t) for t in locator.tick_values(low / unit, high / unit)}
    return sorted(t for t in ticks if low <= t <= high)


# ----------------------------------------------------------------------------------------- files


def save(figure: Figure, path: str | PathLike[str]) -> None:
    """Write a figure as PNG, PDF or SVG, which the suffix of ``path`` says.

    Raises:
        OSError: the file cannot be written.
    """
    write(figure, path, Path(path).suffix[1:].lower())


def write(figure: Figure, target: str | PathLike[str] | IO[bytes], kind: str) -> None:
    """Write a figure; the same figure gives the same bytes.

    Args:
        figure: the picture.
        target: a path or a file.
        kind: the format, "png", "pdf" or "svg".

    Raises:
        OSError: the file cannot be written.
    """
    undated = {"png": None, "pdf": {"CreationDate": None},
               "svg": dict.fromkeys(("Creator", "Date", "Format", "Type"))}  # fmt: skip
    with matplotlib.rc_context({"svg.hashsalt": "spectral_kernels"}):
        figure.savefig(target, format=kind, metadata=undated[kind])
