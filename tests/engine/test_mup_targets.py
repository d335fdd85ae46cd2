"""target="mup": sqrt(rows / cols) of each matrix, outputs over inputs, however it is stored."""

import copy
import math

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer

pytestmark = pytest.mark.usefixtures("seeded")


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.tall, self.wide = nn.Linear(4, 9), nn.Linear(16, 4)
        self.stored = nn.Linear(8, 2)
        self.stored.weight = nn.Parameter(self.stored.weight.detach().t().contiguous().t())
        self.conv = nn.Conv2d(3, 12, 2)
        self.up = nn.ConvTranspose2d(6, 2, 3)
        self.depthwise = nn.Conv2d(5, 5, 3, groups=5)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(8, 2)


EXPECTED = {
    "tall.weight": 9 / 4, "wide.weight": 4 / 16, "stored.weight": 2 / 8, "conv.weight": 12 / 12,
    "up.weight": 2 / 54, "depthwise.weight": 1 / 9, "attention.in_proj_weight[q]": 1,
}  # fmt: skip


def targets_of(reg):
    """The target of each entry by name; None where there is none."""
    found = {}
    for bucket in reg._buckets.bound():
        plan = bucket.plan
        names = [m.name for m in plan.matrices]
        found.update(zip(names, bucket.state.target.tolist(), strict=True))
        for entry, own in zip(plan.elementwise, plan.targets, strict=True):
            found[entry.name] = None if own is None else own.tolist()
    return found


@pytest.mark.parametrize(("target", "factor"), [("mup", 1.0), ("2*mup", 2.0), ("0.5*mup", 0.5),
                                                ("1e-1 * mup", 0.1)])  # fmt: skip
def test_targets_of_every_kind(target, factor):
    reg = SpectralRegularizer(Layers(), target=target)
    found = targets_of(reg)
    for name, square in EXPECTED.items():
        wanted, own = factor * math.sqrt(square), found[name]
        own = own if isinstance(own, list) else [own]
        assert own == pytest.approx([wanted] * len(own)), name
    assert found["norm.weight"] == pytest.approx([factor] * 4)
    assert found["norm.bias"] is found["tall.bias"] is None
    assert reg.target == target
    assert f"target={target}" in repr(reg)


def test_the_penalty_is_that_of_numbers():
    model = Layers()
    numbers = {**{f"{n.removesuffix('[q]')}": math.sqrt(x) for n, x in EXPECTED.items()}, "*": 1.0}
    values = [
        float(SpectralRegularizer(model, target=target).penalty().detach())
        for target in ("mup", numbers)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_in_a_mapping_and_assigned():
    model = Layers()
    reg = SpectralRegularizer(model, target={"tall.*": "2*mup", "wide.*": "initial", "*": 0.7})
    found = targets_of(reg)
    assert found["tall.weight"] == pytest.approx(3.0)
    assert found["conv.weight"] == pytest.approx(0.7)
    sigma = float(torch.linalg.svdvals(model.wide.weight.detach())[0])
    assert found["wide.weight"] == pytest.approx(sigma, rel=1e-3)
    reg.target = "mup"
    assert targets_of(reg)["conv.weight"] == pytest.approx(1.0)
    reg.target = 0.3
    assert targets_of(reg)["tall.weight"] == pytest.approx(0.3)
    assert targets_of(reg)["norm.weight"] is None


def test_it_follows_a_layer_that_is_resized():
    model = Layers()
    reg = SpectralRegularizer(model, target="mup")
    reg.penalty()
    model.tall = nn.Linear(4, 36)
    assert targets_of(reg)["tall.weight"] == pytest.approx(3.0)


def test_copies_and_checkpoints_keep_it():
    model = Layers()
    options = {"target": "0.5*mup", "decoupled": True, "constraint": "sphere"}
    optimizer = SpectralAdamW(model, 0.0, **options)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    other, twin = copy.deepcopy((model, optimizer))
    assert twin.target == "0.5*mup"
    sigma = dict(zip(twin.names, twin.sigma.tolist(), strict=True))
    assert sigma["tall.weight"] == pytest.approx(0.75, rel=1e-2)
    again = SpectralAdamW(other, 0.0, **options)
    again.load_state_dict(optimizer.state_dict())
    assert targets_of(again)["wide.weight"] == pytest.approx(0.25)
    reg = SpectralRegularizer(other, target="mup")
    reg.load_state_dict(reg.state_dict())
    assert targets_of(reg)["wide.weight"] == pytest.approx(0.5)


@pytest.mark.parametrize("target", ["mupp", "x*mup", "-1*mup", "0*mup", "inf*mup", "nan*mup",
                                    "2mup", "mup*2", "*mup"])  # fmt: skip
def test_other_words_are_refused(target):
    with pytest.raises(TypeError, match=r"^target: expected a number, 'initial', 'mup' or "
                       r"'0\.5\*mup', got "):  # fmt: skip
        SpectralRegularizer(nn.Linear(3, 3), target=target)
    with pytest.raises(TypeError, match=r"^target\['\*'\]: expected .*, got"):
        SpectralRegularizer(nn.Linear(3, 3), target={"*": target})


def test_strength_has_no_such_word():
    with pytest.raises(TypeError, match=r"^strength: expected a number, got 'mup'$"):
        SpectralRegularizer(nn.Linear(3, 3), strength="mup")
