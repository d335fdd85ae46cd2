"""The matrices as which a selected parameter is viewed."""

import pytest
import torch
from torch import nn

from spectral_kernels.selection.rules import select

from ..support.selecting import (
    assert_matrices,
    holding,
    kinds_of,
    names_of,
    numbered,
    randomized,
    skipped,
)

pytestmark = pytest.mark.usefixtures("seeded")


# ---------------------------------------------------------------------- layers, one matrix each


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 3), nn.Linear(5, 1), nn.Bilinear(3, 4, 5), nn.Conv1d(4, 6, 3),
        nn.Conv2d(4, 6, 3), nn.Conv3d(4, 6, 2), nn.Conv2d(4, 6, 1), nn.Conv2d(3, 1, 2),
    ],
    ids=str,
)  # fmt: skip
def test_layers_are_flattened_to_outputs_by_rest(layer):
    assert_matrices(randomized(layer), {"weight": layer.weight.flatten(1)})
    assert kinds_of(layer) == {"bias": "shift"}


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose1d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3), nn.ConvTranspose3d(4, 6, 2),
        nn.ConvTranspose2d(4, 6, 1), nn.ConvTranspose2d(1, 3, 2), nn.ConvTranspose2d(3, 1, 2),
    ],
    ids=str,
)  # fmt: skip
def test_transposed_convolutions_are_flattened_to_dim_1_by_rest(layer):
    randomized(layer)
    assert_matrices(layer, {"weight": layer.weight.transpose(0, 1).flatten(1)})
    assert kinds_of(layer) == {"bias": "shift"}


def test_the_view_is_described():
    model = nn.ModuleDict(
        {"lin": nn.Linear(2, 4), "conv": nn.Conv2d(2, 3, 2), "up": nn.ConvTranspose1d(2, 3, 2)}
    )
    model["experts"] = holding(w=torch.randn(3, 4, 5))
    found = select(model, splits={"lin.weight": [1, 3], "experts.w": 2}, stacked=["experts.w"])
    assert {matrix.name: matrix.view for matrix in found.matrices} == {
        "lin.weight[0]": "split 1+3",
        "lin.weight[1]": "split 1+3",
        "conv.weight": "flattened (dim 0, rest)",
        "up.weight": "flattened (dim 1, rest)",
        **{f"experts.w[{e}][{i}]": "stack of 3, split 2+2" for e in range(3) for i in range(2)},
    }


# ---------------------------------------------------------------- convolutions by groups


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(4, 6, 3, groups=2), nn.Conv2d(6, 9, 3, groups=3), nn.Conv2d(4, 8, 1, groups=2),
     nn.Conv2d(4, 8, 3, groups=4)],
    ids=str,
)  # fmt: skip
def test_a_convolution_by_groups_is_a_matrix_per_group(layer):
    parts = randomized(layer).weight.chunk(layer.groups)
    assert_matrices(layer, numbered("weight", [part.flatten(1) for part in parts]))
    assert kinds_of(layer) == {"bias": "shift"}
    assert_matrices(layer, {"weight": layer.weight.flatten(1)}, roles={"weight": "matrix"})


@pytest.mark.parametrize(
    "layer",
    [nn.ConvTranspose1d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 9, 3, groups=3),
     nn.ConvTranspose2d(6, 4, 1, groups=2)],
    ids=str,
)  # fmt: skip
def test_a_transposed_convolution_by_groups_is_a_matrix_per_group(layer):
    parts = randomized(layer).weight.chunk(layer.groups)
    parts = [part.transpose(0, 1).flatten(1) for part in parts]
    assert_matrices(layer, numbered("weight", parts))
    whole = layer.weight.transpose(0, 1).flatten(1)
    assert_matrices(layer, {"weight": whole}, roles={"weight": "matrix"})


@pytest.mark.parametrize(
    ("layer", "length"),
    [
        (nn.Conv2d(6, 6, 3, groups=6), 9), (nn.Conv1d(4, 4, 5, groups=4), 5),
        (nn.Conv2d(3, 6, 1, groups=3), 2), (nn.ConvTranspose2d(6, 6, 2, groups=6), 4),
        (nn.ConvTranspose1d(3, 6, 1, groups=3), 2), (nn.ConvTranspose2d(6, 3, 1, groups=3), 2),
    ],
    ids=str,
)  # fmt: skip
def test_groups_that_are_vectors_are_rows(layer, length):
    found = select(layer)
    assert found.matrices == []
    (rows, bias) = found.elementwise
    assert (rows.name, rows.kind, rows.length, rows.target) == ("weight", "rows", length, None)
    assert bias.kind == "shift"


def test_splits_do_not_concern_biases():
    layer = randomized(nn.Linear(5, 12))
    assert_matrices(layer, numbered("weight", layer.weight.chunk(3)), splits={"*": 3})
    assert kinds_of(layer, splits={"*": 3}) == {"bias": "shift"}


def test_groups_can_be_split_by_hand():
    conv = randomized(nn.Conv2d(6, 6, 3, groups=6))
    parts = [part.flatten(1) for part in conv.weight.chunk(2)]
    assert_matrices(conv, numbered("weight", parts), splits={"weight": 2})


# ----------------------------------------------------------------------------- fused projections


def test_attention_in_proj_is_three_matrices():
    attention = randomized(nn.MultiheadAttention(12, 3))
    q, k, v = attention.in_proj_weight.chunk(3)
    assert_matrices(
        attention,
        {
            "in_proj_weight[q]": q,
            "in_proj_weight[k]": k,
            "in_proj_weight[v]": v,
            "out_proj.weight": attention.out_proj.weight,
        },
    )
    assert kinds_of(attention) == {"in_proj_bias": "shift", "out_proj.bias": "shift"}


def test_attention_with_separate_projections():
    attention = randomized(nn.MultiheadAttention(12, 3, kdim=5, vdim=7))
    expected = {f"{n}_proj_weight": getattr(attention, f"{n}_proj_weight") for n in "qkv"}
    assert_matrices(attention, {**expected, "out_proj.weight": attention.out_proj.weight})


def test_attention_bias_k_and_v_are_tokens_and_skipped():
    attention = randomized(nn.MultiheadAttention(12, 3, add_bias_kv=True))
    assert len(names_of(attention)) == 4
    assert set(kinds_of(attention)) == {"in_proj_bias", "out_proj.bias"}
    reasons = skipped(attention)
    assert set(reasons) == {"bias_k", "bias_v"}
    assert all("token" in reason for reason in reasons.values())


def test_splits_override_the_parts_of_a_known_layer():
    attention = randomized(nn.MultiheadAttention(12, 3))
    weight = attention.in_proj_weight
    assert_matrices(
        attention,
        numbered("in_proj_weight", weight.split([12, 24])),
        include=["in_proj_weight"],
        splits={"in_proj_weight": (12, 24)},
    )


GATED = [
    (nn.LSTM(4, 5, num_layers=2), "ifgo"),
    (nn.LSTM(4, 5, bidirectional=True), "ifgo"),
    (nn.LSTM(4, 5, proj_size=3), "ifgo"),
    (nn.LSTMCell(4, 5), "ifgo"),
    (nn.GRU(4, 5, bidirectional=True), "rzn"),
    (nn.GRUCell(4, 5), "rzn"),
    (nn.RNN(4, 5), ""),
    (nn.RNNCell(4, 5), ""),
]


@pytest.mark.parametrize(("layer", "gates"), GATED, ids=[str(layer) for layer, _ in GATED])
def test_recurrent_weights_are_split_into_gates(layer, gates):
    randomized(layer)
    expected = {}
    for name, weight in layer.named_parameters():
        if name.startswith(("weight_ih", "weight_hh")) and gates:
            parts = weight.chunk(len(gates))
            assert all(part.shape[0] == 5 for part in parts)
            expected |= {f"{name}[{g}]": part for g, part in zip(gates, parts, strict=True)}
        elif name.startswith("weight"):
            expected[name] = weight
    assert_matrices(layer, expected)
    biases = {name: "shift" for name, _ in layer.named_parameters() if name.startswith("bias")}
    assert biases
    assert kinds_of(layer) == biases


def test_projection_of_an_lstm_is_one_matrix():
    layer = randomized(nn.LSTM(4, 5, proj_size=3))
    assert "weight_hr_l0" in names_of(layer)
    assert "weight_hh_l0[o]" in names_of(layer)


def test_splits_by_number():
    layer = randomized(nn.Linear(5, 12))
    assert_matrices(layer, numbered("weight", layer.weight.chunk(3)), splits={"weight": 3})


@pytest.mark.parametrize("sizes", [[16, 4, 4], (1, 23), [24]])
def test_splits_by_sizes(sizes):
    model = randomized(nn.ModuleDict({"qkv": nn.Linear(5, 24), "out": nn.Linear(24, 5)}))
    expected = numbered("qkv.weight", model["qkv"].weight.split(list(sizes)))
    expected["out.weight"] = model["out"].weight
    assert_matrices(model, expected, splits={"*qkv.weight": sizes})


def test_splits_of_convolutions_go_along_the_outputs():
    conv = randomized(nn.Conv2d(3, 8, 2))
    assert_matrices(
        conv,
        numbered("weight", [part.flatten(1) for part in conv.weight.split([2, 6])]),
        splits={"weight": [2, 6]},
    )
    up = randomized(nn.ConvTranspose2d(3, 8, 2))
    parts = up.weight.transpose(0, 1).flatten(1).split([2, 6])
    assert_matrices(up, numbered("weight", parts), splits={"weight": [2, 6]})


def test_the_first_pattern_counts():
    layer = randomized(nn.Linear(5, 12))
    parts = numbered("weight", layer.weight.chunk(2))
    assert_matrices(layer, parts, splits={"w*": 2, "weight": 3})


class Conv1D(nn.Module):
    """As in transformers: y = x W + b with W stored (in, out), ``nf`` outputs."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))


def test_weights_stored_in_by_out_are_split_along_the_outputs():
    layer = Conv1D(12, 5)
    parts = [part.T for part in layer.weight.chunk(3, dim=1)]
    assert_matrices(layer, numbered("weight", parts), splits={"weight": 3})
    parts = [part.T for part in layer.weight.split([8, 2, 2], dim=1)]
    assert_matrices(layer, numbered("weight", parts), splits={"weight": [8, 2, 2]})
    assert_matrices(layer, {"weight": layer.weight})


def test_another_class_of_that_name_is_split_along_dim_0():
    layer = Conv1D(12, 6)
    del layer.nf
    assert_matrices(layer, numbered("weight", layer.weight.chunk(3)), splits={"weight": 3})


@pytest.mark.takes_seconds
def test_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=8, n_embd=12, n_layer=2, n_head=3, n_inner=20
    )
    model = randomized(transformers.GPT2LMHeadModel(config))
    expected = {}
    for i, block in enumerate(model.transformer.h):
        name = f"transformer.h.{i}"
        parts = [part.T for part in block.attn.c_attn.weight.chunk(3, dim=1)]
        expected |= numbered(f"{name}.attn.c_attn.weight", parts)
        expected[f"{name}.attn.c_proj.weight"] = block.attn.c_proj.weight
        expected[f"{name}.mlp.c_fc.weight"] = block.mlp.c_fc.weight
        expected[f"{name}.mlp.c_proj.weight"] = block.mlp.c_proj.weight
    options = {"splits": {"*.c_attn.weight": 3}}
    head = {"lm_head.weight": model.lm_head.weight}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_matrices(model, {**head, **expected}, **options)
    assert set(skipped(model, **options)) == {"transformer.wpe.weight"}
    kinds = kinds_of(model, **options)
    assert len(kinds) == 2 * (2 + 2 + 4) + 2
    assert kinds["transformer.ln_f.weight"] == "gain"
    assert kinds["transformer.h.1.mlp.c_fc.bias"] == "shift"


# --------------------------------------------------------------------------------------- stacks


def test_a_stack_is_as_many_matrices():
    module = holding(experts=torch.randn(3, 6, 5))
    assert_matrices(module, numbered("experts", module.experts), stacked=["experts"])


def test_a_stack_of_more_dimensions_is_flattened_inside():
    module = holding(experts=torch.randn(3, 6, 5, 2))
    parts = [expert.flatten(1) for expert in module.experts]
    assert_matrices(module, numbered("experts", parts), stacked=["exp*"])


def test_a_stack_of_splits():
    module = holding(gate_up=torch.randn(3, 6, 5))
    expected = {
        f"gate_up[{e}][{i}]": part
        for e in range(3)
        for i, part in enumerate(module.gate_up[e].split([2, 4]))
    }
    assert_matrices(module, expected, stacked=["gate_up"], splits={"gate_up": [2, 4]})


def test_a_stack_of_one():
    module = holding(experts=torch.randn(1, 6, 5))
    assert_matrices(module, {"experts[0]": module.experts[0]}, stacked=["experts"])
