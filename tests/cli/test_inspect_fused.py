"""``spectral-kernels inspect`` of weights that hold several matrices, and of experts."""

import json
import math
import statistics

import pytest
import torch

from spectral_kernels import cli
from spectral_kernels.cli.inspect.fused import Recognizer
from spectral_kernels.cli.inspect.rows import MatrixRow
from spectral_kernels.cli.inspect.stacks import summarized
from tests.support.checkpoints import values

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("rich")
pytestmark = pytest.mark.usefixtures("seeded")


def save(folder, tensors, config=None):
    """Write a folder with the weights, and config.json."""
    safetensors.save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def check_sigmas(document, parts):
    assert [row["name"] for row in document["matrices"]] == list(parts)
    for row in document["matrices"]:
        exact = float(torch.linalg.matrix_norm(parts[row["name"]].double(), 2))
        assert row["sigma"] == pytest.approx(exact, rel=1e-4), row["name"]


def named(name, parts):
    return {f"{name}[{label}]": part for label, part in parts.items()}


def in_equal_parts(weight, labels, dim=0):
    return dict(zip(labels, weight.chunk(len(labels), dim), strict=True))


@pytest.mark.parametrize(
    "name",
    ["blocks.0.attn.qkv.weight", "attn.in_proj_weight", "layers.0.W_pack.weight",
     "attn.to_qkv.weight", "attn.c_attn.weight", "attn.Wqkv.weight"],
)  # fmt: skip
def test_equal_parts_of_the_rows_are_q_k_and_v(tmp_path, capsys, name):
    weight = torch.randn(36, 12)
    document = values(save(tmp_path, {name: weight}), capsys=capsys)
    check_sigmas(document, named(name, in_equal_parts(weight, "qkv")))
    assert {tuple(row["shape"]) for row in document["matrices"]} == {(12, 12)}
    whole = values(tmp_path, "--no-splits", capsys=capsys)
    check_sigmas(whole, {name: weight})


@pytest.mark.takes_seconds
@pytest.mark.parametrize("width", [8, 160])
def test_weights_stored_in_out_are_divided_along_columns(tmp_path, capsys, width):
    tensors = {
        "h.0.attn.c_attn.weight": torch.randn(width, 3 * width),
        "h.0.attn.c_proj.weight": torch.randn(width, width),
        "h.0.crossattention.c_attn.weight": torch.randn(width, 2 * width),
        "h.0.mlp.c_fc.weight": torch.randn(width, 4 * width),
    }
    names = list(tensors)
    qkv = in_equal_parts(tensors[names[0]], "qkv", 1)
    kv = in_equal_parts(tensors[names[2]], "kv", 1)
    parts = named(names[0], qkv) | {names[1]: tensors[names[1]]}
    parts |= named(names[2], kv) | {names[3]: tensors[names[3]]}
    document = values(save(tmp_path, tensors), capsys=capsys)
    check_sigmas(document, parts)
    # Of a matrix with as many inputs as dim 0 has elements.
    usual = (math.sqrt(4 * width) + math.sqrt(width)) / math.sqrt(3 * width)
    assert document["matrices"][-1]["usual_sigma"] == pytest.approx(usual)
    by_hand = values(tmp_path, "--splits", f"{names[0]}=2", "--include", names[0], capsys=capsys)
    check_sigmas(by_hand, named(names[0], in_equal_parts(tensors[names[0]], "01", 1)))


def test_splits_by_hand_go_first_and_may_be_along_columns(tmp_path, capsys):
    weight, other = torch.randn(6, 12), torch.randn(6, 5)
    save(tmp_path, {"a.weight": weight, "b.qkv.weight": other})
    document = values(
        tmp_path, "--splits", "a.weight=3,4,5@1", "--splits", "*.qkv.weight=2,4", capsys=capsys
    )
    parts = named("a.weight", dict(zip("012", weight.split((3, 4, 5), 1), strict=True)))
    parts |= named("b.qkv.weight", dict(zip("01", other.split((2, 4)), strict=True)))
    check_sigmas(document, parts)
    assert cli.main(["inspect", str(tmp_path), "--splits", "a.*=5@1"]) == 2
    said = "sizes that add up to the 12 outputs (dim 1) of 'a.weight', got 5"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("where", [None, "text_config"])
def test_heads_of_the_configuration_tell_the_sizes(tmp_path, capsys, where):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3}
    config = heads if where is None else {where: heads, "vision_config": {"head_dim": 7}}
    name, weight = "model.layers.0.self_attn.qkv_proj.weight", torch.randn(24, 10)
    mlp, fused = "model.layers.0.mlp.gate_up_proj.weight", torch.randn(14, 10)
    document = values(save(tmp_path, {name: weight, mlp: fused}, config), capsys=capsys)
    parts = named(mlp, in_equal_parts(fused, ["gate", "up"]))
    parts |= named(name, dict(zip("qkv", weight.split((12, 6, 6)), strict=True)))
    check_sigmas(document, parts)


@pytest.mark.parametrize(
    ("name", "shape", "config", "reason"),
    [
        ("h.0.attention.query_key_value.weight", (36, 12), {}, "q, k and v alternate"),
        ("h.0.attn.qkv_proj.weight", (36, 12), {"model_type": "codegen"}, "q, k and v alternate"),
        ("h.0.attn.qkv_proj.weight", (36, 12), {}, "config.json does not tell"),
        ("h.0.attn.qkv_proj.weight", (36, 12), {"num_attention_heads": 5}, "does not tell"),
        ("h.0.attn.qkv_proj.weight", (36, 12), {"num_attention_heads": -1}, "does not tell"),
        ("s.attn_grid.attn.qkv.weight", (36, 12), {}, "q, k and v alternate"),
        ("s.attn.qkv.weight", (35, 12), {}, None),
        ("s.attn.qkv.weight", (24, 12), {}, None),
        ("s.mlp.gate_up_proj.weight", (15, 12), {}, None),
        ("h.0.attn.c_attn.weight", (36, 13), {}, None),
        ("h.0.attn.c_attn.weight", (36, 12), {"model_type": "gpt_bigcode", "multi_query": False},
         "q, k and v alternate"),
    ],
)  # fmt: skip
def test_what_is_not_certain_stays_whole(tmp_path, capsys, name, shape, config, reason):
    weight = torch.randn(shape)
    document = values(save(tmp_path, {name: weight}, config), capsys=capsys)
    check_sigmas(document, {name: weight})
    assert cli.main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert ("not divided" in out) == (reason is not None)
    assert reason is None or (reason in out and f"{name} {shape[0]}x{shape[1]}" in out)


def test_a_multi_query_weight_has_one_head_of_k_and_v():
    config = {"model_type": "gpt_bigcode", "multi_query": True, "n_head": 4}
    found = Recognizer({"h.0.attn.c_attn.weight": (18, 12)}, config).of("h.0.attn.c_attn.weight")
    assert found.sizes == (12, 3, 3)
    assert found.labels == ("q", "k", "v")


def experts(stored, tensors):
    gate_up, down = (f"layers.0.mlp.experts.{n}_proj" for n in ("gate_up", "down"))
    if stored == "(out, in)":
        tensors[gate_up], tensors[down] = torch.randn(3, 14, 6), torch.randn(3, 6, 7)
    else:
        tensors[gate_up], tensors[down] = torch.randn(3, 6, 14), torch.randn(3, 7, 6)
    return gate_up, down


@pytest.mark.parametrize("stored", ["(out, in)", "(in, out)"])
def test_gate_and_up_of_stacked_experts_are_told_by_the_shapes(tmp_path, capsys, stored):
    tensors = {}
    gate_up, down = experts(stored, tensors)
    document = values(save(tmp_path, tensors), capsys=capsys)
    dim = 0 if stored == "(out, in)" else 1
    parts = {f"{down}[{i}]": tensors[down][i] for i in range(3)}
    for i in range(3):
        halves = in_equal_parts(tensors[gate_up][i], ["gate", "up"], dim)
        parts |= named(f"{gate_up}[{i}]", halves)
    check_sigmas(document, parts)
    usual = (math.sqrt(6) + math.sqrt(7)) / math.sqrt(3 * 7)
    assert document["matrices"][0]["usual_sigma"] == pytest.approx(usual)


def test_columns_that_alternate_stay_whole(tmp_path, capsys):
    tensors = {}
    gate_up, _ = experts("(in, out)", tensors)
    tensors[f"{gate_up}_bias"] = torch.randn(3, 14)  # no matrix
    save(tmp_path, tensors, {"model_type": "gpt_oss"})
    rows = values(tmp_path, capsys=capsys)["matrices"]
    assert [row["name"] for row in rows if "gate" in row["name"]] == [
        f"{gate_up}[{i}]" for i in range(3)
    ]
    assert rows[-1]["usual_sigma"] == pytest.approx((6**0.5 + 14**0.5) / 18**0.5)


@pytest.mark.parametrize("is_stacked", [False, True])
def test_a_stack_of_experts_is_one_line_of_the_table(tmp_path, capsys, monkeypatch, is_stacked):
    monkeypatch.delenv("COLUMNS", raising=False)
    weights = torch.randn(5, 6, 4)
    weights[3] *= 4
    name = "h.0.experts.w1" if is_stacked else "h.0.experts.{}.w1.weight"
    tensors = {name: weights} if is_stacked else {name.format(i): w for i, w in enumerate(weights)}
    save(tmp_path, tensors | {"head.weight": torch.randn(3, 4)})
    sigmas = [float(torch.linalg.matrix_norm(w, 2)) for w in weights]
    assert cli.main(["inspect", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "h.0.experts" in line]
    shown = "h.0.experts.w1[*]" if is_stacked else "h.0.experts.*.w1.weight"
    (line,) = (line.split() for line in lines)
    assert line[:3] == [shown, "6x4", f"{sigmas[3]:.3f}"]
    assert line[-4:] == [f"{statistics.median(sigmas):.3f}", "3", "of", "5"]
    # All of them in JSON, with --experts, and where few rows are asked for.
    assert len(values(tmp_path, capsys=capsys)["matrices"]) == 6
    for more, expected in (["--experts"], 5), (["--top", "2"], 2):
        assert cli.main(["inspect", str(tmp_path), *more]) == 0
        assert capsys.readouterr().out.count("h.0.experts") == expected


def test_a_summary_shows_nan_first_and_the_largest_change():
    def row(number, sigma):
        expert = ("e.*", number)
        return MatrixRow(f"e.{number}", "e.*", (2, 2), 2, 2, "float32", sigma, 2.0, expert=expert)

    ones = [row(i, sigma) for i, sigma in enumerate([1.0, 4.0, math.nan])]
    (stack,) = summarized([(one, None) for one in ones])
    assert (stack.number, stack.count) == (2, 3)
    assert math.isnan(stack.median)
    others = [row(i, sigma) for i, sigma in enumerate([0.1, 4.4, 3.0])]
    before = [row(i, sigma) for i, sigma in enumerate([1.0, 4.0, 3.0])]
    (stack,) = summarized(list(zip(before, others, strict=True)))
    assert stack.number == 0
    assert stack.median == pytest.approx(0)
