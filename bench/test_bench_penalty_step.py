"""One step = power iteration of every matrix + the penalty's gradient added to .grad."""

import pytest
import torch

from tests import cases

from . import baselines
from .conftest import Group

STRENGTH = 1.0  # large enough for an error in the gradient to show beside what is in .grad
FLOORS = ("floor_read", "floor_add")


def leaves(case, dtype):
    """Weights of a case with gradients, neither of them zero."""
    weights = cases.random_weights(cases.MODELS[case](), dtype)
    generator = torch.Generator().manual_seed(1)
    for weight in weights:
        weight.requires_grad_()
        weight.grad = (0.01 * torch.randn(weight.shape, generator=generator)).to(dtype)
    return weights


def truth(weights, updated: bool) -> list[torch.Tensor]:
    """Gradient in float64 at the start vectors v, or at W v and the v of one iteration later."""
    gradients = []
    for weight, v in zip(weights, baselines.start_vectors(weights), strict=True):
        weight, v = weight.detach().double(), v.double()
        v = v / v.norm()
        u = weight @ v
        sigma, u = u.norm(), u / u.norm()
        if updated:
            v = weight.mT @ u
            sigma, v = v.norm(), v / v.norm()
        gradients.append(STRENGTH * 4 * (sigma**2 - 1) * sigma * torch.outer(u, v))
    return gradients


def problem(contender, weights, truths) -> str | None:
    """Run one step on fresh gradients; say what is wrong with it, or return None."""
    before = [weight.grad.clone() for weight in weights]
    step = baselines.CONTENDERS[contender](weights, STRENGTH)
    step()
    eps = torch.finfo(weights[0].dtype).eps
    worst = 0.0
    for weight, old, expected in zip(weights, before, truths, strict=True):
        added = weight.grad.double() - old.double()
        rounding = eps * (old.double().abs() + expected.abs()).max()
        arithmetic = (1e-4 if eps < 1e-5 else 32 * eps) * expected.abs().max()
        worst = max(worst, float((added - expected).abs().max() / (rounding + arithmetic)))
        weight.grad.copy_(old)
    return None if worst <= 1 else f"the gradient is off by {worst:.3g} times what is allowed"


def measured(group: Group, case, dtype, contenders):
    weights = leaves(case, dtype)
    truths = {updated: truth(weights, updated) for updated in (False, True)}
    wrong, functions = {}, {}
    for contender in contenders:
        if contender in FLOORS:
            continue
        found = problem(contender, weights, truths[contender in baselines.UPDATES_FIRST])
        if found is not None:
            wrong[contender] = found
        else:
            functions[contender] = baselines.CONTENDERS[contender](weights, STRENGTH)
    n = sum(weight.numel() for weight in weights)
    flat, grad = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    if FLOORS[0] in contenders:
        functions[FLOORS[0]] = flat.sum
    if FLOORS[1] in contenders:
        functions[FLOORS[1]] = lambda: grad.add_(1e-3)
    group.run(functions, wrong)


@pytest.mark.parametrize("contender", [*baselines.CONTENDERS, *FLOORS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", cases.MODELS)
def test_penalty_step(case, dtype, contender, benchmark, groups, contenders_of, request):
    key = ("penalty_step", case, dtype)
    if key not in groups:
        groups.clear()
        config = request.config
        groups[key] = Group(config.getoption("--rounds"), config.getoption("--smoke"))
        measured(groups[key], case, getattr(torch, dtype), contenders_of)
    shapes = cases.MODELS[case]()
    benchmark.group = f"penalty_step {case} {dtype}"
    benchmark.extra_info.update(
        suite="penalty_step", case=case, dtype=dtype, contender=contender, device="cpu",
        matrices=len(shapes), weights=sum(m * n for m, n in shapes),
    )  # fmt: skip
    groups[key].replay(contender, benchmark)
