"""The interface of a backend: three methods to write, four to inherit or to override for speed.

A backend works on a plan (``tables.plan``: addresses, layouts and tiles of matrices) and a state
(``tables.state``: flat buffers of vectors and scalars). For a matrix with M rows, N columns and r
singular vectors, ``v`` and ``v_next`` hold [r, N] and ``s`` [r, M], in float32 (float64 for float64
weights).

Requirements: sums are float32 or wider, in an order that does not depend on the number of threads.
``s`` is scaled by ``formulas.inverse_power_of_two`` of the last sigma before W^T s is computed. A
zero matrix has a zero gradient; a matrix with an element that is not finite keeps its v.
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
from ..tables.state import Ratios, State
from . import reference


class Rule(NamedTuple):
    """An optimizer's rule, AdamW or SGD."""

    number: int  # of enum Rule in csrc/table.h
    moments: tuple[str, ...]  # their names in torch.optim
    apply: Callable  # called as formulas.adamw is


@dataclass
class Step:
    """An optimizer's step over the parameters of one device and dtype.

    It holds tensors, and for kernels tables of their addresses (``address`` and ``header_address``
    on the host, ``tables`` and ``group_table`` on the device).

    Attributes:
        rule: AdamW or SGD.
        plan: the plan of the parameters with a penalty, or None.
        state: the state of ``plan``, with s, sigma and v_next of the present weights, or None.
        weights: all parameters; those of ``plan`` first, in the order of its refs.
        grads: the gradient of each parameter, or None.
        moments: of each parameter, in the order of ``rule.moments``.
        acts: whether each parameter takes the step; the others do not change.
        steps: [n_parameters] float32, step count of each parameter, this step included.
        groups: [n_groups] of schema.GROUP, hyperparameters.
        group_of: [n_parameters], the row of ``groups`` of each parameter.
        decoupled: whether the penalty acts on the weights directly, beside weight decay.
        constraint: "cap" or "sphere", in place of the penalty (then ``decoupled`` is true), or
            None.
        grad_scale: 0-d float32, by which gradients are divided, or None.
        found_inf: 0-d float32; the step is skipped where it is above zero. None: never.
        moment_dtype: dtype of the moments.
        others: rows of schema.ELEMENTWISE, the parameters without a penalty, in parts.
        tables: ``others``, then rows of schema.MOMENT for matrices, elementwise parameters, others.
        group_table: ``groups`` on the device.
        address: address of the struct Update.
        plain_header: address of the struct Header of a step without a penalty.
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
    constraint: str | None
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
    """Base class of backends: power iterations, gradients and optimizers' steps.

    ``scalars_on_device``: whether ``update`` reads learning rate, grad_scale and found_inf on the
    device, so that the host does not wait for them.
    """

    name: str
    scalars_on_device = False

    @abstractmethod
    def gram_matvec(self, plan: Plan, state: State) -> None:
        """Compute the products of every matrix, and the norms of elementwise parameters.

        Reads weights [M, N] and ``state.v``; with a tolerance ``state.v_next``, and only for stale
        matrices. Writes

        * ``state.s`` = W v, [r, M] per matrix;
        * ``plan.t_partial``: per tile (a block of rows) its part of scale * W^T s, [r, N]; nothing
          if ``state.v_next`` is None;
        * ``plan.gram_partial``: per tile its part of s s^T, [r, r], in the
          ``tables.device.wide_dtype``: float64 on every device that has it;
        * ``state.norm`` [n_elementwise], of rows the largest norm, and the elementwise part of
          ``state.raw_penalty``. What they are pulled to is in ``plan.targets``.
        """

    @abstractmethod
    def normalize(self, plan: Tables, state: State) -> None:
        """Finish an iteration from the tiles' parts, without reading weights.

        Writes sigmas and residuals [r, n_matrices], the matrices' part of ``raw_penalty``, and
        ``v_next``, [r, N] orthonormal rows per matrix. With several vectors, v and s are rotated to
        the Ritz vectors, unless ``v_next`` is None. With a tolerance, only stale matrices are
        processed, and ``v_next`` is copied to their v first.
        """

    @abstractmethod
    def rank_one(
        self, plan: Plan, state: State, grads: Sequence[Tensor | None], accumulate: bool
    ) -> None:
        """Add strength * dR/dW, an outer product of s and v, to the gradients, or overwrite them.

        Args:
            plan: bound to ``grads``: its tables hold their addresses.
            state: with s, v, sigmas, norm, strength, target, and a factor ``scale`` or None.
            grads: one per ref of the plan, shaped and laid out like the parameter; None: skipped.
            accumulate: add to the gradients; otherwise overwrite them.
        """

    def finish(
        self, plan: Plan, state: State, grads: Sequence[Tensor | None], accumulate: bool
    ) -> None:
        """Run ``normalize``, then ``rank_one``; override to take fewer launches."""
        self.normalize(plan, state)
        self.rank_one(plan, state, grads, accumulate)

    def transposed(self, plan: Plan, state: State) -> None:
        """Write the tiles' parts of scale * W^T s and s s^T for the ``s`` in ``state``.

        Like ``gram_matvec``, but s is given: it was summed over the ranks that hold other columns.
        """
        reference.transposed(plan, state)

    def collect(self, plan: Plan, state: State, t: Tensor | None, gram: Tensor) -> None:
        """Sum the tiles' parts of W^T s and s s^T of every matrix, for sums over ranks.

        Args:
            plan: the plan that holds the parts.
            state: the state of ``plan``.
            t: output [sum of r * N], laid out like ``v``, in the state's dtype; None: not computed.
            gram: output [n_matrices * r * r] of the dtype of ``plan.gram_partial``, zero for a
                matrix without rows or columns.
        """
        reference.collect(plan, state, t, gram)

    def update(self, step: Step) -> None:
        """Take an optimizer's step with the penalty's gradient in it.

        Then multiply the new weights by ``v_next``, as ``gram_matvec`` does with ``v``; the caller
        swaps the two afterwards. Where ``step.found_inf`` is above zero, weights and moments do not
        change, ``v`` is copied to ``v_next``, and the products are taken with it. In the decoupled
        form the penalty carries sigma to the target at most, and likewise what is elementwise. With
        a constraint, ``formulas.held_factor`` of every s_j v_j^T or of W is subtracted instead.
        """
        reference.update(step)

    def jumps(self, state: State, ratios: Ratios, least: float, factor: float) -> bool:
        """Return whether residual / sigma of a matrix has jumped; called for weights on a CPU.

        A jump is to above ``least`` and above ``factor`` times the number in ``ratios``. Without
        one, the new numbers are written there; that of a zero matrix is 0.
        """
        return reference.jumps(state, ratios, least, factor)


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
