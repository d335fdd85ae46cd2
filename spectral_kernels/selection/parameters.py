"""References to the parameters of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.utils.prune
from torch import nn

from .arguments import expected

# Modules that hold another one as this attribute; its parameters keep the names they have there.
_WRAPPERS = {
    "DataParallel": "module", "DistributedDataParallel": "module", "AveragedModel": "module",
    "DeepSpeedEngine": "module", "OptimizedModule": "_orig_mod", "_FabricModule": "_forward_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}  # fmt: skip


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

    @property
    def place(self) -> tuple[int, str]:
        """The module's id and the attribute, which are the same whatever the name and tensor."""
        return id(self.module), self.attribute

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


def parameter_refs(source) -> list[list[ParameterRef]]:
    """Return the refs of each distinct tensor, in order of appearance."""
    groups: dict[object, list[ParameterRef]] = {}
    if isinstance(source, nn.Module):
        for prefix, module in named_modules(source):
            _refuse_other_shards(prefix, module)
            for attribute, tensor in module._parameters.items():
                if tensor is not None:
                    ref = ParameterRef(prefix + attribute, module, attribute)
                    groups.setdefault(id(tensor), []).append(ref)
            if nn.utils.parametrize.is_parametrized(module):
                for attribute in module.parametrizations:
                    ref = ParameterRef(prefix + attribute, module, attribute, computed=True)
                    groups.setdefault((id(module), attribute), []).append(ref)
        return list(groups.values())
    if isinstance(source, torch.Tensor | Mapping | str) or not isinstance(source, Iterable):
        got = repr(source) if isinstance(source, str) else type(source).__name__
        raise TypeError(
            "model: expected a torch.nn.Module or an iterable of (name, parameter), such as "
            f"model.state_dict().items(), got {got}"
        )
    seen: dict[str, torch.Tensor] = {}
    for item in source:
        if isinstance(item, torch.Tensor):
            raise TypeError(
                "model: expected the module or named parameters, got parameters without names "
                "(pass the module or model.named_parameters())"
            )
        if not (
            isinstance(item, tuple)
            and len(item) == 2
            and isinstance(item[0], str)
            and isinstance(item[1], torch.Tensor)
        ):
            raise TypeError(expected("model", "items that are (name, parameter)", item))
        name, tensor = item
        if name in seen:
            if seen[name] is tensor:
                continue
            raise ValueError(f"model: expected one tensor per name, got two with the name {name!r}")
        seen[name] = tensor
        groups.setdefault(id(tensor), []).append(
            ParameterRef(name, None, name.rpartition(".")[2], tensor)
        )
    return list(groups.values())


def _refuse_other_shards(prefix: str, module: nn.Module) -> None:
    """Raise ValueError for parameters that are sharded, but not as DTensors."""
    name = repr(prefix.rstrip(".")) if prefix else "it"
    instead = "shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
    if type(module).__name__ == "FullyShardedDataParallel":
        raise ValueError(
            f"model: {name} is a FullyShardedDataParallel (FSDP1), whose flat parameters "
            f"are not divided into matrices; {instead}"
        )
    if any(hasattr(p, "ds_id") for p in module._parameters.values()):
        raise ValueError(
            f"model: {name} has placeholders of DeepSpeed's ZeRO-3 for parameters, whose "
            f"shards are not along a dimension; {instead}, or use ZeRO 1 or 2"
        )


def wrapped_as(module: nn.Module) -> str | None:
    """Return the attribute under which a wrapper holds another module; None if it is no wrapper."""
    for cls in type(module).__mro__:
        key = _WRAPPERS.get(cls.__name__)
        if key in module._modules:
            return key
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers, or ``module`` if it is no wrapper."""
    while (key := wrapped_as(module)) is not None:
        module = module._modules[key]
    return module


def named_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield modules with the prefix of their parameters' names; shared ones several times.

    Wrappers such as DistributedDataParallel and those of torch.compile leave no trace in names.
    """
    yield prefix, module
    inner = wrapped_as(module)
    if inner is not None:
        yield from named_modules(module._modules[inner], prefix)
        return
    for key, child in module._modules.items():
        if child is not None:
            yield from named_modules(child, f"{prefix}{key}.")


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter once, with its first name, without what wrappers insert."""
    seen = set()
    for prefix, module in named_modules(model):
        for attribute, tensor in module._parameters.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield prefix + attribute, tensor


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
