"""penalty() in transforms of torch.func, as in meta learning, and in forward-mode autograd."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

from spectral_kernels import SpectralRegularizer
from spectral_kernels.backends import choice

from ..support.models import close


class WithPenalty(nn.Module):
    """A network whose output comes with the penalty of the parameters that it holds."""

    def __init__(self, backend="auto", **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)).double()
        # Without a warm-up of matrices whose elements are other ones at once.
        options = {"backend": backend, "warmup": 0, **options}
        self.reg = SpectralRegularizer(self.net, 0.5, **options)

    def forward(self, x):
        return self.net(x).square().mean() + self.reg.penalty()


def parameters_of(model):
    """Parameters other than those in the modules."""
    torch.manual_seed(1)
    return {n: p.detach() + torch.randn_like(p) / 5 for n, p in model.named_parameters()}


def expected_of(model, parameters, x):
    """Loss and gradient of a twin of ``model`` that owns the parameters, by backward()."""
    twin = WithPenalty(model.reg._buckets.settings.backend)
    twin.reg.load_state_dict(model.reg.state_dict())
    twin.load_state_dict(parameters)
    loss = twin(x)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in twin.named_parameters()}


@pytest.fixture(params=["reference", "cpu"])
def case(request):
    """A model with a penalty that has been used, other parameters, and inputs."""
    if (reason := choice.unavailable(request.param)) is not None:
        pytest.skip(reason)
    model = WithPenalty(request.param)
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    _ = model.reg.sigma  # builds the buckets, on the module's own parameters
    return model, parameters_of(model), x


def test_grad_is_that_of_backward_for_the_parameters_of_functional_call(case):
    model, parameters, x = case
    _, expected = expected_of(model, parameters, x)
    own = model.reg.sigma
    found = grad(lambda p: functional_call(model, p, (x,)))(parameters)
    close(list(found.values()), list(expected.values()), rtol=1e-9, atol=1e-12)
    assert not torch.equal(model.reg.sigma, own)  # of the parameters in the last step


def test_jvp_is_the_product_with_the_gradient(case):
    model, parameters, x = case
    loss, gradient = expected_of(model, parameters, x)
    direction = {n: torch.randn_like(p) for n, p in parameters.items()}
    expected = sum((gradient[n] * direction[n]).sum() for n in parameters)
    found = jvp(lambda p: functional_call(model, p, (x,)), (parameters,), (direction,))
    close(found, (loss, expected), rtol=1e-9)


def test_forward_mode_autograd_is_the_product_with_the_gradient(case):
    model, parameters, x = case
    loss, gradient = expected_of(model, parameters, x)
    with forward_ad.dual_level():
        dual = {n: forward_ad.make_dual(p, torch.ones_like(p)) for n, p in parameters.items()}
        found = forward_ad.unpack_dual(functional_call(model, dual, (x,)))
    close(found, (loss, sum(g.sum() for g in gradient.values())), rtol=1e-9)


def test_hessians_of_every_mode_agree(case):
    model, parameters, x = case
    start = model.reg.state_dict()

    def loss(weight):
        return functional_call(model, {**parameters, "net.0.weight": weight}, (x,))

    found = []
    for second in (hessian, lambda f: jacrev(jacrev(f)),
                   lambda f: lambda w: torch.autograd.functional.hessian(f, w)):  # fmt: skip
        model.reg.load_state_dict(start)
        found.append(second(loss)(parameters["net.0.weight"]))
    close(found[0], found[2], rtol=1e-9, atol=1e-12)
    close(found[1], found[2], rtol=1e-9, atol=1e-12)


def test_a_gradient_step_in_the_loss_is_differentiated(case):
    """Meta learning: the gradient of the loss after a step is that of autograd."""
    model, parameters, x = case
    start = model.reg.state_dict()

    def loss(p):
        return functional_call(model, p, (x,))

    def stepped(p, gradient):
        return {n: p[n] - 0.1 * g for n, g in zip(p, gradient, strict=True)}

    found = grad(lambda p: loss(stepped(p, grad(loss)(p).values())))(parameters)
    model.reg.load_state_dict(start)
    own = {n: p.clone().requires_grad_() for n, p in parameters.items()}
    inner = torch.autograd.grad(loss(own), list(own.values()), create_graph=True)
    loss(stepped(own, inner)).backward()
    close(list(found.values()), [p.grad for p in own.values()], rtol=1e-9, atol=1e-12)


def test_per_sample_gradients_each_contain_the_penalty(case):
    model, parameters, x = case
    start = model.reg.state_dict()
    found = vmap(grad(lambda p, row: functional_call(model, p, (row,))), (None, 0))(parameters, x)
    for i, row in enumerate(x):
        model.reg.load_state_dict(start)
        _, expected = expected_of(model, parameters, row)
        close([g[i] for g in found.values()], list(expected.values()), rtol=1e-9, atol=1e-12)


def test_a_transform_of_something_else_leaves_the_gradient_of_the_parameters(case):
    model, _, _ = case
    start = model.reg.state_dict()
    scaled = grad(lambda c: c**2 * model.reg.penalty())(torch.tensor(3.0, dtype=torch.float64))
    scaled.backward()
    state = model.reg._buckets.buckets[0].state
    close([scaled.detach()], [6 * torch.dot(state.strength, state.raw_penalty)], rtol=1e-9)
    found = [p.grad for p in model.net.parameters()]
    model.zero_grad()
    model.reg.load_state_dict(start)
    (6 * model.reg.penalty()).backward()
    close(found, [p.grad for p in model.net.parameters()], rtol=1e-9)


def test_a_regularizer_may_be_built_in_the_transform():
    model = nn.Linear(5, 7)
    given = {n: p.detach() for n, p in model.named_parameters()}

    def loss(p):
        return SpectralRegularizer(list(p.items()), 1.0, target={"*": "initial"}).penalty()

    reg = SpectralRegularizer(model, 1.0, target="initial")
    reg.penalty().backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    close(list(grad(loss)(given).values()), list(expected.values()), atol=1e-4)
    direction = {n: torch.ones_like(p) for n, p in given.items()}
    _, found = jvp(loss, (given,), (direction,))
    # The penalty begins at zero: both are rounding.
    close([found], [sum(g.sum() for g in expected.values())], atol=1e-5)


def test_without_gradients_the_vectors_do_not_change(case):
    model, parameters, x = case
    start = model.reg.state_dict()["vectors"]
    with torch.no_grad():
        jvp(lambda p: functional_call(model, p, (x,)), (parameters,), (parameters,))
    close(list(model.reg.state_dict()["vectors"].values()), list(start.values()), rtol=0, atol=0)


# ----------------------------------------------------------------------------------- refusals


def test_vmap_over_parameters_is_refused_before_anything_changes(case):
    model, _, x = case
    start = model.reg.state_dict()["vectors"]
    stacked, _ = stack_module_state([model, model])
    with pytest.raises(RuntimeError, match=r"'0.weight' is batched by torch.func.vmap; call"):
        vmap(grad(lambda p: functional_call(model, p, (x,))))(stacked)
    close(list(model.reg.state_dict()["vectors"].values()), list(start.values()), rtol=0, atol=0)


def test_what_the_refusal_of_vmap_names_works():
    weights = torch.stack([torch.randn(4, 3), torch.randn(4, 3)]).requires_grad_()
    reg = SpectralRegularizer([("a.weight", weights)], stacked=["a.weight"], warmup=200)
    close([reg.sigma], [torch.linalg.matrix_norm(weights.detach(), 2)], rtol=1e-4)


def test_the_other_ways_are_refused_in_a_transform(case):
    model, parameters, _ = case

    def with_accumulate(p):
        model.reg.accumulate_grad_()
        return p["net.0.weight"].sum()

    with pytest.raises(RuntimeError, match=r"accumulate_grad_\(\) cannot run in a transform"):
        grad(with_accumulate)(parameters)
    assert all(p.grad is None for p in model.parameters())
    model.forward = lambda: model.reg.sigma.sum()
    with pytest.raises(
        RuntimeError, match=r"parameter '0.weight': expected .*, got one of a transform"
    ):
        grad(lambda p: functional_call(model, p, ()))(parameters)


def test_a_strength_of_a_transform_is_refused(case):
    model, _, _ = case

    def loss(strength):
        model.reg.strength = strength
        return model.reg.penalty()

    with pytest.raises(
        RuntimeError, match=r"strength: expected .*, got one of a transform.*multiply"
    ):
        grad(loss)(torch.tensor(0.1))
    assert model.reg.strength == 0.5


@pytest.mark.takes_seconds
def test_a_compiled_transform_is_refused():
    model = WithPenalty()
    with pytest.raises(Exception, match=r"compiled penalty\(\) cannot run in a transform"):
        torch.compile(grad(lambda p: functional_call(model, p, (torch.ones(2, 6).double(),))))(
            parameters_of(model)
        )
