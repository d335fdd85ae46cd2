"""A simulated GPU on a CPU: kernels see only copies of what Python writes.

The kernels are those of the "cpu" backend and read copies of the tables. A CUDA graph is a list of
calls; kernels get the arguments of the capture, and torch's operations its tensors.
"""

import contextlib
import ctypes

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectral_kernels import SpectralAdamW, SpectralRegularizer
from spectral_kernels.backends import choice
from spectral_kernels.backends.base import Backend
from spectral_kernels.tables import device as device_tables
from spectral_kernels.tables import schema
from spectral_kernels.tables.schema import SLOT, address

WAYS = ("accumulate", "penalty", "decoupled", "optimizer")  # to have the penalty in a step
_TABLES = [SLOT[name] for name in ("matrices", "tiles", "elementwise", "chunks")]


def training(model, way, backend, loss_of, **options):
    """Return a step as torch recommends for graphs, its device scalars, and a getter of results.

    Some parameters are not regularized.
    """
    device = next(model.parameters()).device
    strength, lr = torch.tensor([0.1, 1e-2], device=device)
    options = {"strength": strength, "exclude": ["1.*", "*.bias"], "backend": backend, **options}
    if way == "optimizer":
        # Gradients of a graph may be rounded differently: eps is above their rounding.
        optimizer = reg = SpectralAdamW(model, lr, eps=1e-3, **options)
    else:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        reg = SpectralRegularizer(model, **options)
        if way == "decoupled":
            reg.attach(optimizer, decoupled=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model)
        if way == "penalty":
            loss = loss + reg.penalty()
        loss.backward()
        if way == "accumulate":
            reg.accumulate_grad_()
        optimizer.step()

    return step, (strength, lr), lambda: [*(p.detach() for p in model.parameters()), reg.sigma]


def check_graph(capture, make, equal):
    """Assert that replays and eager steps give the results of a twin with eager steps only.

    Args:
        capture: returns a graph of a step, after running it once.
        make: returns what :func:`training` does, the same at every call.
        equal: compares the results of two steps.
    """
    (step, numbers, state), (twin_step, twin_numbers, twin_state) = make(), make()
    graph = capture(step)
    twin_step()
    assert equal(state(), twin_state())
    for i in range(4):
        for number, value in zip((*numbers, *twin_numbers), (0.1, 0.01, 0.1, 0.01), strict=True):
            number.fill_(value * (i + 1))
        graph.replay()
        twin_step()
        assert equal(state(), twin_state()), i
    for call in (step, step, graph.replay, step, graph.replay, graph.replay):
        call()
        twin_step()
        assert equal(state(), twin_state()), call


class GpuLike:
    """The simulated device; ``patch`` is pytest's monkeypatch."""

    def __init__(self, patch):
        self.graph = None  # the one being captured
        self.pinned = []
        patch.setattr(device_tables, "shares_memory", lambda device: False)
        patch.setattr(device_tables, "pinned", self._pin)
        patch.setattr(device_tables, "is_capturing", lambda device: self.graph is not None)
        make = choice._make
        patch.setattr(
            choice, "_make",
            lambda name, dtype: Kernels(self) if name == "cpu" else make(name, dtype),
        )  # fmt: skip

    def _pin(self, n, dtype):
        assert self.graph is None, "page-locked memory is not allocated during a capture"
        self.pinned.append(torch.empty(n, dtype=dtype))
        return self.pinned[-1]

    def is_pinned(self, tensor):
        return any(_start(tensor) == _start(other) for other in self.pinned)

    def captured(self, step):
        """Return a graph of ``step``, which has effects only when replayed."""
        self.graph = graph = Graph(self)
        try:
            with graph:
                step()
        finally:
            self.graph = None
            graph.undo()
        return graph

    @contextlib.contextmanager
    def without_waits(self):
        """Assert that nothing makes the host wait for the device."""
        mode = _Waits(self)
        with mode:
            yield
        assert not mode.found, mode.found


class Graph(TorchDispatchMode):
    """Operations of torch and kernels, in order."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu, self.calls = gpu, []
        self._made, self._before = [], {}  # new tensors; written storages with a copy

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    storage = tensor.untyped_storage()
                    made = any(_start(tensor) == _start(other) for other in self._made)
                    if not made and not self.gpu.is_pinned(tensor):
                        self._before.setdefault(_start(tensor), (storage, storage.clone()))
        out = func(*args, **kwargs)
        self._made += [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)
                       and not any(_start(x) == _start(y) for y in tree_leaves((args, kwargs))
                                   if isinstance(y, torch.Tensor))]  # fmt: skip
        self.calls.append(lambda: _again(func, args, kwargs, out))
        return out

    def undo(self):
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self):
        for call in self.calls:
            call()


class Kernels(Backend):
    """The kernels of the "cpu" backend, launched with headers by value, on copies of tables."""

    name = "cpu"
    scalars_on_device = True  # except found_inf, which these kernels lack

    def __init__(self, gpu):
        self._gpu, self._native = gpu, choice.native_module().cpu

    def gram_matvec(self, plan, state):
        self._launch("gram_matvec", [self._header(plan, state)])

    def normalize(self, plan, state):
        self._launch("normalize", [self._header(plan, state)])

    def rank_one(self, plan, state, grads, accumulate):
        self._launch("rank_one", [self._header(plan, state)], accumulate)

    def update(self, step):
        if step.plan is None:
            header = _copy_of_struct(step.header_address, len(schema.HEADER))
        else:
            header = self._header(step.plan, step.state)
        self._launch("update", [header, _copy_of_struct(step.address, len(schema.UPDATE))])

    @staticmethod
    def _header(plan, state):
        header = state.header.copy()
        header[_TABLES] = plan.device_tables().addresses
        return header

    def _launch(self, name, headers, *numbers):
        kernel = getattr(self._native, name)

        def call():
            kernel(*map(address, headers), *numbers, 1)

        if self._gpu.graph is None:
            call()
        else:
            self._gpu.graph.calls.append(call)


def _copy_of_struct(where, n_fields):
    return np.ctypeslib.as_array((ctypes.c_int64 * n_fields).from_address(where)).copy()


class _Waits(TorchDispatchMode):
    """Finds operations that would wait: reading a number, using pageable host memory."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu, self.found, self._host = gpu, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name == "aten::lift_fresh":  # torch.tensor(...)
            self._host += given
        elif any(map(self._is_on_host, given)):
            if not (name == "aten::copy_" and self.gpu.is_pinned(args[0])):
                self.found.append(f"{name} of memory of the host")
        elif name == "aten::_local_scalar_dense":
            self.found.append(name)
        elif name == "aten::copy_" and self.gpu.is_pinned(args[1]) and args[2:] != (True,):
            self.found.append(f"{name} that is not non_blocking")
        return func(*args, **kwargs)

    def _is_on_host(self, tensor):
        return any(_start(tensor) == _start(other) for other in self._host)


def _start(tensor):
    return tensor.untyped_storage().data_ptr()


def _again(func, args, kwargs, out):
    """Call ``func`` again, and write the results into the tensors that it returned before."""
    for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)
