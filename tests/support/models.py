"""Small models with every kind of parameter."""

import torch
from torch import nn


class Mixed(nn.Module):
    """Convolutions, norms, attention, recurrence, an embedding with a tied head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.rnn = nn.GRU(12, 5, batch_first=True)
        self.table = nn.Embedding(11, 12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.table.weight
        self.layer_norm = nn.LayerNorm(12)

    def forward(self, tokens, images):
        x = self.layer_norm(self.table(tokens))
        x, _ = self.attention(x, x, x)
        y, _ = self.rnn(x)
        z = self.up(self.norm(self.conv(images)))
        return self.head(x).square().mean() + y.square().mean() + z.square().mean()


def mixed(seed=0, dtype=torch.float32):
    """A Mixed whose parameters are perturbed at random."""
    torch.manual_seed(seed)
    model = Mixed().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def net(dtypes=(torch.float32, torch.float32)):
    """Two layers and a norm on the GPU, the same at every call."""
    torch.manual_seed(0)
    first, last = nn.Linear(300, 200), nn.Linear(200, 7)
    return nn.Sequential(first.to(dtypes[0]), nn.LayerNorm(200), last.to(dtypes[1])).cuda()


def with_gradients(model):
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.01)
    return model


def captured(step):
    """Run ``step`` once in a stream of its own; return a CUDA graph of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def batch(dtype=torch.float32):
    return torch.randint(11, (3, 7)), torch.randn(3, 3, 6, 6, dtype=dtype)


def grads(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def close(a, b, rtol=1e-5, atol=1e-7):
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol)
