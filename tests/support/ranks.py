"""Processes of torch.distributed that run a function together."""

import importlib
import multiprocessing
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from tests import TIMEOUT


class Ranks:
    """``world`` processes; ``call`` runs a function on each and returns what they return."""

    def __init__(self, world, timeout=TIMEOUT, backend="gloo"):
        context = multiprocessing.get_context("spawn")
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pipes = [context.Pipe() for _ in range(world)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(
                target=_main, daemon=True,
                args=(rank, world, self.store.port, timeout, backend, theirs),
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]  # fmt: skip
        for process in self.processes:
            process.start()
        self.usable = True  # no call has failed or timed out on any rank

    def call(self, function, *args, raising=True):
        """Return the results of ``function`` by rank; unless ``raising``, tracebacks too."""
        name = f"{function.__module__}:{function.__name__}"
        self.usable = False
        for pipe in self.pipes:
            pipe.send((name, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT):
                raise RuntimeError(f"rank {rank} gave no answer to {name}")
            results.append(pipe.recv())
        failed = [(rank, r[1]) for rank, r in enumerate(results) if r[0] == "raised"]
        if failed and raising:
            raise AssertionError(f"{name} on rank {failed[0][0]}:\n{failed[0][1]}")
        self.usable = not failed
        return [value for _, value in results]

    def close(self):
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _main(rank, world, port, timeout, backend, pipe):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=TIMEOUT))
    store.set(f"rank {rank}", "is there")  # timeout is not for ranks that start late
    store.wait([f"rank {other}" for other in range(world)])
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        module, _, function = name.partition(":")
        try:
            pipe.send(("returned", getattr(importlib.import_module(module), function)(*args)))
        except Exception:
            pipe.send(("raised", traceback.format_exc()))
