"""Which parameters are regularized, under which names, and as which matrices."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from spectral_kernels.plan import Plan
from spectral_kernels.reference import stored
from spectral_kernels.selection import check_patterns, match, select

from .models import mixed


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


def names_of(source, **options):
    return [matrix.name for matrix in select(source, **options).matrices]


def kinds_of(source, **options):
    return {vector.name: vector.kind for vector in select(source, **options).vectors}


def skipped(source, **options):
    return dict(select(source, **options).skipped)


def assert_matrices(source, expected, **options):
    """Names in order, shapes and singular values of all matrices are those of ``expected``."""
    found = select(source, **options)
    assert [matrix.name for matrix in found.matrices] == list(expected)
    owners = list(dict.fromkeys(matrix.owner for matrix in found.matrices))
    plan = Plan(found.matrices, [], [owner.get() for owner in owners])
    for i, (matrix, truth) in enumerate(zip(found.matrices, expected.values(), strict=True)):
        assert matrix.shape == tuple(truth.shape), matrix.name
        layout, tensor = plan.layouts[i], matrix.owner.get().detach()
        weight = stored(plan, i, tensor).reshape(layout.rows, layout.cols)
        assert sorted(weight.shape) == sorted(truth.shape), matrix.name
        torch.testing.assert_close(
            torch.linalg.svdvals(weight), torch.linalg.svdvals(truth.detach()), msg=matrix.name
        )


def numbered(name, parts):
    return {f"{name}[{i}]": part for i, part in enumerate(parts)}


# ---------------------------------------------------------------------- layers, one matrix each


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 3), nn.Linear(5, 1), nn.Bilinear(3, 4, 5), nn.Conv1d(4, 6, 3),
        nn.Conv2d(4, 6, 3), nn.Conv3d(4, 6, 2), nn.Conv2d(4, 6, 1), nn.Conv2d(3, 1, 2),
        nn.Conv1d(4, 6, 3, groups=2), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 6, 3, groups=6),
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
        nn.ConvTranspose1d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2),
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


def test_any_parameter_of_two_or_more_dimensions_is_a_matrix():
    module = holding(a=torch.randn(3, 4), b=torch.randn(3, 4, 5))
    assert_matrices(module, {"a": module.a, "b": module.b.flatten(1)})


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


# ------------------------------------------------------------------------------ which are chosen


def test_include_takes_only_what_it_names():
    model = mixed()
    assert names_of(model, include=["conv.weight", "up.*"]) == ["conv.weight", "up.weight"]
    assert kinds_of(model, include=["conv.weight", "up.*"]) == {"up.bias": "shift"}
    reasons = skipped(model, include=["conv.weight", "up.*"])
    assert reasons["conv.bias"] == "not in include"
    assert "conv.weight" not in reasons


def test_exclude_leaves_out_what_it_names():
    model = mixed()
    everything, rest = names_of(model), names_of(model, exclude=["conv.*", "*in_proj*"])
    assert rest == [n for n in everything if not n.startswith("conv") and "in_proj" not in n]
    assert len(rest) == len(everything) - 4
    reasons = skipped(model, exclude=["conv.*", "*in_proj*"])
    assert reasons["conv.bias"] == "exclude 'conv.*'"
    assert reasons["attention.in_proj_weight"] == "exclude '*in_proj*'"


def test_exclude_wins_over_include():
    assert names_of(mixed(), include=["*.weight"], exclude=["conv.*"])[0] == "up.weight"


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embedding_tables_are_left_out_unless_named(kind):
    model = randomized(nn.ModuleDict({"table": kind(9, 4), "lin": nn.Linear(4, 3)}))
    assert_matrices(model, {"lin.weight": model["lin"].weight})
    assert "include" in skipped(model)["table.weight"]
    assert_matrices(model, {"table.weight": model["table"].weight}, include=["table.*"])


def test_a_frozen_parameter_is_skipped():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    assert names_of(model) == ["1.weight"]
    assert skipped(model) == dict.fromkeys(["0.weight", "0.bias"], "requires_grad is False")
    assert names_of(model, trainable_only=False) == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_other_dtypes_are_skipped(dtype):
    module = nn.Linear(3, 4)
    module.packed = nn.Parameter(torch.randn(5, 4).to(dtype), requires_grad=False)
    assert skipped(module) == {"packed": "requires_grad is False"}
    reasons = skipped(module, trainable_only=False)
    assert reasons == {"packed": f"dtype {str(dtype).removeprefix('torch.')}"}


def test_a_trainable_complex_parameter_is_skipped():
    module = holding(spectrum=nn.Parameter(torch.randn(3, 4, dtype=torch.complex64)))
    module.w = nn.Parameter(torch.randn(3, 4))
    assert skipped(module) == {"spectrum": "dtype complex64"}


def test_a_sparse_parameter_is_skipped():
    module = holding(w=torch.randn(3, 4), s=torch.randn(3, 4).to_sparse())
    assert names_of(module) == ["w"]
    assert skipped(module) == {"s": "layout sparse_coo"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_all_dtypes_with_kernels_are_taken(dtype):
    assert names_of(nn.Linear(2, 3).to(dtype)) == ["weight"]


def test_positional_embeddings_and_tokens_are_skipped_unless_named():
    model = nn.Linear(4, 3)
    model.positions = nn.Parameter(torch.randn(1, 6, 4))
    model.token = nn.Parameter(torch.randn(1, 1, 4))
    assert_matrices(model, {"weight": model.weight})
    reasons = skipped(model)
    assert set(reasons) == {"positions", "token"}
    assert all("include" in reason for reason in reasons.values())
    assert_matrices(model, {"positions": model.positions.flatten(1)}, include=["pos*"])


def test_a_layer_with_one_output_is_not_taken_for_a_token():
    conv = randomized(prune.identity(nn.Conv2d(3, 1, 2, bias=False), "weight"))
    assert_matrices(conv, {"weight_orig": conv.weight_orig.flatten(1)})


def test_positional_embeddings_are_a_table_as_a_stack_of_one():
    model = holding(positions=torch.randn(1, 6, 4))
    assert_matrices(model, {"positions[0]": model.positions[0]}, stacked=["positions"])


def test_other_vectors_and_scalars_are_skipped():
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4))
    model.temperature = nn.Parameter(torch.tensor(0.7))
    model.layer_scale = nn.Parameter(torch.rand(4))
    model.logit_bias = nn.Parameter(torch.tensor(-3.0))
    assert skipped(model) == {
        "temperature": "0-D, neither a bias nor a parameter of a norm",
        "layer_scale": "1-D, neither a bias nor a parameter of a norm",
        "logit_bias": "0-D, neither a bias nor a parameter of a norm",
        "1.weight": "1-D, neither a bias nor a parameter of a norm",
    }


def test_biases_of_any_module_are_known_by_their_name():
    module = holding(w=torch.randn(2, 2), bias=torch.randn(2), q_bias=torch.randn(2))
    assert kinds_of(module) == {"bias": "shift", "q_bias": "shift"}


# ---------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, affine=True), nn.InstanceNorm2d(4, affine=True),
        nn.InstanceNorm3d(4, affine=True), nn.GroupNorm(2, 4), nn.LayerNorm(4),
        nn.LayerNorm((3, 4)), nn.LayerNorm((2, 3, 4)),
    ],
    ids=str,
)  # fmt: skip
def test_norms_have_a_gain_and_a_shift(norm):
    assert kinds_of(norm) == {"weight": "gain", "bias": "shift"}
    assert names_of(norm) == []


def test_a_norm_without_shift():
    assert kinds_of(nn.RMSNorm(4)) == {"weight": "gain"}
    assert kinds_of(nn.LayerNorm(4, bias=False)) == {"weight": "gain"}


def custom(name, base=nn.Module, *arguments, **parameters):
    """An instance of a new class ``name`` with these parameters."""
    module = type(name, (base,), {})(*arguments)
    for key, value in parameters.items():
        setattr(module, key, nn.Parameter(value) if isinstance(value, torch.Tensor) else value)
    return module


@pytest.mark.parametrize(
    ("gain", "shift"), [("weight", "bias"), ("gamma", "beta"), ("scale", "shift"), ("g", "b")]
)
def test_norms_of_other_libraries_are_known_by_their_names(gain, shift):
    norm = custom("LlamaRMSNorm", **{gain: torch.randn(4), shift: torch.randn(4)})
    assert kinds_of(norm) == {gain: "gain", shift: "shift"}


def test_other_vectors_of_a_norm_are_not_pulled_anywhere():
    norm = custom("QKNorm", weight=torch.randn(4), temp=torch.randn(4))
    assert kinds_of(norm) == {"weight": "gain"}
    assert skipped(norm) == {"temp": "1-D, neither a bias nor a parameter of a norm"}
    norm = custom("Mine", nn.LayerNorm, 4, alpha=torch.randn(4), mix=torch.randn(4, 4))
    assert kinds_of(norm) == {"weight": "gain", "bias": "shift"}
    assert_matrices(norm, {"mix": norm.mix})


def test_a_matrix_in_a_module_named_like_a_norm_is_a_matrix():
    layer = custom("NormalizedLinear", weight=torch.randn(3, 4), bias=torch.randn(3))
    assert_matrices(layer, {"weight": layer.weight})


@pytest.mark.parametrize(
    "norm",
    [
        custom("GemmaRMSNorm", weight=torch.randn(4)),
        custom("GemmaRMSNorm", scale=torch.randn(4)),
        custom("NemotronLayerNorm1P", nn.LayerNorm, 4),
        custom("AnyNorm", gamma=torch.randn(4), unit_offset=1.0),
    ],
    ids=["transformers", "scale", "LayerNorm", "unit_offset"],
)
def test_a_gain_stored_as_distance_from_one_is_skipped(norm):
    model = nn.ModuleDict({"norm": norm, "lin": nn.Linear(2, 2)})
    assert "gain" not in kinds_of(model).values()
    (reason,) = skipped(model).values()
    assert type(norm).__name__ in reason
    assert "distance from one" in reason


def test_a_gain_that_could_be_offset_and_is_not_is_taken():
    assert kinds_of(custom("AnyNorm", gamma=torch.randn(4), unit_offset=0.0)) == {"gamma": "gain"}


def test_without_biases():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    assert kinds_of(model, biases=False) == {"1.weight": "gain", "1.bias": "shift"}
    assert skipped(model, biases=False) == {"0.bias": "biases=False"}


def test_without_norms():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    assert kinds_of(model, norms=False) == {"0.bias": "shift"}
    assert skipped(model, norms=False) == dict.fromkeys(["1.weight", "1.bias"], "norms=False")


# ----------------------------------------------------------------------------------------- tied


def tied():
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["table"].weight
    return randomized(model)


def test_a_head_tied_to_an_embedding_is_the_matrix_of_the_head():
    model = tied()
    assert_matrices(model, {"head.weight": model["head"].weight})
    assert skipped(model) == {}


def test_other_tied_tensors_count_once_under_their_first_name():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight, b.bias = a.weight, a.bias
    model = randomized(nn.ModuleDict({"a": a, "b": b}))
    assert_matrices(model, {"a.weight": a.weight})
    assert kinds_of(model) == {"a.bias": "shift"}


def test_a_module_used_twice_counts_once():
    layer = randomized(nn.Linear(4, 4))
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    assert_matrices(model, {"a.weight": layer.weight})
    assert_matrices(model, {"a.weight": layer.weight}, include=["b.0.weight"])


@pytest.mark.parametrize("name", ["table.weight", "head.weight"])
def test_patterns_apply_to_every_name_of_a_tied_tensor(name):
    model = tied()
    model["other"] = nn.Linear(3, 3)
    weight = model["head"].weight
    assert_matrices(model, {"head.weight": weight}, include=[name])
    assert_matrices(model, {"other.weight": model["other"].weight}, exclude=[name])
    parts = numbered("head.weight", weight.chunk(3))
    assert_matrices(model, parts, splits={name: 3}, exclude=["other.*"])


def test_every_parameter_is_accounted_for_once():
    model = mixed()
    model.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)
    model.scalar = nn.Parameter(torch.randn(()))
    found = select(model, exclude=["up.*"])
    used = {x.owner.name for x in (*found.matrices, *found.vectors)}
    left = [name for name, _ in found.skipped]
    assert not used & set(left)
    every = {id(p) for p in model.parameters()}
    named = dict(model.named_parameters(remove_duplicate=False))
    assert {id(named[name]) for name in (*used, *left)} == every
    assert len(used) + len(left) == len(every)


# ------------------------------------------------------------------------- sources and wrappers


@pytest.mark.parametrize("kind", [list, tuple, iter, dict.items], ids=str)
def test_any_iterable_of_names_and_tensors(kind):
    weight, bias, gain = torch.randn(3, 4), torch.randn(3), torch.randn(3)
    named = {"a.weight": weight, "a.bias": bias, "gain": gain}
    source = named.items() if kind is dict.items else kind(list(named.items()))
    found = select(source, trainable_only=False)
    assert [m.name for m in found.matrices] == ["a.weight"]
    assert found.matrices[0].owner.get() is weight
    assert [(v.name, v.kind) for v in found.vectors] == [("a.bias", "shift")]
    assert [name for name, _ in found.skipped] == ["gain"]


def test_named_parameters_may_be_tied():
    model = tied()
    named = list(model.named_parameters(remove_duplicate=False))
    assert len(named) == 2
    assert names_of(named) == ["table.weight"]


def test_a_compiled_model_has_the_names_of_the_original():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    compiled = torch.compile(model)
    assert compiled is not model
    assert names_of(compiled) == names_of(model) == ["0.weight"]
    assert kinds_of(compiled) == kinds_of(model)
    assert select(compiled).matrices[0].owner.get() is model[0].weight


def test_data_parallel_is_unwrapped():
    model = nn.Sequential(nn.Linear(3, 4))
    assert names_of(nn.DataParallel(model)) == ["0.weight"]
    assert names_of(torch.compile(nn.DataParallel(model))) == ["0.weight"]
    assert names_of(nn.DataParallel(torch.compile(model))) == ["0.weight"]


def test_a_model_on_the_meta_device_can_be_selected_from():
    with torch.device("meta"):
        model = nn.Linear(3, 4)
    assert select(model).matrices[0].shape == (4, 3)


@pytest.mark.parametrize(
    ("kind", "arguments", "shape"),
    [
        (nn.LazyLinear, (3,), (2, 5)),
        (nn.LazyConv2d, (3, 2), (2, 3, 4, 4)),
        (nn.LazyBatchNorm1d, (), (2, 5)),
    ],
)
def test_a_lazy_module_must_have_run(kind, arguments, shape):
    lazy = kind(*arguments)
    model = nn.ModuleDict({"lazy": lazy, "lin": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"'lazy\.weight' is not initialized.*run the lazy module"):
        select(model)
    assert names_of(model, exclude=["lazy.*"]) == ["lin.weight"]
    lazy(torch.randn(shape))
    found = select(model)
    assert "lazy.weight" in {x.name for x in (*found.matrices, *found.vectors)}


def test_an_owner_follows_its_parameter():
    model = nn.Sequential(nn.Linear(3, 4))
    owner = select(model).matrices[0].owner
    model[0].weight = nn.Parameter(torch.randn(4, 3))
    assert owner.get() is model[0].weight
    nn.utils.parametrizations.orthogonal(model[0])
    with pytest.raises(RuntimeError, match=r"'0\.weight' is no longer a parameter.*build a new"):
        owner.get()


# --------------------------------------------------------------------------------------- errors

LIN = nn.ModuleDict({"lin": nn.Linear(5, 6), "norm": nn.LayerNorm(6)})
LIN.experts = nn.Parameter(torch.randn(3, 4, 5))

BAD = {
    "a tensor for a model": (
        lambda: select(torch.randn(3, 4)), TypeError, ["model", "Tensor", "Module", "(name, "]),
    "nothing for a model": (
        lambda: select(None), TypeError, ["model", "NoneType", "Module"]),
    "tensors without names": (
        lambda: select([torch.randn(3, 4)]), TypeError, ["model", "tensor(", "(name, parameter)"]),
    "names without tensors": (
        lambda: select(["weight"]), TypeError, ["model", "'weight'", "(name, parameter)"]),
    "a dict": (
        lambda: select({"weight": torch.randn(3, 4)}), TypeError, ["model", "(name, parameter)"]),
    "arrays": (
        lambda: select([("weight", torch.randn(3, 4).numpy())]), TypeError, ["model", "array"]),
    "a name that comes twice": (
        lambda: select([("w", torch.randn(3, 4)), ("w", torch.randn(3, 4))]), ValueError,
        ["model", "'w'", "twice"]),
    "no parameters": (
        lambda: select(nn.ReLU()), ValueError, ["nothing to regularize", "no parameters"]),
    "nothing left": (
        lambda: select(LIN, exclude=["*"]), ValueError,
        ["nothing to regularize", "lin.weight: exclude '*'"]),
    "include that names nothing": (
        lambda: select(LIN, include=["lin.wieght"]), ValueError,
        ["include", "'lin.wieght'", "no parameter", "lin.weight"]),
    "exclude that names nothing": (
        lambda: select(LIN, exclude=["lin.*", "conv.*"]), ValueError,
        ["exclude", "'conv.*'", "norm.weight"]),
    "splits that name nothing": (
        lambda: select(LIN, splits={"qkv": 3}), ValueError, ["splits", "'qkv'", "lin.weight"]),
    "stacked that names nothing": (
        lambda: select(LIN, stacked=["moe"]), ValueError, ["stacked", "'moe'", "experts"]),
    "one pattern for a list, include": (
        lambda: select(LIN, include="lin.*"), TypeError, ["include", "'lin.*'", "list"]),
    "one pattern for a list, exclude": (
        lambda: select(LIN, exclude="lin.*"), TypeError, ["exclude", "'lin.*'", "list"]),
    "one pattern for a list, stacked": (
        lambda: select(LIN, stacked="experts"), TypeError, ["stacked", "'experts'", "list"]),
    "a number for a list": (
        lambda: select(LIN, include=5), TypeError, ["include", "5", "list"]),
    "numbers for patterns": (
        lambda: select(LIN, exclude=["lin.*", 5]), TypeError, ["exclude", "5", "list"]),
    "a list for splits": (
        lambda: select(LIN, splits=["lin.weight"]), TypeError, ["splits", "['lin", "mapping"]),
    "splits of numbers": (
        lambda: select(LIN, splits={3: 3}), TypeError, ["splits", "{3: 3}", "name patterns"]),
    "parts that are not equal": (
        lambda: select(LIN, splits={"lin.weight": 4}), ValueError,
        ["splits", "4", "6 outputs", "'lin.weight'", "add up to 6"]),
    "sizes that do not add up": (
        lambda: select(LIN, splits={"lin.*": [4, 1]}), ValueError,
        ["splits", "'lin.*'", "[4, 1]", "'lin.weight'", "add up to 6"]),
    "transposed outputs": (
        lambda: select(nn.ConvTranspose1d(6, 4, 2), splits={"weight": 6}), ValueError,
        ["4 outputs (dim 1)", "add up to 4"]),
    "outputs inside of a stack": (
        lambda: select(LIN, splits={"experts": 3}, stacked=["experts"]), ValueError,
        ["4 outputs", "'experts'", "add up to 4"]),
    "a stack of two dimensions": (
        lambda: select(LIN, stacked=["lin.weight"]), ValueError,
        ["stacked", "'lin.weight'", "(6, 5)", "(E, out, in)"]),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_errors_name_what_came_and_what_is_accepted(bad):
    call, error, parts = BAD[bad]
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "wanted", [0, -2, 2.0, True, None, "2", [], [6, 0], [7, -1], [3.0, 3.0], [[3], [3]]], ids=repr
)
def test_only_counts_and_sizes_divide(wanted):
    with pytest.raises(ValueError, match=r"splits: 'lin.weight'.*does not divide the 6 outputs"):
        select(LIN, splits={"lin.weight": wanted})


def test_patterns_are_globs_of_whole_names_in_order():
    assert match("blocks.3.qkv.weight", ["qkv.*", "*.qkv.weight", "*"]) == "*.qkv.weight"
    assert match("blocks.3.qkv.weight", ["blocks.[12].*", "qkv"]) is None
    assert match("Blocks.3", ["blocks.*"]) is None


def test_an_unknown_pattern_lists_the_first_names_only():
    names = [f"layer{i}" for i in range(20)]
    with pytest.raises(ValueError, match=r"layer7, \.\.\.$"):
        check_patterns("include", ["*", "nothing"], names)
    check_patterns("include", ["*", "layer1?"], names)
