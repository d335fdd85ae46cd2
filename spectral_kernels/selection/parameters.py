"""References to the parameters of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.utils.prune
from torch import nn

from .arguments import shown

# Parts that torch.compile and activation checkpointing insert into names.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class ParameterRef:
    """Where a parameter lives: looked up at every use, since modules may replace it.

    ``computed``: the weight is computed by a parametrization at every use.
    """

    name: str
    module: nn.Module | None
    attribute: str
    tensor: torch.Tensor | None = None
    computed: bool = False

    def get(self) -> torch.Tensor:
        """Return the current tensor; RuntimeError if the parameter was removed."""
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
    """A computed weight, with the lookup of ``module._parameters``."""

    def __init__(self, ref: ParameterRef):
        self.ref = ref

    def __getitem__(self, attribute: str) -> torch.Tensor:
        return self.ref.get()


def without_wrappers(name: str) -> str:
    """Return a name without the parts that torch.compile and checkpointing insert."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def parameter_refs(source) -> list[list[ParameterRef]]:
    """Return the refs of each distinct tensor, in order of appearance."""
    groups: dict[object, list[ParameterRef]] = {}
    if isinstance(source, nn.Module):
        for prefix, module in unwrapped(source).named_modules(remove_duplicate=False):
            _refuse_other_shards(prefix, module)
            for attribute, tensor in module._parameters.items():
                if tensor is not None:
                    name = without_wrappers(f"{prefix}.{attribute}" if prefix else attribute)
                    groups.setdefault(id(tensor), []).append(ParameterRef(name, module, attribute))
            if nn.utils.parametrize.is_parametrized(module):
                for attribute in module.parametrizations:
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    ref = ParameterRef(name, module, attribute, computed=True)
                    groups.setdefault((id(module), attribute), []).append(ref)
        return list(groups.values())
    if isinstance(source, torch.Tensor | Mapping | str) or not isinstance(source, Iterable):
        got = repr(source) if isinstance(source, str) else type(source).__name__
        raise TypeError(
            f"model: got {got}; accepted are a torch.nn.Module and an iterable of "
            "(name, parameter), such as model.state_dict().items()"
        )
    seen: dict[str, torch.Tensor] = {}
    for item in source:
        if isinstance(item, torch.Tensor):
            raise TypeError(
                "model: got parameters without names; pass the module or model.named_parameters()"
            )
        if not (
            isinstance(item, tuple)
            and len(item) == 2
            and isinstance(item[0], str)
            and isinstance(item[1], torch.Tensor)
        ):
            raise TypeError(f"model: got an item {shown(item)}; accepted is (name, parameter)")
        name, tensor = item
        if name in seen:
            if seen[name] is tensor:
                continue
            raise ValueError(f"model: got the name {name!r} twice; accepted are distinct names")
        seen[name] = tensor
        groups.setdefault(id(tensor), []).append(
            ParameterRef(name, None, name.rpartition(".")[2], tensor)
        )
    return list(groups.values())


def _refuse_other_shards(name: str, module: nn.Module) -> None:
    """Raise ValueError for parameters that are sharded, but not as DTensors."""
    instead = "shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
    if type(module).__name__ == "FullyShardedDataParallel":
        raise ValueError(
            f"model: {name or 'it'!r} is a FullyShardedDataParallel (FSDP1), whose flat parameters "
            f"are not divided into matrices; {instead}"
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
    """Return why a parameter is not its module's weight, and what to do, or None if it is."""
    for hook in getattr(ref.module, "_forward_pre_hooks", {}).values():
        if isinstance(hook, nn.utils.prune.BasePruningMethod):
            if ref.attribute == f"{hook._tensor_name}_orig":
                return (
                    "is pruned: its module uses the product with a mask, computed before every "
                    "forward pass; call torch.nn.utils.prune.remove first"
                )
        elif (kind := type(hook).__name__) in ("WeightNorm", "SpectralNorm"):
            own = f"{hook.name}_g", f"{hook.name}_v", f"{hook.name}_orig"
            if type(hook).__module__.startswith("torch.") and ref.attribute in own:
                new = "weight_norm" if kind == "WeightNorm" else "spectral_norm"
                return (
                    f"belongs to torch.nn.utils.{new}, which computes the weight from it before "
                    f"every forward pass; use torch.nn.utils.parametrizations.{new} instead"
                )
    return None
