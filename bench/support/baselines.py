"""Common implementations, and ours, behind one interface.

One step = power iteration of every layer + gradient of the penalty into ``.grad``. ``make(weights,
strength)`` takes leaf tensors whose ``.grad`` exists, and returns a function without arguments that
runs one step. All start from the same vectors (``start_vectors``), so that the first step's
gradient can be checked against float64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._dynamo import config as dynamo_config

from spectral_kernels import SpectralRegularizer
from spectral_kernels.backends.formulas import orthonormal_rows
from spectral_kernels.tables.schema import N_VECTORS

Step = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One way to compute a step.

    ``at`` names the vectors at which the gradient is taken: "v" (those before the iteration; of
    ``r`` vectors the Ritz vector), "next v" (those after it), "svd" (the exact ones), or "nothing"
    if no gradient is computed and the time is for orientation. It is left out beyond ``most``
    weights.
    """

    make: Callable[[list[torch.Tensor], float], Step]
    label: str
    at: str = "v"
    most: float = float("inf")
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    r: int = 1

    def enters(self, shapes, dtype: str, device: str) -> bool:
        """Return whether it can be measured on weights of ``shapes``."""
        weights = sum(m * n for m, n in shapes)
        return weights <= self.most and dtype in self.dtypes and device in self.devices


def start_vectors(weights, r: int = 1) -> list[torch.Tensor]:
    """Random unit vectors, the same at every call: one per weight [N], or ``r`` of them [r, N]."""
    generator = torch.Generator().manual_seed(0)
    if r > 1:
        random = (torch.randn(r, w.shape[1], generator=generator) for w in weights)
        return [orthonormal_rows(v).float() for v in random]
    vectors = (torch.randn(w.shape[1], generator=generator).to(w) for w in weights)
    return [v / v.norm() for v in vectors]


def _normalized(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _regularizer(weights, strength, backend, r=1) -> SpectralRegularizer:
    named = [(f"{i}.weight", w) for i, w in enumerate(weights)]
    reg = SpectralRegularizer(named, strength, backend=backend, n_vectors=r, warmup=0)
    vectors = [torch.atleast_2d(v) for v in start_vectors(weights, r)]
    reg.load_state_dict({"vectors": {name: v for (name, _), v in zip(named, vectors, strict=True)}})
    return reg


def ours(backend: str, r: int = 1):
    """Return a ``make`` for accumulate_grad_ on a backend, with ``r`` vectors per matrix."""

    def make(weights, strength):
        return _regularizer(weights, strength, backend, r).accumulate_grad_

    return make


def ours_replayed(backend: str):
    """Return a ``make`` for accumulate_grad_ in a CUDA graph; a step is one replay."""

    def make(weights, strength):
        reg = _regularizer(weights, strength, backend)
        grads = [weight.grad.clone() for weight in weights]
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compilation and setup happen before the capture
            reg.accumulate_grad_()
        torch.cuda.current_stream().wait_stream(side)
        for weight, before in zip(weights, grads, strict=True):
            weight.grad.copy_(before)
        for bucket in reg._buckets.buckets:
            bucket.state.swap()  # back to the vectors that the step has read
        with torch.cuda.graph(graph):
            reg.accumulate_grad_()
        return lambda kept=reg: graph.replay()  # the regularizer owns its memory

    return make


def ours_by_autograd(backend: str):
    """Return a ``make`` for penalty().backward() on a backend."""

    def make(weights, strength):
        reg = _regularizer(weights, strength, backend)
        return lambda: reg.penalty().backward()

    return make


def loop_penalty(weights, vectors):
    """R by the usual loop over layers; updates ``vectors``, then takes sigma from them."""
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


def inplace_loop(weights, strength):
    """A hand-written loop without autograd: two products and an in-place addr_ per layer."""
    vectors, grads = start_vectors(weights), [w.grad for w in weights]
    plain = [w.detach() for w in weights]

    def step():
        with torch.no_grad():
            for i, (weight, grad) in enumerate(zip(plain, grads, strict=True)):
                s = weight @ vectors[i]
                grad.addr_(s * (4 * strength * (torch.dot(s, s) - 1)), vectors[i])
                vectors[i] = _normalized(weight.mT @ s)

    return step


def compiled_loop(weights, strength):
    """torch.compile of the hand-written loop."""
    vectors, grads = start_vectors(weights), [w.grad for w in weights]
    plain = [w.detach() for w in weights]

    def body(weights, grads, vectors):
        out = []
        for weight, grad, v in zip(weights, grads, vectors, strict=True):
            s = weight @ v
            grad.add_(torch.outer(s * (4 * strength * (torch.dot(s, s) - 1)), v))
            out.append(_normalized(weight.mT @ s))
        return out

    # Beyond the recompilation limit torch would run plain Python, and that would be timed.
    dynamo_config.fail_on_recompile_limit_hit = True
    compiled = torch.compile(body, dynamic=False)

    def step():
        nonlocal vectors
        with torch.no_grad():
            vectors = compiled(plain, grads, vectors)

    return step


def stacked_bmm(weights, strength):
    """Equal shapes stacked in each step into one tensor for batched products."""
    groups = defaultdict(list)
    for weight, v in zip(weights, start_vectors(weights), strict=True):
        groups[tuple(weight.shape)].append((weight.detach(), weight.grad, v))
    members = [([w for w, _, _ in g], [g for _, g, _ in g]) for g in groups.values()]
    vectors = [torch.stack([v for _, _, v in g]) for g in groups.values()]

    def step():
        with torch.no_grad():
            for i, (own, grads) in enumerate(members):
                stack, v = torch.stack(own), vectors[i]
                s = torch.bmm(stack, v[:, :, None])
                factor = 4 * strength * (s.square().sum(1, keepdim=True) - 1)
                torch._foreach_add_(grads, list((s * factor * v[:, None, :]).unbind()))
                vectors[i] = _normalized(torch.bmm(stack.mT, s)[:, :, 0])

    return step


def spectral_norm_forward(weights, strength):
    """The forward pass of torch's spectral_norm parametrization, which divides W by sigma."""
    layers = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.detach())
        layers.append(nn.utils.parametrizations.spectral_norm(layer))

    def step():
        with torch.no_grad():
            for layer in layers:
                layer.weight  # noqa: B018  (a parametrized weight is computed when it is read)

    return step


def exact_svd(weights, strength):
    """sigma_1 and its vectors by a full SVD per layer."""
    grads, plain = [w.grad for w in weights], [w.detach() for w in weights]

    def step():
        for weight, grad in zip(plain, grads, strict=True):
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            grad.addr_(u[:, 0] * (4 * strength * (s[0] ** 2 - 1) * s[0]), vh[0])

    return step


CONTENDERS = {
    "triton": Contender(ours("triton"), "ours (Triton)", devices=("cuda",)),
    "triton_replay": Contender(
        ours_replayed("triton"), "ours (Triton), replayed", most=2e8, devices=("cuda",)
    ),
    "cuda": Contender(ours("cuda"), "ours (CUDA C++)", devices=("cuda",)),
    "cuda_replay": Contender(
        ours_replayed("cuda"), "ours (CUDA C++), replayed", most=2e8, devices=("cuda",)
    ),
    "cpu": Contender(ours("cpu"), "ours (C++)", devices=("cpu",)),
    "reference": Contender(ours("reference"), "ours (PyTorch reference)"),
    "autograd_loop": Contender(autograd_loop, "per-layer autograd loop", at="next v"),
    "inplace_loop": Contender(inplace_loop, "hand-written in-place loop"),
    "compiled_loop": Contender(compiled_loop, "compiled in-place loop"),
    "stacked_bmm": Contender(stacked_bmm, "equal shapes stacked for bmm"),
    "spectral_norm": Contender(
        spectral_norm_forward, "torch spectral_norm, forward only", at="nothing"
    ),
    # There is no SVD in 16 bits.
    "exact_svd": Contender(exact_svd, "exact SVD", at="svd", most=1e6, dtypes=("float32",)),
}
BY_AUTOGRAD = {
    "triton": Contender(ours_by_autograd("triton"), "ours (Triton)", devices=("cuda",)),
    "cuda": Contender(ours_by_autograd("cuda"), "ours (CUDA C++)", devices=("cuda",)),
    "cpu": Contender(ours_by_autograd("cpu"), "ours (C++)", devices=("cpu",)),
    "reference": Contender(ours_by_autograd("reference"), "ours (PyTorch reference)"),
    "autograd_loop": CONTENDERS["autograd_loop"],
}
SEVERAL = {
    **{name: CONTENDERS[name] for name in ("triton", "cuda", "cpu")},
    **{
        f"{name}_{r}": Contender(
            ours(name, r), CONTENDERS[name].label + f", {r} vectors",
            devices=CONTENDERS[name].devices, r=r,
        )
        for name in ("triton", "cuda", "cpu")
        for r in N_VECTORS[1:]
    },
}  # fmt: skip
FLOORS = {
    "floor": "floor: read W, add to .grad",
    "floor_read": "read W alone",
    "floor_add": "add to .grad alone",
    "floor_copy": "copy W",
}
