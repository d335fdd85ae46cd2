"""``spectral-kernels inspect CHECKPOINT OTHER`` of checkpoints whose names differ."""

import math

import pytest
import torch
from torch import nn

from spectral_kernels import cli
from spectral_kernels.cli.inspect.matching import matched
from tests.support.checkpoints import values

pytest.importorskip("rich")
pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def state():
    """The weights of a small network."""
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).state_dict()


def inside(path, tensors):
    """Return the tensors in containers, by a dotted path."""
    for key in reversed(path.split(".")):
        tensors = {key: tensors}
    return tensors


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def doubled(state):
    return {name: 2 * tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("wrap", "removed"),
    [
        (lambda s: prefixed("module.", s), "'module.'"),
        (lambda s: prefixed("module._orig_mod.", s), "'module._orig_mod.'"),
        (lambda s: inside("state_dict", prefixed("model.", s)), "'state_dict.model.'"),
        (lambda s: inside("model_state_dict", s), "'model_state_dict.'"),
        (lambda s: prefixed("base_model.model.", s), "'base_model.model.'"),
        (lambda s: prefixed("_forward_module.", s), "'_forward_module.'"),
        (
            lambda s: {n.replace(".", "._checkpoint_wrapped_module."): t for n, t in s.items()},
            "'_checkpoint_wrapped_module.'",
        ),
    ],
)
@pytest.mark.parametrize("is_first", [False, True])
def test_what_wrappers_add_is_ignored_and_told(tmp_path, capsys, state, wrap, removed, is_first):
    plain, wrapped = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(state, plain)
    torch.save(wrap(doubled(state)), wrapped)
    pair = (wrapped, plain) if is_first else (plain, wrapped)
    document = values(*pair, capsys=capsys)
    assert len(document["matrices"]) == 2
    for row in document["matrices"]:
        expected = -50 if is_first else 100
        assert row["change_percent"]["sigma"] == pytest.approx(expected, abs=0.05)
    assert document["only_in_checkpoint"] == document["only_in_other"] == []
    assert cli.main(["inspect", *map(str, pair)]) == 0
    assert f"4 names matched without {removed}\n" in capsys.readouterr().out


def test_one_root_may_stand_for_another(tmp_path, capsys, state):
    one, other = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(prefixed("transformer.h.", state) | {"head.weight": torch.eye(3)}, one)
    torch.save(prefixed("encoder.", doubled(state)) | {"new.weight": torch.eye(5)}, other)
    document = values(one, other, "--include", "transformer.*", capsys=capsys)
    assert [row["name"] for row in document["matrices"]] == [
        "transformer.h.0.weight", "transformer.h.2.weight"
    ]  # fmt: skip
    assert document["matching"] == ["4 names matched with 'encoder.' for 'transformer.h.'"]
    document = values(one, other, capsys=capsys)
    assert [row["name"] for row in document["only_in_checkpoint"]] == ["head.weight"]
    assert [row["name"] for row in document["only_in_other"]] == ["new.weight"]


def test_ambiguous_names_are_told_and_not_guessed():
    shapes = {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (2, 4)}
    twice = prefixed("module.", shapes) | prefixed("_orig_mod.", shapes)
    found = matched(shapes, twice)
    assert found.names == {}
    assert any("module.0.weight and _orig_mod.0.weight" in note for note in found.notes)
    encoders = prefixed("online.", shapes) | prefixed("target.", shapes)
    found = matched(shapes, encoders)
    assert found.names == {}
    (note,) = found.notes
    assert "'online.'" in note
    assert "'target.'" in note
    # A name that is equal is no question.
    assert matched(shapes, shapes | twice).names == {name: name for name in shapes}
    assert matched(shapes, inside_of("model", shapes) | inside_of("ema", shapes)).names == {
        f"model.{name}": name for name in shapes
    }


def inside_of(root, shapes):
    return prefixed(f"{root}.", shapes)


@pytest.mark.parametrize(
    "other",
    [
        {"b.0.weight": (4, 3), "b.1.weight": (2, 5), "b.2.weight": (7, 2)},  # one shape fits
        {"c.d.weight": (9, 9)},
        {},
    ],
)
def test_roots_are_not_matched_by_few_tensors(other):
    first = {"a.0.weight": (4, 3), "a.1.weight": (2, 4), "a.2.weight": (2, 2)}
    assert matched(first, other).names == {}


def test_nothing_in_common_is_exit_code_1(tmp_path, capsys):
    one, other = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"fc.weight": torch.randn(3, 2), "bias": torch.randn(2)}, one)
    torch.save({"x.kernel": torch.randn(5, 2), "bias": torch.randn(2)}, other)
    assert cli.main(["inspect", str(one), str(other)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"spectral-kernels: nothing to compare: no matrix is in both, such as 'fc.weight' in {one} "
        f"and 'x.kernel' in {other}\n"
    )


def test_what_is_not_finite_is_counted_by_tensor(tmp_path, capsys, state):
    one, other = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(state, one)
    state = {name: tensor.clone() for name, tensor in state.items()}
    state["2.bias"][1:3] = math.inf
    state["2.bias"][3] = -math.inf
    state["2.weight"][1, 0] = math.nan
    torch.save(prefixed("module.", state), other)
    assert cli.main(["inspect", str(one), str(other), "--sort", "change"]) == 0
    out = capsys.readouterr().out
    assert f"not finite in {other}: 2.weight 1 nan; 2.bias 2 inf, 1 -inf\n" in out
    assert "+nan" not in out
    document = values(one, other, "--sort", "change", capsys=capsys)
    assert document["matrices"][0]["name"] == "2.weight"
    assert document["not_finite"] == [
        {"checkpoint": str(other), "name": "2.weight", "nan": 1, "inf": 0, "negative_inf": 0,
         "first_index": [1, 0]},
        {"checkpoint": str(other), "name": "2.bias", "nan": 0, "inf": 3, "negative_inf": 1,
         "first_index": [1]},
    ]  # fmt: skip


def test_a_bias_that_is_not_finite_fails_the_gate(tmp_path, capsys, state):
    path = tmp_path / "a.pt"
    state["0.bias"][5] = math.nan
    torch.save(state, path)
    assert cli.main(["inspect", str(path), "--fail-above", "1e6"]) == 3
    assert capsys.readouterr().err == "spectral-kernels: 0.bias: 1 nan\n"
    assert cli.main(["inspect", str(path), "--fail-above", "1e6", "--exclude", "*.bias"]) == 0


def test_every_matrix_of_a_tensor_is_told_once(tmp_path, capsys):
    path = tmp_path / "a.pt"
    tensors = {
        "h.experts.w1": torch.randn(3, 4, 5),
        "fc.weight": torch.full((2, 2), 1e200, dtype=torch.float64),
    }
    tensors["h.experts.w1"][1, 2, 3] = math.inf
    torch.save(tensors, path)
    assert cli.main(["inspect", str(path), "--fail-above", "1e6"]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "spectral-kernels: h.experts.w1: 1 inf"
    # Its numbers are finite, and its norm is not.
    assert lines[1:] == ["spectral-kernels: fc.weight: sigma_1 nan is above 1e+06"]


def test_names_of_many_parts_are_matched_in_no_time():
    first = {"a." * 20000 + f"{i}.w": (2, 2) for i in range(20)}
    other = {"b." * 20000 + f"{i}.w": (2, 2) for i in range(20)}
    assert matched(first, other).names == {}
