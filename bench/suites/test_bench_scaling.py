"""Cost against the number of weights, and against the number of layers that share them."""

import pytest
import torch

from tests.support import cases

from ..support.baselines import CONTENDERS
from .compete import compete_on_shapes

LAYERS = 50  # of the nets of different sizes; those of different depths have 1e7 weights
NETS = {
    **{f"{w} in {LAYERS}": (float(w), LAYERS)
       for w in ("1e5", "3e5", "1e6", "3e6", "1e7", "3e7", "1e8", "3e8")},
    **{f"1e7 in {n}": (1e7, n) for n in (1, 2, 5, 10, 20, 50, 100, 200, 500)},
}  # fmt: skip
NAMES = ("cpu", "autograd_loop", "inplace_loop", "compiled_loop")
PARAMETERS = [
    (case, device, threads, "float32", name)
    for case in NETS
    for device, threads in (("cpu", 1), ("cpu", 2), ("cuda", None))
    for name in (*NAMES, "floor")
    if name == "floor" or device in CONTENDERS[name].devices
]


@pytest.fixture
def with_threads():
    """Yield torch.set_num_threads, and restore the number afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("case", "device", "threads", "dtype", "contender"), PARAMETERS)
def test_scaling(case, device, threads, dtype, contender, compete, with_threads):
    if threads is not None:
        with_threads(threads)
    compete_on_shapes(compete, "scaling", cases.equal(*NETS[case]), dtype, CONTENDERS)
