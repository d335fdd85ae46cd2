"""Largest errors over the zoo, against the SVD in float64: ``python -m tests.support.accuracy``."""

import torch

from spectral_kernels.backends import choice

from ..backends.test_backends import DTYPES, decaying_zoo
from .buckets import bucket_of
from .tolerances import relative_error


def errors(backend: str, dtype: torch.dtype) -> tuple[float, float]:
    """Largest relative error of sigma_1 and of u v^T (over its largest element)."""
    weights, triples = decaying_zoo(dtype)
    bucket = bucket_of(weights, backend)
    bucket.iterate(40)
    worst_sigma = worst_product = 0.0
    for i, (sigma, product) in enumerate(triples):
        state = bucket.state
        found = torch.outer(state.rows(i)[0].double(), state.columns(i, state.v)[0].double())
        found = found / state.sigma[i].double()
        if bucket.plan.layouts[i].side == "left":
            found = found.T
        worst_sigma = max(worst_sigma, relative_error(state.sigma[i], sigma))
        worst_product = max(worst_product, relative_error(found, product))
    return worst_sigma, worst_product


def main() -> None:
    """Print a Markdown table."""
    print(f"{len(decaying_zoo(torch.float32)[0])} shapes from 1 x 1 to 1024 x 4096\n")
    print("| backend | dtype of W | error of sigma_1 | error of u v^T |\n|---|---|---|---|")
    for name in choice.NAMES:
        if choice.unavailable(name) is not None:
            continue
        cpu = choice.native_module().cpu if name == "cpu" else None
        for level in cpu.levels() if cpu else [""]:
            if cpu:
                cpu.set_level(level)
            for dtype in DTYPES:
                sigma, product = errors(name, dtype)
                label = str(dtype).removeprefix("torch.")
                print(f"| {name} {level} | {label} | {sigma:.1e} | {product:.1e} |")


if __name__ == "__main__":
    main()
