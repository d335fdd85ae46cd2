"""What people write today: one step = power iteration of every layer + gradient into .grad.

Every contender is built by ``make(weights, strength)`` from leaf tensors whose ``.grad`` exists,
and returns a function without arguments that runs one step. All of them start from the same
vectors, so that one step from the same weights gives the same gradient up to rounding.
"""

from __future__ import annotations

import torch

from spectral_kernels import SpectralRegularizer


def start_vectors(weights) -> list[torch.Tensor]:
    """Random unit vectors, one per weight, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    vectors = (torch.randn(w.shape[1], generator=generator).to(w) for w in weights)
    return [v / v.norm() for v in vectors]


def _normalized(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm()


def loop_penalty(weights, vectors):
    """R by a loop over layers as in most code; moves ``vectors``, then takes sigma from them."""
    total = 0.0
    for i, weight in enumerate(weights):
        with torch.no_grad():
            u = _normalized(weight @ vectors[i])
            vectors[i] = v = _normalized(weight.mT @ u)
        sigma = torch.dot(u, weight @ v)
        total = total + (sigma**2 - 1) ** 2
    return total


def autograd_loop(weights, strength):
    """The loop over layers, then backward()."""
    vectors = start_vectors(weights)

    def step():
        (strength * loop_penalty(weights, vectors)).backward()

    return step


def _one_read_step(weights, grads, vectors, strength):
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        s = weight @ vectors[i]
        sigma2 = torch.dot(s, s)
        grad.addr_(s * (4 * strength * (sigma2 - 1)), vectors[i])
        vectors[i] = _normalized(weight.mT @ s)


def inplace_loop(weights, strength):
    """Loop written by hand without autograd: two products and an in-place addr_ per layer."""
    vectors, grads = start_vectors(weights), [w.grad for w in weights]
    plain = [w.detach() for w in weights]

    def step():
        with torch.no_grad():
            _one_read_step(plain, grads, vectors, strength)

    return step


def compiled_loop(weights, strength):
    """torch.compile of the loop written by hand."""
    vectors, grads = start_vectors(weights), [w.grad for w in weights]
    plain = [w.detach() for w in weights]

    def body(weights, grads, vectors):
        out = []
        for weight, grad, v in zip(weights, grads, vectors, strict=True):
            s = weight @ v
            sigma2 = torch.dot(s, s)
            grad.add_(torch.outer(s * (4 * strength * (sigma2 - 1)), v))
            out.append(_normalized(weight.mT @ s))
        return out

    compiled = torch.compile(body)

    def step():
        nonlocal vectors
        with torch.no_grad():
            vectors = compiled(plain, grads, vectors)

    return step


def ours(backend: str):
    """Return a maker of this package's accumulate_grad_ on a backend."""

    def make(weights, strength):
        named = [(f"{i}.weight", w) for i, w in enumerate(weights)]
        reg = SpectralRegularizer(named, strength, backend=backend, warmup=0)
        vectors = start_vectors(weights)
        reg.load_state_dict(
            {"vectors": {name: v[None] for (name, _), v in zip(named, vectors, strict=True)}}
        )
        return reg.accumulate_grad_

    return make


CONTENDERS = {
    "cpu": ours("cpu"),
    "reference": ours("reference"),
    "autograd_loop": autograd_loop,
    "inplace_loop": inplace_loop,
    "compiled_loop": compiled_loop,
}

# These take sigma and the gradient from the vectors after the iteration, the others from before.
UPDATES_FIRST = ("autograd_loop",)
