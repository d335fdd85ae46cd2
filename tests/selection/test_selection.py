"""Which parameters are regularized, and under which names."""

import pytest
import torch
from torch import nn

from spectral_kernels.selection.arguments import check_patterns, match_any
from spectral_kernels.selection.rules import select

from ..support.models import mixed
from ..support.selecting import (
    assert_matrices,
    custom,
    holding,
    kinds_of,
    names_of,
    numbered,
    randomized,
    skipped,
)

pytestmark = pytest.mark.usefixtures("seeded")


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
    assert_matrices(model, {"positions[0]": model.positions[0]}, include=["pos*"])
    flat = {"positions": model.positions.flatten(1)}
    assert_matrices(model, flat, include=["pos*"], roles={"positions": "matrix"})


def test_a_layer_with_one_output_is_not_taken_for_a_token():
    conv = randomized(nn.Conv2d(3, 1, 2, bias=False))
    assert_matrices(conv, {"weight": conv.weight.flatten(1)})


def test_positional_embeddings_are_a_table_as_a_stack_of_one():
    model = holding(positions=torch.randn(1, 6, 4))
    assert_matrices(model, {"positions[0]": model.positions[0]}, stacked=["positions"])


def test_other_vectors_and_scalars_are_skipped():
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4))
    model.temperature = nn.Parameter(torch.tensor(0.7))
    model.layer_scale = nn.Parameter(torch.rand(4))
    model.logit_bias = nn.Parameter(torch.tensor(-3.0))
    assert skipped(model) == {
        "temperature": "a scale, by its name (roles takes it)",
        "layer_scale": "a scale, by its name (roles takes it)",
        "logit_bias": "0-D, neither a bias nor a gain",
        "1.weight": "a slope",
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


@pytest.mark.parametrize(
    ("gain", "shift"), [("weight", "bias"), ("gamma", "beta"), ("scale", "shift"), ("g", "b")]
)
def test_norms_of_other_libraries_are_known_by_their_names(gain, shift):
    norm = custom("LlamaRMSNorm", **{gain: torch.randn(4), shift: torch.randn(4)})
    assert kinds_of(norm) == {gain: "gain", shift: "shift"}


def test_other_vectors_of_a_norm_are_not_pulled_anywhere():
    norm = custom("QKNorm", weight=torch.randn(4), temp=torch.randn(4))
    assert kinds_of(norm) == {"weight": "gain"}
    assert skipped(norm) == {"temp": "a scale, by its name (roles takes it)"}
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
    used = {x.ref.name for x in (*found.matrices, *found.elementwise)}
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
    named = {"a.weight": weight, "a.bias": bias, "ln.weight": gain}
    source = named.items() if kind is dict.items else kind(list(named.items()))
    found = select(source, trainable_only=False)
    assert [m.name for m in found.matrices] == ["a.weight"]
    assert found.matrices[0].ref.get() is weight
    assert [(v.name, v.kind) for v in found.elementwise] == [("a.bias", "shift")]
    assert [name for name, _ in found.skipped] == ["ln.weight"]


def test_named_parameters_may_be_tied():
    model = tied()
    named = list(model.named_parameters(remove_duplicate=False))
    assert len(named) == 2
    assert names_of(named) == ["table.weight"]


@pytest.mark.takes_seconds
def test_a_compiled_model_has_the_names_of_the_original():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    compiled = torch.compile(model)
    assert compiled is not model
    assert names_of(compiled) == names_of(model) == ["0.weight"]
    assert kinds_of(compiled) == kinds_of(model)
    assert select(compiled).matrices[0].ref.get() is model[0].weight


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
    assert "lazy.weight" in {x.name for x in (*found.matrices, *found.elementwise)}


def test_an_owner_follows_its_parameter():
    model = nn.Sequential(nn.Linear(3, 4))
    ref = select(model).matrices[0].ref
    model[0].weight = nn.Parameter(torch.randn(4, 3))
    assert ref.get() is model[0].weight
    nn.utils.parametrizations.orthogonal(model[0])
    with pytest.raises(RuntimeError, match=r"'0\.weight' is no longer a parameter.*build a new"):
        ref.get()


# --------------------------------------------------------------------------------------- errors

LIN = nn.ModuleDict({"lin": nn.Linear(5, 6), "norm": nn.LayerNorm(6)})
LIN.experts = nn.Parameter(torch.randn(3, 4, 5))

BAD = {
    "a tensor for a model": (
        lambda: select(torch.randn(3, 4)), TypeError, ["model", "Tensor", "Module", "(name, "]),
    "nothing for a model": (
        lambda: select(None), TypeError, ["model", "NoneType", "Module"]),
    "tensors without names": (
        lambda: select([torch.randn(3, 4)]), TypeError,
        ["named parameters, got parameters without names (pass the module or model.named_p"]),
    "a name for a model": (
        lambda: select("model.pt"), TypeError,
        ["model: expected a torch.nn.Module", "got 'model.pt'"]),
    "names without tensors": (
        lambda: select(["weight"]), TypeError, ["model", "'weight'", "(name, parameter)"]),
    "a dict": (
        lambda: select({"weight": torch.randn(3, 4)}), TypeError,
        ["got dict", "model.state_dict().items()"]),
    "arrays": (
        lambda: select([("weight", torch.randn(3, 4).numpy())]), TypeError,
        ["model", "('weight', ndarray of shape (3, 4))"]),
    "a name that comes twice": (
        lambda: select([("w", torch.randn(3, 4)), ("w", torch.randn(3, 4))]), ValueError,
        ["model: expected one tensor per name", "got two", "'w'"]),
    "no parameters": (
        lambda: select(nn.ReLU()), ValueError, ["nothing to regularize", "no parameters"]),
    "nothing left": (
        lambda: select(LIN, exclude=["*"]), ValueError,
        ["nothing to regularize", "lin.weight: exclude '*'"]),
    "include that names nothing": (
        lambda: select(LIN, include=["lin.wieght"]), ValueError,
        ["include", "matches a parameter, got 'lin.wieght'", "lin.weight"]),
    "exclude that names nothing": (
        lambda: select(LIN, exclude=["lin.*", "conv.*"]), ValueError,
        ["exclude", "'conv.*'", "norm.weight"]),
    "splits that name nothing": (
        lambda: select(LIN, splits={"qkv": 3}), ValueError, ["splits", "'qkv'", "lin.weight"]),
    "stacked that names nothing": (
        lambda: select(LIN, stacked=["moe"]), ValueError, ["stacked", "'moe'", "experts"]),
    "a number for a list": (
        lambda: select(LIN, include=5), TypeError, ["include", "5", "list"]),
    "numbers for patterns": (
        lambda: select(LIN, exclude=["lin.*", 5]), TypeError, ["exclude", "5", "list"]),
    "a word for a flag": (
        lambda: select(LIN, biases="no"), TypeError, ["biases: expected True or False, got 'no'"]),
    "no flag": (
        lambda: select(LIN, norms=None), TypeError, ["norms: expected True or False, got None"]),
    "a list for splits": (
        lambda: select(LIN, splits=["lin.weight"]), TypeError, ["splits", "['lin", "mapping"]),
    "splits of numbers": (
        lambda: select(LIN, splits={3: 3}), TypeError, ["splits", "{3: 3}", "name patterns"]),
    "parts that are not equal": (
        lambda: select(LIN, splits={"lin.weight": 4}), ValueError,
        ["splits", "add up to the 6 outputs", "'lin.weight'", "got 4"]),
    "sizes that do not add up": (
        lambda: select(LIN, splits={"lin.*": [4, 1]}), ValueError,
        ["splits", "'lin.*'", "got [4, 1]", "'lin.weight'", "add up to the 6"]),
    "transposed outputs": (
        lambda: select(nn.ConvTranspose1d(6, 4, 2), splits={"weight": 6}), ValueError,
        ["add up to the 4 outputs (dim 1)", "got 6"]),
    "outputs inside of a stack": (
        lambda: select(LIN, splits={"experts": 3}, stacked=["experts"]), ValueError,
        ["add up to the 4 outputs", "'experts'"]),
    "a stack of two dimensions": (
        lambda: select(LIN, stacked=["lin.weight"]), ValueError,
        ["stacked", "'lin.weight'", "(6, 5)", "(E, out, in)"]),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_errors_name_what_was_expected_and_what_came(bad):
    call, error, parts = BAD[bad]
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "wanted", [0, -2, 2.0, True, None, "2", [], [6, 0], [7, -1], [3.0, 3.0], [[3], [3]]], ids=repr
)
def test_only_counts_and_sizes_divide(wanted):
    with pytest.raises(
        ValueError, match=r"splits\['lin.weight'\]: expected .* the 6 outputs.*, got "
    ):
        select(LIN, splits={"lin.weight": wanted})


def test_patterns_are_globs_of_whole_names_in_order():
    assert match_any(["blocks.3.qkv.weight"], ["qkv.*", "*.qkv.weight", "*"]) == "*.qkv.weight"
    assert match_any(["blocks.3.qkv.weight"], ["blocks.[12].*", "qkv"]) is None
    assert match_any(["Blocks.3"], ["blocks.*"]) is None


def test_an_unknown_pattern_lists_the_first_names_only():
    names = [f"layer{i}" for i in range(20)]
    with pytest.raises(ValueError, match=r"layer7, \.\.\.\)$"):
        check_patterns("include", ["*", "nothing"], names)
    check_patterns("include", ["*", "layer1?"], names)
