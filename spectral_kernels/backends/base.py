"""The contract of a backend: three methods to write, four to inherit or to do faster.

A backend sees a plan (``tables.plan``: which matrices lie where, cut into tiles), and a state
(``tables.state``: flat buffers of vectors and scalars). With M rows, N columns and r singular
vectors per matrix, ``v`` and ``v_next`` hold [r, N] of each matrix, ``s`` [r, M], in float32
(float64 for float64 weights).

What is expected: sums are float32 or wider, in an order that does not depend on the number of
threads. ``s`` is scaled by ``formulas.inverse_power_of_two`` of the last sigma before it goes into
W^T s. A matrix of zeros has a gradient of zero; one that is not finite keeps its last good v.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..tables.device import DeviceTables
from ..tables.plan import Plan, Tables
from ..tables.state import State
from . import reference


class Rule(NamedTuple):
    """How gradients become steps."""

    number: int  # in csrc/table.h
    moments: tuple[str, ...]  # their names in torch.optim
    apply: Callable  # see formulas.adamw


@dataclass
class Step:
    """An optimizer's step over the parameters of one device and dtype.

    The same twice: as tensors, and as tables of their addresses for kernels (``address`` and
    ``header_address`` for a CPU, ``tables`` and ``group_table`` on the device).

    Attributes:
        rule: the optimizer's.
        plan: of the parameters with a penalty, or None.
        state: of ``plan``, with its s, sigma and v_next.
        weights: every parameter; those of ``plan`` first, in the order of its refs.
        grads: the gradient of each, or None.
        moments: of each, as ``rule.moments`` names them.
        acts: whose step it is; the others stay as they are.
        steps: [n_parameters] float32, the number of each parameter's step, this one included.
        groups: [n_groups] of schema.GROUP, hyperparameters.
        group_of: [n_parameters], a row of ``groups`` for each.
        decoupled: whether the penalty acts on the weights directly, beside weight decay.
        grad_scale: 0-d float32, by which gradients are divided, or None.
        found_inf: 0-d float32; where it is above zero nothing changes. None: everything does.
        moment_dtype: dtype of the moments.
        others: rows of schema.ELEMENTWISE, the parameters without a penalty, in parts.
        tables: ``others``, then a row of schema.MOMENT per matrix, elementwise parameter and other.
        group_table: ``groups``.
        address: of the struct Update.
        plain_header: a Header for a step without a penalty.
    """

    rule: Rule
    plan: Plan | None
    state: State | None
    weights: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    moments: Sequence[tuple[Tensor, ...]]
    acts: Sequence[bool]
    steps: Tensor
    groups: np.ndarray
    group_of: np.ndarray
    decoupled: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None
    moment_dtype: torch.dtype
    others: np.ndarray
    tables: DeviceTables
    group_table: DeviceTables
    address: int
    plain_header: int

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.weights[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.weights[0].dtype

    @property
    def header_address(self) -> int:
        """Address of the struct Header."""
        return self.plain_header if self.state is None else self.state.address


class Backend(ABC):
    """What runs power iterations, gradients and optimizers' steps.

    ``scalars_on_device``: whether ``update`` reads learning rate, grad_scale and found_inf on the
    device, so that the host does not wait for them.
    """

    name: str
    scalars_on_device = False

    @abstractmethod
    def gram_matvec(self, plan: Plan, state: State) -> None:
        """Multiply every matrix by its vectors, and take norms of what is elementwise.

        Reads weights [M, N] and ``state.v``; with a tolerance ``state.v_next``, for stale matrices
        alone. Writes

        * ``state.s`` = W v, [r, M] per matrix;
        * ``plan.t_partial``: per tile (a block of rows) its part of scale * W^T s, [r, N]; nothing
          where ``state.v_next`` is None;
        * ``plan.gram_partial``: per tile its part of s s^T, [r, r] float64;
        * ``state.norm`` [n_elementwise] and the elementwise part of ``state.raw_penalty``.
        """

    @abstractmethod
    def normalize(self, plan: Tables, state: State) -> None:
        """Finish an iteration from the tiles' parts, without a look at weights.

        Writes sigmas and residuals [r, n_matrices], the matrices' part of ``raw_penalty``, and
        ``v_next``, [r, N] orthonormal rows per matrix. With several vectors, v and s are turned to
        the Ritz vectors, unless ``v_next`` is None. With a tolerance, all this for stale matrices
        alone, whose v becomes ``v_next`` first.
        """

    @abstractmethod
    def rank_one(
        self, plan: Plan, state: State, grads: Sequence[Tensor | None], accumulate: bool
    ) -> None:
        """Add strength * dR/dW, an outer product of s and v, to gradients or write it over them.

        Args:
            plan: bound to ``grads``: its tables have their addresses.
            state: with s, v, sigmas, norm, strength, target, and a factor ``scale`` or None.
            grads: one per parameter of the plan, shaped and laid out like it; None: left out.
            accumulate: add, instead of writing over.
        """

    def finish(
        self, plan: Plan, state: State, grads: Sequence[Tensor | None], accumulate: bool
    ) -> None:
        """Do what ``normalize`` and then ``rank_one`` do, in fewer launches where that can be."""
        self.normalize(plan, state)
        self.rank_one(plan, state, grads, accumulate)

    def transposed(self, plan: Plan, state: State) -> None:
        """Write the tiles' parts of scale * W^T s and s s^T of the ``s`` that ``state`` holds.

        As ``gram_matvec``, but for s, which comes from a sum over ranks with other columns.
        """
        reference.transposed(plan, state)

    def collect(self, plan: Plan, state: State, t: Tensor | None, gram: Tensor) -> None:
        """Sum the tiles' parts of W^T s and s s^T of every matrix, for sums over ranks.

        Args:
            plan: whose parts are summed.
            state: of ``plan``.
            t: [sum of r N], laid out like ``v``, in the state's dtype; None: not wanted.
            gram: [n_matrices * r * r] float64. A matrix without rows or columns has zeros.
        """
        reference.collect(plan, state, t, gram)

    def update(self, step: Step) -> None:
        """Take an optimizer's step with the penalty's gradient in it.

        Then multiply the new weights by ``v_next``, as ``gram_matvec`` does with ``v``; the caller
        swaps the two afterwards. Where ``step.found_inf`` is above zero, nothing but the products
        is written, and these are those of ``v``, which goes to ``v_next``.
        """
        reference.update(step)


class Reference(Backend):
    """Plain PyTorch, on any device and for every dtype."""

    name = "reference"

    def gram_matvec(self, plan: Plan, state: State) -> None:
        """See :meth:`Backend.gram_matvec`."""
        reference.gram_matvec(plan, state)

    def normalize(self, plan: Tables, state: State) -> None:
        """See :meth:`Backend.normalize`."""
        reference.normalize(plan, state)

    def rank_one(self, plan: Plan, state: State, grads, accumulate: bool) -> None:
        """See :meth:`Backend.rank_one`."""
        reference.rank_one(plan, state, grads, accumulate)
