"""The benchmark of continual learning: its tasks, methods, runs and reports."""

import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from scipy import stats

from bench.continual import __main__ as cli
from bench.continual import arms as arms_of
from bench.continual import data, methods, models, problems, report, runner, train
from tests import ROOT, TIMEOUT

pytestmark = pytest.mark.usefixtures("seeded", "process_wide_settings")
KEY = train.Key("random_labels", "digits", "mlp", "none", 0.0, 0, 2, 1)


@pytest.fixture
def process_wide_settings():
    """Undo the process-wide settings of a run, which usually has a process of its own."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tasks(name, n=6, seed=0, images="digits"):
    return list(problems.build(name, images, n, generator(seed)).tasks)


# -------------------------------------------------------------------------------- data and tasks


@pytest.mark.parametrize("name", data.DATA)
def test_images_are_standardized_and_held_out_ones_are_others(name):
    if name == "mnist1d":
        pytest.importorskip("mnist1d", reason="mnist1d is not installed")
    images = data.DATA[name](generator())
    assert abs(float(images.x.mean())) < 0.1
    assert 0.8 < float(images.x.std()) < 1.1
    assert set(images.y.tolist()) == set(images.y_test.tolist()) == set(range(10))
    seen = {x.numpy().tobytes() for x in images.x}
    assert sum(x.numpy().tobytes() in seen for x in images.x_test) <= 0.01 * len(images.x_test)
    assert torch.equal(images.x, data.DATA[name](generator()).x)


def test_mnist1d_leaves_the_global_seeds_alone():
    pytest.importorskip("mnist1d", reason="mnist1d is not installed")
    before = random.getstate(), np.random.get_state()[1].tolist()
    images = data.mnist1d(generator())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert images.x.shape == (1280, 40)
    assert images.x_test.shape == (640, 40)


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_a_seed_decides_about_all_tasks(name):
    for a, b, c in zip(tasks(name), tasks(name), tasks(name, seed=1), strict=True):
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not (torch.equal(a.x, c.x) and torch.equal(a.y, c.y))


def test_random_labels_change_and_images_do_not():
    a, b = tasks("random_labels", 2)
    assert torch.equal(a.x, b.x)
    assert 0.05 < float((a.y == b.y).double().mean()) < 0.15
    assert a.x_test is None


def test_permuted_pixels_are_the_same_pixels():
    a, b = tasks("permuted_pixels", 2)
    assert not torch.equal(a.x, b.x)
    assert torch.equal(a.x.flatten(1).sort().values, b.x.flatten(1).sort().values)
    assert torch.equal(a.y, b.y)
    # Training and held-out images are permuted alike: the blank pixels are the same ones.
    assert torch.equal((b.x == 0).all(0), (b.x_test == 0).all(0) & (b.x == 0).all(0))
    assert (b.x_test[:, (b.x == 0).all(0)] == 0).double().mean() > 0.95


def test_flipped_labels_are_those_of_classes():
    a, b = tasks("label_flips", 2)
    pairs = set(zip(a.y.tolist(), b.y.tolist(), strict=True))
    assert len(pairs) == 10
    held_out = set(zip(a.y_test.tolist(), b.y_test.tolist(), strict=True))
    assert held_out == pairs


def test_classes_come_two_by_two():
    found = tasks("class_incremental", 6)
    classes = [set(task.y.tolist()) for task in found]
    assert [len(c) for c in classes] == [2, 4, 6, 8, 10, 2]
    assert all(a < b for a, b in itertools.pairwise(classes[:5]))
    assert [set(task.y_test.tolist()) for task in found] == classes


def test_noise_goes_away():
    found = tasks("label_noise", 5)
    wrong = [float((task.y != found[-1].y).double().mean()) for task in found]
    assert wrong == sorted(wrong, reverse=True)
    assert wrong[0] == pytest.approx(0.75 * 0.9, abs=0.05)
    assert all(torch.equal(task.y_test, found[-1].y_test) for task in found)


def test_one_slow_bit_flips_per_task():
    found = tasks("bit_flipping", 4)
    slow = [task.x[:, :15] for task in found]
    assert all((s == s[0]).all() for s in slow)
    flips = [int((a[0] != b[0]).sum()) for a, b in itertools.pairwise(slow)]
    assert flips == [1, 1, 1]
    assert all(float(task.y.std()) > 0 for task in found)
    # The target is a function of the bits.
    known = {}
    for task in found:
        for x, y in zip(torch.cat((task.x, task.x_test)), torch.cat((task.y, task.y_test)),
                        strict=True):  # fmt: skip
            assert known.setdefault(tuple(x.tolist()), float(y)) == float(y)


# ------------------------------------------------------------------------------------------ runs


@pytest.mark.takes_seconds
@pytest.mark.parametrize("model", models.MODELS)
@pytest.mark.parametrize("method", ["none", "shrink_perturb", "spectral", "spectral_norm"])
def test_every_model_is_trained_and_measured(model, method):
    strength = 1e-3 if methods.METHODS[method].strengths else 0.0
    found = train.run(KEY._replace(problem="class_incremental", model=model, method=method,
                                   strength=strength, tasks=1))  # fmt: skip
    assert set(found) == {*train.Key._fields, "online", "seconds", "train", "test", "sigma_max",
                          "sigma_min", "stable_rank", "gradient_diversity", "dormant",
                          "weight_norm", "operator_sigma", "lipschitz", "measured"}  # fmt: skip
    assert math.isfinite(found["lipschitz"][0]) == (model in ("mlp", "resnet_plain", "vgg_plain"))
    for name in set(found) - {*train.Key._fields, "lipschitz"}:
        assert len(found[name]) == 1
        assert all(map(math.isfinite, np.ravel(found[name]))), name
    assert 1 <= found["gradient_diversity"][0] <= train.MEASURED


@pytest.mark.takes_seconds
def test_a_run_gives_the_same_figures_again_and_learns():
    key = KEY._replace(problem="label_flips", method="spectral", strength=1e-3, epochs=6)
    a, b = train.run(key), train.run(key)
    a.pop("seconds"), b.pop("seconds")
    assert a == b
    assert min(a["train"]) > 0.9
    assert min(a["test"]) > 0.8
    assert all(online < end for online, end in zip(a["online"], a["train"], strict=True))


@pytest.mark.takes_seconds
def test_the_benchmark_sees_a_network_lose_its_plasticity():
    key = KEY._replace(tasks=6, epochs=20)
    none = train.run(key)["train"]
    spectral = train.run(key._replace(method="spectral", strength=1e-3))["train"]
    assert spectral[-1] > none[-1] + 0.05


@pytest.mark.takes_seconds
def test_methods_of_a_seed_see_the_same():
    found = [train.run(KEY._replace(method=m, strength=s, epochs=2))
             for m, s in (("none", 0.0), ("l2", 1e-12))]  # fmt: skip
    assert found[0]["online"][0] == pytest.approx(found[1]["online"][0], abs=0.01)


def command(folder, *more):
    return [sys.executable, "-m", "bench.continual", "--out", str(folder), "--methods",
            "none,l2", "--strengths", "1e-3", "--seeds", "2", "--tasks", "2", "--epochs", "4",
            "--workers", "1", *more]  # fmt: skip


@pytest.mark.takes_seconds
def test_a_run_that_is_killed_is_resumed_without_losing_or_repeating_one(tmp_path):
    folder = tmp_path / "killed"
    file = folder / runner.FILE
    process = subprocess.Popen(command(folder), cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT
    while not (file.exists() and b"\n" in file.read_bytes()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = file.read_bytes()
    assert 1 <= kept.count(b"\n") < 4
    file.write_bytes(kept + b'{"problem":"random_la')  # as a kill during a write leaves it
    subprocess.run(command(folder), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    whole = file.read_bytes()
    assert whole.startswith(kept)
    runs = runner.load(folder)
    expected = cli.keys(cli.parse(command(folder)[3:]))
    assert sorted(map(runner.key_of, runs)) == sorted(expected)
    # Resuming does not change the results.
    for run in runs:
        again = train.run(runner.key_of(run))
        assert run["train"] == again["train"]
    subprocess.run(command(folder), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert file.read_bytes() == whole
    assert (folder / "report.md").exists()


@pytest.mark.takes_seconds
def test_workers_end_with_the_process_that_started_them(tmp_path):
    process = subprocess.Popen(command(tmp_path, "--epochs", "4000"), cwd=ROOT,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        deadline = time.monotonic() + TIMEOUT
        children = []
        while len(children) < 2:  # the worker and the resource tracker
            assert time.monotonic() < deadline
            listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            if not listed.exists():
                pytest.skip("reads /proc/PID/task/PID/children")
            children = [int(pid) for pid in listed.read_text().split()]
            time.sleep(0.05)
        time.sleep(3)  # until the worker's watcher runs
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + TIMEOUT
    while any(_runs(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_a_broken_line_is_an_error(tmp_path):
    (tmp_path / runner.FILE).write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 2"):
        runner.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--problem weather", "or FILE.py:CLASS, got 'weather'"),
        ("--methods none,magic", "method: expected one of none, l2, l2_init"),
        (
            "--data faces",
            "data: expected one of digits, textures, mnist1d for 'random_labels', got",
        ),
        ("--problem bit_flipping --model vit", "FILE.py:CLASS for 'bit_flipping', got 'vit'"),
        ("--problem cartpole --model mlp", "model: expected one of ppo for 'cartpole', got"),
        ("--problem cartpole --model ppo --methods redo", "which is PPO's own"),
        ("--model vit --methods layer_norm", "model: expected 'mlp' for the method 'layer_norm'"),
    ],
)
def test_bad_names_are_refused_before_anything_runs(options, message, tmp_path):
    with pytest.raises(ValueError, match=r": expected .*, got ") as error:
        cli.keys(cli.parse(["--out", str(tmp_path / "x"), *options.split()]))
    assert message in str(error.value)
    assert cli.main(["--out", str(tmp_path / "x"), *options.split()]) == 2
    assert not (tmp_path / "x").exists()


def wanted(options):
    return cli.keys(cli.parse(options.split()))


def test_strengths_are_for_methods_that_have_one():
    found = wanted("--methods none,l2,spectral --strengths 1e-3,1 --seeds 2")
    by = {}
    for key in found:
        by.setdefault(key.method, []).append(key.strength)
    assert {m: sorted(s) for m, s in by.items()} == {
        "none": [0, 0], "l2": [1e-3, 1e-3, 1, 1], "spectral": [1e-3, 1e-3, 1, 1]
    }  # fmt: skip
    assert [key.seed for key in found] == [0] * 5 + [1] * 5
    default = wanted("--methods spectral --seeds 1")
    assert tuple(key.strength for key in default) == methods.FOUR


# --------------------------------------------------------------------------------------- reports


def made(method, strength, seed, end, tasks=8):
    values = np.linspace(0.9, end, tasks).tolist()
    return {**KEY._replace(method=method, strength=strength, seed=seed, tasks=tasks)._asdict(),
            "train": values, "online": values, "test": [None] * tasks,
            "sigma_max": [[1.0, 2.0]] * tasks, "sigma_min": [[0.1, 0.2]] * tasks,
            "stable_rank": [[3.0, 4.0]] * tasks, "gradient_diversity": [12.0] * tasks,
            "dormant": [0.25] * tasks, "weight_norm": [7.0] * tasks,
            "seconds": [900.0] * tasks, **runner.where()}  # fmt: skip


def test_intervals_are_students():
    x = np.random.default_rng().normal(size=6)
    mean, half = arms_of.interval(x)
    low, high = stats.t.interval(0.95, 5, loc=x.mean(), scale=stats.sem(x))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert math.isnan(arms_of.interval([1.0, 2.0])[1])


@pytest.mark.takes_seconds
def test_report_has_every_arm_and_the_best_strength(tmp_path):
    runs = [made("none", 0.0, s, 0.1 + 0.01 * s) for s in range(3)]
    runs += [made("l2", strength, s, end + 0.01 * s)
             for strength, end in ((1e-3, 0.5), (1e-2, 0.3)) for s in range(3)]  # fmt: skip
    lines = [json.dumps(run) for run in runs]
    (tmp_path / runner.FILE).write_text("\n".join(lines) + "\n")
    ((_, arms),) = report.settings(runs).items()
    assert arms_of.best(arms, lower=False)["l2"] == ("l2", 1e-3, train.LR)
    assert arms_of.best(arms, lower=True)["l2"] == ("l2", 1e-2, train.LR)
    text, *pictures = report.write(tmp_path)
    found = text.read_text()
    rows = [line.split(" | ") for line in found.splitlines() if line.startswith("| l2 0.001")]
    ends = [report.ended(run, "train") for run in runs if run["strength"] == 1e-3]
    mean, half = arms_of.interval(ends)
    assert rows[0][1] == "3"
    assert rows[0][3] == f"{mean:.3f} ± {half:.3f}"
    assert "held out" not in found
    assert "Time of all runs on one core each: 18.0 hours" in found
    assert f"torch {torch.__version__}; commit" in found
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.name in found for p in pictures)


def test_report_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected finished runs, got none"):
        report.write(tmp_path)


# ------------------------------------------------------------------------- reinforcement learning


def control():
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
    from bench.continual import control

    return control


def test_a_changed_pole_moves_and_looks_differently():
    pole, usual = control().ChangingPole(), control().ChangingPole()
    factors = dict.fromkeys(control().PHYSICS, 1.0)
    order, signs = np.array([2, 0, 3, 1]), np.array([1, -1, 1, -1], np.float32)
    pole.change(factors, order, signs)
    a, b = pole.reset(seed=3)[0], usual.reset(seed=3)[0]
    assert np.array_equal(a, b[order] * signs)
    for action in (0, 1, 1):
        a, b = pole.step(action)[0], usual.step(action)[0]
        assert np.array_equal(a, b[order] * signs)
    pole.change({**factors, "force_mag": 2.0, "masspole": 2.0}, np.arange(4), np.ones(4))
    assert pole.unwrapped.force_mag == 2 * usual.unwrapped.force_mag
    assert pole.unwrapped.total_mass == pytest.approx(1.2)
    pole.change(factors, np.arange(4), np.ones(4))
    assert pole.unwrapped.force_mag == usual.unwrapped.force_mag


def test_a_slippery_hopper_slides():
    pytest.importorskip("mujoco", reason="mujoco is not installed")
    hoppers = [control().SlipperyHopper() for _ in range(2)]
    hoppers[0].change(0.1)
    ends = []
    for hopper in hoppers:
        hopper.reset(seed=1)
        hopper.action_space.seed(2)
        for _ in range(12):  # both fall with the same push: what differs is the contact
            hopper.step(np.array([0.2, -1.0, 1.0], np.float32))
        ends.append(hopper.unwrapped.data.qpos[0])
    assert abs(ends[0] - ends[1]) > 1e-3
    friction = [hopper.unwrapped.model.geom_friction for hopper in hoppers]
    assert np.allclose(friction[0][:, 0], 0.1 * friction[1][:, 0])
    assert np.array_equal(friction[0][:, 1:], friction[1][:, 1:])
    hoppers[0].change(1.0)
    assert np.array_equal(*friction)
    factors = list(itertools.islice(hoppers[0].changes(np.random.default_rng()), 100))
    assert all(0.1 <= factor <= 2 for (factor,) in factors)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("method", ["none", "continual_backprop_10k", "spectral_decoupled"])
def test_ppo_runs_on_the_slippery_hopper(method):
    pytest.importorskip("mujoco", reason="mujoco is not installed")
    strength = 0.0 if method == "none" else 1e-2
    key = train.Key("slippery", "none", "ppo", method, strength, 0, 2, 2, 3e-4)
    found = control().run(key)
    assert [len(found[name]) for name in ("train", "online", "sigma_max", "measured")] == [2] * 4
    assert [len(blocks) for blocks in found["returns"]] == [10, 10]
    ends = [mean for blocks in found["returns"] for mean in blocks if mean is not None]
    assert len(ends) == 4  # of ten blocks two have an epoch's end in them
    assert min(ends) > 3
    stopped = control().run(key, limit=0)
    assert stopped["failed"] == "more than 0 seconds, after 1 of 2 tasks"
    assert stopped["train"] == found["train"][:1]


@pytest.mark.takes_seconds
def test_ppo_learns_with_a_method_in_its_steps():
    key = train.Key("cartpole", "none", "ppo", "spectral", 1e-3, 0, 1, 12)
    found = control().run(key)
    assert found["online"][0] > 22  # a policy that does not learn keeps the pole up for 22 steps
    held = max(found["sigma_max"][0])
    plain = control().run(key._replace(method="none", strength=0.0))
    assert held < max(plain["sigma_max"][0])
