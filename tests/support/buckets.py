"""Buckets over plain lists of tensors, for tests of plans and backends."""

import torch

from spectral_kernels.backends import choice
from spectral_kernels.backends.formulas import orthonormal
from spectral_kernels.engine.bucket import Bucket
from spectral_kernels.selection.matrices import refs_of
from spectral_kernels.selection.rules import select
from spectral_kernels.tables import plan as plan_module
from spectral_kernels.tables.plan import Plan


def bucket_of(
    tensors, backend="reference", exponent=2, target=1.0, strength=1.0, seed=0, r=1,
    extra_iterations=0, **kw,
):  # fmt: skip
    """A bucket with random unit vectors and poisoned scratch; tensors become leaf parameters."""
    named = tensors if isinstance(tensors, torch.nn.Module) else list(named_weights(tensors))
    found = select(named, trainable_only=False, **kw)
    refs = refs_of(found.matrices, found.elementwise)
    weights = [ref.get() for ref in refs]
    chosen = choice.choose(backend, weights[0].device, weights[0].dtype, r)
    plan = Plan(found.matrices, found.elementwise, weights, r)
    bucket = Bucket(plan, chosen, exponent, extra_iterations)
    bucket.state.target.fill_(target)
    bucket.state.strength.fill_(strength)
    generator = torch.Generator().manual_seed(seed)
    for i in range(len(plan.matrices)):
        v = bucket.state.columns(i, bucket.state.v_next)
        x = torch.randn(v.shape, generator=generator, dtype=torch.float64, device="cpu")
        v.copy_(orthonormal(x))
    poison(plan)
    return bucket


def cut_as_on_a_gpu(patch):
    """Make plans cut matrices into the tiles of a GPU; ``patch`` is pytest's monkeypatch."""
    rows = plan_module.rows_of_tiles
    patch.setattr(plan_module, "rows_of_tiles", lambda shapes, _, r=1: rows(shapes, "cuda", r))


def named_weights(tensors):
    for i, tensor in enumerate(tensors):
        yield (f"{i}.bias" if tensor.dim() == 1 else f"{i}.weight"), tensor


def poison(plan):
    """Fill scratch with NaN, so that reads of unwritten memory show."""
    plan.t_partial.fill_(float("nan"))
    plan.gram_partial.fill_(float("nan"))


def gradients(bucket, accumulate=False, grads=None):
    """Run rank_one at the bucket's state into NaN (or given) gradients and return them."""
    if grads is None:
        grads = [torch.full_like(t, float("nan")) for t in bucket.plan.tensors]
    bucket.plan.bind_grads(grads)
    bucket.add_gradient(bucket.state, grads, accumulate)
    return grads
