"""The bench suites refuse what is wrong, and report what was measured."""

import json

import pytest
import torch
from torch import nn

from bench.report import __main__ as report
from bench.report import results, tables
from bench.support import baselines, gate, interleave, memory, optimizers, traffic
from spectral_kernels.backends import choice, native
from spectral_kernels.selection.rules import select
from spectral_kernels.tables.plan import Plan
from spectral_kernels.tables.schema import SLOT
from tests.support import cases

SHAPES = [(30, 40), (64, 16), (30, 40)]
EVERY = baselines.CONTENDERS | baselines.SEVERAL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [n for n, c in EVERY.items() if n != "compiled_loop" and "cpu" in c.devices],
)
def test_every_contender_passes_the_gate_and_leaves_the_gradients_alone(name, dtype):
    if (name, dtype) == ("exact_svd", torch.bfloat16):
        pytest.skip("there is no SVD in 16 bits")
    weights = gate.leaves(SHAPES, dtype)
    before = [weight.grad.clone() for weight in weights]
    first = gate.first_step(EVERY[name], weights)
    assert first.problem is None
    assert first.seconds > 0
    assert all(torch.equal(a, w.grad) for a, w in zip(before, weights, strict=True))


def flipped(weights, strength):
    return baselines.inplace_loop(weights, -strength)


def one_layer_forgotten(weights, strength):
    return baselines.inplace_loop(weights[:-1], strength)


def not_a_number(weights, strength):
    return baselines.inplace_loop(weights, float("nan"))


def compete(wrong, dtype):
    group = gate.Group(rounds=2, min_time=0)
    contenders = {"wrong": baselines.Contender(wrong, "wrong"),
                  "right": baselines.CONTENDERS["inplace_loop"]}  # fmt: skip
    group.run(SHAPES, dtype, contenders, ["floor"])
    assert set(group.durations) == {"right", "floor"}
    return group.wrong["wrong"]


@pytest.mark.parametrize("wrong", [flipped, one_layer_forgotten, not_a_number])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_contender_is_not_timed(wrong, dtype):
    assert "off by" in compete(wrong, dtype)


def test_a_contender_that_raises_does_not_stop_the_others():
    def raises(weights, strength):
        raise torch.OutOfMemoryError("no room")

    assert compete(raises, torch.float32) == "OutOfMemoryError: no room"


def test_our_kernel_with_a_flipped_sign_is_not_timed(monkeypatch):
    if (reason := choice.unavailable("cpu")) is not None:
        pytest.skip(reason)
    right = native.Cpu.rank_one

    def flipped_rank_one(self, plan, state, grads, accumulate):
        state.strength.neg_()
        right(self, plan, state, grads, accumulate)
        state.strength.neg_()

    monkeypatch.setattr(native.Cpu, "rank_one", flipped_rank_one)
    assert "off by" in compete(baselines.ours("cpu"), torch.float32)


@pytest.mark.takes_seconds
def test_a_compiled_contender_never_falls_back_to_plain_python():
    group = gate.Group(rounds=1, min_time=0)
    chosen = {"compiled_loop": baselines.CONTENDERS["compiled_loop"]}
    with torch._dynamo.config.patch(recompile_limit=1):
        for shapes in ([(3, 4)], [(5, 6)]):  # the limit counts per list of shapes
            group.run(shapes, torch.float32, chosen, [])
            assert not group.wrong
        step = baselines.compiled_loop(gate.leaves([(7, 8)], torch.float32), 1.0)
        with pytest.raises(Exception, match="recompile_limit"):
            step()


def small_net():
    return nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 20))


def layer_forgotten(model, strength):
    optimizer = optimizers.SpectralAdamW(model, optimizers.LR, strength=strength, exclude=["2.*"])
    return optimizers.Contender(model, optimizer, optimizer.step)


def longer_step(model, strength):
    found = optimizers.spectral_adamw(model, strength)
    found.optimizer.param_groups[0]["lr"] *= 1.5
    return found


@pytest.mark.takes_seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_whose_step_is_wrong_is_not_timed(monkeypatch, dtype):
    for wrong, said in (
        (optimizers.torch_adamw, "the gradient of 0.weight"),
        (layer_forgotten, "the gradient of 2.weight"),
        # In 16 bits a step so small is hardly more than the rounding of a weight.
        *([(longer_step, "the weights of 0.weight")] if dtype == torch.float32 else []),
    ):
        monkeypatch.setitem(optimizers.CONTENDERS, "spectral_adamw", wrong)
        group = gate.Group(rounds=2, min_time=0)
        optimizers.run(group, list(optimizers.CONTENDERS), small_net, dtype)
        assert set(group.durations) == set(optimizers.CONTENDERS) - {"spectral_adamw"}
        assert set(group.wrong) == {"spectral_adamw"}
        assert said in group.wrong["spectral_adamw"]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizers_are_timed_where_they_are_right(dtype):
    group = gate.Group(rounds=2, min_time=0)
    optimizers.run(group, list(optimizers.CONTENDERS), small_net, dtype)
    assert not group.wrong
    assert {name: len(found) for name, found in group.durations.items()} == {
        name: 2 for name in optimizers.CONTENDERS
    }
    assert optimizers.n_parameters(small_net) == 41 * 30 + 2 * 30 + 31 * 20


def test_input_sets_are_taken_in_turn():
    seen = []
    step = interleave.in_turn([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(7):
        step()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.takes_seconds
def test_memory_of_a_step_is_that_of_vectors_not_of_matrices():
    if (reason := memory.missing("cpu")) is not None:
        pytest.skip(reason)
    if (reason := choice.unavailable("cpu")) is not None:
        pytest.skip(reason)
    of_weights = 4 * sum(m * n for m, n in cases.CASES["vit_tiny"]())
    peak = {
        n: memory.measure("vit_tiny", "cpu", "float32", n).bytes for n in ("cpu", "stacked_bmm")
    }
    assert peak["cpu"] < of_weights / 20
    assert peak["stacked_bmm"] > of_weights / 2
    with pytest.raises(RuntimeError, match="nobody"):
        memory.measure("vit_tiny", "cpu", "float32", "nobody")


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


def result_file(path, device="chip", contender="cpu", median=1.0, suite="penalty_step", **info):
    info = {"suite": suite, "case": "mlp", "dtype": "float32", "contender": contender,
            "device_name": device, "device": "cpu", "threads": 2, "weights": 10**6,
            "matrices": 4, **info}  # fmt: skip
    path.write_text(json.dumps({
        "machine_info": {"device": device, "versions": "torch 2.13.0"},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [{"extra_info": info, "stats": {"median": median}}],
    }))  # fmt: skip
    return path


def test_the_report_gives_ratios_and_bandwidth(tmp_path):
    files = [
        result_file(tmp_path / "a.json", median=1e-3, first_step_seconds=0.25),
        result_file(tmp_path / "b.json", contender="floor", median=8e-4),
        result_file(tmp_path / "c.json", contender="autograd_loop", median=5e-3),
    ]
    text = tables.tables(results.load(files))
    assert text.startswith("chip, torch 2.13.0, 2026-01-02, commit 012345678. ")
    assert "| mlp | 1.0 M | ours (C++) | 1 | 1.00 | 1.25 | 12.0 | 250 |" in text
    assert "| mlp | 1.0 M | per-layer autograd loop | 5 | 5.00 | 6.25 | 2.4 |  |" in text


def test_the_report_says_on_which_kernels_the_run_was(tmp_path):
    path = result_file(tmp_path / "a.json")
    assert "kernels" not in tables.tables(results.load([path]))
    data = json.loads(path.read_text())
    data["machine_info"]["cpp_kernels"] = "without the C++ kernels: they are missing"
    other = tmp_path / "b.json"
    other.write_text(json.dumps(data))
    assert "\nWithout the C++ kernels: they are missing.\n" in tables.tables(results.load([other]))
    with pytest.raises(ValueError, match="expected one machine, commit and module per table"):
        results.load([path, other])


def test_the_summary_compares_with_the_best_rival(tmp_path):
    medians = {"cpu": 1e-3, "floor": 8e-4, "autograd_loop": 5e-3, "compiled_loop": 3e-3,
               "inplace_loop": 2e-3, "spectral_norm": 1e-4}  # fmt: skip
    files = [result_file(tmp_path / f"{name}.json", contender=name, median=median)
             for name, median in medians.items()]  # fmt: skip
    row = "| mlp | 1.0 M | 5 ms | in place, 2 ms | **1 ms** | 5.0 | 2.0 | 1.25 |"
    assert row in tables.summary(results.load(files)).splitlines()


def test_the_report_of_memory_and_scaling(tmp_path):
    memory_file = result_file(
        tmp_path / "a.json", suite="memory", peak_bytes=40_000, sides=1000, median=1e-3
    )
    scaling = [
        result_file(tmp_path / f"{i}.json", suite="scaling", threads=threads, contender=name,
                    median=median)
        for i, (threads, name, median) in enumerate(
            [(1, "cpu", 4e-3), (1, "floor", 2e-3), (2, "cpu", 3e-3), (2, "floor", 1e-3)])
    ]  # fmt: skip
    text = tables.tables(results.load([memory_file, *scaling]))
    assert "| mlp | 4.0 MB | ours (C++) | 0.04 | 1.0 % | 40 |" in text
    assert "| 1e+06 | 4 | 1 | 4 | 2 | 2.00 | 3.0 |" in text
    assert "| 1e+06 | 4 | 2 | 3 | 1 | 3.00 | 4.0 |" in text


def test_the_report_of_optimizers_is_in_units_of_torchs_step(tmp_path):
    medians = {"spectral_adamw": 3e-3, "torch_adamw": 2e-3, "attach": 5e-3, "loop": 17e-3}
    files = [
        result_file(tmp_path / f"{name}.json", suite="optimizer_step", contender=name,
                    median=median)
        for name, median in medians.items()
    ]  # fmt: skip
    text = tables.tables(results.load(files))
    assert "| mlp | 1.0 M | 2 | 3 | 1.50 | 2.50 | 8.50 |" in text
    without_torch = tables.tables(results.load([files[0], *files[2:]]))
    assert "| mlp | 1.0 M |  | 3 |  |  |  |" in without_torch


def test_the_report_refuses_to_mix_machines(tmp_path, capsys):
    files = [str(result_file(tmp_path / f"{d}.json", device=d)) for d in ("one", "other")]
    assert report.main(files) == 1
    assert "expected one machine, commit and module per table" in capsys.readouterr().err
    assert report.main([str(tmp_path / "missing.json")]) == 1


def test_devices_of_one_machine_go_into_tables_of_their_own(tmp_path):
    files = [result_file(tmp_path / "a.json"), result_file(tmp_path / "b.json")]
    text = files[1].read_text()
    text = text.replace('"device_name": "chip"', '"device_name": "card"')
    files[1].write_text(text)
    with pytest.raises(ValueError, match="one device and number of threads"):
        results.load(files)
    files[1].write_text(text.replace('"device": "cpu"', '"device": "cuda"'))
    text = tables.tables(results.load(files))
    assert "### penalty_step, float32, chip, 2 threads\n" in text
    assert "### penalty_step, float32, card\n" in text
    with pytest.raises(ValueError, match=r"expected one device per table, got \['card', 'chip'\]"):
        tables.summary(results.load(files))


def test_the_shapes_have_as_many_weights_as_the_models_they_are_named_after():
    weights = {name: sum(m * n for m, n in shapes()) for name, shapes in cases.CASES.items()}
    assert weights["resnet18"] == pytest.approx(11.68e6, rel=1e-3)
    assert weights["vit_b"] == pytest.approx(86.3e6, rel=1e-2)
    assert weights["gpt2"] == pytest.approx(123.5e6, rel=1e-2)
    assert weights["many_small"] == 500 * 64 * 64
    assert weights["llama_1b"] == pytest.approx(1.236e9, rel=1e-3)
    assert weights["llama_7b"] == pytest.approx(6.61e9, rel=1e-2)  # 6.74e9 with the embedding
    assert sum(m * n for m, n in cases.equal(1e7, 7)) == pytest.approx(1e7, rel=1e-2)


def test_traffic_counts_what_the_plan_lays_out():
    shapes = [(1000, 96), (64, 48), (3, 40), (9000, 20)]
    weights = cases.random_weights(shapes, torch.bfloat16)
    selection = select([(f"{i}.weight", w) for i, w in enumerate(weights)], trainable_only=False)
    plan = Plan(selection.matrices, (), weights)
    counted = traffic.step(shapes, torch.bfloat16, "cpu")
    assert counted.weights == 3 * plan.header[SLOT["n_bytes"]]
    rows, columns = sum(m for m, _ in shapes), sum(n for _, n in shapes)
    tables = plan.table.nbytes + plan.tiles.nbytes + plan.gram_partial.nbytes
    chunks = plan.chunks.nbytes + 2 * plan.chunk_squares.nbytes + 2 * plan.arrivals.nbytes
    vectors = 4 * (4 * plan.t_partial.numel() + 4 * columns + 2 * rows)
    assert counted.vectors == vectors + 2 * tables + chunks
    assert counted.seconds(1e9) == pytest.approx(counted.total / 1e9)
