"""Shared by the suites over lists of shapes: their parameters, and how a group is filled."""

from __future__ import annotations

import pytest
import torch

from tests.support import cases

from ..support.baselines import FLOORS
from ..support.devices import DEVICES


def dtypes(case: str, device: str) -> tuple[str, ...]:
    """Return the dtypes in which ``case`` is measured on ``device``."""
    if case in cases.LARGE:
        return ("bfloat16",) if device == "cuda" else ()
    return ("float32", "bfloat16")


def parameters(contenders):
    """Return (case, device, dtype, contender) for everything that a suite measures."""
    return [
        pytest.param(case, device, dtype, name)
        for case, shapes in cases.CASES.items()
        for device in DEVICES
        for dtype in dtypes(case, device)
        for name in (*contenders, *FLOORS)
        if name in FLOORS or contenders[name].enters(shapes(), dtype, device)
    ]


def compete_on_shapes(compete, suite: str, shapes, dtype: str, contenders) -> None:
    """Let ``compete`` (the fixture) check and time ``contenders`` on weights of ``shapes``."""

    def fill(group, names) -> None:
        chosen = {name: contenders[name] for name in names if name in contenders}
        group.run(shapes, getattr(torch, dtype), chosen, names)

    weights = sum(m * n for m, n in shapes)
    compete(fill, suite=suite, matrices=len(shapes), weights=weights)
