"""Models in every supported placement, for tests/sharding/test_sharded.py."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)


class Block(nn.Module):
    """Attention and an MLP, with a convolution and sizes that no number of ranks divides."""

    def __init__(self, width=26, hidden=52, dtype=torch.float32):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True, dtype=dtype)
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.up = nn.Linear(width, hidden, dtype=dtype)
        self.down = nn.Linear(hidden, width, dtype=dtype)

    def forward(self, x):
        """Return [n, tokens, width]."""
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Blocks between a linear layer and a head with fewer rows than ranks."""

    def __init__(self, dtype=torch.float32, blocks=2):
        super().__init__()
        self.inputs = nn.Linear(5, 26, dtype=dtype)
        self.blocks = nn.ModuleList(Block(dtype=dtype) for _ in range(blocks))
        self.head = nn.Linear(26, 3, dtype=dtype)

    def forward(self, x):
        """Return [n, tokens, 3]."""
        x = self.inputs(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Views(nn.Module):
    """Parameters for every view as matrices; the module is not run."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 10, 3)
        self.last = nn.Conv2d(6, 10, 3).to(memory_format=torch.channels_last)
        self.up = nn.ConvTranspose2d(6, 10, 3)
        self.experts = nn.Parameter(torch.randn(6, 7, 9))
        self.thin_experts = nn.Parameter(torch.randn(6, 7, 1))
        self.lstm = nn.LSTM(5, 6)
        self.fused = nn.Linear(8, 3 * 8)
        self.row = nn.Linear(9, 1)
        self.column = nn.Linear(1, 9)


VIEWS = {"splits": {"fused.weight": 3}, "stacked": ["experts", "thin_experts"]}


def device():
    """Return the type of device that the process group is for."""
    has_group = torch.distributed.is_initialized()
    return "cuda" if has_group and torch.distributed.get_backend() == "nccl" else "cpu"


def built(kind=Model, seed=0, **options):
    """Return a model, the same one on every rank."""
    torch.manual_seed(seed)
    model = kind(**options)
    for p in model.parameters():
        if p.dim() > 1:  # away from where the penalty is small
            p.data.mul_(1.5)
    return model.to(device())


def distributed(model, mesh, placements):
    """Shard every parameter by those of the ``placements`` whose dimensions it has."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                own = [x if not isinstance(x, Shard) or x.dim < p.dim() else Replicate()
                       for x in placements]  # fmt: skip
                module._parameters[name] = nn.Parameter(distribute_tensor(p.data, mesh, own))
    return model


def _fsdp(model, mesh, **options):
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _tensor_parallel(model, mesh):
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def sharded(placement, world, model):
    """Return the model in the placement of that name."""
    if placement == "fsdp":
        return _fsdp(model, init_device_mesh(device(), (world,)))
    if placement == "fsdp, not resharded":
        return _fsdp(model, init_device_mesh(device(), (world,)), reshard_after_forward=False)
    if placement == "fsdp, bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return _fsdp(model, init_device_mesh(device(), (world,)), mp_policy=policy)
    if placement == "fsdp of blocks alone":
        for block in model.blocks:
            fully_shard(block, mesh=init_device_mesh(device(), (world,)))
        return model
    if placement == "hsdp":
        names = "replicas", "shards"
        return _fsdp(model, init_device_mesh(device(), (2, world // 2), mesh_dim_names=names))
    if placement == "tensor parallel":
        return _tensor_parallel(model, init_device_mesh(device(), (world,)))
    if placement == "fsdp and tensor parallel":
        mesh = init_device_mesh(device(), (2, world // 2), mesh_dim_names=("dp", "tp"))
        return _fsdp(_tensor_parallel(model, mesh["tp"]), mesh["dp"])
    if placement == "two meshes":
        names = "replicas", "shards"
        fully_shard(model.blocks[0], mesh=init_device_mesh(device(), (world,)))
        fully_shard(
            model.blocks[1], mesh=init_device_mesh(device(), (2, world // 2), mesh_dim_names=names)
        )
        return model
    raise ValueError(placement)


PLACEMENTS = (
    "fsdp", "fsdp, not resharded", "fsdp, bfloat16", "fsdp of blocks alone", "hsdp",
    "tensor parallel", "fsdp and tensor parallel", "two meshes",
)  # fmt: skip


def whole(tensor):
    """Return the full tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
