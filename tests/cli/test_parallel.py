"""Work on several tensors at a time: how many, with which threads, what an error ends, progress."""

import threading
import time

import pytest
import torch

from spectral_kernels.cli.inspect import base
from spectral_kernels.cli.inspect.measure import Patterns, measure, planned
from spectral_kernels.cli.inspect.parallel import for_each
from spectral_kernels.cli.inspect.spectrum import SpectrumOptions
from spectral_kernels.diagnostics.checkpoints import Checkpoint


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
def test_what_goes_on_at_a_time_is_no_larger_than_the_largest():
    sizes = [100, 30, 25, 20, 25, 10, 60, 5]
    lock, now, most, threads = threading.Lock(), [], [0, 0], {}

    def work(size):
        with lock:
            now.append(size)
            threads[size] = torch.get_num_threads()
            most[0], most[1] = max(most[0], sum(now)), max(most[1], len(now))
        time.sleep(0.02)
        with lock:
            now.remove(size)

    for_each(work, sizes, size=lambda size: size)
    assert most[0] == 100
    assert 2 <= most[1] <= 4
    assert {size for size, n in threads.items() if n == 1} == {25, 20, 10, 5}
    assert {size for size, n in threads.items() if n == 4} == {100, 30, 60}
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("bad", [0, 3, 39])
def test_an_error_ends_the_rest(bad):
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.005)
        if number == bad:
            raise ValueError(f"task {number}")

    with pytest.raises(ValueError, match=f"task {bad}"):
        for_each(work, range(40), size=lambda number: 1 if number < 39 else 10)
    assert len(begun) <= bad + 8
    assert torch.get_num_threads() == 4


def test_no_tasks_are_no_work():
    for_each(lambda task: pytest.fail("called"), [], size=lambda task: 1)


@pytest.mark.parametrize("spectra", [None, SpectrumOptions(2), SpectrumOptions(3, side_limit=8)])
def test_progress_ends_at_all_of_the_work(tmp_path, spectra):
    tensors = {"a.q_proj.weight": torch.randn(16, 16), "a.k_proj.weight": torch.randn(8, 16),
               "a.bias": torch.randn(16), "b.weight": torch.randn(300, 250)}  # fmt: skip
    path, other = tmp_path / "model.pt", tmp_path / "base.pt"
    torch.save(tensors, path)
    torch.save({"b.weight": tensors["b.weight"] + 1}, other)
    plan = planned(Checkpoint(path), Patterns(), None, spectra, 4)
    assert plan.attention
    steps = []
    found = measure(plan, lambda name, work: steps.append(work))
    assert sum(steps) == plan.work >= sum(tensor.numel() for tensor in tensors.values())
    steps.clear()
    base.compare(plan, Checkpoint(other), found, lambda name, work: steps.append(work))
    assert sum(steps) == base.work(plan, other) == 384 + 300 * 250
    assert base.work(plan, None) == 0
