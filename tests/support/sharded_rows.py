"""Functions that tests/sharding/test_sharded_rows.py runs on every rank: elementwise parameters."""

import contextlib

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from spectral_kernels import SpectralAdamW, SpectralRegularizer, regularizer
from spectral_kernels.sharding import shards
from tests.support.elementwise import Mixed, MixedSelection
from tests.support.sharded_models import built, device, distributed, whole


@contextlib.contextmanager
def rows_are_selected():
    """Let the parameters of Mixed that no rule knows be rows."""
    before = regularizer.select
    regularizer.select = MixedSelection(before)
    try:
        yield
    finally:
        regularizer.select = before


def mesh_of(placements):
    """A mesh with a dimension per placement."""
    world = torch.distributed.get_world_size()
    sizes = (world,) if len(placements) == 1 else (2, world // 2)
    return init_device_mesh(device(), sizes)


def pair(placements, dtype=torch.float32):
    """The model, and the same one sharded."""
    model = built(Mixed, dtype=dtype)
    return built(Mixed, dtype=dtype), distributed(model, mesh_of(placements), placements)


def moved(*models):
    """Multiply every parameter, in place."""
    with torch.no_grad():
        for model in models:
            for p in model.parameters():
                shards.local_of(p).mul_(1.3)


def two_steps(model, own, way, constraint=None):
    """Take two steps in a way that begins with "accumulate", "penalty", "attached" or "adamw"."""
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    if way.startswith("attached"):
        own.attach(sgd, decoupled=True, constraint=constraint)
    for _ in range(2):
        if way.startswith("accumulate"):
            own.accumulate_grad_()
        elif way == "penalty":
            own.penalty().backward()
        else:
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.1)
            (own if way.startswith("adamw") else sgd).step()


def numbers(model, own):
    """Return sigmas, whole parameters and their gradients by name."""
    return {
        **{f"sigma {n}": x for n, x in zip(own.names, own.sigma, strict=True)},
        **{n: whole(p.detach()) for n, p in model.named_parameters()},
        **{f"grad {n}": whole(p.grad) for n, p in model.named_parameters()},
    }


def differences(expected, found):
    """Return the largest difference of each quantity, over its largest number."""
    return {
        name: float((found[name] - x).abs().max() / x.abs().max().clamp(min=1e-30))
        for name, x in expected.items()
    }


def compare(placements, target, exponent, way):
    """Return the largest difference between sharded and whole, over the largest number."""
    alone, model = pair(placements)
    found = []
    for one in (alone, model):
        with rows_are_selected():
            options = {"strength": 0.3, "target": target, "exponent": exponent}
            constraint = way.partition(", ")[2]
            constraint = constraint if constraint in ("cap", "sphere") else None
            if way == "accumulate, above":
                options["side"] = "above"
            if way.startswith("adamw"):
                own = SpectralAdamW(one, 0.01, eps=1e-2, decoupled="," in way,
                                    constraint=constraint, **options)  # fmt: skip
            else:
                own = SpectralRegularizer(one, **options)
        moved(one)
        two_steps(one, own, way, constraint)
        (bucket,) = own._buckets.buckets
        found.append({
            "norms": bucket.state.norm.clone(), "penalties": bucket.state.raw_penalty[1:].clone(),
            **numbers(one, own),
        })  # fmt: skip
        assert own.report()[1].shape == (6, 9)
    return differences(*found)


def initial(placements):
    """Return the initial targets that are measured, those of the whole model, and the penalty."""
    alone, model = pair(placements)
    with rows_are_selected():
        regs = [SpectralRegularizer(m, 1.0, target="initial") for m in (alone, model)]
    found = [reg.state_dict()["initial"] for reg in regs]
    value = float(regs[1].penalty())
    # A state that was measured elsewhere goes to the ranks' own parts.
    twice = {n: 2 * x for n, x in found[0].items()}
    result = regs[1].load_state_dict({**regs[1].state_dict(), "initial": twice})
    regs[1].penalty()
    regs[0].load_state_dict({**regs[0].state_dict(), "initial": twice})
    regs[0].penalty()
    raw = [reg._buckets.buckets[0].state.raw_penalty.clone() for reg in regs]
    return found, value, result, raw


def not_finite():
    """Return the norm and penalty of rows of which one, on the last rank, is not finite."""
    _, model = pair((Shard(0),))
    with rows_are_selected():
        reg = SpectralRegularizer(model, 1.0)
    local = shards.local_of(model.kernel)
    if len(local) and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        with torch.no_grad():
            local[-1, 0, 0, 0] = float("nan")
    reg.accumulate_grad_()
    state = reg._buckets.buckets[0].state
    return float(reg.sigma[1]), float(state.raw_penalty[4]), float(state.norm[0])


def cut(dim):
    """Return what is said about rows that are sharded along ``dim``."""
    _, model = pair((Shard(0),))
    model.kernel = nn.Parameter(
        distribute_tensor(torch.randn(6, 1, 4, 4), mesh_of((Shard(dim),)), [Shard(dim)])
    )
    try:
        with rows_are_selected():
            SpectralRegularizer(model, 1.0, exclude=["linear.weight"]).penalty()
    except ValueError as error:
        return str(error)
    return ""
