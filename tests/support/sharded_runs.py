"""Functions that tests/sharding/test_sharded.py runs on every rank, and their comparisons."""

import os
import time

import torch
import torch._dynamo
import torch.distributed.checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import spectral_kernels
from spectral_kernels import SpectralRegularizer, diagnostics
from spectral_kernels.sharding import shards
from tests.support.collectives import Collectives
from tests.support.sharded_models import VIEWS, Views, built, device, distributed, sharded, whole

STRENGTH = 0.1
EPS = 1e-3  # of AdamW: damps gradients that are pure rounding, such as those of key biases


def measured(reg, model):
    """Return the quantities that are compared: sigmas, residuals and gradients."""
    return {
        "sigma": reg.singular_values, "squared residual": reg.residuals**2,
        **{f"grad {n}": whole(p.grad) for n, p in model.named_parameters() if p.grad is not None},
    }  # fmt: skip


def deviations(found, truth):
    """Return the largest deviation of each quantity, relative to its largest element.

    A residual is the root of a difference of squares as large as sigma^2: its square is compared
    relative to sigma^2.
    """
    largest = {}
    for name, value in truth.items():
        kind = name.partition(" ")[0]
        size = (truth["sigma"] ** 2 if kind == "squared" else value.abs()).max()
        deviation = float(
            (found[name].double() - value.double()).abs().max() / size.clamp(min=1e-30)
        )
        largest[kind] = max(largest.get(kind, 0.0), deviation)
    return largest


def compare_alone(placement, way, options):
    """Do what ``compare`` does, with the usually omitted sums over a single rank."""
    shards.LEAST_RANKS = 1
    return compare(placement, way, options)


def compare(placement, way, options, dtype=torch.float32, steps=3):
    """Return the deviations of a sharded model from the unsharded one after some steps."""
    world = torch.distributed.get_world_size()
    alone, model = built(dtype=dtype), sharded(placement, world, built(dtype=dtype))
    return _compared(alone, model, way, options, {}, steps)


def compare_views(placements, names, options):
    """Return the deviations with every parameter of Views sharded by ``placements``."""
    world = torch.distributed.get_world_size()
    sizes = (world,) if len(placements) == 1 else (2, world // 2)
    alone, model = built(Views), built(Views)
    distributed(model, init_device_mesh(device(), sizes), placements)
    return _compared(alone, model, "accumulate", options, VIEWS, 3)


def _compared(alone, model, way, options, selection, steps):
    found = []
    for own in (alone, model):
        reg = SpectralRegularizer(own, STRENGTH, **selection, **options)
        penalty = None
        for _ in range(steps):
            for p in own.parameters():
                p.grad = None
            if way == "penalty":
                penalty = reg.penalty()
                penalty.backward()
            else:
                reg.accumulate_grad_()
        measures = measured(reg, own)
        measures["evaluated"] = _evaluated(reg)
        if penalty is not None:
            measures["penalty"] = penalty.detach()
        found.append(measures)
        if torch.distributed.is_initialized():
            reg.check_ranks()
    assert set(found[0]) == set(found[1])
    return deviations(found[1], found[0])


def _evaluated(reg):
    with torch.no_grad():
        return reg.penalty()


def losses(placement, way, steps):
    """Return the training losses of the unsharded and the sharded model."""
    world = torch.distributed.get_world_size()
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(steps, world, 2, 4, 5, generator=generator)
    y = torch.randn(steps, world, 2, 4, 3, generator=generator)
    curves = []
    for model in (built(), sharded(placement, world, built())):
        is_alone = not curves
        curve, optimizer, reg = [], None, None
        if way.startswith("Spectral"):
            kind, _, constraint = way.partition(", ")
            extra = {"momentum": 0.9} if kind == "SpectralSGD" else {}
            kind = getattr(spectral_kernels, kind)
            constraint, _, r = constraint.partition(" of ")
            if constraint:
                extra.update(decoupled=True, constraint=constraint, target=0.5)
                extra["n_vectors"] = int(r or 1)
            optimizer = kind(model, 3e-3, strength=STRENGTH, **extra)
        else:
            caps = way == "attach, cap of 4"
            extra = {"target": 0.5, "n_vectors": 4} if caps else {}
            reg = SpectralRegularizer(model, STRENGTH, **extra)
            optimizer = torch.optim.AdamW(model.parameters(), 3e-3, foreach=False)
            if caps:
                reg.attach(optimizer, decoupled=True, constraint="cap")
            elif way in ("attach", "decoupled"):
                reg.attach(optimizer, decoupled=way == "decoupled")
        data_parallel = "fsdp" in placement or "hsdp" in placement or "meshes" in placement
        for i in range(steps):
            optimizer.zero_grad()
            mine = slice(rank, rank + 1)
            if is_alone or placement == "tensor parallel":
                mine = slice(0, world)
            elif placement == "fsdp and tensor parallel":
                mine = slice(rank // (world // 2) * (world // 2),
                             (rank // (world // 2) + 1) * (world // 2))  # fmt: skip
            assert data_parallel or placement == "tensor parallel"
            loss = (model(x[i, mine].flatten(0, 1)) - y[i, mine].flatten(0, 1)).square().mean()
            shown = loss.detach().clone()
            if not is_alone and mine != slice(0, world):
                torch.distributed.all_reduce(shown)
                shown /= world
            curve.append(float(shown))
            if way == "penalty":
                loss = loss + reg.penalty()
            loss.backward()
            if way == "accumulate":
                reg.accumulate_grad_()
            optimizer.step()
        curves.append(curve)
    return curves


def counted(placement, blocks, n_vectors, way):
    """Return the collectives of a step: torch's counts, and each with its bytes.

    Also the sizes of v and s, and the numbers of matrices and elementwise parameters.
    """
    world = torch.distributed.get_world_size()
    model = sharded(placement, world, built(blocks=blocks))
    if way == "SpectralAdamW":
        optimizer = spectral_kernels.SpectralAdamW(model, n_vectors=n_vectors)
        reg = optimizer.regularizer
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        act = optimizer.step
    else:
        reg = SpectralRegularizer(model, n_vectors=n_vectors)
        act = reg.accumulate_grad_
    act()
    with CommDebugMode() as mode:
        act()
    with Collectives() as seen:
        act()
    states = [b.state for b in reg._buckets.buckets]
    sizes = {
        "v": [len(x.v) for x in states], "s": [len(x.s) for x in states],
        "matrices": [len(x.plan.matrices) for x in states],
        "vectors": [len(x.plan.elementwise) for x in states],
    }  # fmt: skip
    return {str(k): n for k, n in mode.get_comm_counts().items() if n}, seen.found, sizes


def _trainer(kind, placement, n_vectors, target):
    """Return model, optimizer, and the regularizer that has the vectors."""
    model = built()
    if placement is not None:
        model = sharded(placement, torch.distributed.get_world_size(), model)
    if kind == "SpectralRegularizer":
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3, eps=EPS)
        reg = SpectralRegularizer(model, STRENGTH, target=target, n_vectors=n_vectors)
        reg.attach(optimizer)
        return model, optimizer, reg
    own = getattr(spectral_kernels, kind)
    more = {"eps": EPS} if kind == "SpectralAdamW" else {"momentum": 0.9}
    optimizer = own(model, 3e-3, strength=STRENGTH, target=target, n_vectors=n_vectors, **more)
    return model, optimizer, optimizer.regularizer


def _train(model, optimizer, steps):
    """Take steps, the same for every number of ranks."""
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(7))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def _states(model, optimizer, reg, kind, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    found = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    return {**found, "regularizer": reg} if kind == "SpectralRegularizer" else found


def _vectors(reg):
    return {name: v.clone() for name, v in reg.state_dict()["vectors"].items()}


def saved(folder, kind, placement, n_vectors, target, flat, steps):
    """Train, save, train on; return the vectors at both points, and the last weights."""
    model, optimizer, reg = _trainer(kind, placement, n_vectors, target)
    _train(model, optimizer, steps)
    torch.distributed.checkpoint.save(
        _states(model, optimizer, reg, kind, flat), checkpoint_id=folder
    )
    before = _vectors(reg)
    _train(model, optimizer, steps)
    weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    return before, _vectors(reg), weights


def evaluated_and_saved():
    """Return the names in the optimizer's state after a forward pass left weights gathered."""
    model, optimizer, _ = _trainer("SpectralAdamW", "fsdp", 1, "initial")
    _train(model, optimizer, 1)
    with torch.no_grad():
        model(torch.randn(1, 2, 5))
    assert not isinstance(model.head.weight, DTensor)
    return [sorted(state) for state in optimizer.state_dict()["state"].values()]


def loaded(folder, kind, placement, n_vectors, target, flat, steps):
    """Load what ``saved`` has saved, on any number of ranks; return the same as it does."""
    model, optimizer, reg = _trainer(kind, placement, n_vectors, target)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    states = _states(model, optimizer, reg, kind, flat)
    torch.distributed.checkpoint.load(states, checkpoint_id=folder)
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, optimizer, states["optimizer"], options=options)
    before = _vectors(reg)
    _train(model, optimizer, steps)
    weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    return before, _vectors(reg), weights


def norms(placements, n_vectors):
    """Return the spectral_norms of sharded and of unsharded Views; compare their spectra."""
    world = torch.distributed.get_world_size()
    sizes = (world,) if len(placements) == 1 else (2, world // 2)
    alone = built(Views)
    model = distributed(built(Views), init_device_mesh(device(), sizes), placements)
    found = spectral_kernels.spectral_norms(model, n_vectors=n_vectors, **VIEWS)
    spectra = diagnostics.spectra(model, **VIEWS)
    truth = diagnostics.spectra(alone, **VIEWS)
    assert {n: s.sigma_max for n, s in spectra.items()} == {
        n: s.sigma_max for n, s in truth.items()
    }
    whole_norms = spectral_kernels.spectral_norms(alone, n_vectors=n_vectors, **VIEWS)
    return found, whole_norms


def metrics(path):
    """Return the metrics of an unsharded and of a sharded model, and log the latter."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    found = []
    for model in (built(), sharded("fsdp", world, built())):
        reg = SpectralRegularizer(model, STRENGTH)
        reg.accumulate_grad_()
        found.append(reg.metrics(per_layer=True))
    log = reg.log_to(path)
    log(1)
    if rank == 0:  # after a step nothing is summed over ranks
        found[1] = reg.metrics(per_layer=True)
    return found


def come_apart(what):
    """Return the message of check_ranks before and after one rank diverges."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if what == "replicas":
        model = built()
    else:
        model = sharded("hsdp" if what == "replicas of shards" else "fsdp", world, built())
    exclude = ["head.*"] if what == "names" and rank == 1 else []
    if what == "names":
        model = built()
    seed = rank if what == "seeds" else 0
    reg = SpectralRegularizer(model, exclude=exclude, seed=seed)
    said = []
    for turn in range(2):
        if turn and rank == world - 1:
            if what == "replicas":
                model.inputs.weight.data += 0.1
            elif what == "replicas of shards":
                model.inputs.weight.to_local().data += 0.1
            elif what == "vectors":
                bucket = reg._buckets.buckets[0]
                bucket.state.columns(0, bucket.state.v_next)[0, 0] += 0.1
            elif what in ("strength", "target"):
                setattr(reg, what, 0.5)
        try:
            if what != "vectors" and what != "names":
                reg.accumulate_grad_()
            reg.check_ranks()
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    return said


def resharded(change):
    """Return deviations after a model was sharded or gathered under an existing regularizer."""
    world = torch.distributed.get_world_size()
    alone, model = built(), built()
    if change == "gathered":
        model = distributed(model, init_device_mesh(device(), (world,)), (Shard(0),))
    regs = [SpectralRegularizer(own, STRENGTH) for own in (alone, model)]
    for reg in regs:
        reg.accumulate_grad_()
    if change == "sharded":
        sharded("fsdp", world, model)
    elif change == "gathered":
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    module._parameters[name] = nn.Parameter(p.full_tensor().detach())
    elif change == "by another dimension":
        distributed(model, init_device_mesh(device(), (world,)), (Shard(1),))
    for own in (alone, model):
        for p in own.parameters():
            p.grad = None
    for reg in regs:
        reg.accumulate_grad_()
    return deviations(measured(regs[1], model), measured(regs[0], alone))


def refused(what):
    """Return the error of an unsupported use of sharded weights."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh(device(), (world,))
    model = built()
    try:
        if what == "FSDP1":
            SpectralRegularizer(FullyShardedDataParallel(model, device_id=torch.device("cpu")))
        elif what == "second derivatives":
            reg = SpectralRegularizer(sharded("fsdp", world, model))
            reg.penalty().backward(create_graph=True)
        elif what == "partial":
            model.head.weight = nn.Parameter(
                DTensor.from_local(model.head.weight.data, mesh, [Partial()], run_check=False)
            )
            SpectralRegularizer(model).accumulate_grad_()
        elif what == "other ranks":
            half = init_device_mesh(device(), (world // 2,))
            model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.data, half))
            SpectralRegularizer(model).accumulate_grad_()
        elif what == "column by column":
            local = model.head.weight.data.t().contiguous().t()
            model.head.weight = nn.Parameter(DTensor.from_local(local, mesh, [Replicate()]))
            SpectralRegularizer(model).accumulate_grad_()
        elif what == "in a graph":
            reg = SpectralRegularizer(sharded("fsdp", world, model))
            torch.compile(lambda: reg.penalty(), backend="aot_eager", fullgraph=True)()
        elif what == "plain gradient":
            reg = SpectralRegularizer(sharded("fsdp", world, model))
            model.head.weight.grad = None
            model.head.weight._grad = torch.zeros(3, 26)
            reg.accumulate_grad_()
    except (ValueError, RuntimeError, TypeError, torch._dynamo.exc.Unsupported) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def between_graphs():
    """Return deviations where penalty() of a sharded model is called in a compiled function."""
    world, found = torch.distributed.get_world_size(), []
    for compiled in (False, True):
        model = sharded("fsdp", world, built())
        reg = SpectralRegularizer(model, STRENGTH)
        step = torch.compile(lambda r=reg: 2 * r.penalty(), backend="aot_eager")
        for _ in range(3):
            (step() if compiled else 2 * reg.penalty()).backward()
        found.append(measured(reg, model))
    return deviations(*found)


def partial_gradient():
    """Return gradients where .grad of a replicated parameter is a partial sum."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh(device(), (world,))
    alone = built()
    model = distributed(built(), mesh, (Replicate(),))
    grad = torch.ones(3, 26)
    model.head.weight.grad = DTensor.from_local(grad, mesh, [Partial()], run_check=False)
    alone.head.weight.grad = grad * world
    for own in (alone, model):
        SpectralRegularizer(own, STRENGTH).accumulate_grad_()
    return whole(model.head.weight.grad), alone.head.weight.grad


def dies(seconds):
    """Return the error on the other ranks when one has died."""
    model = sharded("fsdp", torch.distributed.get_world_size(), built())
    reg = SpectralRegularizer(model)
    reg.accumulate_grad_()
    if torch.distributed.get_rank() == 1:
        time.sleep(seconds)
        os._exit(1)
    try:
        for _ in range(1000):
            reg.accumulate_grad_()
            time.sleep(0.01)
    except RuntimeError as error:
        return str(error)
    return "nothing"
