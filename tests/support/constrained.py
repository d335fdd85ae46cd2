"""Models whose singular values are known, for tests of bounds on them."""

import copy

import torch
from torch import nn

from spectral_kernels import SpectralRegularizer

from .optimizer_pairs import KINDS

TARGET = 1.5


def dominated(m, n, sigma):
    """A float64 matrix of that sigma_1; its other singular values are a hundred times smaller."""
    return with_values(m, n, [sigma, *[1e-2 * sigma] * 4])


def with_values(m, n, values):
    """A float64 matrix of those singular values, as many as it has."""
    r = min(m, n, len(values))
    u, _ = torch.linalg.qr(torch.randn(m, r, dtype=torch.float64, device="cpu"))
    v, _ = torch.linalg.qr(torch.randn(n, r, dtype=torch.float64, device="cpu"))
    return (u * torch.tensor(values[:r], dtype=torch.float64)) @ v.T


class Layers(nn.Module):
    """Matrices of every layout, above and below the target: ragged, a single row or column."""

    def __init__(self, sigmas=(4.0, 0.4), dtype=torch.float32):
        super().__init__()
        shapes = [(40, 24), (7, 31), (5, 520), (1, 9), (9, 1), (130, 64)]
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in shapes for _ in sigmas)
        self.transposed = nn.Linear(19, 24, bias=False)
        self.conv = nn.Conv2d(4, 6, 3, bias=False)
        self.free = nn.Parameter(torch.ones(3))
        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                layer.weight.copy_(dominated(*layer.weight.shape, sigmas[i % len(sigmas)]))
            self.conv.weight.copy_(dominated(6, 36, sigmas[0]).view(6, 4, 3, 3))
            x = dominated(24, 19, sigmas[0])
        self.to(dtype)
        self.conv.to(memory_format=torch.channels_last)
        self.transposed.weight = nn.Parameter(x.to(dtype).t().contiguous().t())
        self.to(torch.get_default_device())


def put_gradients(model, scale=1e-2, seed=0):
    """The same gradients for models of the same shapes, as exact as the dtype allows."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        g = (scale * torch.randn(p.shape, generator=generator, device="cpu")).bfloat16()
        p.grad = torch.empty_like(p).copy_(g)


def flat(p):
    return p.detach().flatten(1).double() if p.dim() > 1 else p.detach().double()[:, None]


def assert_step_takes(kind, model, held, state, taken, limit):
    """A step is that of torch's optimizer without what ``taken`` says of every matrix.

    ``held`` are options of ours beside torch's, ``state`` is that of the regularizer, and ``limit``
    the error relative to the largest element.
    """
    theirs, ours, options = KINDS[kind]
    eps = {"eps": 1e-2} if kind == "adamw" else {}
    other = copy.deepcopy(model).double()
    mine = ours(model, **options, **eps, **held, target=TARGET, decoupled=True, warmup=0)
    mine.regularizer.load_state_dict(state)
    yours = theirs(other.parameters(), **options, **eps)
    for one in (model, other):
        put_gradients(one)
    before = {n: p.detach().clone() for n, p in other.named_parameters()}
    mine.step()
    yours.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        expected = q.detach() - (taken(before[name]) if p.dim() > 1 else 0)
        error = float((p.detach().double() - expected).abs().max())
        largest = max(float(x.abs().max()) for x in (before[name], expected))
        assert error <= limit * largest, (name, error)


def converged(model, r=1, warmup=30):
    """State of a regularizer whose vectors have converged."""
    reg = SpectralRegularizer(model, n_vectors=r, warmup=warmup, backend="reference")
    reg.accumulate_grad_()
    for p in model.parameters():
        p.grad = None
    return reg.state_dict()
