"""Work on several tensors at a time: how many, with which threads, and what an error ends."""

import threading
import time

import pytest
import torch

from spectral_kernels.cli.inspect.parallel import for_each


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
