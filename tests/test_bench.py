"""The bench suites refuse what is wrong, and report what was measured."""

import json

import pytest
import torch

from bench import baselines, gate, interleave, report

SHAPES = [(30, 40), (64, 16), (30, 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in baselines.CONTENDERS if n != "compiled_loop"])
def test_every_contender_passes_the_gate_and_leaves_the_gradients_alone(name, dtype):
    if (name, dtype) == ("exact_svd", torch.bfloat16):
        pytest.skip("there is no SVD in 16 bits")
    weights = gate.leaves(SHAPES, dtype)
    before = [weight.grad.clone() for weight in weights]
    assert gate.problem(baselines.CONTENDERS[name], weights) is None
    assert all(torch.equal(a, w.grad) for a, w in zip(before, weights, strict=True))


def flipped(weights, strength):
    return baselines.inplace_loop(weights, -strength)


def one_layer_forgotten(weights, strength):
    return baselines.inplace_loop(weights[:-1], strength)


def not_a_number(weights, strength):
    return baselines.inplace_loop(weights, float("nan"))


@pytest.mark.parametrize("wrong", [flipped, one_layer_forgotten, not_a_number])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_contender_is_not_timed(wrong, dtype):
    group = gate.Group(rounds=2, min_time=0)
    contenders = {"wrong": baselines.Contender(wrong, "wrong"),
                  "right": baselines.CONTENDERS["inplace_loop"]}  # fmt: skip
    group.run(SHAPES, dtype, contenders, ["floor"])
    assert "off by" in group.wrong["wrong"]
    assert set(group.durations) == {"right", "floor"}


def test_durations_are_replayed_as_they_were():
    clock, seen = interleave.Replay(), []

    class Benchmark:
        def pedantic(self, function, rounds, iterations):
            assert iterations == 1
            for _ in range(rounds):
                start = clock()
                function()
                seen.append(clock() - start)

    clock.into(Benchmark(), [0.5, 0.001, 2e-5])
    assert seen == pytest.approx([0.5, 0.001, 2e-5], abs=1e-8)


def result_file(path, device="chip", contender="cpu", median=1.0):
    info = {"suite": "penalty_step", "case": "mlp", "dtype": "float32", "contender": contender,
            "weights": 10**6, "matrices": 4}  # fmt: skip
    path.write_text(json.dumps({
        "machine_info": {"device": device, "threads": 2, "torch": "2.13.0"},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [{"extra_info": info, "stats": {"median": median}}],
    }))  # fmt: skip
    return path


def test_the_report_gives_ratios_and_bandwidth(tmp_path):
    files = [
        result_file(tmp_path / "a.json", median=1e-3),
        result_file(tmp_path / "b.json", contender="floor", median=8e-4),
        result_file(tmp_path / "c.json", contender="autograd_loop", median=5e-3),
    ]
    text = report.tables(report.load(files))
    assert text.startswith("chip, 2 threads, torch 2.13.0, 2026-01-02, commit 012345678. ")
    assert "| mlp | 1.0 M | ours (C++) | 1 | 1.00 | 1.25 | 12.0 |" in text
    assert "| mlp | 1.0 M | per-layer autograd loop | 5 | 5.00 | 6.25 | 2.4 |" in text


def test_the_report_refuses_to_mix_machines(tmp_path, capsys):
    files = [str(result_file(tmp_path / f"{d}.json", device=d)) for d in ("one", "other")]
    assert report.main(files) == 1
    assert "different machines" in capsys.readouterr().err
    assert report.main([str(tmp_path / "missing.json")]) == 1
