"""The operators that graphs of torch.compile hold: schemas, fakes, derivatives, refusals."""

import pytest
import torch
import torch._dynamo
from torch import nn

from spectral_kernels import SpectralRegularizer
from spectral_kernels.engine import compiled

pytestmark = pytest.mark.usefixtures("seeded", "compiled_once")


def arguments(r=1, strength=None, dtype=torch.float32, requires_grad=False, backend="auto"):
    """The arguments that a graph passes, after a step of a regularizer; and the regularizer."""
    layers = nn.Linear(12, 20), nn.LayerNorm(20), nn.ReLU(), nn.Linear(20, 5)
    model = nn.Sequential(*layers).to(dtype)
    reg = SpectralRegularizer(model, 0.1, n_vectors=r, backend=backend)
    reg.penalty()
    ((bucket, weights),) = reg._buckets.with_tensors()
    weights = [w.detach().clone().requires_grad_(requires_grad) for w in weights]
    state = bucket.state
    where = reg._buckets.number, 0
    strength = None if strength is None else torch.tensor(strength, dtype=dtype)
    return reg, weights, state, strength, where


CHECKS = [{"r": 1}, {"r": 4}, {"strength": 0.3}, {"dtype": torch.float64}, {"backend": "reference"},
          {"requires_grad": True}]  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("options", CHECKS, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "power_iteration",
        "settle",
        "mark",
        "evaluate",
        "penalty",
        "penalty_backward",
    ],
)
def test_operators_do_what_their_schemas_say(name, options):
    reg, weights, state, strength, where = arguments(**options)
    copies = [x.clone() for x in (state.v, state.v_next, state.s, state.scalars)]
    v, v_next, s, scalars = copies
    upstream = torch.tensor(0.7, dtype=scalars.dtype)
    wanted = [i != 1 for i in range(len(weights))]
    if name == "penalty_backward":  # no derivative: compiled graphs have no second one
        weights = [w.detach() for w in weights]
    found = torch.cat((v, s, scalars, v_next))
    calls = {
        "settle": [(weights, found, torch.tensor(False), *where)],
        "mark": [(upstream, where[0])],
        "power_iteration": [(weights, *copies, strength, *where, n) for n in (1, 2)],
        "evaluate": [(weights, v_next, scalars, strength, *where)],
        "penalty": [(weights, torch.tensor(2.0).to(v), v, s, scalars, *where)],
        "penalty_backward": [(weights, v, s, scalars, upstream, wanted, *where)],
    }
    op = getattr(torch.ops.spectral_kernels, name).default
    with torch._dynamo.config.patch(error_on_recompile=False):
        for call in calls[name]:
            torch.library.opcheck(op, call)
    assert reg.names


def test_operators_are_those_of_the_file():
    checked = {"power_iteration", "settle", "mark", "evaluate", "penalty", "penalty_backward"}
    registered = {name.partition("::")[2].partition(".")[0]
                  for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("spectral_kernels::")}  # fmt: skip
    assert registered == checked
    for name in checked:
        assert callable(getattr(compiled, name))


def test_an_operator_refuses_other_weights_than_the_bucket_is_made_for():
    reg, weights, state, strength, where = arguments()
    held = [x.clone() for x in (state.v, state.v_next, state.s, state.scalars)]
    weights[0] = weights[0].mT.contiguous()
    with pytest.raises(RuntimeError, match="another device, dtype, shape or layout"):
        compiled.power_iteration(
            weights, state.v, state.v_next, state.s, state.scalars, strength, *where, 1
        )
    now = state.v, state.v_next, state.s, state.scalars
    for before, after in zip(held, now, strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert reg.names
