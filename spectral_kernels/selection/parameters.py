"""Where the parameters of a model live."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.utils.prune
from torch import nn

# Of torch.compile and of activation checkpointing, inside of names.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class ParameterRef:
    """Where a parameter lives: looked up again at every use, since modules may replace it.

    ``computed``: it is the weight that a parametrization makes of others at every use.
    """

    name: str
    module: nn.Module | None
    attribute: str
    tensor: torch.Tensor | None = None
    computed: bool = False

    def get(self) -> torch.Tensor:
        """Return the tensor that is the parameter now; RuntimeError when it is gone."""
        if self.module is None:
            return self.tensor
        if self.computed:
            return getattr(self.module, self.attribute)
        parameter = self.module._parameters.get(self.attribute)
        if parameter is None:
            raise RuntimeError(
                f"parameter {self.name!r} is no longer a parameter of its "
                f"{type(self.module).__name__} (was it parametrized, pruned or removed?); build a "
                "new SpectralRegularizer after such a change"
            )
        return parameter


class Computed:
    """What a parametrization makes, looked up as a parameter is."""

    def __init__(self, ref: ParameterRef):
        self.ref = ref

    def __getitem__(self, attribute: str) -> torch.Tensor:
        return self.ref.get()


def parameter_refs(source) -> list[list[ParameterRef]]:
    """Group the places where each distinct tensor is found, in order of appearance."""
    groups: dict[object, list[ParameterRef]] = {}
    if isinstance(source, nn.Module):
        for prefix, module in unwrapped(source).named_modules(remove_duplicate=False):
            _refuse_other_shards(prefix, module)
            for attribute, tensor in module._parameters.items():
                if tensor is not None:
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    for wrapper in _WRAPPERS:
                        name = name.replace(wrapper, "")
                    groups.setdefault(id(tensor), []).append(ParameterRef(name, module, attribute))
            if nn.utils.parametrize.is_parametrized(module):
                for attribute in module.parametrizations:
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    ref = ParameterRef(name, module, attribute, computed=True)
                    groups.setdefault((id(module), attribute), []).append(ref)
        return list(groups.values())
    if isinstance(source, torch.Tensor) or not isinstance(source, Iterable):
        raise TypeError(
            f"model: got {type(source).__name__}; accepted are a torch.nn.Module and an iterable "
            "of (name, parameter)"
        )
    seen: set[str] = set()
    for item in source:
        if not (
            isinstance(item, tuple)
            and len(item) == 2
            and isinstance(item[0], str)
            and isinstance(item[1], torch.Tensor)
        ):
            raise TypeError(f"model: got an item {item!r:.80}; accepted is (name, parameter)")
        name, tensor = item
        if name in seen:
            raise ValueError(f"model: the name {name!r} comes twice")
        seen.add(name)
        groups.setdefault(id(tensor), []).append(
            ParameterRef(name, None, name.rpartition(".")[2], tensor)
        )
    return list(groups.values())


def _refuse_other_shards(name: str, module: nn.Module) -> None:
    """Raise ValueError for parameters that are sharded in another way than as DTensors."""
    instead = "shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
    if type(module).__name__ == "FullyShardedDataParallel":
        raise ValueError(
            f"model: {name or 'it'!r} is a FullyShardedDataParallel (FSDP1), whose flat parameters "
            f"do not tell one matrix from another; {instead}"
        )
    if any(hasattr(p, "ds_id") for p in module._parameters.values()):
        raise ValueError(
            f"model: {name or 'it'!r} has placeholders of DeepSpeed's ZeRO-3 for parameters, whose "
            f"shards are not along a dimension; {instead}, or use ZeRO 1 or 2"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and torch.compile."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def made_before_use(ref: ParameterRef) -> str | None:
    """Return why a parameter is not the weight that its module uses, and what to do, or None."""
    for hook in getattr(ref.module, "_forward_pre_hooks", {}).values():
        if isinstance(hook, nn.utils.prune.BasePruningMethod):
            if ref.attribute == f"{hook._tensor_name}_orig":
                return (
                    "is pruned: what its module uses is made of it and a mask before every forward "
                    "pass; call torch.nn.utils.prune.remove first"
                )
        elif (kind := type(hook).__name__) in ("WeightNorm", "SpectralNorm"):
            own = f"{hook.name}_g", f"{hook.name}_v", f"{hook.name}_orig"
            if type(hook).__module__.startswith("torch.") and ref.attribute in own:
                new = "weight_norm" if kind == "WeightNorm" else "spectral_norm"
                return (
                    f"belongs to torch.nn.utils.{new}, which makes a weight of it before every "
                    f"forward pass; use torch.nn.utils.parametrizations.{new} instead"
                )
    return None
