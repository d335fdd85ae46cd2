"""The penalty of small matrices as plain PyTorch, in graphs of torch.compile.

An operator costs a compiled step tens of microseconds, however small the matrices. A compiler
turns these functions into a few loops instead, together with the rest of the step. They compute
what ``backends.formulas`` says; the vectors are constants. ``traceable`` tells which buckets are
traced like this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import formulas, reference
from ..tables.device import wide
from .bucket import JUMP, JUMP_FACTOR
from .traceable import FIRST_TARGET, ElementwiseView, MatrixView, Recipe, recipe_of


def _view(recipe: Recipe, i: int, weights: list[Tensor]) -> Tensor:
    """Return entry ``i``: a matrix [M, N] of its parameter, or an elementwise parameter."""
    if i >= len(recipe.matrices):
        return weights[recipe.elementwise[i - len(recipe.matrices)].ref]
    view = recipe.matrices[i]
    weight = weights[view.ref]
    if view.index is not None:
        weight = weight.select(0, view.index)
    if view.part is not None:
        weight = weight.narrow(*view.part)
    return weight.permute(view.permutation).reshape(view.rows, view.cols)


def _squares(parts: list[Tensor]) -> list[Tensor]:
    """Return the sum of squares of each of ``parts``, 1-D; all [1] and wide."""
    # With one element, not none, as inductor then writes them into a torch.cat without a buffer.
    return [(wide(x) * wide(x)).sum(0, keepdim=True) for x in parts]


def _iterated(
    views: tuple[MatrixView, ...], matrices: list[Tensor], v: Tensor, sigma: Tensor
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """Run one iteration of ``matrices`` from ``v``, after one that has found ``sigma``.

    Returns:
        s, [M] for each matrix; its sums of squares and ||W^T s||, [n_matrices] wide; the next
        vectors in the order of their memory, which are those before where W^T s is zero or not
        finite.
    """
    scale = formulas.inverse_power_of_two(sigma)
    own = [v[x.v_offset : x.v_offset + x.cols] for x in views]
    # Not by matrix products, which autocast would compute in 16 bits.
    s = [(weight * x).sum(1) for weight, x in zip(matrices, own, strict=True)]
    # A compiler computes what goes into torch.cat once, not for every column of a matrix.
    scaled = torch.cat([x * scale[i] for i, x in enumerate(s)]).split([len(x) for x in s])
    t = [(weight * x[:, None]).sum(0) for weight, x in zip(matrices, scaled, strict=True)]
    squares, length = torch.cat(_squares(s)), torch.cat(_squares(t)).sqrt()
    good = torch.isfinite(length) & (length > 0) & torch.isfinite(squares)
    inverse = 1 / length
    found = [torch.where(good[i], (wide(x) * inverse[i]).to(x.dtype), own[i])
             for i, x in enumerate(t)]  # fmt: skip
    order = sorted(range(len(own)), key=lambda i: views[i].v_offset)
    return s, squares, length / wide(scale), [found[i] for i in order]


def _iterations(
    recipe: Recipe, weights: list[Tensor], v: Tensor, scalars: Tensor, strength: Tensor,
    options: Tensor, n: int,
) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
    """Run ``n`` iterations from ``v``, after one that has found ``scalars``.

    Returns:
        v, s, scalars and v_next after them, flat; dR/dx of the entries that are gains and rows.
    """
    n_matrices, dtype = len(recipe.matrices), v.dtype
    matrices = [_view(recipe, i, weights).to(dtype) for i in range(n_matrices)]
    sigma, target = scalars[:n_matrices], scalars[-n_matrices:]
    s, squares, length, v_next = _iterated(recipe.matrices, matrices, v, sigma)
    for _ in range(n - 1):
        v, sigma = torch.cat(v_next), squares.sqrt().to(dtype)
        s, squares, length, v_next = _iterated(recipe.matrices, matrices, v, sigma)
    others = [(i, x, wide(weights[x.ref])) for i, x in enumerate(recipe.elementwise, n_matrices)]
    norms = torch.cat([squares, *[_largest_square(x, value) for _, x, value in others]]).sqrt()
    sigma, norm = norms[:n_matrices], norms[n_matrices:]
    residual = ((length - sigma * sigma) * (length + sigma * sigma)).clamp(min=0).sqrt() / sigma
    residual = torch.where(torch.isfinite(sigma) & (sigma > 0), residual, sigma)
    k, above, firsts = _options(recipe, options)
    targets = torch.cat((wide(target), firsts))
    raw, slopes, start = formulas.raw_penalty_at(norms, k, targets, above), {}, 0
    parts = []
    for i, x, value in others:
        if x.kind != "shift":
            own, slopes[i] = _gain_or_rows(x, options, value)
            parts += [raw[start:i], own]
            start = i + 1
    scalars = [x.to(dtype) for x in (sigma, residual, norm, *parts, raw[start:])]
    return torch.cat([v, *s, *scalars, strength, target, *v_next]), slopes


def _options(recipe: Recipe, options: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return k, whether the penalty has one side, and the elementwise parameters' first targets."""
    return options[0], options[1] > 0, options[FIRST_TARGET:][: len(recipe.elementwise)]


def _largest_square(view: ElementwiseView, x: Tensor) -> Tensor:
    """Return the square of the norm of ``x``, of rows that of the largest one; [1]."""
    if view.kind != "rows":
        return _squares([x.flatten()])[0]
    rows = x.reshape(view.n_targets, -1)
    return (rows * rows).sum(1).amax(0, keepdim=True)


def _gain_or_rows(view: ElementwiseView, options: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return R of a gain or of rows ``x``, [1], and dR/dx."""
    k, above, target = options[0], options[1] > 0, options[view.targets :][: view.n_targets]
    target = target.to(x.dtype)
    if view.kind == "gain":
        own = x, k, target.view(x.shape), above
        return formulas.gain_penalty(*own)[None], formulas.gain_gradient(*own)
    rows = x.reshape(view.n_targets, -1)
    norms = (rows * rows).sum(1).sqrt()
    slope = formulas.gradient_factor(norms, 1.0, k, target, above)[:, None] * rows
    value = formulas.raw_penalty_at(norms, k, target, above).sum(0, keepdim=True)
    return value, slope.view(x.shape)


def _split(recipe: Recipe, found: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return v, s, scalars and v_next of ``found``, flat; and the parts of scalars."""
    sizes = recipe.v_size, recipe.s_size, sum(recipe.scalar_sizes), recipe.v_size
    buffers = found.split(sizes)
    return buffers, buffers[2].split(recipe.scalar_sizes)


class Penalty(torch.autograd.Function):
    """A penalty whose gradient is known: exact in the weights, given the vectors."""

    @staticmethod
    def forward(
        ctx, recipe: Recipe, trained: list[int], marks: int | None, value: Tensor, s: Tensor,
        v: Tensor, factors: Tensor, strength: Tensor, target: Tensor, options: Tensor,
        *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return ``value``.

        Args:
            ctx: context of the backward pass.
            recipe: of the bucket.
            trained: the entries that get a gradient.
            marks: number of the ``ModelBuckets`` at which a backward pass is to leave a mark, see
                ``attach.once``; None: it leaves none.
            value: the penalty, 0-d.
            s: [sum of M].
            v: [sum of N].
            factors: [n_entries], by which s, and shifts, are multiplied.
            strength: [n_entries].
            target: [n_matrices].
            options: of ``Traceable``.
            tensors: the trained matrices [M, N] and elementwise parameters, then the gradients of
                those that are gains and rows.
        """
        ctx.recipe, ctx.trained, ctx.marks, ctx.n_slopes = (
            recipe, trained, marks, len(tensors) - len(trained),
        )  # fmt: skip
        ctx.save_for_backward(s, v, factors, strength, target, options, *tensors)
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return upstream * strength * dR/dx of every input."""
        recipe, trained = ctx.recipe, ctx.trained
        s, v, factors, strength, target, options, *tensors = ctx.saved_tensors
        inputs, slopes = tensors[: len(trained)], iter(tensors[len(trained) :])
        if ctx.marks is not None:
            operators = torch.ops.spectral_kernels
            upstream = operators.mark(upstream, ctx.marks)
        if torch.is_grad_enabled():  # with create_graph, where no compiler has traced this
            total = _differentiable(recipe, trained, inputs, v, strength, target, options)
            grads = torch.autograd.grad(total, inputs, upstream, create_graph=True)
            return *[None] * 10, *grads, *[None] * ctx.n_slopes
        grads, factors = [], upstream * factors
        for i, x in zip(trained, inputs, strict=True):
            kind = recipe.kind(i)
            if kind == "matrix":
                view = recipe.matrices[i]
                left = factors[i] * s[view.s_offset : view.s_offset + view.rows]
                grads.append(left[:, None] * v[view.v_offset : view.v_offset + view.cols])
            else:
                grads.append(factors[i] * x if kind == "shift" else upstream * next(slopes))
        return *[None] * 10, *grads, *[None] * ctx.n_slopes


def _differentiable(
    recipe: Recipe, trained: list[int], inputs: list[Tensor], v: Tensor, strength: Tensor,
    target: Tensor, options: Tensor,
) -> Tensor:  # fmt: skip
    """Return the penalty of ``inputs``, 0-d, by operations that autograd can follow.

    See ``Penalty.forward`` for the arguments.
    """
    n, k, above, total = len(recipe.matrices), options[0], options[1] > 0, 0
    for i, x in zip(trained, inputs, strict=True):
        if i < n:
            view = recipe.matrices[i]
            own = v[view.v_offset : view.v_offset + view.cols]
            value = formulas.raw_penalty(x, own, k, target[i], above)
        else:
            view = recipe.elementwise[i - n]
            goal = options[view.targets : view.targets + view.n_targets]
            if view.kind == "gain":
                value = formulas.gain_penalty(wide(x), k, goal.view(x.shape), above)
            else:
                rows = wide(x).reshape(view.n_targets, -1)
                value = formulas.rows_penalty(rows, k, goal, above)
        total = total + strength[i] * value
    return total.to(v.dtype)


def step(
    key: str, iterations: int, number: int, index: int, trained: tuple[bool, ...], marks: bool,
    strength: Tensor | None, v: Tensor, v_next: Tensor, s: Tensor, scalars: Tensor, ratios: Tensor,
    options: Tensor, unsettled: Tensor, *weights: Tensor,
) -> Tensor:  # fmt: skip
    """Run the power iterations of a traceable bucket, and return its penalty, 0-d.

    Compilers trace the operations of this function, but not its Python code: it must depend on its
    arguments alone.

    Args:
        key: stands for the recipe.
        iterations: number of iterations, 1 or more.
        number: number of the ``ModelBuckets``.
        index: index of the bucket among them.
        trained: which of the weights get a gradient.
        marks: whether a backward pass is to leave a mark, see ``attach.once``.
        strength: [n_entries], replaces all strengths, or None.
        v: [sum of N], overwritten with the vectors of the last iteration.
        v_next: [sum of N], the vectors to start from; overwritten with the next ones.
        s: [sum of M], overwritten.
        scalars: ``State.scalars``, overwritten.
        ratios: of ``Traceable``, overwritten.
        options: of ``Traceable``.
        unsettled: of ``Traceable``.
        weights: the parameters of the bucket.
    """
    recipe, state = recipe_of(key), (v, v_next, s, scalars, ratios)
    operators = torch.ops.spectral_kernels
    n, n_entries = len(recipe.matrices), len(recipe.matrices) + len(recipe.elementwise)
    with torch.no_grad():
        plain = [w.detach() for w in weights]
        own = scalars[-n - n_entries : -n] if strength is None else strength
        found, slopes = _iterations(recipe, plain, v_next, scalars, own, options, iterations)
        wanted = unsettled
        if recipe.warmup:
            now = reference.ratios(*_split(recipe, found)[1][:2])
            wanted = wanted | reference.jumped(now, ratios, JUMP, JUMP_FACTOR).any()
        found = operators.settle(plain, found, wanted, number, index)
        # What the backward pass needs comes from here, never from the state: inductor (2.13) may
        # read a graph input in the backward pass that the forward pass has overwritten.
        (v, s, scalars, v_next), parts = _split(recipe, found)
        sigma, residual, norm, raw, own, target = parts
        for old, new in zip(
            state, (v, v_next, s, scalars, reference.ratios(sigma, residual)), strict=True
        ):
            old.copy_(new)
        value = (own * raw).sum()
        k, above, firsts = _options(recipe, options)
        norms, targets = wide(torch.cat((sigma, norm))), torch.cat((wide(target), firsts))
        # In 32 bits the loops of the backward pass are vectorized.
        factors = formulas.gradient_factor(norms, wide(own), k, targets, above).to(v.dtype)
    entries = [i for i, x in enumerate((*recipe.matrices, *recipe.elementwise)) if trained[x.ref]]
    if not entries:
        return value
    inputs = [_view(recipe, i, weights).to(v.dtype) for i in entries]
    slopes = [(own[i] * slopes[i]).to(v.dtype) for i in entries if i in slopes]
    at = number if marks else None
    return Penalty.apply(
        recipe, entries, at, value, s, v, factors, own, target, options, *inputs, *slopes
    )
