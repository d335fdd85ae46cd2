"""The Triton kernels compiled for GPUs that are not here: no spills, wide loads, programs that fit.

Of the exponent, the scale and what a step may lack there is one compilation for all.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("triton interprets here", allow_module_level=True)

from spectral_kernels.backends.triton import precompile  # noqa: E402

from ..support.triton_compiled import (  # noqa: E402
    CAPABILITIES,
    compiled,
    core,
    largest,
    operators,
    partials,
    rare,
    several_vectors,
    usual,
)

pytestmark = pytest.mark.takes_seconds
# Bytes, of registers for which a compiler finds no room. On an H200 such kernels were faster than
# those with room for all: more programs run at once. Triton 3.7 runs out of them in five more.
# rank_one of 16-bit gradients lacks two on an A100, where three programs run.
# waves needs some for sines of float64 numbers.
STACK = {"update": 256, "gram_matvec_long": 160, "gram_matvec large": 128, "rank_one": 8,
         "waves": 96}  # fmt: skip
IN_3_7 = 16 if triton.__version__.startswith("3.7.") else 0
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Nothing shows the compiler here that vectors are aligned.
NARROW = ("ritz", "subspace_grams", "collect", "waves")

# Everything for one architecture; for the others what decides about their registers: the largest
# kernels of a usual step in both widths, and those with the most vectors.
MAIN = 90
USUAL = [(MAIN, d) for dtype in DTYPES for d in usual(dtype)] + [
    (sm, d)
    for sm in CAPABILITIES
    if sm != MAIN
    for dtype in (torch.float32, torch.bfloat16)
    for d in core(dtype)
    if d.kernel != "rank_one" or dict(d.constants)["accumulate"]
]
OTHERS = [
    (MAIN, d)
    for dtype in DTYPES
    for d in (*rare(dtype), *several_vectors(dtype), *partials(dtype), *operators(dtype))
] + [(sm, d) for sm in CAPABILITIES if sm != MAIN for d in largest()]


@pytest.fixture(scope="module")
def compilation():
    """Every case on its way through the compiler, on all processors."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield {(sm, d): pool.submit(compiled, d, sm) for sm, d in dict.fromkeys(USUAL + OTHERS)}


@pytest.mark.parametrize(("capability", "configuration"), dict.fromkeys(USUAL + OTHERS), ids=str)
def test_nothing_spills_and_aligned_rows_are_read_128_bits_at_a_time(
    compilation, capability, configuration
):
    found = compilation[capability, configuration].result()
    large = " large" if dict(configuration.constants).get("large") else ""
    assert found.stack <= max(STACK.get(configuration.kernel + large, 0), IN_3_7)
    assert found.registers <= 255
    assert found.programs(capability) >= 1
    if configuration.kernel not in NARROW and dict(configuration.constants).get("accumulate", True):
        assert found.loads(128) > 0


@pytest.mark.parametrize(("capability", "configuration"), USUAL, ids=str)
def test_two_programs_of_a_usual_step_fit_into_a_multiprocessor(
    compilation, capability, configuration
):
    assert compilation[capability, configuration].result().programs(capability) >= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_on_their_way_while_others_are_multiplied(compilation, dtype):
    chosen = next(d for d in usual(dtype) if d.kernel == "gram_matvec")
    assert compilation[90, chosen].result().sass.count("LDGSTS") >= 6  # a pair per width


def test_rows_that_are_not_aligned_are_read_one_after_the_other():
    """Neighbouring threads have neighbouring columns: the last dimension varies fastest."""
    chosen = next(d for d in usual(torch.float32) if d.kernel == "rank_one")
    made = precompile.compile_for(90, chosen)
    layouts = [line for line in made.asm["ttgir"].splitlines() if "#ttg.blocked<{" in line]
    two_dimensional = [x for x in layouts if "order = [1, 0]" in x or "order = [0, 1]" in x]
    # Rows in pieces are the only ones whose columns the compiler cannot follow.
    assert sum("order = [1, 0]" in x for x in two_dimensional) >= 2
    assert sum("order = [0, 1]" in x for x in two_dimensional) <= 1


def test_a_capability_and_a_dtype_have_few_compilations():
    """The number for a regularizer and SpectralAdamW, whatever the exponent and the scales."""
    for dtype in DTYPES:
        assert len(set(precompile.core(dtype))) == (6 if dtype.itemsize == 2 else 5)


def test_compiling_ahead_leaves_what_a_launch_finds(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(precompile, "core", lambda dtype, r=1: precompile_one(dtype))
    ((what, _, error),) = precompile.compile_core(90, [torch.float32], processes=1)
    assert (what.split()[0], error) == ("rank_one", None)
    before = {path for path in tmp_path.rglob("*.cubin")}
    assert len(before) == 1
    (again,) = precompile.compile_core(90, [torch.float32], processes=1)
    assert again[2] is None
    assert {path for path in tmp_path.rglob("*.cubin")} == before


def precompile_one(dtype):
    """The cheapest kernel of the core set."""
    return [precompile.describe("rank_one", dtype, grad_type=dtype, finish=True, with_t=True,
                                tolerance=0.0, gradient=False, accumulate=False)]  # fmt: skip
