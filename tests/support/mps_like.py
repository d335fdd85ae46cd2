"""A simulated device of Apple's (mps) on a CPU: it has no float64.

A tensor of it holds one on the CPU. Like the real device, it refuses float64 and operations on
tensors of both devices, except copies and numbers (0-d tensors); frexp came there after torch 2.10.
"""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("mps")


class OnMps(torch.Tensor):
    """A tensor whose device is mps; ``held`` has its elements."""

    @staticmethod
    def __new__(cls, held):
        found = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype
        )
        found.held = held
        return found

    device = property(lambda self: DEVICE)
    data_ptr = property(lambda self: self.held.data_ptr)
    tolist = property(lambda self: self.held.tolist)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def mps_like():
    """Let factories and ``Tensor.to`` make tensors of the device, too."""
    with _Factories(), mock.patch.object(torch.Tensor, "to", _to):
        yield


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


_cast = torch.Tensor.to


def _to(tensor, *args, **kwargs):
    """Stand in for ``Tensor.to``."""
    if args and isinstance(args[0], torch.Tensor):
        args = args[0].device, args[0].dtype
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    dtype = tensor.dtype if dtype is None else dtype
    if device is None or device == tensor.device:
        return _cast(tensor, dtype)
    if device == DEVICE:
        return _on_mps("to", _cast(tensor, dtype, copy=True))
    return _cast(tensor.held, dtype, copy=True)


def _run(func, args, kwargs):
    name, given = func._schema.name, tree_leaves((args, kwargs))
    here = [x for x in given if isinstance(x, OnMps)]
    others = [x for x in given if isinstance(x, torch.Tensor) and not isinstance(x, OnMps)]
    if here and name == "aten::frexp":
        raise NotImplementedError(f"{name}: not on mps")
    if here and name != "aten::copy_" and any(x.dim() for x in others):
        raise RuntimeError(f"{name}: tensors of mps and of the CPU")
    onto = bool(here)
    if kwargs.get("device") is not None:
        onto = torch.device(kwargs["device"]) == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name == "aten::copy_":
        onto = isinstance(args[0], OnMps)
    args, kwargs = tree_map_only(OnMps, lambda x: x.held, (args, kwargs))
    out = func(*args, **kwargs)
    if not onto:
        return out
    known = {id(x.held): x for x in here}  # what was written in place
    return tree_map_only(
        torch.Tensor, lambda x: known[id(x)] if id(x) in known else _on_mps(name, x), out
    )


def _on_mps(name, held):
    if held.dtype == torch.float64:
        raise TypeError(f"{name}: mps has no float64")
    return OnMps(held)


def moved(model):
    """Move a model to the device, in place."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(OnMps(p.detach().clone()))
    return model
