"""The protocol of the benchmark of continual learning: what it runs, chooses and reports."""

import itertools
import json

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from bench.continual import checks, evidence, pictures, protocol, report, runner, train
from bench.continual.arms import Arm, ended, finished, last, measured
from bench.continual.figures import in_blocks, shown_arms
from bench.continual.methods import METHODS

STREAM = protocol.Stream("random_labels", "digits", "mlp", 60, 1, 4, ("none", "l2", "snr"),
                         (1e-4, 1e-3), 3, has_plane=True)  # fmt: skip


def made(key, end, online=0.5, **more):
    """A run of ``key`` that ends at ``end``."""
    n = key.tasks
    values = np.linspace(0.9, end, n).tolist()
    tasks = [task for task in range(1, n + 1) if (n - task) % -(-n // 40) == 0]
    run = {**key._asdict(), "train": values, "test": [None] * n, "online": [online] * n,
           "seconds": [36.0] * n, "measured": tasks, **runner.where()}  # fmt: skip
    values = {"sigma_max": [1.0, 2.0], "sigma_min": [0.1], "stable_rank": [3.0],
              "gradient_diversity": 9.0, "dormant": 0.1, "weight_norm": 7.0}  # fmt: skip
    return run | {name: [value] * len(tasks) for name, value in values.items()} | more


@pytest.fixture
def mini(monkeypatch):
    """The protocol with one small stream."""
    for module in (protocol, evidence):
        monkeypatch.setattr(module, "STREAMS", {"labels": STREAM})


@pytest.mark.parametrize("name", protocol.STREAMS)
def test_every_run_of_the_protocol_can_begin(name):
    stream = protocol.STREAMS[name]
    if name == "slippery":
        for package in ("gymnasium", "mujoco", "stable_baselines3"):
            pytest.importorskip(package, reason=f"{package} is not installed")
    if stream.data == "mnist1d":
        pytest.importorskip("mnist1d", reason="mnist1d is not installed")
    keys = protocol.tuning(stream)
    assert len(set(keys)) == len(keys)
    for key in {key.method: key for key in keys}.values():
        checks.check(key)
    assert {key.method for key in keys} == set(stream.methods) <= set(METHODS)
    assert {key.seed for key in keys} == {protocol.TUNED}
    assert stream.seeds <= protocol.TUNED


def test_learning_rates_and_strengths_are_all_tried():
    keys = protocol.tuning(STREAM)
    tried = {(key.method, key.lr, key.strength) for key in keys}
    expected = {("none", lr, 0.0) for lr in (1e-4, 1e-3)}
    expected |= {("l2", lr, s) for lr in (1e-4, 1e-3) for s in METHODS["l2"].strengths}
    expected |= {("snr", 1e-3, s) for s in METHODS["snr"].strengths}  # no plane: few rates
    assert tried == expected
    shown = {(key.method, key.seed, key.lr) for key in protocol.plane(STREAM)}
    seeds = protocol.TUNED, protocol.TUNED + 1
    assert shown == set(itertools.product(("none", "l2"), seeds, protocol.LRS))


def test_the_best_is_chosen_on_its_own_seed():
    keys = [key for key in protocol.tuning(STREAM) if key.method == "l2"]
    runs = [made(key, 0.3) for key in keys]
    runs[3] = made(keys[3], 0.5, 0.2)
    runs[5] = made(keys[5], 0.501, 0.4)  # as good, and faster
    runs[6] = made(keys[6], 0.9, failed="parameters that are not finite")
    assert protocol.chosen(STREAM, runs)["l2"] == [Arm("l2", keys[5].strength, keys[5].lr)]
    assert protocol.chosen(STREAM, runs[:-1]) == {}  # one is missing: not yet
    twice = STREAM._replace(twice=("l2",))
    assert [arm.strength for arm in protocol.chosen(twice, runs)["l2"]] == [
        keys[5].strength, keys[3].strength
    ]  # fmt: skip
    reported = protocol.reported(STREAM, runs)
    assert [key.seed for key in reported] == [0, 1, 2]
    assert {key[:5] + key[6:] for key in reported} == {
        ("random_labels", "digits", "mlp", "l2", keys[5].strength, 60, 1, keys[5].lr)
    }
    # What other seeds found does not count.
    others = [*runs, made(keys[0]._replace(seed=0, tasks=60), 1.0)]
    assert protocol.chosen(STREAM, others) == protocol.chosen(STREAM, runs)


def tuned(stream):
    """All runs that choose; the best strength is not at an end."""
    return [made(key, 0.4 if key.strength == {"snr": 0.01}.get(key.method, 1e-3) else 0.3)
            for key in protocol.tuning(stream)]  # fmt: skip


def test_a_best_strength_at_an_end_is_gone_beyond():
    runs = tuned(STREAM)
    assert protocol.extension(STREAM, runs) == []
    highest = [made(key, 0.5) for key in protocol.tuning(STREAM)
               if key.method == "l2" and key.strength == 1e-2]  # fmt: skip
    lowest = [made(key, 0.5) for key in protocol.tuning(STREAM)
              if key.method == "snr" and key.strength == 0.001]  # fmt: skip
    keys = {runner.key_of(run) for run in highest + lowest}
    runs = [run for run in runs if runner.key_of(run) not in keys] + highest + lowest
    more = protocol.extension(STREAM, runs)
    assert {(key.method, key.strength, key.lr) for key in more} == {
        ("l2", 0.1, 1e-4), ("l2", 0.1, 1e-3), ("snr", 1e-4, 1e-3)
    }  # fmt: skip
    assert set(protocol.chosen(STREAM, runs)) == {"none"}  # the others wait for these
    runs += [made(key, 0.2 if key.method == "l2" else 0.6) for key in more]
    found = protocol.chosen(STREAM, runs)
    assert [found["l2"][0].strength, found["snr"][0].strength] == [1e-2, 1e-4]
    assert protocol.extension(STREAM, runs) == more  # once


def reported_runs(ends, method="l2", **more):
    """All runs of the stream, with ``ends`` of the seeds of one method."""
    runs = tuned(STREAM)
    keys = [key for key in protocol.reported(STREAM, runs) if key.method == method]
    return runs + [made(key, end, **more) for key, end in zip(keys, ends, strict=False)]


def test_failed_runs_count_as_chance():
    runs = reported_runs([0.8, 0.6, 0.7])
    runs[-1]["failed"] = "more than 3 seconds, after 4 of 60 tasks"
    (row,) = evidence.rows(STREAM, runs).values()
    expected = [ended(run, "train") for run in runs[-3:-1]]
    assert row.scores == [*expected, evidence.CHANCE]
    cell = evidence._cell(row, 3, 1.0)
    assert cell == f"{np.mean(row.scores):.3f} (0.100 to {expected[0]:.3f}, 1 failed)"


def test_evidence_is_written_of_what_is_there(tmp_path, mini):
    runs = reported_runs([0.8, 0.6, 0.7])
    (tmp_path / runner.FILE).write_text("".join(json.dumps(run) + "\n" for run in runs))
    text, *drawn = evidence.write(tmp_path)
    found = text.read_text()
    scores = [ended(run, "train") for run in runs[-3:]]
    assert f"| l2 | **{np.mean(scores):.3f}** ({min(scores):.3f} to {max(scores):.3f}) |" in found
    assert "| none |  |" in found  # no run yet
    choosing = {*protocol.tuning(STREAM), *protocol.plane(STREAM)}
    assert f"| labels | {len(runs) - 3} of {len(choosing)} | 3 of 9 |" in found
    assert {path.name for path in drawn} == {"planes.png", "labels.png"}
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"]({path.name})" in found
    hours = sum(sum(run["seconds"]) for run in runs) / 3600
    assert f"{hours:.1f} hours of training" in found


def test_evidence_of_nothing_is_an_error(tmp_path, capsys):
    assert evidence.main([str(tmp_path)]) == 1
    assert "expected finished runs, got none" in capsys.readouterr().err


def test_areas_count_cells_near_the_best():
    scores = np.array([[0.5, 0.96], [1.0, 0.94]])
    planes = [evidence.Plane("l2", (1e-4, 1e-3), (1e-5, 1e-4), scores, 2),
              evidence.Plane("none", (1e-4, 1e-3), (0.0,), scores[:, :1] / 2, 2)]  # fmt: skip
    lines = evidence.areas(planes).splitlines()
    assert lines[2] == "| l2 | 1.000 | 0.001 | 1e-05 | 2 of 4 | 2 of 4 |"
    assert lines[3] == "| none | 0.500 | 0.001 |  | 0 of 2 | 1 of 2 |"


def test_the_rule_compares_worst_seeds(monkeypatch):
    stream = STREAM._replace(methods=("spectral", "spectral_four"), lrs=(1e-3,))
    monkeypatch.setattr(evidence, "STREAMS", {"labels": stream})
    runs = tuned(stream)
    for key in protocol.reported(stream, runs):
        end = {"spectral": 0.9, "spectral_four": 0.95}[key.method] - 0.1 * key.seed
        runs.append(made(key, end))
    worst = {m: min(ended(r, "train") for r in runs if r["method"] == m and r["tasks"] == 60)
             for m in stream.methods}  # fmt: skip
    lines = evidence.decision(runs).splitlines()
    assert lines[2] == f"| spectral | {worst['spectral']:.3f} | {worst['spectral']:.3f} | +0.000 |"
    difference = worst["spectral_four"] - worst["spectral"]
    assert lines[3].endswith(f"{worst['spectral_four']:.3f} | {difference:+.3f} |")
    shares = evidence.strengths(runs).splitlines()[2:]
    assert len(shares) == 4
    ends = [ended(made(protocol.tuning(stream)[0], end), "train") for end in (0.3, 0.4)]
    share = f"{ends[0] / ends[1]:.3f}"
    assert [line.split(" | ")[1] for line in shares] == [share, share, "1.000", share]


@pytest.mark.takes_seconds
def test_the_protocol_goes_on_where_it_was(tmp_path, mini, monkeypatch):
    stream = STREAM._replace(methods=("none", "spectral"), lrs=(1e-3,), tasks=2, tuned_tasks=1,
                             has_plane=False)  # fmt: skip
    for module in (protocol, evidence):
        monkeypatch.setattr(module, "STREAMS", {"labels": stream})
    file = tmp_path / runner.FILE
    arguments = [str(tmp_path), "--workers", "1"]
    assert protocol.main([*arguments, "--stages", "tune"]) == 0
    first = file.read_bytes()
    assert first.count(b"\n") == 5
    assert protocol.main([*arguments, "--budget", "0"]) == 0  # no time: nothing begins
    assert file.read_bytes() == first
    assert protocol.main(arguments) == 0
    runs = runner.load(tmp_path)
    assert file.read_bytes().startswith(first)
    counts = {}
    for run in runs:
        counts[run["seed"], run["method"]] = counts.get((run["seed"], run["method"]), 0) + 1
    extended = counts.pop((100, "spectral"))
    assert extended == 4 + len(protocol.extension(stream, runs))
    of_seeds = dict.fromkeys(itertools.product(range(3), stream.methods), 1)
    assert counts == {(100, "none"): 1} | of_seeds
    assert evidence.main([str(tmp_path)]) == 0
    with pytest.raises(SystemExit):
        protocol.main([str(tmp_path), "--streams", "weather"])


# -------------------------------------------------------------------- long streams and failures


@pytest.mark.takes_seconds
def test_long_streams_are_measured_now_and_then_and_scored_always():
    key = train.Key("random_labels", "digits", "mlp", "none", 0.0, 0, 85, 1, 1e-2)
    found = train.run(key)
    assert len(found["train"]) == len(found["online"]) == 85
    assert found["measured"] == list(range(1, 86, 3))
    assert len(found["sigma_max"]) == len(found["dormant"]) == 29
    assert measured(found, "dormant") == found["measured"]
    assert measured(found, "train") == list(range(1, 86))
    assert last(found["train"]) == found["train"][-5:]
    assert len(last(range(800))) == 40


@pytest.mark.takes_seconds
def test_a_run_that_takes_too_long_or_diverges_has_failed():
    key = train.Key("random_labels", "digits", "mlp", "l2", 1e-3, 0, 3, 1)
    found = train.run(key, limit=0)
    assert found["failed"] == "more than 0 seconds, after 1 of 3 tasks"
    assert len(found["train"]) == 1
    assert "failed" not in train.run(key)
    diverged = train.run(key._replace(method="isometry", strength=1e6, lr=1.0))
    assert diverged["failed"] == "parameters that are not finite, after 1 of 3 tasks"
    assert "sigma_max" not in diverged


def test_failed_runs_are_in_the_table_and_are_not_the_best():
    key = train.Key("random_labels", "digits", "mlp", "l2", 1e-3, 0, 8, 1)
    runs = [made(key._replace(seed=seed, strength=s), end) for s, end in ((1e-3, 0.5), (1e-2, 0.9))
            for seed in range(3)]  # fmt: skip
    runs[-1]["failed"] = "more than 3 seconds, after 4 of 8 tasks"
    ((setting, arms),) = report.settings(runs).items()
    lines = report.table(setting, arms).splitlines()
    assert "| l2 0.01 | 2 of 3, others failed |" in lines[-1]
    from bench.continual.arms import best

    assert best(arms, lower=False)["l2"] == ("l2", 1e-3, train.LR)
    for run in runs[3:]:
        run["failed"] = "yes"
    ((setting, arms),) = report.settings(runs).items()
    assert report.table(setting, arms).splitlines()[-1].startswith("| l2 0.01 | 0 of 3, others")
    assert finished(runs) == runs[:3]


def test_the_lr_is_part_of_an_arm():
    key = train.Key("random_labels", "digits", "mlp", "l2", 1e-3, 0, 8, 1)
    old = {name: value for name, value in made(key, 0.5).items() if name != "lr"}
    ((_, arms),) = report.settings([old, made(key._replace(lr=3e-3), 0.6)]).items()
    assert [str(arm) for arm in arms] == ["l2 0.001", "l2 0.001, lr 0.003"]
    assert runner.key_of(old) == key


def test_curves_of_long_streams_are_means_over_blocks():
    curves = np.arange(2 * 403.0).reshape(2, 403)
    x, y = in_blocks(list(range(1, 404)), curves)
    assert len(x) == 40
    assert x[-1] == 398.5
    np.testing.assert_allclose(y[:, -1], curves[:, -10:].mean(1))
    short = np.random.default_rng().normal(size=(3, 40))
    np.testing.assert_array_equal(in_blocks(list(range(1, 41)), short)[1], short)


def test_at_most_nine_methods_and_none_have_curves():
    arms = {Arm(f"m{i}", 0.0): [{"train": [i / 20] * 5}] for i in range(15)}
    arms[Arm("none", 0.0)] = [{"train": [0.0] * 5}]
    shown = shown_arms(arms, {arm.method: arm for arm in arms}, lower=False)
    assert [arm.method for arm in shown] == [*(f"m{i}" for i in range(6, 15)), "none"]


def test_returns_without_episodes_keep_the_value_before():
    assert pictures._filled([1.0, None, 3.0, None]) == [1.0, 1.0, 3.0, 3.0]
