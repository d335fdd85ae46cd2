"""Which parameters of a model are regularized, and how each is viewed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from . import transforms
from .arguments import (
    check_flag,
    check_pattern_list,
    check_patterns,
    check_roles,
    check_splits,
    match_any,
    one_of,
)
from .convolutions import check_convolutions, periods_of
from .layers import TRANSPOSED, is_embedding
from .matrices import (
    COMPUTED,
    FROZEN,
    Elementwise,
    NothingSelected,
    Selection,
    elementwise_of,
    matrices_of,
    refs_of,
)
from .options import Patterns, Roles, Source, Splits
from .parameters import ParameterRef, made_before_use, parameter_refs
from .roles import role_of

_FLAGS = {"bias": "biases", "biases": "biases", "shift": "norms", "gain": "norms"}  # by role
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def select(
    source: Source,
    *,
    biases: bool = True,
    norms: bool = True,
    include: Patterns | None = None,
    exclude: Patterns | None = (),
    splits: Splits | None = None,
    stacked: Patterns | None = (),
    roles: Roles | None = None,
    convolutions: str = "flattened",
    trainable_only: bool = True,
    computed: bool = True,
    before: Selection | None = None,
) -> Selection:
    """Choose the matrices and elementwise parameters of a model.

    A parameter is what its module does with it (see ``layers``); where the module is unknown, its
    shape and its name decide (see ``roles``). A tensor with several names (tied weights) counts
    once; a pattern may name it by any of them.

    Args:
        source: a module, or an iterable of (name, tensor).
        biases: select biases of layers; the shifts of norms belong to ``norms``.
        norms: select the gains and shifts of normalization layers.
        include: a glob pattern or several; if given, only parameters whose name matches one are
            selected, and of these also what is left out by default: embedding tables, tokens,
            positions, scales and others with two or more dimensions, as matrices.
        exclude: a glob pattern or several, of names to leave out.
        splits: pattern -> number of equal parts, or their sizes, along the output dimension
            (dim 0; dim 1 for transposed convolutions and transformers' ``Conv1D``).
        stacked: a pattern or several, of parameters (E, out, in) that are stacks of E matrices,
            and of their biases (E, out); short for the role "stack".
        roles: pattern -> "matrix" (dim 0, rest), "stack", "bias" (pulled to 0), "gain" (each
            element pulled to 1) or "skip"; see ``layers.register_layer``.
        convolutions: "flattened", or "operator": see ``convolutions``.
        trainable_only: leave out parameters that do not require a gradient.
        computed: take weights that a parametrization computes at every use.
        before: the selection before, when a changed model is selected again: what it has need not
            require a gradient, and patterns may match nothing any more.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a pattern without a match, sizes that do not add up, a parameter that cannot be
            regularized, nothing selected.
    """
    flags = {"biases": check_flag("biases", biases), "norms": check_flag("norms", norms)}
    include = check_pattern_list("include", include)
    exclude = check_pattern_list("exclude", exclude) or []
    stacked = check_pattern_list("stacked", stacked) or []
    roles, splits = check_roles(roles), check_splits(splits)
    as_operators = check_convolutions(convolutions)
    refs = parameter_refs(source)
    names = [ref.name for group in refs for ref in group]
    for argument, patterns in (
        ("include", include or []), ("exclude", exclude), ("splits", splits),
        ("stacked", stacked), ("roles", roles),
    ):  # fmt: skip
        if before is None:
            check_patterns(argument, patterns, names)

    root = source if isinstance(source, nn.Module) else None
    found = Selection(root=root, names=frozenset(names))
    gains: list[tuple[Elementwise, torch.Tensor]] = []
    shapes = _shapes(refs)
    known = () if before is None else {o.name for o in refs_of(before.matrices, before.elementwise)}
    for group in refs:
        ref = next((o for o in group if not is_embedding(o)), group[0])
        aliases = tuple(dict.fromkeys(o.name for o in group))
        if len(aliases) > 1:
            found.aliases[ref.name] = aliases
        with torch.enable_grad():
            tensor = ref.get()
        said = _named_by(aliases, roles)
        is_needed = trainable_only and ref.name not in known
        reason = _reason_to_skip(ref, aliases, tensor, include, exclude, is_needed)
        if ref.computed and not computed:
            reason = reason or COMPUTED
        if reason is not None:
            if reason == FROZEN:
                found.frozen.append(ref)
            elif said not in (None, "skip") and reason.startswith(("dtype", "layout")):
                raise ValueError(
                    f"roles: expected a dense parameter of {one_of(map(str, FLOAT_DTYPES))}, got "
                    f"{ref.name!r} with {reason}"
                )
            found.skipped.append((ref.name, reason))
            continue
        if said is None and tensor.dim() >= 2 and match_any(aliases, stacked):
            said = "stack"
        role = role_of(ref, tensor, shapes[id(ref.module)], said, include is not None)
        flag = _FLAGS.get(role.kind)
        if role.kind == "skip" or (said is None and flag is not None and not flags[flag]):
            found.skipped.append((ref.name, role.reason or f"{flag}=False"))
            continue
        pattern = match_any(aliases, splits)
        split = None if pattern is None else (pattern, splits[pattern])
        periods = None
        if as_operators and said is None and role.kind in ("matrix", "groups"):
            periods = periods_of(ref, tensor)
        # A convolution that is split by hand, or an operator, is no rows.
        is_operator = bool(periods) or (periods == () and isinstance(ref.module, TRANSPOSED))
        is_split = role.kind == "groups" and (split is not None or is_operator)
        entry = None if is_split else elementwise_of(ref, tensor, role.kind)
        if entry is None:
            found.matrices += matrices_of(ref, tensor, role.kind, split, periods)
        else:
            found.elementwise.append(entry)
            if role.kind == "gain" and said is None:
                gains.append((entry, tensor))
    _leave_out_zeros(found, gains, before)
    if not found.matrices and not found.elementwise:
        raise NothingSelected(found.skipped)
    return found


def _named_by(aliases: Sequence[str], values: Mapping[str, str]) -> str | None:
    """Return the value of the first pattern that one of the names of a tensor matches, or None."""
    pattern = match_any(aliases, values)
    return None if pattern is None else values[pattern]


def _shapes(refs: Sequence[Sequence[ParameterRef]]) -> dict[int, dict[str, torch.Size]]:
    """Return the shapes of the parameters of every module, by id of the module and attribute."""
    found: dict[int, dict[str, torch.Size]] = {}
    for ref in (ref for group in refs for ref in group):
        own = found.setdefault(id(ref.module), {})
        if ref.module is not None:
            parameter = ref.module._parameters.get(ref.attribute)
            if parameter is not None and not _is_lazy(parameter):
                own[ref.attribute] = parameter.shape
    return found


def _leave_out_zeros(
    found: Selection,
    gains: Sequence[tuple[Elementwise, torch.Tensor]],
    before: Selection | None,
) -> None:
    """Skip the gains that are zero: stored as distances from one, or meant to begin at zero.

    Those of the selection ``before`` are what they were, whatever their values are now.
    """
    found.zeros = [] if before is None else [o for o in before.zeros if o.name in found.names]
    settled = {ref.place for ref in found.zeros}
    if before is not None:
        settled |= {entry.ref.place for entry in before.elementwise}
    by_device: dict[torch.device, list[tuple[ParameterRef, torch.Tensor]]] = {}
    for entry, tensor in gains:
        if tensor.is_meta or entry.ref.place in settled:
            continue
        with transforms.suspended():
            value = transforms.value_of(entry.name, tensor)
            norm = torch.linalg.vector_norm(value.float())
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor
        by_device.setdefault(norm.device, []).append((entry.ref, norm))
    for pairs in by_device.values():  # one wait for each device
        values = torch.stack([norm for _, norm in pairs]).tolist()
        found.zeros += [ref for (ref, _), x in zip(pairs, values, strict=True) if x == 0]
    names = {ref.name for ref in found.zeros}
    found.elementwise = [entry for entry in found.elementwise if entry.name not in names]
    reason = 'a gain that is zero: the distance from one, or zero at first (roles: "gain" takes it)'
    found.skipped += [(entry.name, reason) for entry, _ in gains if entry.name in names]


def _reason_to_skip(ref, aliases, tensor, include, exclude, trainable_only) -> str | None:
    if include is not None and match_any(aliases, include) is None:
        return "not in include"
    if (pattern := match_any(aliases, exclude)) is not None:
        return f"exclude {pattern!r}"
    if trainable_only and not transforms.is_differentiated(tensor):
        return FROZEN
    if tensor.dtype not in FLOAT_DTYPES:
        return f"dtype {str(tensor.dtype).removeprefix('torch.')}"
    if _is_lazy(tensor):
        raise ValueError(
            f"parameter {ref.name!r} is not initialized yet; run the lazy module once before "
            "building the regularizer"
        )
    if isinstance(ref.module, nn.utils.parametrize.ParametrizationList):
        return "part of a parametrization; the weight that it makes is taken instead"
    if (problem := made_before_use(ref)) is not None:
        raise ValueError(f"parameter {ref.name!r} {problem}, or leave it out with exclude")
    if tensor.layout != torch.strided:
        return f"layout {str(tensor.layout).removeprefix('torch.')}"
    return None


def _is_lazy(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.parameter.UninitializedTensorMixin)
