"""What is sent between ranks, as torch's dispatcher sees it; the bench uses it too."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """Notes name and bytes of every collective."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Note it, and let it be."""
        if function.namespace == "c10d":
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            self.found.append((function.name().removeprefix("c10d::"), size))
        return function(*args, **(kwargs or {}))
