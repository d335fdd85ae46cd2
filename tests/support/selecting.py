"""Helpers for tests of the selection."""

import torch
from torch import nn

from spectral_kernels.backends.reference import stored
from spectral_kernels.selection.rules import select
from spectral_kernels.tables.plan import Plan


def randomized(module):
    """The module with parameters that are neither zero nor one nor equal to each other."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn_like(parameter))
    return module


def holding(**parameters):
    """A module of no known kind with these parameters."""
    module = nn.Module()
    for name, value in parameters.items():
        if not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=value.is_floating_point())
        module.register_parameter(name, value)
    return module


def custom(name, base=nn.Module, *arguments, **parameters):
    """An instance of a new class ``name`` with these parameters."""
    module = type(name, (base,), {})(*arguments)
    for key, value in parameters.items():
        setattr(module, key, nn.Parameter(value) if isinstance(value, torch.Tensor) else value)
    return module


def names_of(source, **options):
    return [matrix.name for matrix in select(source, **options).matrices]


def kinds_of(source, **options):
    return {vector.name: vector.kind for vector in select(source, **options).elementwise}


def skipped(source, **options):
    return dict(select(source, **options).skipped)


def assert_matrices(source, expected, **options):
    """Assert that names (in order), shapes and singular values of all matrices are as expected."""
    found = select(source, **options)
    assert [matrix.name for matrix in found.matrices] == list(expected)
    refs = list(dict.fromkeys(matrix.ref for matrix in found.matrices))
    plan = Plan(found.matrices, [], [ref.get() for ref in refs])
    for i, (matrix, truth) in enumerate(zip(found.matrices, expected.values(), strict=True)):
        assert matrix.shape == tuple(truth.shape), matrix.name
        layout, tensor = plan.layouts[i], matrix.ref.get().detach()
        weight = stored(plan, i, tensor).reshape(layout.rows, layout.cols)
        assert sorted(weight.shape) == sorted(truth.shape), matrix.name
        torch.testing.assert_close(
            torch.linalg.svdvals(weight), torch.linalg.svdvals(truth.detach()), msg=matrix.name
        )


def numbered(name, parts):
    return {f"{name}[{i}]": part for i, part in enumerate(parts)}
