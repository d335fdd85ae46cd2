"""The C++ kernels where memory is short, and on threads with a small stack."""

import sys

import pytest

from spectral_kernels.backends import choice
from tests import ROOT
from tests.conftest import LEVELS
from tests.support import processes

pytestmark = [
    pytest.mark.takes_seconds,
    pytest.mark.skipif(choice.unavailable("cpu") is not None, reason="no compiled module"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

# Two equal models, the second of which is never short of memory. 16 vectors of N numbers are 13 MB.
SETUP = """
import resource, sys, torch
from torch import nn
from spectral_kernels import SpectralAdamW, SpectralRegularizer

N = 200_000
way, dtype, threads = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)

def made():
    torch.manual_seed(0)
    if "gathered" in way:
        model = nn.ConvTranspose1d(100, 2, N // 100, bias=False)
    else:
        model = nn.Linear(N, 2, bias=False)
    weight, options = model.to(dtype).weight, {"n_vectors": 16, "warmup": 0, "backend": "cpu"}
    weight.grad = torch.full_like(weight, 1e-3)
    if "update" in way:
        penalty = SpectralAdamW(model, 1e-3, **options)
        step = penalty.step
    else:
        penalty = SpectralRegularizer(model, **options)
        step = penalty.accumulate_grad_
    if "first" in way:
        penalty._buckets.bound()
    else:
        step()
    return weight, penalty, step

def set_limit(n_megabytes):
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limit = most if n_megabytes is None else used + n_megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))

def check_equal():
    own, other = ([x.clone() for x in (w.detach(), w.grad, penalty.singular_values)]
                  for w, penalty, _ in (limited, unlimited))
    assert all(map(torch.equal, own, other))
    assert all(x.isfinite().all() for x in own)

limited, unlimited = made(), made()
step = limited[2]
set_limit(5)
"""


def run(code, *arguments):
    # malloc has to ask the system for whatever is not small.
    variables = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "OMP_WAIT_POLICY": "PASSIVE"}
    result = processes.run(SETUP + code, *arguments, **variables)
    assert result.returncode == 0, (result.returncode, result.stdout, result.stderr)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [("accumulate", "float32"), ("update", "float32"), ("accumulate", "float16"),
     ("accumulate, gathered", "float32")],
)  # fmt: skip
def test_vectors_of_a_weight_are_not_copied(way, dtype):
    """Rows that lie in pieces are gathered, four at a time: 3 MB."""
    run("step(); set_limit(None); unlimited[2](); check_equal()", way, dtype, 2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("way", ["accumulate", "accumulate, first", "update"])
def test_a_lack_of_memory_is_an_error_after_which_everything_is_as_before(way, threads):
    """For bfloat16 a thread reorders the vectors."""
    code = """
try:
    step()
except MemoryError as error:
    assert "no memory for" in str(error) and "bytes of scratch" in str(error), error
else:
    raise AssertionError("no error")
set_limit(None)
if "first" not in way:
    check_equal()
for _ in range(2):
    step()
    unlimited[2]()
    check_equal()
"""
    run(code, way, "bfloat16", threads)


SMALL_STACK = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
from spectral_kernels import SpectralAdamW
from spectral_kernels.backends import choice
from spectral_kernels.tables.schema import N_VECTORS
from tests.support.buckets import bucket_of, gradients, named_weights
torch.set_num_threads(2)
cpu = choice.native_module().cpu
cpu.set_level(sys.argv[1])
for dtype in torch.float32, torch.float64, torch.bfloat16, torch.float16:
    for r in N_VECTORS:
        print(dtype, r, flush=True)
        weights = [torch.randn(70, 150).to(dtype) for _ in range(40)]
        bucket = bucket_of([*weights, torch.randn(150).to(dtype)], "cpu", r=r)
        plan, state, kernels = bucket.plan, bucket.state, bucket.backend
        gram = torch.empty(len(plan.matrices) * r * r, dtype=torch.float64)
        parameters = [(name, torch.nn.Parameter(x)) for name, x in named_weights(plan.tensors)]
        optimizer = SpectralAdamW(parameters, 1e-3, n_vectors=r, backend="cpu")
        for _ in range(4):
            bucket.iterate(1)
            kernels.transposed(plan, state)
            kernels.collect(plan, state, torch.empty_like(state.v), gram)
            gradients(bucket)
            for _, p in parameters:
                p.grad = torch.zeros_like(p)
            optimizer.step()
print("done")
"""


@pytest.mark.parametrize("level", LEVELS)
def test_the_smallest_stack_that_openmp_gives_to_a_thread_is_enough(level):
    if level not in choice.native_module().cpu.levels():
        pytest.skip(f"this processor or build has no instruction-set level {level!r}")
    result = processes.run(SMALL_STACK, level, OMP_STACKSIZE="16k", OMP_WAIT_POLICY="PASSIVE")
    assert result.returncode == 0, (result.returncode, result.stdout, result.stderr)
    assert result.stdout.endswith("done\n")
    assert "libgomp" not in result.stderr, "the stack is not what was asked for"
