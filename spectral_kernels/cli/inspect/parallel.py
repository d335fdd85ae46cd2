"""Work on the tensors of a checkpoint, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
_MOST_THREADS = 8  # of which each holds a tensor


@contextmanager
def threads_of_one(number: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads in each of which torch has one; what has not begun is cancelled."""
    before = torch.get_num_threads()
    # torch counts the threads of its operators for every thread that starts them.
    pool = ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def for_each(
    work: Callable[[T], None],
    tasks: Sequence[T],
    size: Callable[[T], int],
    most: int | None = None,
) -> None:
    """Do ``work`` for all tasks; those that go on at the same time are no larger than ``most``.

    With n threads, tasks of at most 1/n of that go first, n at a time and each in one thread of
    torch; those that are larger follow one by one, each in all threads.

    Args:
        work: takes a task; what it raises ends all, after the tasks that have begun.
        tasks: in the order in which they should begin.
        size: of a task, such as the elements of its tensor.
        most: of all sizes together; None: the largest one.
    """
    threads = torch.get_num_threads()
    at_once = min(threads, _MOST_THREADS)
    if most is None:
        most = max(map(size, tasks), default=0)
    small = [task for task in tasks if size(task) * at_once <= most] if at_once > 1 else []
    if small:
        with threads_of_one(at_once) as pool:
            futures = [pool.submit(work, task) for task in small]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
    done = set(map(id, small))
    for task in tasks:
        if id(task) not in done:
            work(task)
