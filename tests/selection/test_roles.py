"""What a parameter is taken for: by its layer, by shape and name, and by what the user says."""

import pytest
import torch
from torch import nn

import spectral_kernels
from spectral_kernels.selection import layers
from spectral_kernels.selection.arguments import by_name
from spectral_kernels.selection.listing import listing
from spectral_kernels.selection.rules import select

from ..support.selecting import (
    assert_matrices,
    custom,
    holding,
    kinds_of,
    names_of,
    numbered,
    skipped,
)

pytestmark = pytest.mark.usefixtures("seeded")


# ------------------------------------------------------------------------------- shape and name

SKIPPED = {
    "actor_logstd": ((1, 6), "a logarithm"),
    "log_std": ((64, 2), "a logarithm"),
    "A_log": ((8, 4), "a logarithm"),
    "weight_sigma": ((4, 5), "a standard deviation"),
    "dt_bias": ((4,), "a time step"),
    "time_decay": ((4, 2), "a decay"),
    "inv_freq": ((4,), "a frequency"),
    "relative_position_bias_table": ((9, 3), "a position"),
    "codebook": ((9, 3), "a table"),
    "pos_embed": ((5, 4), "a position"),
    "rel_pos_w": ((5, 4), "a position"),
    "class_embedding": ((4,), "an embedding"),
    "cls_token": ((1, 4), "a token"),
    "queries": ((5, 4), "a token"),
    "logit_scale": ((3, 1, 1), "a scale"),
    "temperature": ((3, 1, 1), "a scale"),
    "gamma_1": ((4,), "a scale"),
    "layer_scale": ((4, 1, 1), "a scale"),
    "attention_biases": ((3, 9), "a table of biases"),
    "D": ((4,), "1-D, neither a bias nor a gain"),
    "mix": ((1, 1, 4), "3-D, neither a bias nor a gain"),
    "kernel4": ((3, 4, 5, 5), "4-D, of an unknown layer"),
    "att": ((1, 3, 4), "additive embedding or token"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_is_no_weight_is_skipped_with_the_reason(name):
    shape, reason = SKIPPED[name]
    module = holding(**{name: torch.randn(shape), "w": torch.randn(3, 4)})
    assert names_of(module) == ["w"]
    assert kinds_of(module) == {}
    found = skipped(module)[name]
    assert found.startswith(reason)
    assert ("include" in found) == (len(shape) >= 2)
    if len(shape) >= 2:
        assert any(n.startswith(name) for n in names_of(module, include=[name, "w"]))


@pytest.mark.parametrize(
    "name",
    ["prototypes", "text_projection", "W", "weight_mu", "pos_proj", "embed_weight", "gate_up"],
)
def test_two_dimensions_are_a_matrix_if_nothing_speaks_against_it(name):
    module = holding(**{name: torch.randn(3, 4)})
    assert_matrices(module, {name: getattr(module, name)})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("bias", (1, 4)),
        ("_bias", (4, 1)),
        ("q_bias", (4,)),
        ("bias_mu", (4,)),
        ("b", (4,)),
        ("b_in", (4,)),
        ("b1", (1, 4)),
    ],
)
def test_a_bias_has_one_dimension_above_one(name, shape):
    module = holding(**{"w": torch.randn(3, 4), name: torch.randn(shape)})
    assert kinds_of(module) == {name: "shift"}


def test_weights_and_biases_per_head():
    module = holding(W_Q=torch.randn(2, 6, 3), b_Q=torch.randn(2, 3), B=torch.randn(3, 4))
    assert names_of(module) == ["W_Q[0]", "W_Q[1]", "B"]
    assert kinds_of(module) == {"b_Q": "rows"}
    assert names_of(holding(b_proj=torch.randn(3, 4))) == ["b_proj"]


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (1, 1)])
def test_a_weight_may_have_one_row_or_column(shape):
    module = holding(weight=torch.randn(shape))
    assert_matrices(module, {"weight": module.weight})
    assert_matrices([("a", module.weight)], {"a": module.weight})


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 1, 5), (1, 4, 5), (2, 4, 1)])
def test_three_dimensions_of_a_weight_are_a_stack(shape):
    module = holding(weight=torch.randn(shape))
    assert_matrices(module, numbered("weight", module.weight))
    flat = {"weight": module.weight.flatten(1)}
    assert_matrices(module, flat, roles={"weight": "matrix"})


@pytest.mark.parametrize("bias", [(3, 5), (3, 1, 5), (3, 1)])
def test_biases_beside_a_stack_are_rows_pulled_to_zero(bias):
    module = holding(gate_up=torch.randn(3, 4, 5), gate_up_bias=torch.randn(bias))
    (rows,) = select(module).elementwise
    length = module.gate_up_bias[0].numel()
    assert (rows.name, rows.kind, rows.length, rows.target) == ("gate_up_bias", "rows", length, 0.0)
    assert kinds_of(module, biases=False) == {}
    assert skipped(module, biases=False) == {"gate_up_bias": "biases=False"}


def test_a_kernel_of_the_size_that_the_module_says_is_a_convolution():
    layer = custom("MyConv", weight=torch.randn(6, 4, 3, 2))
    layer.kernel_size = (3, 2)
    assert_matrices(layer, {"weight": layer.weight.flatten(1)})
    layer.groups = 2
    parts = [part.flatten(1) for part in layer.weight.chunk(2)]
    assert_matrices(layer, numbered("weight", parts))


def test_a_table_by_the_name_of_its_class():
    for kind, name in (("VocabParallelEmbedding", "weight"), ("Embed", "W_E")):
        model = nn.ModuleDict({"a": custom(kind, **{name: torch.randn(9, 4)})})
        model["b"] = nn.Linear(4, 3)
        assert names_of(model) == ["b.weight"]
        assert "embedding table" in skipped(model)[f"a.{name}"]


def test_a_mark_of_the_author_counts():
    module = holding(w=torch.randn(3, 4), state=torch.randn(3, 4))
    module.state._no_weight_decay = True
    assert skipped(module) == {
        "state": "marked _no_weight_decay by its author (include or roles takes it)"
    }


def test_the_bias_of_a_time_step_is_skipped():
    model = nn.ModuleDict({"dt_proj": nn.Linear(3, 4), "in_proj": nn.Linear(3, 4)})
    assert names_of(model) == ["dt_proj.weight", "in_proj.weight"]
    assert kinds_of(model) == {"in_proj.bias": "shift"}


def test_a_weight_of_one_dimension_is_no_matrix():
    for layer in (nn.Linear(3, 4), nn.Conv2d(2, 3, 1), nn.LSTM(3, 4), nn.MultiheadAttention(4, 2)):
        for name, p in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(torch.randn(p.shape[0])))
        layer.w = nn.Parameter(torch.randn(2, 2))
        assert [n for n in names_of(layer) if "out_proj" not in n] == ["w"]


def test_a_noisy_linear_layer_by_a_subclass_of_linear():
    layer = type("NoisyLinear", (nn.Linear,), {})(3, 4)
    layer.sigma_weight = nn.Parameter(torch.randn(4, 3))
    layer.mask = nn.Parameter(torch.randn(4, 3))
    assert names_of(layer) == ["weight"]


def test_parameters_of_a_list_have_its_name():
    model = holding(w=torch.randn(3, 4))
    model.pos_embeds = nn.ParameterList([torch.randn(5, 4)])
    model.experts = nn.ParameterDict({"a": torch.randn(5, 4)})
    assert names_of(model) == ["w", "experts.a"]
    assert skipped(model)["pos_embeds.0"].startswith("a position")


def test_an_iterable_tells_stacks_by_name_alone():
    named = {"h.experts.up": torch.randn(3, 4, 5), "conv.weight": torch.randn(4, 3, 5),
             "q.log_std": torch.randn(4, 2)}  # fmt: skip
    found = select(named.items(), trainable_only=False)
    assert [m.name for m in found.matrices] == [
        "h.experts.up[0]", "h.experts.up[1]", "h.experts.up[2]", "conv.weight",
    ]  # fmt: skip
    assert [name for name, _ in found.skipped] == ["q.log_std"]


# ---------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("kind", ["NormalHead", "Normalize", "Normed"])
def test_norm_is_a_word_of_the_class(kind):
    assert kinds_of(custom(kind, weight=torch.randn(4), w=torch.randn(3, 4))) == {}


@pytest.mark.parametrize("kind", ["RMSNorm2d", "QKNorm", "RMSNormGated", "Layernorm"])
def test_a_norm_by_the_name_of_its_class(kind):
    shape = (1, 4, 1, 1) if kind == "RMSNorm2d" else (4,)
    norm = custom(kind, weight=torch.randn(shape), bias=torch.randn(shape))
    assert kinds_of(norm) == {"weight": "gain", "bias": "shift"}


def test_a_gain_per_head_and_element_is_a_gain():
    assert kinds_of(custom("MultiHeadNorm", gamma=torch.randn(3, 4))) == {"gamma": "gain"}
    layer = custom("NormLinear", weight=torch.randn(3, 4))
    assert names_of(layer) == ["weight"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_gain_that_is_zero_is_skipped(device):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4))
    nn.init.zeros_(model[1].weight)
    kinds = kinds_of(model.to(device))
    assert kinds["2.weight"] == "gain"
    assert ("1.weight" in kinds) == (device == "meta")  # its values are not known there
    if device == "cpu":
        assert skipped(model)["1.weight"].startswith("a gain that is zero")
        assert kinds_of(model, roles={"1.weight": "gain"})["1.weight"] == "gain"


def test_the_gain_of_a_branch_that_is_added_is_skipped():
    norm = custom("GRN", weight=torch.randn(1, 1, 1, 4), bias=torch.randn(1, 1, 1, 4))
    assert kinds_of(norm) == {"bias": "shift"}
    assert "added to its input" in skipped(norm)["weight"]


def test_subclasses_of_a_norm_with_an_offset_gain():
    base = type("Gemma2RMSNorm", (nn.Module,), {})
    norm = type("FSDPGemma2RMSNorm", (base,), {})()
    norm.weight, norm.w = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 4))
    assert "distance from one" in skipped(norm)["weight"]


def test_gains_that_are_no_norms():
    layer = nn.Conv2d(3, 4, 1)
    layer.gain = nn.Parameter(torch.ones(4, 1, 1, 1))
    assert kinds_of(layer) == {"bias": "shift", "gain": "gain"}


# --------------------------------------------------------------------------- what the user says


def test_roles_go_before_everything_but_exclude():
    module = holding(
        scale=torch.randn(4), state=torch.randn(4, 3), w=torch.randn(3, 4, 5), v=torch.randn(3, 4)
    )
    roles = {"scale": "gain", "state": "bias", "w": "matrix", "v": "skip"}
    assert_matrices(module, {"w": module.w.flatten(1)}, roles=roles)
    assert kinds_of(module, roles=roles) == {"scale": "gain", "state": "shift"}
    assert kinds_of(module, roles=roles, biases=False, norms=False) == {
        "scale": "gain", "state": "shift",
    }  # fmt: skip
    assert skipped(module, roles=roles) == {"v": "role 'skip'"}
    assert "scale" not in kinds_of(module, roles=roles, exclude=["scale"])


def test_the_first_role_that_matches_counts_and_any_name_of_a_tied_tensor():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    assert names_of(model, roles={"b.weight": "matrix", "*": "skip"}) == ["a.weight"]
    with pytest.raises(ValueError, match="nothing to regularize"):
        names_of(model, roles={"*": "skip", "b.weight": "matrix"})


def test_a_stack_of_weights_and_biases_by_one_pattern():
    module = holding(up=torch.randn(3, 4, 5), up_bias=torch.randn(3, 4))
    for said in ({"stacked": ["*"]}, {"roles": {"*": "stack"}}):
        assert names_of(module, **said) == ["up[0]", "up[1]", "up[2]"]
        assert kinds_of(module, **said) == {"up_bias": "rows"}
    module.bias = nn.Parameter(torch.randn(4))  # that of a router
    assert kinds_of(module, stacked=["*"]) == {"up_bias": "rows", "bias": "shift"}


@pytest.fixture
def taught():
    """Forget what a test has registered."""
    before = dict(layers._registered)
    yield
    layers._registered.clear()
    layers._registered.update(before)


def test_a_layer_is_taught_once(taught):
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))
            self.pos_mix = nn.Parameter(torch.randn(4, 4))
            self.heads = nn.Parameter(torch.randn(2, 3, 4))

    class Sub(Mixer):
        pass

    assert names_of(Sub()) == ["heads[0]", "heads[1]"]
    roles = {"scale": "gain", "pos_mix": "matrix", "heads": "skip"}
    spectral_kernels.register_layer(Mixer, roles=roles)
    for module in (Mixer(), nn.Sequential(Sub())):
        assert [n.removeprefix("0.") for n in names_of(module)] == ["pos_mix"]
        assert list(kinds_of(module).values()) == ["gain"]
        prefix = "" if isinstance(module, Mixer) else "0."
        assert len(names_of(module, roles={f"{prefix}heads": "stack"})) == 3
    spectral_kernels.register_layer(Sub, roles={"scale": "skip"})
    assert kinds_of(Sub()) == {}
    assert names_of(Sub()) == ["pos_mix"]


BAD = {
    "no mapping": (
        lambda m: select(m, roles=["w"]), TypeError, ["roles: expected a mapping", "got ['w']"]),
    "no role": (
        lambda m: select(m, roles={"w": 3}), TypeError, ["roles['w']: expected", "'skip', got 3"]),
    "a misspelt role": (
        lambda m: select(m, roles={"w": "matrx"}), ValueError,
        ["roles['w']: expected", "got 'matrx' (did you mean 'matrix'?)"]),
    "a pattern without a match": (
        lambda m: select(m, roles={"x": "skip"}), ValueError,
        ["roles: expected a pattern that matches a parameter, got 'x'"]),
    "a matrix of one dimension": (
        lambda m: select(m, roles={"v": "matrix"}), ValueError, ["'v'", "(4,)", "2 or more"]),
    "a stack of two": (
        lambda m: select(m, roles={"w": "stack"}), ValueError, ["'w'", "(3, 4)", "3 or more"]),
    "a complex parameter": (
        lambda m: select(m, roles={"c": "matrix"}), ValueError,
        ["got 'c' with dtype complex64", "torch.float32"]),
    "no class": (
        lambda m: spectral_kernels.register_layer(m, roles={}), TypeError,
        ["cls: expected a subclass of torch.nn.Module, got "]),
    "another class": (
        lambda m: spectral_kernels.register_layer(int, roles={}), TypeError,
        ["cls: expected a subclass of torch.nn.Module, got <class 'int'>"]),
    "roles of a class": (
        lambda m: spectral_kernels.register_layer(nn.Linear, roles="bias"), TypeError,
        ["roles: expected a mapping from names of parameters", "got 'bias'"]),
    "a misspelt role of a class": (
        lambda m: spectral_kernels.register_layer(nn.Linear, roles={"weight": "weight"}),
        ValueError, ["roles['weight']: expected", "'gain'", "got 'weight'"]),
}  # fmt: skip


def complex_parameter():
    return nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))


@pytest.mark.parametrize("bad", BAD)
def test_errors_of_roles(bad, taught):
    call, error, parts = BAD[bad]
    before = dict(layers._registered)
    with pytest.raises(error) as caught:
        call(holding(w=torch.randn(3, 4), v=torch.randn(4), c=complex_parameter()))
    assert all(part in str(caught.value) for part in parts), caught.value
    assert layers._registered == before


# ---------------------------------------------------------------------------------- names, text


def test_strengths_and_targets_may_use_any_name_of_a_tied_tensor():
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight, model["other"] = model["table"].weight, nn.Linear(4, 4)
    found = by_name("strength", {"table.*": 2.0, "*": 1.0}, select(model))
    assert found == {"head.weight": 2.0, "other.weight": 1.0, "other.bias": 1.0}


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    ("kind", "key"),
    [("_FabricModule", "_forward_module"), ("DeepSpeedEngine", "module"),
     ("CheckpointWrapper", "_checkpoint_wrapped_module"), ("OptimizedModule", "_orig_mod")],
)  # fmt: skip
def test_wrappers_leave_no_trace_in_names(kind, key):
    bases = (type("ActivationWrapper", (nn.Module,), {}),) if kind == "CheckpointWrapper" else ()
    inner = nn.Linear(3, 4)
    wrapper = type(kind, bases or (nn.Module,), {})()
    setattr(wrapper, key, inner)
    wrapper._original_module = inner
    assert names_of(wrapper) == ["weight"]
    model = nn.Sequential(wrapper, nn.Linear(4, 4))
    assert names_of(model) == ["0.weight", "1.weight"]
    assert select(model).matrices[0].ref.get() is inner.weight


def test_an_attribute_called_module_stays_in_the_name():
    assert names_of(Wrapper(nn.Linear(3, 4))) == ["module.weight"]
    assert names_of(nn.DataParallel(Wrapper(nn.Linear(3, 4)))) == ["module.weight"]
    assert names_of(torch.optim.swa_utils.AveragedModel(nn.Linear(3, 4))) == ["weight"]


def test_the_listing_groups_by_role_view_and_reason():
    model = nn.ModuleDict({"e": nn.Embedding(3, 4), "d": nn.Conv2d(4, 4, 3, groups=4)})
    model["h"] = nn.ModuleList([nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)) for _ in range(3)])
    model["c"], model["x"] = nn.Conv2d(4, 6, 3, bias=False), holding(w=torch.randn(2, 3, 4))
    assert listing(select(model)) == [
        "6 matrices",
        "  rows x columns",
        "    5 x 4  h.{0-2}.0.weight  (3)",
        "  flattened (dim 0, rest)",
        "    6 x 36  c.weight",
        "  stack of 2",
        "    3 x 4  x.w[{0-1}]  (2)",
        "1 parameter of rows",
        "  a group per row, its norm pulled to the target",
        "    rows of 9  d.weight",
        "10 elementwise parameters",
        "  pulled to 0",
        "    d.bias",
        "    h.{0-2}.{0-1}.bias  (6)",
        "  every element pulled to 1",
        "    h.{0-2}.1.weight  (3)",
        "1 skipped",
        "  embedding table (include or roles takes it)",
        "    e.weight",
    ]
