"""The bilinear forms of attention, and the modules that they are found in."""

import math

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralRegularizer
from spectral_kernels.diagnostics import attention_modules, attention_norms
from spectral_kernels.diagnostics.attention import divided, is_between
from spectral_kernels.optim import SpectralAdamW

pytestmark = pytest.mark.usefixtures("seeded")


def formed(query, key, n_heads):
    """sigma_1 of every head's form, from the SVD of the product."""
    head_dim = len(query) // n_heads
    groups = n_heads // (len(key) // head_dim)
    queries = query.detach().double().split(head_dim)
    keys = [k for k in key.detach().double().split(head_dim) for _ in range(groups)]
    return torch.stack([torch.linalg.svdvals(q.mT @ k)[0]
                        for q, k in zip(queries, keys, strict=True)])  # fmt: skip


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_dim", "d_query", "d_key"),
    [(4, 4, 8, 32, 32), (8, 2, 16, 64, 64), (2, 2, 32, 16, 24), (6, 1, 4, 40, 10), (1, 1, 7, 9, 9)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_are_those_of_the_formed_product(
    n_heads, n_kv_heads, head_dim, d_query, d_key, dtype
):
    query = torch.randn(n_heads * head_dim, d_query).to(dtype)
    key = torch.randn(n_kv_heads * head_dim, d_key).to(dtype)
    found = attention_norms(query, key, n_heads)
    exact = formed(query, key, n_heads)
    assert torch.allclose(found, exact, rtol=1e-4)
    assert bool((found >= exact * (1 - 1e-9)).all())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_forms_of_low_rank_and_of_nearly_orthogonal_queries_and_keys_are_measured(scale):
    query, key = torch.randn(64, 32), torch.randn(64, 32)
    key[:20] = 0  # all of the first head's, and some of the second's
    key[40:48] = key[40]
    query[:, 16:] *= 1e-3
    key[:, :16] *= 1e-3
    query[48:] = 0
    query *= scale
    found, exact = attention_norms(query, key, 4), formed(query, key, 4)
    assert torch.allclose(found / scale, exact / scale, rtol=1e-4, atol=0)
    assert found[0] == found[3] == 0 != found[1]


@pytest.mark.parametrize("rotation", [0.01, 1e-4])
def test_forms_with_equal_largest_values_are_within_the_tolerance(rotation):
    head_dim = 64
    query = torch.linalg.qr(torch.randn(200, head_dim, dtype=torch.float64)).Q.mT
    key = query + rotation * torch.randn(head_dim, 200, dtype=torch.float64)
    found, exact = attention_norms(query, key, 1), formed(query, key, 1)
    assert 1 - 1e-9 < float(found / exact) < 1 + 1e-4


def test_a_weight_that_is_not_finite_makes_its_heads_nan():
    query, key = torch.randn(32, 16), torch.randn(16, 16)
    query[3, 2], key[9, 1] = math.nan, math.inf
    found = attention_norms(query, key, 4)  # the heads of keys are 0, 0, 1, 1
    assert found.isnan().tolist() == [True, False, True, True]


def test_the_logits_are_within_the_bound():
    module = nn.MultiheadAttention(24, 4, bias=False)
    (layer,) = attention_modules(module)
    norms = attention_norms(layer.query, layer.key, 4)
    x, y = torch.randn(50, 24), torch.randn(60, 24)
    queries, keys = ((side @ w.detach().T).unflatten(1, (4, 6)).transpose(0, 1)
                     for side, w in ((x, layer.query), (y, layer.key)))  # fmt: skip
    logits = (queries @ keys.mT).abs()
    bound = x.norm(dim=1)[:, None] * y.norm(dim=1)
    assert bool((logits <= norms[:, None, None] * bound).all())
    assert float((logits / bound).amax()) > 0.2 * float(norms.max())


@pytest.mark.parametrize(
    ("n_heads", "query", "key"),
    [(3, (8, 4), (8, 4)), (4, (8, 4), (3, 4)), (4, (8, 4), (6, 4)), (0, (8, 4), (8, 4)),
     (4, (8, 4), (16, 4)), (2, (8, 4), (0, 4))],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(n_heads, query, key):
    with pytest.raises(ValueError, match=rf"n_heads: expected .*queries \[8, 4\].*, got {n_heads}"):
        attention_norms(torch.randn(query), torch.randn(key), n_heads)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_fused_weights_are_divided_in_both_layouts(n_heads, n_kv_heads):
    head_dim, groups = 3, n_heads // n_kv_heads
    query, key, value = (torch.randn(n * head_dim, 7) for n in (n_heads, n_kv_heads, n_kv_heads))
    stacked = torch.cat((query, key, value))
    by_group = torch.cat([
        piece for i in range(n_kv_heads)
        for piece in (query.split(groups * head_dim)[i], key.split(head_dim)[i],
                      value.split(head_dim)[i])
    ])  # fmt: skip
    for fused, layout in ((stacked, "stacked"), (by_group, "by group")):
        found = divided(fused, layout, n_heads, n_kv_heads)
        assert torch.equal(found[0], query)
        assert torch.equal(found[1], key)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("q_norm.weight", True), ("norm_k.weight", True), ("norm.query_norm.scale", True),
        ("query_layernorm.weight", True), ("q_ln.weight", True), ("logit_scale", True),
        ("k_conv1d.weight", True), ("qk_norm.weight", True),
        ("q_proj.weight", False), ("norm.weight", False), ("k_proj.lora_A.weight", False),
        ("layer_norm.weight", False), ("q_a_layernorm.weight", False), ("norm_kv.weight", False),
    ],
)  # fmt: skip
def test_what_changes_queries_or_keys_is_known_by_name(name, expected):
    assert is_between(name) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_waits_for_a_gpu():
    query, key = torch.randn(64, 48, device="cuda"), torch.randn(32, 48, device="cuda")
    attention_norms(query, key, 8)  # libraries are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = attention_norms(query, key, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(found.cpu(), formed(query.cpu(), key.cpu(), 8), rtol=1e-4)


# --------------------------------------------------------------------------------------- modules


class Attention(nn.Module):
    """Linear layers of queries and keys under given names."""

    def __init__(self, names, n_heads=4, n_kv_heads=2, d=16, **attributes):
        super().__init__()
        head_dim = attributes.get("head_dim", d // n_heads)
        for name, heads in zip(names, (n_heads, n_kv_heads), strict=True):
            self.add_module(name, nn.Linear(d, heads * head_dim))
        for name, value in attributes.items():
            setattr(self, name, value)


def largest(module, names, n_heads=4):
    weights = [getattr(module, name).weight for name in names]
    return float(formed(*weights, n_heads).max())


@pytest.mark.parametrize(
    ("names", "attributes"),
    [
        (("q_proj", "k_proj"), {"head_dim": 8}),
        (("query", "key"), {"num_attention_heads": 4, "attention_head_size": 4}),
        (("to_q", "to_k"), {"heads": 4}),
        (("q", "k"), {"n_heads": 4, "key_value_proj_dim": 4}),
    ],
)
def test_metrics_have_the_largest_of_every_layer(names, attributes):
    model = nn.ModuleDict({
        "first": Attention(names, **attributes), "second": Attention(names, **attributes),
        "mlp": nn.Linear(16, 16),
    })  # fmt: skip
    reg = SpectralRegularizer(model)
    found = reg.metrics(per_layer=True)
    each = {f"spectral/attention/{n}": largest(model[n], names) for n in ("first", "second")}
    assert {n: found[n] for n in found if "/attention/" in n} == pytest.approx(each, rel=1e-4)
    assert found["spectral/attention_max"] == max(found[name] for name in each)
    assert set(found) - set(reg.metrics()) == {n for n in found if n.count("/") == 2}
    with torch.no_grad():
        model["first"].get_submodule(names[0]).weight.mul_(100)
    now = reg.metrics()["spectral/attention_max"]
    assert now == pytest.approx(100 * each["spectral/attention/first"], rel=1e-4)


def test_multihead_attention_is_measured_by_both_kinds_of_regularization():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32),
                          nn.MultiheadAttention(12, 3, kdim=8, vdim=5))  # fmt: skip
    fused, other = model[0].self_attn.in_proj_weight, model[1]
    expected = {
        "spectral/attention/0.self_attn": float(formed(fused[:16], fused[16:32], 2).max()),
        "spectral/attention/1": float(
            formed(other.q_proj_weight, other.k_proj_weight, 3).max()
        ),
    }  # fmt: skip
    for owner in (SpectralRegularizer(model), SpectralAdamW(model)):
        found = owner.metrics(per_layer=True)
        here = {name: x for name, x in found.items() if "/attention/" in name}
        assert here == pytest.approx(expected, rel=1e-4)


def test_models_without_attention_have_no_such_metric():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    assert not [n for n in SpectralRegularizer(model).metrics(True) if "attention" in n]
    pairs = list(nn.MultiheadAttention(8, 2).named_parameters())
    assert not [n for n in SpectralRegularizer(pairs).metrics(True) if "attention" in n]


def test_modules_whose_form_is_not_known_are_left_out():
    names = ("q_proj", "k_proj")
    unknown_heads = Attention(names)
    contradicting = Attention(names, head_dim=4, num_heads=8)
    normalized = Attention(names, num_heads=4)
    normalized.q_norm = nn.LayerNorm(4)
    flagged = Attention(names, num_heads=4, qk_layernorm=True)
    computed = Attention(names, num_heads=4)
    nn.utils.parametrizations.weight_norm(computed.k_proj)
    on_meta = Attention(names, num_heads=4).to("meta")
    for module in (unknown_heads, contradicting, normalized, flagged, computed, on_meta):
        assert attention_modules(module) == []
    normalized.q_norm = nn.Identity()
    assert [x.n_heads for x in attention_modules(nn.Sequential(normalized, normalized))] == [4]


def test_the_modules_of_transformers_are_found():
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 20, "num_attention_heads": 4, "num_hidden_layers": 1, "hidden_size": 16,
             "intermediate_size": 16}  # fmt: skip
    llama = transformers.LlamaModel(transformers.LlamaConfig(**small, num_key_value_heads=2))
    bert = transformers.BertModel(transformers.BertConfig(**small))
    gpt2 = transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=4)
    )
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=20, d_model=16, d_kv=3, d_ff=16, num_layers=1, num_heads=4)
    )
    qwen = transformers.Qwen3Model(transformers.Qwen3Config(**small, head_dim=4))
    for model in (llama, bert, gpt2, t5):
        (layer,) = attention_modules(model)
        assert layer.n_heads == 4
        assert layer.query.shape[1] == 16
    fused = gpt2.h[0].attn.c_attn.weight.detach().mT
    (layer,) = attention_modules(gpt2)
    assert torch.equal(torch.cat((layer.query, layer.key)), fused[:32])
    assert attention_modules(qwen) == []  # norms of queries and keys
