"""Processes of torch.distributed, all of which run a function when asked to."""

import importlib
import multiprocessing
import os
import socket
import traceback
from datetime import timedelta

TIMEOUT = 40


class Ranks:
    """``world`` processes; ``call`` runs a function on each and returns what they return."""

    def __init__(self, world, timeout=TIMEOUT, backend="gloo"):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pipes = [context.Pipe() for _ in range(world)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(
                target=_main, args=(rank, world, port, timeout, backend, theirs), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        self.usable = True  # no rank has left the others in the middle of something

    def call(self, function, *args, raising=True):
        """Return a list, by rank, of what ``function`` returns; its own exceptions too."""
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
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
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
