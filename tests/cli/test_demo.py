import contextlib
import multiprocessing
import os
import signal

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")

from rich.console import Console

from spectral_kernels.cli.demo import command as demo_command
from spectral_kernels.cli.demo import experiment


@pytest.fixture(autouse=True)
def one_thread(threads):
    """As in a worker: so small a network gains nothing from a second thread."""
    threads(1)


@contextlib.contextmanager
def time_limit(seconds):
    def expire(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def rendered(results, width=80):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(demo_command.table(results))
    return capture.get()


def learned(arm, tasks, epochs, seed):
    """Accuracies and singular values, without times."""
    return [(r.accuracy, r.sigmas) for r in experiment.run_arm(arm, tasks, epochs, seed)]


@pytest.mark.parametrize("arm", experiment.ARMS)
def test_a_seed_decides_what_an_arm_learns(arm):
    first = learned(arm, 2, 1, seed=3)
    assert learned(arm, 2, 1, seed=3) == first
    assert learned(arm, 2, 1, seed=4) != first


def test_arms_differ_only_in_their_penalty(monkeypatch):
    seen = {}

    def record(model, optimizer, images, labels, order):
        parameters = [p.detach().clone() for p in model.parameters()]
        seen[arm].append((images, labels, order, *parameters))
        return 1.0

    monkeypatch.setattr(experiment, "train_epoch", record)
    for arm in experiment.ARMS:
        seen[arm] = []
        experiment.run_arm(arm, 2, 2, seed=0)
    for arm in experiment.ARMS:
        for mine, first in zip(seen[arm], seen["none"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, first, strict=True))
    labels = [epoch[1] for epoch in seen["none"]]
    assert torch.equal(labels[0], labels[1])
    assert (labels[1] != labels[2]).float().mean() > 0.8


def test_every_image_is_in_one_batch_of_an_epoch(monkeypatch):
    orders = []
    monkeypatch.setattr(experiment, "train_epoch", lambda *args: orders.append(args[4]) or 1.0)
    experiment.run_arm("none", 1, 2, seed=0)
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1280))
    assert not torch.equal(*orders)


def test_pixels_are_standardized_and_constant_ones_are_zero():
    images = experiment.digits(torch.Generator().manual_seed(0)).double()
    assert images.shape == (1280, 64)
    std = images.std(dim=0)
    constant = std == 0
    assert 0 < constant.sum() < 10
    assert torch.all(images[:, constant] == 0)
    torch.testing.assert_close(std[~constant], torch.ones_like(std[~constant]))
    torch.testing.assert_close(images.mean(dim=0), torch.zeros_like(std), atol=1e-6, rtol=0)


def test_the_random_numbers_of_torch_are_left_alone():
    before = torch.random.get_rng_state()
    experiment.run_arm("spectral", 1, 1, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weight_decay_is_the_gradient_of_the_l2_penalty():
    model = experiment.build_model(torch.Generator().manual_seed(0)).double()
    decay = experiment.build_optimizer("L2", model).param_groups[0]["weight_decay"]
    (1e-3 * sum((p**2).sum() for p in model.parameters())).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.grad, decay * p.detach())


@pytest.mark.takes_seconds
def test_the_spectral_arm_bounds_the_singular_values():
    plain, spectral = (experiment.run_arm(arm, 2, 25, seed=0) for arm in ("none", "spectral"))
    assert max(spectral[-1].sigmas) < 0.8 * max(plain[-1].sigmas)
    assert min(r.accuracy for r in spectral) > 0.7


def test_the_optimizer_with_the_penalty_in_it_learns_what_the_attached_one_learns():
    attached, own = (experiment.run_arm(arm, 2, 5, seed=0) for arm in ("spectral", "SpectralAdamW"))
    for mine, theirs in zip(own, attached, strict=True):
        # The two round differently. In 200 steps that grows from 1e-7 to some 1e-6 of a weight,
        # which may turn an image or two at the border of two classes.
        assert mine.sigmas == pytest.approx(theirs.sigmas, rel=1e-4)
        assert mine.accuracy == pytest.approx(theirs.accuracy, abs=2.5 / experiment.N_IMAGES)


def test_reports_follow_the_epochs():
    epochs = []
    results = experiment.run_arm("none", 2, 3, seed=0, report=epochs.append)
    assert [(e.task, e.epoch) for e in epochs] == [(t, e) for t in (1, 2) for e in (1, 2, 3)]
    assert [e.result for e in epochs] == [None, None, results[0], None, None, results[1]]
    assert [e.accuracy for e in epochs if e.result] == [r.accuracy for r in results]


@pytest.mark.takes_seconds
def test_processes_compute_what_run_arm_computes():
    shown = []
    results = experiment.run(2, 1, 0, shown.append, arms=("none", "spectral"))
    assert not results.interrupted
    assert {e.arm for e in shown} == {"none", "spectral"}
    for arm, done in results.arms.items():
        assert [(r.accuracy, r.sigmas) for r in done] == learned(arm, 2, 1, seed=0)
    assert multiprocessing.active_children() == []


@pytest.mark.takes_seconds
def test_an_error_in_a_worker_is_raised_with_its_traceback():
    with pytest.raises(
        experiment.WorkerError,
        match=r"'L1' arm failed:\n(?s:.*)ValueError: arm: expected .*, got 'L1'",
    ):
        experiment.run(1, 1, 0, arms=("L1",))
    assert multiprocessing.active_children() == []


@pytest.mark.takes_seconds
def test_a_killed_worker_is_an_error_and_ends_the_others():
    killed = []

    def kill_one(epoch):
        if not killed:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    with time_limit(60), pytest.raises(experiment.WorkerError, match="died, exit code -9"):
        experiment.run(10**6, 1, 0, kill_one, arms=("none", "L2"))
    assert multiprocessing.active_children() == []


@pytest.mark.takes_seconds
def test_an_interrupt_keeps_finished_tasks_and_the_handler():
    def interrupt(epoch):
        if epoch.task == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    results = experiment.run(1000, 1, 0, interrupt, arms=("none",))
    assert results.interrupted
    assert 2 <= len(results.arms["none"]) < 1000
    assert signal.getsignal(signal.SIGINT) is before
    assert multiprocessing.active_children() == []


def test_the_table_shows_means_of_first_and_last_tasks_and_final_singular_values():
    done = [experiment.TaskResult(i / 100, (i, 2.5, 3.5, 44.5), float(i)) for i in range(1, 13)]
    text = rendered(experiment.Results(12, 1, 0, {"none": done, "L2": done[:7]}))
    none, l2 = (
        line.split() for line in text.splitlines() if line.split()[:1] in (["none"], ["L2"])
    )
    assert none == ["none", "0.030", "0.100", "12.00", "2.50", "3.50", "44.50", "6.50"]
    assert l2 == ["L2", "0.030", "0.050", "7.00", "2.50", "3.50", "44.50", "4.00"]


def test_the_table_of_an_interrupted_run_fits_and_counts_tasks():
    done = [experiment.TaskResult(0.5, (123.45,) * 4, 1.0)] * 3
    arms = {"none": [], "spectral": done, "SpectralAdamW": done}
    text = rendered(experiment.Results(100, 1, 0, arms, interrupted=True))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    assert ["none", "0"] in rows
    assert ["spectral", "3", "0.500", "0.500", *["123.45"] * 4, "1.00"] in rows


@pytest.mark.parametrize("tasks", [3, 30, 95])
def test_plain_lines_come_at_most_ten_times_and_name_the_last_task(capsys, tasks):
    display = demo_command.lines(tasks)
    for task in range(1, tasks + 1):
        display(experiment.Epoch("L2", task, 1, 0.25, None))
        display(experiment.Epoch("L2", task, 2, 0.5, experiment.TaskResult(0.5, (1.0,) * 4, 1.0)))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == min(tasks, 10)
    assert printed[-1].split() == ["L2", "task", f"{tasks}/{tasks}", "accuracy", "0.500"]
