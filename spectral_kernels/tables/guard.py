"""Steps that stay prepared: one native call compares what they were prepared from, and takes them.

A step asks every tensor for address, shape, strides, dtype, device and storage, and many Python
objects whether they are the same as before. Asked one by one from Python this takes several times
as long as the arithmetic of a small network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .addresses import Column, Counter, native_or_none, tensor_reader

# What Guard.look and Guard.step return, see csrc/guard.h; or the index of a job.
FITS, CHANGED, MISSING = -1, -2, -3
# What the gradient of a holder is: not looked at, None, a tensor.
IGNORED, NONE, TENSOR = -1, 0, 1


@dataclass
class Watched:
    """What a step is prepared from.

    Attributes:
        lookups: (dict, key, value): the value is that very object.
        lists: (list, items): the items are those very objects.
        mappings: (dict, keys, values): likewise, in the order of the dict.
        written: tensors that are written to: neither address nor layout may change.
        read: the same of tensors that are only read, and may overlap.
        holders: (tensor, one of IGNORED, NONE and TENSOR): whether it requires a gradient stays,
            and so does the layout of its gradient; the address of that may change.
        versioned: tensors whose version in torch stays.
        edited: tensors whose version counts the step; None: the gradients.
        options: (dict, key, index, address, is_fixed): a hyperparameter, a Python number, in the
            dict or in a tuple there (index; -1 for none); it is written to the address, a float64,
            or must be what is there (``is_fixed``).
        columns: (first, column): fields with addresses of gradients; the refs of the column count
            from the holder ``first``.
        counters: of the changes of the tables that the step uses.
        jobs: addresses of the structs and arrays of each job on a CPU, see cpu::Job in
            csrc/cpu/backend.h: header, update, ratios, steps, acts, and the number of the last two.
    """

    lookups: list[tuple[dict, Any, Any]] = field(default_factory=list)
    lists: list[tuple[list, Sequence[Any]]] = field(default_factory=list)
    mappings: list[tuple[dict, Sequence[Any], Sequence[Any]]] = field(default_factory=list)
    written: list[torch.Tensor] = field(default_factory=list)
    read: list[torch.Tensor] = field(default_factory=list)
    holders: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    versioned: list[torch.Tensor] = field(default_factory=list)
    edited: list[torch.Tensor] | None = None
    options: list[tuple[dict, str, int, int, bool]] = field(default_factory=list)
    columns: list[tuple[int, Column]] = field(default_factory=list)
    counters: list[Counter] = field(default_factory=list)
    jobs: list[tuple[int, ...]] = field(default_factory=list)

    def attribute(self, owner: object, name: str) -> None:
        """Watch an attribute that is in the ``__dict__`` of its owner."""
        self.lookups.append((owner.__dict__, name, owner.__dict__[name]))


class Guard:
    """What a step was prepared from, compared with the objects and tensors of this moment.

    Args:
        watched: what is compared.
        least: see ``Backend.jumps``.
        factor: see there.

    Raises:
        ValueError: something that cannot be watched, or no native module.
    """

    def __init__(self, watched: Watched, least: float = 0.0, factor: float = 0.0):
        native, reader = native_or_none(), tensor_reader()
        if native is None or reader is None:
            raise ValueError("tensors cannot be read in native code here")
        dicts = [x[0] for x in (*watched.lookups, *watched.mappings, *watched.options)]
        if not all(type(one).__getitem__ in _PLAIN for one in dicts):
            raise ValueError("a dict has a lookup of its own")
        # The native object keeps no references: all are here, where garbage collection sees them.
        self._objects = (
            _flat(watched.lookups),
            _flat((own, tuple(items)) for own, items in watched.lists),
            _flat((own, tuple(keys), tuple(values)) for own, keys, values in watched.mappings),
            (*watched.written, *watched.read),
            tuple(holder for holder, _ in watched.holders),
            _flat((own, key) for own, key, *_ in watched.options),
            tuple(watched.versioned),
            tuple(watched.edited or ()),
        )
        self._kept = watched.columns, watched.counters
        self._native = native.Guard(
            reader, self._objects, [kind for _, kind in watched.holders], len(watched.written),
            watched.edited is None, [(first, *column.where) for first, column in watched.columns],
            [counter.address for counter in watched.counters],
            [(index, address, is_fixed) for *_, index, address, is_fixed in watched.options],
            watched.jobs, least, factor, torch._C._increment_version,
            torch.is_inference_mode_enabled,
        )  # fmt: skip
        self._look, self._step = self._native.look, self._native.step
        self.was_useful = False  # whether it has fitted since it was made

    def look(self) -> int:
        """Return FITS, CHANGED or MISSING; if it fits, the tables have the present addresses.

        MISSING: all fits but gradients that are None where there were tensors.
        """
        found = self._look(self._objects)
        self.was_useful = self.was_useful or found != CHANGED
        return found

    def step(self) -> int:
        """Look; if it fits take the step, with torch's number of threads.

        Returns:
            FITS: it is done. CHANGED or MISSING: nothing is done. From 0 on: the index of a job
            whose vectors have jumped; an optimizer's update of it is done, the penalty's gradient
            is not added, and no job after it is begun; no version of a tensor counts the step yet.
        """
        found = self._step(self._objects, torch.get_num_threads())
        self.was_useful = self.was_useful or found != CHANGED
        return found

    def versions(self) -> list[int]:
        """Return the versions of the ``versioned`` tensors after the last step."""
        return self._native.versions()


_PLAIN = {dict.__getitem__, OrderedDict.__getitem__}


def _flat(rows: Iterable[Iterable[Any]]) -> tuple[Any, ...]:
    return tuple(x for row in rows for x in row)
