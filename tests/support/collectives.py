"""Records collectives through torch's dispatcher; the benchmarks use it too."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """Records name and bytes of every collective."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Record a collective, and run the operation."""
        if function.namespace == "c10d":
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            self.found.append((function.name().removeprefix("c10d::"), size))
        return function(*args, **(kwargs or {}))
