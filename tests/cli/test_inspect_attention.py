"""``spectral-kernels inspect``: attention layers, by name and config.json, head by head."""

import json

import pytest
import torch

from spectral_kernels import cli
from tests.diagnostics.test_attention import formed
from tests.support.checkpoints import values

save_file = pytest.importorskip("safetensors.torch").save_file
pytest.importorskip("rich")
pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def folder(tmp_path):
    """Return a function that saves tensors and a configuration, and returns their folder."""

    def save(tensors, **config):
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return save


def check(document, expected):
    """Compare with name -> (query, key, number of heads)."""
    rows = {row["layer"]: row for row in document["attention"]}
    assert list(rows) == list(expected)
    for name, (query, key, n_heads) in expected.items():
        exact, row = formed(query, key, n_heads), rows[name]
        assert row["sigma"] == pytest.approx(exact.tolist(), rel=1e-4)
        assert row["largest"] == max(row["sigma"])
        assert row["largest_head"] == int(exact.argmax())
        assert min(row["sigma"]) <= row["median"] <= row["largest"]


@pytest.mark.parametrize(
    ("query", "key", "config"),
    [
        ("q_proj", "k_proj",
         {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}),
        ("attention.query", "attention.key", {"n_heads": 4, "head_dim": 3}),
        ("q", "k", {"num_heads": 4, "d_kv": 3, "d_model": 16}),
        ("to_q", "to_k", {"num_attention_heads": 4}),
    ],
)  # fmt: skip
def test_queries_and_keys_are_found_by_name(folder, capsys, query, key, config):
    tensors, expected = {}, {}
    for i in (2, 10):
        name = ".".join([f"layers.{i}.self_attn", *query.split(".")[:-1]])
        pair = torch.randn(12, 16), torch.randn(6, 16)
        tensors |= {f"layers.{i}.self_attn.{query}.weight": pair[0],
                    f"layers.{i}.self_attn.{key}.weight": pair[1]}  # fmt: skip
        expected[name] = (*pair, 4)
    path = folder(tensors, **config)
    document = values(path, capsys=capsys)
    check(document, expected)
    assert document["attention_left_out"] == []
    assert cli.main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "attention, sigma_1 of W_q^T W_k by head" in out
    assert f"{document['attention'][0]['largest']:.3f}" in out


def test_keys_of_other_inputs_may_have_another_width(folder, capsys):
    pair = torch.randn(12, 16), torch.randn(12, 7)
    path = folder({"attn2.to_q.weight": pair[0], "attn2.to_k.weight": pair[1]})
    check(values(path, "--heads", 2, capsys=capsys), {"attn2": (*pair, 2)})


@pytest.mark.parametrize(
    ("name", "config", "heads", "is_transposed"),
    [
        ("attn.c_attn.weight", {"model_type": "gpt2", "n_head": 4, "n_embd": 16}, None, True),
        ("attn.c_attn.weight", {}, 4, False),
        ("self_attn.in_proj_weight", {}, 4, False),
        ("attn.qkv.weight", {"architecture": "vit", "num_classes": 3}, 4, False),
        ("attn.Wqkv.weight", {"model_type": "modernbert", "num_attention_heads": 4}, None, False),
    ],
)
def test_fused_weights_of_equal_parts_are_divided(
    folder, capsys, name, config, heads, is_transposed
):
    fused = torch.randn(48, 16)
    path = folder({f"h.0.{name}": fused.T if is_transposed else fused}, **config)
    arguments = [] if heads is None else ["--heads", heads]
    layer = f"h.0.{name.rpartition('.')[0].removesuffix('.c_attn')}"
    layer = layer.removesuffix(".qkv").removesuffix(".Wqkv")
    expected = {layer: (fused[:16], fused[16:32], 4)}
    check(values(path, *arguments, capsys=capsys), expected)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("GPTNeoX", {"intermediate_size": 16}),
        ("Bloom", {}),
        ("Persimmon", {"intermediate_size": 16, "qk_layernorm": False}),
        ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("Falcon", {"multi_query": True, "new_decoder_architecture": False}),
        ("Falcon", {"multi_query": False, "new_decoder_architecture": False}),
        ("Phi3", {"num_key_value_heads": 2, "intermediate_size": 16, "pad_token_id": 0}),
        ("GPT2", {}),
        ("ModernBert", {"intermediate_size": 16, "pad_token_id": 0, "bos_token_id": 1,
                        "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}),
    ],
)  # fmt: skip
@pytest.mark.takes_seconds
def test_heads_of_fused_weights_are_those_that_transformers_computes_with(
    tmp_path, capsys, model, config
):
    transformers = pytest.importorskip("transformers")
    settings = getattr(transformers, f"{model}Config")(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, **config
    )
    network = getattr(transformers, f"{model}Model")(settings).eval()
    network.save_pretrained(tmp_path)
    (row,) = values(tmp_path, capsys=capsys)["attention"]
    with torch.no_grad():
        queries, keys = heads_of(network)
    forms = queries.mT @ keys.repeat_interleave(4 // len(keys), 0)
    exact = [float(torch.linalg.svdvals(form.double())[0]) for form in forms]
    assert row["sigma"] == pytest.approx(exact, rel=1e-3)


def heads_of(network):
    """Return a model's own queries and keys [heads, head_dim, 16], one column per unit vector."""
    ends = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")
    (name,) = [n for n, _ in network.named_modules() if n.endswith(ends)]
    attention, fused = network.get_submodule(name.rpartition(".")[0]), network.get_submodule(name)
    if fused.bias is not None:
        fused.bias.zero_()
    split = getattr(attention, "_reshape", getattr(attention, "_split_heads", None))
    if split is not None:
        found = [x[0] for x in split(fused(torch.eye(16)[None]))[:2]]
        if type(network).__name__ != "BloomModel":  # (position, head, head_dim)
            found = [x.transpose(0, 1) for x in found]
    else:
        found = attended(network, fused)
    return [x.mT for x in found]


def attended(network, fused):
    """Return queries and keys as they reach the function that multiplies them."""
    from transformers import AttentionInterface

    class Seen(Exception):
        pass

    def stop(module, query, key, *others, **options):
        raise Seen(query[0], key[0])

    AttentionInterface.register("stop", stop)
    network.config._attn_implementation = "stop"
    fused.register_forward_pre_hook(lambda module, inputs: (torch.eye(16)[None],))
    # At position 0 rotary embeddings change nothing.
    ids = torch.zeros(1, 16, dtype=torch.long)
    with pytest.raises(Seen) as seen:
        network(ids, position_ids=ids, attention_mask=torch.ones(1, 16, dtype=torch.long))
    return seen.value.args


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "number of heads unknown (--heads N)"),
        ({"num_attention_heads": [2, 4]}, "number of heads unknown (--heads N)"),
        ({"num_attention_heads": 5}, "its rows are not those of 5 heads"),
        ({"num_attention_heads": 10**30}, "number of heads unknown (--heads N)"),
        ({"num_attention_heads": 4, "head_dim": 5}, "its rows are not those of 4 heads"),
        ({"num_attention_heads": 4, "num_key_value_heads": 2},
         "its keys have 4 heads, in config.json another number"),
        ({"num_attention_heads": 4, "hidden_size": 64},
         "its inputs are 16, which config.json does not say"),
        ({"num_attention_heads": 4, "use_qk_norm": True},
         "use_qk_norm of config.json changes queries and keys"),
        ({"n_heads": 4, "attn_config": {"clip_qkv": 8}},
         "clip_qkv of config.json changes queries and keys"),
    ],
)  # fmt: skip
def test_layers_are_left_out_where_names_and_configuration_do_not_agree(
    folder, capsys, config, reason
):
    path = folder({f"x.{i}_proj.weight": torch.randn(12, 16) for i in "qk"}, **config)
    document = values(path, capsys=capsys)
    assert document["attention"] == []
    assert document["attention_left_out"] == [
        {"checkpoint": str(path), "layer": "x", "reason": reason}
    ]
    assert cli.main(["inspect", str(path)]) == 0
    assert f"attention left out, {reason}: x\n" in capsys.readouterr().out


def test_fused_weights_in_an_unknown_order_are_left_out(folder, capsys):
    path = folder({"x.query_key_value.weight": torch.randn(48, 16)},
                  model_type="unheard of", num_attention_heads=4)  # fmt: skip
    (left_out,) = values(path, capsys=capsys)["attention_left_out"]
    assert left_out["reason"] == "the order of the rows of its fused weight is unknown"


def test_layers_that_normalize_queries_are_left_out(folder, capsys):
    pair = {f"x.1.{i}_proj.weight": torch.randn(12, 16) for i in "qk"}
    normed = {f"x.2.{i}_proj.weight": torch.randn(12, 16) for i in "qk"}
    path = folder({**pair, **normed, "x.2.q_norm.weight": torch.ones(3)}, num_attention_heads=4)
    document = values(path, capsys=capsys)
    check(document, {"x.1": (*pair.values(), 4)})
    (left_out,) = document["attention_left_out"]
    assert left_out["layer"] == "x.2"
    assert left_out["reason"] == "queries or keys are changed before their product"


def test_parts_of_a_model_have_their_own_configuration(folder, capsys):
    tensors, expected = {}, {}
    for part, heads in (("text_model", 4), ("vision_model", 2)):
        pair = torch.randn(12, 16), torch.randn(12, 16)
        name = f"{part}.encoder.layers.0.self_attn"
        tensors |= {f"{name}.{i}_proj.weight": w for i, w in zip("qk", pair, strict=True)}
        expected[name] = (*pair, heads)
    path = folder(tensors, text_config={"num_attention_heads": 4, "hidden_size": 16},
                  vision_config={"num_attention_heads": 2}, num_attention_heads=3)  # fmt: skip
    check(values(path, capsys=capsys), expected)


def test_encoder_and_decoder_may_have_different_heads(folder, capsys):
    tensors, expected = {}, {}
    for part, heads in (("decoder", 6), ("encoder", 3)):
        pair = torch.randn(12, 16), torch.randn(12, 16)
        tensors |= {f"{part}.attn.{i}_proj.weight": w for i, w in zip("qk", pair, strict=True)}
        expected[f"{part}.attn"] = (*pair, heads)
    path = folder(tensors, encoder_attention_heads=3, decoder_attention_heads=6)
    check(values(path, capsys=capsys), expected)


def test_tensors_that_are_not_taken_have_no_attention(folder, capsys):
    tensors = {f"x.{n}.{i}_proj.weight": torch.randn(12, 16) for n in (1, 2) for i in "qk"}
    path = folder(tensors, num_attention_heads=4)
    document = values(path, "--exclude", "x.1.*", capsys=capsys)
    assert [row["layer"] for row in document["attention"]] == ["x.2"]
    assert values(path, "--include", "*q_proj*", capsys=capsys)["attention"] == []


def test_two_checkpoints_have_their_layers_by_path(folder, tmp_path, capsys):
    tensors = {f"x.{i}_proj.weight": torch.randn(12, 16) for i in "qk"}
    path, other = folder(tensors, num_attention_heads=4), tmp_path / "other.pt"
    torch.save({name: 2 * tensor for name, tensor in tensors.items()}, other)
    one, two = values(path / "model.safetensors", other, capsys=capsys)["attention"]
    assert [one["checkpoint"], two["checkpoint"]] == [str(path / "model.safetensors"), str(other)]
    assert two["largest"] == pytest.approx(4 * one["largest"], rel=1e-3)
    assert cli.main(["inspect", str(path / "model.safetensors"), str(other)]) == 0
    assert "W_q^T W_k" not in capsys.readouterr().out


def test_the_largest_layers_are_shown_if_few_are_asked_for(folder, capsys):
    tensors = {f"x.{n}.{i}_proj.weight": 2.0 ** (n == 1) * torch.randn(12, 16)
               for n in range(4) for i in "qk"}  # fmt: skip
    tensors["x.3.k_proj.weight"][0, 0] = torch.inf
    path = folder(tensors, num_attention_heads=4)
    assert cli.main(["inspect", str(path), "--top", "2"]) == 0
    table = capsys.readouterr().out.partition("W_q^T W_k")[2].partition(str(path))[0]
    assert [line.split()[0] for line in table.splitlines() if "x." in line] == ["x.3", "x.1"]


def test_a_weight_that_is_not_finite_makes_its_heads_null(folder, capsys):
    tensors = {f"x.{i}_proj.weight": torch.randn(12, 16) for i in "qk"}
    tensors["x.q_proj.weight"][4, 2] = torch.nan
    path = folder(tensors, num_attention_heads=4)
    (row,) = values(path, capsys=capsys)["attention"]
    assert [x is None for x in row["sigma"]] == [False, True, False, False]
    assert row["largest"] is row["median"] is None
    assert row["largest_head"] == 1
