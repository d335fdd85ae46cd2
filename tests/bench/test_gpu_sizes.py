"""``bench.gpu_sizes``, rehearsed with interpreted kernels."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bench import gpu_sizes
from spectral_kernels.backends import choice
from spectral_kernels.backends.triton import launch


@pytest.mark.parametrize("choice", gpu_sizes.CHOICES, ids=lambda c: f"{c.kernel}-{c.itemsize}")
def test_a_choice_is_what_kernels_are_launched_with(choice):
    dtype = torch.bfloat16 if choice.itemsize == 2 else torch.float32
    constants = {
        "gram_matvec": {"with_t": True, "tolerance": 0.0},
        "rank_one": {"grad_type": dtype, "finish": True, "with_t": True, "gradient": True,
                     "accumulate": True, "tolerance": 0.0},
        "update": {"moment_type": dtype, "rule": 0, "with_moment": True, "decoupled": False,
                   "products": True},
    }[choice.kernel]  # fmt: skip

    def variant():
        found = launch.variant(choice.kernel, 90, dtype, **constants)
        names = list(found.function.fn.__annotations__)
        return dict(zip(names, found.constants, strict=True)), found.options

    usual, _ = variant()
    with gpu_sizes.chosen(choice):
        values, options = variant()
    assert options["num_warps"] == choice.warps
    assert choice.registers in (None, options.get("maxnreg"))
    assert {name: values[name] for name in choice.constants} == choice.constants
    assert variant()[0] == usual


@pytest.mark.skipif(not choice.interpreted(), reason="set TRITON_INTERPRET=1")
def test_a_rehearsal_has_a_line_for_every_kernel_of_triton(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_sizes, "CHOICES", gpu_sizes.CHOICES[:1])
    monkeypatch.setattr(gpu_sizes, "CUTS", gpu_sizes.CUTS[:1])
    file = tmp_path / "sizes.jsonl"
    assert gpu_sizes.main([str(file), "--dry-run", "--cases", "mlp"]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(x["kernel"], x["dtype"], x["choice"] is None) for x in lines] == [
        *((name, "bfloat16", True) for name in gpu_sizes.KERNELS),
        ("gram_matvec", "bfloat16", False),
        *((name, "float32", True) for name in gpu_sizes.KERNELS),
    ]
    assert all(x["microseconds"] > 0 for x in lines)
