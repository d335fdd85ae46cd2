"""Low-rank updates of checkpoints: one matrix each, with its scale, as the packages make them."""

import pytest
import torch
from torch import nn

from spectral_kernels.diagnostics.checkpoints import open_checkpoint
from spectral_kernels.diagnostics.low_rank import product_singular_values

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("seeded")


class Model(nn.Module):
    """Layers of the kinds that peft adapts."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 12)
        self.block = nn.ModuleList([nn.Linear(12, 6), nn.Linear(12, 10)])
        self.conv = nn.Conv2d(4, 6, 3)


def adapted(**arguments):
    """Return a model with adapters whose factors are random."""
    peft = pytest.importorskip("peft")
    arguments = {"r": 3, "lora_alpha": 5, "target_modules": ["first", "0", "1"]} | arguments
    model = peft.get_peft_model(Model(), peft.LoraConfig(**arguments))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def deltas(model):
    """Return what peft adds, by the names of the updates here."""
    from peft.tuners.lora import LoraLayer

    return {f"{name}.lora": layer.get_delta_weight("default").detach()
            for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}  # fmt: skip


def opened(path):
    checkpoint = open_checkpoint(path)
    return dict(checkpoint), {s.name: s.reason for s in checkpoint.skipped}


def check(weights, expected):
    assert set(weights) == set(expected)
    for name, delta in expected.items():
        tensor = weights[name].read()
        assert weights[name].shape == tuple(tensor.shape) == tuple(delta.shape)
        torch.testing.assert_close(tensor, delta, rtol=1e-5, atol=1e-5)
        values = product_singular_values(*weights[name].factors())
        exact = torch.linalg.svdvals(delta.double().flatten(1))
        assert len(values) == 3
        torch.testing.assert_close(values, exact[:3], rtol=1e-5, atol=1e-5)
        assert float(exact[3:].sum()) < 1e-4


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"use_rslora": True}, {"target_modules": ["embed", "conv"]},
        {"rank_pattern": {"block.0": 3}, "alpha_pattern": {"block.0": 7, "first": 2}},
        {"alpha_pattern": {"^block.1": 9}},
    ],
    ids=str,
)  # fmt: skip
def test_updates_are_those_of_peft(tmp_path, arguments):
    model = adapted(**arguments)
    model.save_pretrained(tmp_path)
    weights, skipped = opened(tmp_path)
    expected = deltas(model)
    assert len(expected) == len(arguments.get("target_modules", "abc"))
    check(weights, expected)
    assert not skipped


def test_the_state_of_the_whole_model_has_the_name_of_the_adapter(tmp_path):
    model = adapted()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    weights, _ = opened(tmp_path / "model.pt")
    updates = {name: t for name, t in weights.items() if t.factors is not None}
    # The scale is not stored, so that it is B A alone.
    check(updates, {name: delta * 3 / 5 for name, delta in deltas(model).items()})
    assert {t.made_by for t in updates.values()} == {"B A (LoRA; its scale is not known)"}
    assert "base_model.model.first.base_layer.weight" in weights
    assert not any("lora_" in name for name in weights)


def test_a_scale_that_a_regular_expression_decides_is_not_known(tmp_path):
    model = adapted(alpha_pattern={"(first|1)": 9})
    model.save_pretrained(tmp_path)
    weights, _ = opened(tmp_path)
    assert {t.made_by for t in weights.values()} == {"B A (LoRA; its scale is not known)"}


def test_magnitudes_of_dora_are_named(tmp_path):
    adapted(use_dora=True).save_pretrained(tmp_path)
    weights, _ = opened(tmp_path)
    assert {t.made_by for t in weights.values()} == {
        "1.667 B A (LoRA), without the magnitudes of DoRA"
    }
    assert not any("magnitude" in name for name in weights)


@pytest.mark.parametrize(
    ("down", "up", "name"),
    [
        ("lora_unet_mid_to_q.lora_down.weight", "lora_unet_mid_to_q.lora_up.weight",
         "lora_unet_mid_to_q.lora"),
        ("unet.mid.to_q.lora.down.weight", "unet.mid.to_q.lora.up.weight", "unet.mid.to_q.lora"),
        ("mid.processor.to_q_lora.down.weight", "mid.processor.to_q_lora.up.weight",
         "mid.processor.to_q.lora"),
        ("mid.to_q.lora_linear_layer.down.weight", "mid.to_q.lora_linear_layer.up.weight",
         "mid.to_q.lora"),
        ("unet.to_q.lora_A.weight", "unet.to_q.lora_B.weight", "unet.to_q.lora"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=["linear", "convolution"])
def test_names_of_kohya_and_diffusers(tmp_path, down, up, name, kernel):
    a, b = torch.randn(3, 8, *kernel), torch.randn(6, 3, *[1] * len(kernel))
    stored = {down: a, up: b}
    has_alpha = "lora_down" in down
    if has_alpha:
        stored["lora_unet_mid_to_q.alpha"] = torch.tensor(1.5)
    safetensors.save_file(stored, tmp_path / "adapter.safetensors")
    weights, skipped = opened(tmp_path)
    product = (b.flatten(1) @ a.flatten(1)).view(6, 8, *kernel)
    check(weights, {name: product * (0.5 if has_alpha else 1)})
    assert not skipped


def test_factors_that_do_not_fit_and_other_adapters_are_skipped(tmp_path):
    stored = {
        "a.lora_A.weight": torch.randn(3, 8), "a.lora_B.weight": torch.randn(6, 4),
        "b.lora_A.weight": torch.randn(3, 8),
        "c.lora_A.weight": torch.randn(3, 8), "c.lora_B.weight": torch.randn(6, 3),
        "c.lora_E": torch.randn(3, 1),
        "d.hada_w1_a": torch.randn(6, 3), "d.hada_w1_b": torch.randn(3, 8),
        "d.hada_w2_a": torch.randn(6, 3), "d.hada_w2_b": torch.randn(3, 8),
    }  # fmt: skip
    safetensors.save_file(stored, tmp_path / "adapter.safetensors")
    weights, skipped = opened(tmp_path)
    assert not weights
    other = "an adapter that is no product B A: AdaLoRA, LoCon, LoHa or LoKr"
    assert skipped["a.lora_A.weight"] == "factors [3, 8] and [6, 4] do not fit"
    assert skipped["b.lora_A.weight"] == "a factor of an update whose other one is missing"
    assert sorted(skipped.values()).count(other) == 2
    assert len(skipped) == 4


@pytest.mark.parametrize("text", ["[]", "{", '{"lora_alpha": "x"}', '{"lora_alpha": 1e999}',
                                  '{"lora_alpha": 4, "alpha_pattern": {"(a+)+$": 1}}',
                                  '{"lora_alpha": 4, "rank_pattern": {"a": 0}}'])  # fmt: skip
def test_a_config_that_is_wrong_gives_no_scale(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    stored = {"a.lora_A.weight": torch.randn(3, 8), "a.lora_B.weight": torch.randn(6, 3)}
    safetensors.save_file(stored, tmp_path / "adapter.safetensors")
    (weight,) = opened(tmp_path)[0].values()
    assert weight.made_by == "B A (LoRA; its scale is not known)"
    torch.testing.assert_close(weight.read(), stored["a.lora_B.weight"] @ stored["a.lora_A.weight"])


@pytest.mark.parametrize("shape", [(40, 3, 30), (5, 9, 30), (30, 9, 5), (4, 1, 1)], ids=str)
def test_singular_values_of_a_product_are_those_of_the_svd(shape):
    m, r, n = shape
    b, a = torch.randn(m, r, dtype=torch.float64), torch.randn(r, n, dtype=torch.float64)
    exact = torch.linalg.svdvals(b @ a)[: min(shape)]
    torch.testing.assert_close(product_singular_values(b, a), exact, rtol=1e-12, atol=1e-12)
    a[0, 0] = torch.inf
    assert bool(torch.isnan(product_singular_values(b, a)).all())
