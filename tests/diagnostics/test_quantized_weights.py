"""Quantized weights of checkpoints, against the dequantization of the packages that write them."""

import json

import pytest
import torch

from spectral_kernels.diagnostics.checkpoints import open_checkpoint, scales

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("seeded")


def opened(folder, tensors, config=None, metadata=None):
    """Save tensors, and return name -> LazyTensor, and name -> reason of what was skipped."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors.save_file(tensors, path, metadata=metadata)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(path)
    return dict(checkpoint), {s.name: s.reason for s in checkpoint.skipped}


def check(weights, expected, made_by=None, rtol=1e-6):
    """Check that these weights are there, and no others."""
    assert set(weights) == set(expected)
    for name, weight in expected.items():
        tensor = weights[name].read()
        assert weights[name].shape == tuple(tensor.shape) == tuple(weight.shape)
        assert weights[name].dtype == str(tensor.dtype).removeprefix("torch.")
        torch.testing.assert_close(tensor, weight.to(tensor.dtype), rtol=rtol, atol=1e-7)
        if made_by is not None:
            assert weights[name].made_by == made_by


@pytest.fixture(params=[1 << 20, 700], ids=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(scales, "_TILE", request.param)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("suffix", "table", "text"),
    [
        ("weight_scale_inv", (2, 3), "scales of 128 x 128"),
        ("weight_scale", (200, 1), "a scale per row"),
        ("weight_scale", (200,), "a scale per row"),
        ("weight_scale", (), "one scale"),
        ("weight_scale", (1,), "one scale"),
        ("scale_weight", (1,), "one scale"),
        ("weight_scale", (200, 10), "scales of 1 x 30"),
    ],
)
@pytest.mark.usefixtures("tiles")
def test_float8_is_multiplied_by_its_scales(tmp_path, dtype, suffix, table, text):
    values = torch.randn(200, 300).to(dtype)
    factors = torch.rand(table) + 0.5
    whole = factors.reshape(200, 1) if table == (200,) else factors
    if table == (2, 3):
        whole = factors.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    if table == (200, 10):
        whole = factors.repeat_interleave(30, 1)
    weights, skipped = opened(tmp_path, {"a.weight": values, f"a.{suffix}": factors})
    name = str(dtype).removeprefix("torch.")
    check(weights, {"a.weight": values.double() * whole}, f"{name} with {text}")
    assert weights["a.weight"].parts == ("a.weight", f"a.{suffix}")
    assert not skipped


@pytest.mark.usefixtures("tiles")
def test_blocks_are_those_of_the_config_and_experts_have_tables_of_their_own(tmp_path):
    values = torch.randn(3, 80, 70).to(torch.float8_e4m3fn)
    factors = torch.rand(3, 2, 3) + 0.5
    whole = factors.repeat_interleave(48, 1)[:, :80].repeat_interleave(32, 2)[..., :70]
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [48, 32]}}
    stored = {"experts.down_proj": values, "experts.down_proj_scale_inv": factors}
    weights, _ = opened(tmp_path, stored, config)
    check(weights, {"experts.down_proj": values.double() * whole})


def test_exponents_as_scales_are_powers_of_two(tmp_path):
    values = torch.randn(256, 128).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[120], [125]], dtype=torch.uint8)
    whole = torch.exp2(exponents.double() - 127).repeat_interleave(128, 0)
    weights, _ = opened(tmp_path, {"a.weight": values, "a.weight_scale": exponents})
    check(weights, {"a.weight": values.double() * whole})
    with_dtype = {"a.weight": values, "a.weight_scale": exponents.view(torch.float8_e8m0fnu)}
    path = tmp_path / "e8m0.pt"
    torch.save(with_dtype, path)
    check(dict(open_checkpoint(path)), {"a.weight": values.double() * whole})


def test_float8_of_a_plain_cast_has_no_scales(tmp_path):
    values = torch.randn(20, 30).to(torch.float8_e4m3fn)
    check(opened(tmp_path, {"w": values})[0], {"w": values}, "float8_e4m3fn without scales")


def test_what_does_not_fit_is_skipped_with_the_reason(tmp_path):
    float8 = torch.randn(20, 30).to(torch.float8_e4m3fn)
    weights, skipped = opened(tmp_path, {
        "misfit.weight": float8, "misfit.weight_scale": torch.rand(7, 3),
        "alone.weight": float8, "orphan.weight_scale_inv": torch.rand(2, 3),
        "gptq.qweight": torch.randint(99, (4, 32), dtype=torch.int32),
        "gptq.qzeros": torch.randint(99, (2, 4), dtype=torch.int32),
        "gptq.scales": torch.rand(2, 32), "gptq.g_idx": torch.arange(32),
        "other.weight": torch.randint(99, (4, 32), dtype=torch.int8),
        "plain.weight": torch.randn(4, 5),
    }, {"quantization_config": {"quant_method": "gptq"}})  # fmt: skip
    assert set(weights) == {"plain.weight"}
    layout = "of gptq (config.json), whose layout is not read"
    assert skipped == {
        "misfit.weight": "scales [7, 3] do not fit values [20, 30]",
        "alone.weight": "float8_e4m3fn without its scales",
        "orphan.weight_scale_inv": "a table of scales, whose weight is not read",
        "gptq.qweight": f"quantized values {layout}",
        "other.weight": f"dtype int8 {layout}",
    }


def test_scales_of_inputs_are_no_part_of_a_weight(tmp_path):
    stored = {"a.weight": torch.randn(4, 6).to(torch.float8_e4m3fn),
              "a.weight_scale": torch.tensor(0.3), "a.input_scale": torch.tensor(5.0)}  # fmt: skip
    weights, _ = opened(tmp_path, stored)
    expected = stored["a.weight"].double() * stored["a.weight_scale"]
    check(weights, {"a.weight": expected, "a.input_scale": stored["a.input_scale"]})


@pytest.mark.usefixtures("tiles")
def test_int8_with_zero_points(tmp_path):
    values, factors = torch.randint(-128, 128, (40, 64), dtype=torch.int8), torch.rand(40, 4)
    zeros = torch.randint(-9, 9, (40, 4), dtype=torch.int8)
    stored = {"a.weight": values, "a.weight_scale": factors, "a.weight_zero_point": zeros}
    weights, _ = opened(tmp_path, stored)
    whole, shift = factors.repeat_interleave(16, 1), zeros.repeat_interleave(16, 1)
    check(weights, {"a.weight": (values.double() - shift) * whole})


@pytest.mark.usefixtures("tiles")
def test_mxfp4_experts_are_those_of_transformers(tmp_path):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(256, (2, 48, 3, 16), dtype=torch.uint8)
    exponents = torch.randint(120, 130, (2, 48, 3), dtype=torch.uint8)
    stored = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": exponents}
    weights, _ = opened(tmp_path, stored)
    expected = mxfp4.convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
    check(weights, {"e.gate_up_proj": expected}, "mxfp4 with scales of 32")


@pytest.mark.usefixtures("tiles")
def test_packed_fp4_with_two_scales(tmp_path):
    packed = torch.randint(256, (24, 32), dtype=torch.uint8)
    inner = (torch.rand(24, 4) + 0.5).to(torch.float8_e4m3fn)
    stored = {"a.weight_packed": packed, "a.weight_scale": inner,
              "a.weight_global_scale": torch.tensor([40.0])}  # fmt: skip
    weights, _ = opened(tmp_path, stored)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()
    values = torch.stack([levels[(packed & 15).int()], levels[(packed >> 4).int()]], -1).flatten(1)
    expected = values * inner.double().repeat_interleave(16, 1) / 40
    check(weights, {"a.weight": expected}, "nvfp4 with scales of 1 x 16")


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_are_those_of_compressed_tensors(tmp_path, bits):
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, 64), dtype=torch.int8)
    factors = torch.rand(24, 2) + 0.5
    stored = {"a.weight_packed": package.pack_to_int32(values, bits), "a.weight_scale": factors,
              "a.weight_shape": torch.tensor([24, 64])}  # fmt: skip
    weights, _ = opened(tmp_path, stored)
    expected = values.double() * factors.repeat_interleave(32, 1)
    check(weights, {"a.weight": expected}, f"packed int{bits} with scales of 1 x 32")


@pytest.mark.usefixtures("tiles")
def test_packed_integers_by_hand(tmp_path):
    values = torch.randint(-8, 8, (6, 40), dtype=torch.int32)
    words = sum((values[:, i::8] + 8) << (4 * i) for i in range(8)).to(torch.int32)
    stored = {"a.weight_packed": words, "a.weight_scale": torch.rand(6, 1) + 0.5,
              "a.weight_shape": torch.tensor([6, 40])}  # fmt: skip
    weights, _ = opened(tmp_path, stored)
    check(weights, {"a.weight": values.double() * stored["a.weight_scale"]})


def test_int8_of_bitsandbytes_has_a_scale_per_row(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(24, 32, dtype=torch.float16)
    values, row_maxima, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    stored = {"a.weight": values, "a.SCB": row_maxima,
              "a.weight_format": torch.tensor(0, dtype=torch.uint8)}  # fmt: skip
    weights, _ = opened(tmp_path, stored)
    expected = bitsandbytes.functional.int8_vectorwise_dequant(values, row_maxima)
    check(weights, {"a.weight": expected}, "int8 of bitsandbytes with a scale per row", rtol=1e-5)
    assert float((weights["a.weight"].read() - weight).abs().max()) < 0.02


@pytest.mark.parametrize("shape", [(24, 64), (5, 25)], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_of_bitsandbytes(tmp_path, kind, nested, shape):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(shape), quant_type=kind, compress_statistics=nested, blocksize=64
    )
    stored = {"a.weight": packed} | {
        f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()
    }
    weights, skipped = opened(tmp_path, stored)
    assert not skipped
    check(weights, {"a.weight": bitsandbytes.functional.dequantize_4bit(packed, state)}, rtol=1e-5)


def nf4(count=192, blocksize=64, **changes):
    """Return a weight of four bits as bitsandbytes stores it, and the weight."""
    state = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "float32",
             "shape": [6, count // 6]} | changes  # fmt: skip
    numbers, absmax = torch.randint(16, (count,)), torch.rand(-(-count // blocksize)) + 0.5
    levels = torch.linspace(-1, 1, 16)
    text = json.dumps(state).encode()
    stored = {
        "a.weight": ((numbers[::2] << 4) | numbers[1::2]).to(torch.uint8)[:, None],
        "a.weight.absmax": absmax, "a.weight.quant_map": levels,
        "a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
    }  # fmt: skip
    return stored, (levels[numbers] * absmax.repeat_interleave(blocksize)[:count]).view(6, -1)


@pytest.mark.usefixtures("tiles")
def test_four_bits_by_hand(tmp_path):
    stored, weight = nf4()
    check(
        opened(tmp_path, stored)[0], {"a.weight": weight}, "nf4 of bitsandbytes with scales of 64"
    )


@pytest.mark.parametrize(
    "changes", [{"shape": [7, 32]}, {"shape": "x"}, {"shape": [-6, -32]}, {"blocksize": 0},
                {"blocksize": 32}, {"nested_offset": "x"}, {"shape": None}],
    ids=str,
)  # fmt: skip
def test_a_state_that_is_wrong_is_named_and_not_followed(tmp_path, changes):
    stored, _ = nf4()
    text = {"blocksize": 64, "shape": [6, 32], "quant_type": "nf4"} | changes
    state = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
    weights, skipped = opened(tmp_path, stored | {"a.weight.quant_state.bitsandbytes__nf4": state})
    assert not weights
    assert skipped == {"a.weight": "nf4 of bitsandbytes whose parts do not fit together"}


def flattened(model):
    """Return what torchao puts into a safetensors file."""
    package = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    state = {name: p.data if type(p) is torch.nn.Parameter else p
             for name, p in model.state_dict().items()}  # fmt: skip
    return package.flatten_tensor_state_dict(state)


@pytest.mark.parametrize(
    ("config", "arguments", "made_by"),
    [
        ("Float8WeightOnlyConfig", {}, "float8_e4m3fn of torchao with a scale per row"),
        ("Int8WeightOnlyConfig", {}, "int8 of torchao with a scale per row"),
        ("IntxWeightOnlyConfig", {"weight_dtype": torch.int4, "granularity": 32},
         "int8 of torchao with scales of 1 x 32"),
    ],
)  # fmt: skip
def test_weights_of_torchao(tmp_path, config, arguments, made_by):
    api = pytest.importorskip("torchao.quantization")
    model = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False), torch.nn.Linear(48, 8))
    if "granularity" in arguments:
        arguments = arguments | {"granularity": api.PerGroup(arguments["granularity"])}
    api.quantize_(model[0], getattr(api, config)(**arguments), filter_fn=lambda *_: True)
    tensors, metadata = flattened(model)
    assert "0._weight_qdata" in tensors
    weights, skipped = opened(tmp_path, tensors, metadata=metadata)
    assert not skipped
    expected = {name: p.dequantize() if hasattr(p, "qdata") else p
                for name, p in model.state_dict().items()}  # fmt: skip
    assert {name for name, t in weights.items() if t.made_by == made_by} == {"0.weight"}
    check(weights, expected, rtol=1e-5)


@pytest.mark.parametrize("config", ["Float8WeightOnlyConfig", "Int8WeightOnlyConfig"])
def test_weights_of_torchao_that_were_pickled(tmp_path, config):
    api = pytest.importorskip("torchao.quantization")
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Linear(48, 8))
    api.quantize_(model[0], getattr(api, config)(), filter_fn=lambda *_: True)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    weights = dict(checkpoint)
    assert not checkpoint.skipped
    assert list(weights) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert weights["0.weight"].made_by.endswith("of torchao with a scale per row")
    expected = {name: p.dequantize() if hasattr(p, "qdata") else p
                for name, p in model.state_dict().items()}  # fmt: skip
    check(weights, expected, rtol=1e-5)


def test_int4_of_torchao_has_scales_for_its_kernel(tmp_path):
    values, factors = torch.randint(-8, 8, (6, 64)), torch.rand(6, 2) + 0.5
    shifts = torch.randn(6, 2)
    about = {"_type": "Int4Tensor", "_data": {"block_size": [1, 32], "shape": [6, 64]}}
    stored = {
        "a._weight_qdata": ((values[:, ::2] & 15) | ((values[:, 1::2] & 15) << 4)).to(torch.uint8),
        "a._weight_scale": factors.T, "a._weight_zero_point": shifts.T,
    }  # fmt: skip
    weights, _ = opened(tmp_path, stored, metadata={"a.weight": json.dumps(about)})
    wide = factors.repeat_interleave(32, 1).double(), shifts.repeat_interleave(32, 1).double()
    expected = {"a.weight": values * wide[0] + wide[1]}
    check(weights, expected, "int4 of torchao with scales of 1 x 32", rtol=1e-5)


@pytest.mark.parametrize("metadata", [None, {"a.weight": "{"}, {"a.weight": '{"_type": "Odd"}'}])
def test_torchao_without_its_metadata_is_skipped(tmp_path, metadata):
    stored = {"a._weight_qdata": torch.randint(99, (6, 8), dtype=torch.int8),
              "a._weight_scale": torch.rand(6, 1)}  # fmt: skip
    weights, skipped = opened(tmp_path, stored, metadata=metadata)
    assert not weights
    assert "of torchao, whose layout is not read" in skipped["a._weight_qdata"]


def test_empty_tensors_and_scalars_are_no_reason_to_stop(tmp_path):
    float8 = torch.float8_e4m3fn
    stored = {
        "a.weight": torch.empty(0, 8, dtype=float8), "a.weight_scale": torch.rand(1),
        "b.weight": torch.empty(8, 0, dtype=float8), "b.weight_scale": torch.rand(8),
        "c.weight": torch.empty(4, 8, dtype=float8), "c.weight_scale": torch.empty(0),
        "d_blocks": torch.empty(0, 4, 2, 16, dtype=torch.uint8),
        "d_scales": torch.empty(0, 4, 2, dtype=torch.uint8),
        "e.weight": torch.empty((), dtype=torch.int8), "e.SCB": torch.rand(()),
        "f.weight_packed": torch.empty(0, 0, dtype=torch.int32), "f.weight_scale": torch.rand(1),
        "f.weight_shape": torch.tensor([0, 0]),
    }  # fmt: skip
    weights, skipped = opened(tmp_path, stored)
    shapes = {name: tuple(w.read().shape) for name, w in weights.items() if w.parts}
    assert shapes == {"a.weight": (0, 8), "d": (0, 64, 4)}
    assert skipped["c.weight"] == "scales [0] do not fit values [4, 8]"
    assert set(skipped) == {"b.weight", "c.weight", "e.weight", "f.weight_packed"}
