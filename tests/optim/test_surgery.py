"""Parameters, gradients and state that are changed between two steps: followed, or refused by name.

What torch.optim does with a change is right, where it does not raise; a change that is refused has
changed nothing.
"""

import copy
from collections import defaultdict

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD

KINDS = {
    "adamw": (torch.optim.AdamW, SpectralAdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, SpectralSGD, {"lr": 0.1, "momentum": 0.9}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"table": nn.Embedding(50, 8), "a": nn.Linear(8, 6), "b": nn.Linear(6, 8)})


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (
            torch.randn(p.shape, generator=generator, device="cpu").to(p)
            if p.requires_grad
            else p.grad
        )


def stepped(kind, ours=True, backend="auto", n=3, **changes):
    """A model and its optimizer after ``n`` steps, ours with nothing to add to the gradients."""
    model, (theirs, mine, options) = net(), KINDS[kind]
    options = {**options, **changes}
    if ours:
        optimizer = mine(model, strength=0, backend=backend, **options)
    else:
        optimizer = theirs(model.parameters(), **options)
    for step in range(n):
        give_gradients(model, step)
        optimizer.step()
    return model, optimizer


def everything(model, optimizer):
    """Copies of all weights, gradients and states."""
    tensors = [t for p in model.parameters() for t in (p.detach(), p.grad) if t is not None]
    tensors += [t for s in optimizer.state.values() for t in s.values() if t is not None]
    return [t.clone() for t in tensors]


# ------------------------------------------------------------------------------------- followed


@backends
@every_kind
@pytest.mark.parametrize("strength", [0, 0.1])
def test_strides_of_dimensions_of_size_1_do_not_count(kind, backend, strength):
    """As those of the gradient of a class token, a slice of an activation's."""
    theirs, mine, options = KINDS[kind]
    shapes = {"token": (1, 1, 8), "row.weight": (1, 8), "column.weight": (5, 1), "norm": (1, 4, 1)}
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        named = [(name, nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]
        if ours:
            optimizer = mine(named, strength=strength, backend=backend, **options)
        else:
            optimizer = theirs([p for _, p in named], **options)
            if strength:
                SpectralRegularizer(named, strength, backend=backend).attach(optimizer)
        for step in range(3):
            for _, p in named:
                strides = [31 if size == 1 else old
                           for size, old in zip(p.shape, p.stride(), strict=True)]  # fmt: skip
                p.grad = torch.randn(p.numel()).as_strided(p.shape, strides if step else p.stride())
            optimizer.step()
        found.append([p.detach() for _, p in named])
    for own, truth in zip(*found, strict=True):
        torch.testing.assert_close(own, truth, rtol=1e-5, atol=1e-6)


def clear(model, optimizer):
    optimizer.state.clear()


def assign(model, optimizer):
    optimizer.state = defaultdict(dict)


def clear_one(model, optimizer):
    optimizer.state.pop(model["a"].weight)


def replace_moments(model, optimizer):
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if name in state:
                state[name] = state[name] * 0.25


def replace_step(model, optimizer):
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.tensor(1.0)


def replace_group(model, optimizer):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.01}


def leave_out(model, optimizer):
    """A replaced entry of param_groups without two of the parameters."""
    group = optimizer.param_groups[0]
    kept = [p for p in group["params"] if p is not model["a"].weight and p is not model["b"].bias]
    optimizer.param_groups[0] = {**group, "params": kept}


def reorder(model, optimizer):
    group = optimizer.param_groups[0]
    optimizer.param_groups[:] = [
        {**group, "params": group["params"][3:], "lr": 0.01},
        {**group, "params": group["params"][:3]},
    ]


def freeze_with_gradient(model, optimizer):
    """torch.optim steps what has a gradient, whether or not it requires one."""
    for p in (model["table"].weight, model["a"].bias):
        p.requires_grad_(False)
        p.grad = torch.ones_like(p)


def freeze_without_gradient(model, optimizer):
    for p in (model["table"].weight, model["a"].bias):
        p.requires_grad_(False)
        p.grad = None


def grow_a_table(model, optimizer):
    table = model["table"].weight
    table.data = torch.cat((table.data, torch.ones(30, 8)))
    optimizer.state.pop(table)


def shrink_a_table(model, optimizer):
    table = model["table"].weight
    table.data = table.data[:7].clone()
    optimizer.state.pop(table)


def grow_a_head(model, optimizer):
    head = model["b"]
    head.weight.data = torch.cat((head.weight.data, torch.ones(5, 6)))
    head.bias.data = torch.zeros(13)
    for p in (head.weight, head.bias):
        optimizer.state.pop(p)


def move_within_a_buffer(model, optimizer):
    buffer = torch.zeros(1000)
    table = model["table"].weight
    table.data = buffer[300:700].view(50, 8).copy_(table.data)


FOLLOWED = [
    clear, assign, clear_one, replace_moments, replace_step, replace_group, leave_out, reorder,
    freeze_with_gradient, freeze_without_gradient, grow_a_table, shrink_a_table, grow_a_head,
    move_within_a_buffer,
]  # fmt: skip


@every_kind
@backends
@pytest.mark.parametrize("change", FOLLOWED, ids=lambda f: f.__name__)
def test_a_change_is_followed_as_torch_follows_it(change, backend, kind):
    found = []
    for ours in (True, False):
        model, optimizer = stepped(kind, ours, backend)
        model.zero_grad()
        change(model, optimizer)
        for step in range(3, 6):
            give_gradients(model, step)
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@every_kind
def test_another_dtype_is_followed(kind):
    model, optimizer = stepped(kind)
    model["table"].to(torch.float64)
    model["a"].to(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    give_gradients(model, 7)
    optimizer.step()
    for p, was in zip(model.parameters(), before, strict=True):
        assert 0 < (p - was).abs().max() < 2
        state = optimizer.state[p]
        assert all(state[k].dtype == p.dtype for k in ("exp_avg", "momentum_buffer") if k in state)


def test_momentum_that_is_switched_on_later_begins_as_torch_begins():
    found = []
    for ours in (True, False):
        model, optimizer = stepped("sgd", ours, momentum=0)
        optimizer.param_groups[0]["momentum"] = 0.9
        for step in range(3, 6):
            give_gradients(model, step)
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------- refused


def freed(p):
    p.data = torch.randn(p.numel() + 5)[5:].view(p.shape)
    p.data.untyped_storage().resize_(0)


def first(state):
    return state.get("exp_avg", state.get("momentum_buffer"))


def set_first(state, value):
    state["exp_avg" if "exp_avg" in state else "momentum_buffer"] = value


REFUSED = {
    "smaller, with its moments": (
        "table.weight", lambda m, o: setattr(m["table"].weight, "data", torch.randn(7, 8))),
    "larger, with its moments": (
        "b.weight", lambda m, o: setattr(m["b"].weight, "data", torch.randn(90, 6))),
    "a moment of another shape": (
        "table.weight", lambda m, o: set_first(o.state[m["table"].weight], torch.zeros(8))),
    "a moment that is no tensor": (
        "a.weight", lambda m, o: set_first(o.state[m["a"].weight], 0.5)),
    "memory that was freed": ("table.weight", lambda m, o: freed(m["table"].weight)),
    "memory of a weight that was freed": ("a.weight", lambda m, o: freed(m["a"].weight)),
    "memory of a moment that was freed": (
        "a.bias", lambda m, o: first(o.state[m["a"].bias]).untyped_storage().resize_(0)),
    "two parameters on one memory": (
        "b.weight", lambda m, o: setattr(m["b"].weight, "data", m["a"].weight.data.view(8, 6))),
    "a parameter inside of another": (
        "a.bias", lambda m, o: setattr(m["a"].bias, "data", m["table"].weight.data[3, :6])),
    "a moment that is the weight": (
        "a.weight", lambda m, o: set_first(o.state[m["a"].weight], m["a"].weight.detach())),
    "a gradient that is a weight": (
        "a.bias", lambda m, o: setattr(m["a"].bias, "grad", m["b"].bias.data[:6])),
    "a negative bit": (
        "table.weight", lambda m, o: setattr(m["table"].weight, "data",
                                             torch._neg_view(torch.randn(50, 8)))),
    "a gradient with a negative bit": (
        "b.bias", lambda m, o: setattr(m["b"].bias, "grad", torch._neg_view(torch.randn(8)))),
    "a gap between elements": (
        "table.weight", lambda m, o: setattr(m["table"].weight, "data",
                                             torch.randn(50, 9)[:, :8])),
}  # fmt: skip


def contents(model, optimizer):
    """Copies of weights, gradients, moments and step counts, but of those without memory."""
    tensors = [t for p in model.parameters() for t in (p.data, p.grad) if t is not None]
    tensors += [t for state in optimizer.state.values() for key, t in state.items()
                if isinstance(t, torch.Tensor) and not key.startswith("spectral")]  # fmt: skip
    return [t.clone() for t in tensors if t.untyped_storage().nbytes()]


@every_kind
@backends
@pytest.mark.parametrize("case", REFUSED)
def test_a_change_that_cannot_be_followed_is_refused_by_name(case, backend, kind):
    name, change = REFUSED[case]
    model, optimizer = stepped(kind, backend=backend)
    give_gradients(model, 5)
    change(model, optimizer)
    for p in model.parameters():
        if p.grad is not None and p.grad.shape != p.shape:
            p.grad = torch.randn(p.shape)
    before = contents(model, optimizer)
    for _ in range(2):  # again as long as it is so
        with pytest.raises(ValueError, match=name):
            optimizer.step()
        now = contents(model, optimizer)
        assert all(map(torch.equal, before, now))


@every_kind
def test_a_state_with_a_part_missing_is_refused(kind):
    model, optimizer = stepped(kind)
    state = optimizer.state[model["a"].weight]
    if kind == "sgd":
        pytest.skip("SGD's momentum is all of its state; without it torch.optim begins anew")
    del state["exp_avg"]
    give_gradients(model, 5)
    with pytest.raises(ValueError, match=r"'a\.weight': expected .*, got a state without exp_avg"):
        optimizer.step()


@every_kind
def test_a_parameter_that_is_replaced_in_its_module_is_refused(kind):
    for shape in ((6, 8), (9, 8)):
        model, optimizer = stepped(kind)
        model["a"].weight = nn.Parameter(torch.randn(shape))
        give_gradients(model, 5)
        with pytest.raises(RuntimeError, match=r"'a\.weight' was replaced"):
            optimizer.step()


# --------------------------------------------------------------------------------- checkpoints


BAD_STATES = {
    "another vocabulary": ("exp_avg", lambda t: t[:3]),
    "a moment that is not finite": ("exp_avg_sq", lambda t: t.log()),
    "a second moment below 0": ("exp_avg_sq", lambda t: -1 - t),
    "a moment that is no tensor": ("exp_avg", lambda t: t.tolist()),
    "a step that is not a number": ("step", lambda t: float("nan")),
    "a step below 0": ("step", lambda t: torch.tensor(-1.0)),
    "a step of a wrong type": ("step", lambda t: "3"),
    "vectors of a wrong shape": ("spectral_vectors", lambda t: t[:, 1:]),
    "vectors that are not finite": ("spectral_vectors", lambda t: t / 0),
    "an initial target below 0": ("spectral_initial", lambda t: torch.tensor(-1.0)),
    "an initial target that is not a number": ("spectral_initial", lambda t: torch.tensor("nan")
                                               if isinstance(t, str) else t * float("nan")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_dict_that_is_refused_changes_nothing(case):
    key, spoil = BAD_STATES[case]
    model, optimizer = stepped("adamw", target="initial")
    saved = copy.deepcopy(optimizer.state_dict())
    place = next(i for i, state in saved["state"].items() if key in state)
    saved["state"][place][key] = spoil(saved["state"][place][key])
    saved["param_groups"][0]["lr"] = 7.0
    for state in saved["state"].values():
        if state is not saved["state"][place]:
            state["exp_avg"].fill_(-5)
    before, vectors = everything(model, optimizer), optimizer.regularizer.state_dict()
    with pytest.raises((TypeError, ValueError), match=key.removeprefix("spectral_")[:6]):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(map(torch.equal, before, everything(model, optimizer)))
    now = optimizer.regularizer.state_dict()
    torch.testing.assert_close(now["initial"], vectors["initial"], rtol=0, atol=0)
    assert all(torch.equal(now["vectors"][n], v) for n, v in vectors["vectors"].items())
    give_gradients(model, 5)
    twin, other = stepped("adamw", target="initial")
    give_gradients(twin, 5)
    for o in (optimizer, other):
        o.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@every_kind
def test_loaded_states_are_copies(kind):
    model, optimizer = stepped(kind)
    twin, other = stepped(kind)
    other.load_state_dict(optimizer.state_dict())
    before = everything(twin, other)
    for step in range(5, 8):
        give_gradients(model, step)
        optimizer.step()
    assert all(map(torch.equal, before, everything(twin, other)))


# -------------------------------------------------------------------- the regularizer by itself


def test_a_weight_that_has_changed_its_shape_before_backward_is_refused():
    model = nn.Linear(8, 200, bias=False)
    loss = SpectralRegularizer(model).penalty()
    model.weight.data = model.weight.data[:4].clone()
    with pytest.raises(RuntimeError, match="'weight' has another shape"):
        loss.backward()


@backends
def test_memory_of_a_weight_that_was_freed_is_refused(backend):
    flat = torch.randn(100 + 64)
    model = nn.Linear(8, 8, bias=False)
    model.weight.data = flat[100:].view(8, 8)
    reg = SpectralRegularizer(model, backend=backend)
    reg.accumulate_grad_()
    before = model.weight.grad.clone()
    flat.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"'weight': expected .*, got one with no memory"):
        reg.accumulate_grad_()
    assert torch.equal(model.weight.grad, before)


@backends
def test_gradients_that_share_memory_are_refused(backend):
    model = net()
    reg = SpectralRegularizer(model, backend=backend)
    shared = torch.randn(48)
    model["a"].weight.grad, model["b"].weight.grad = shared.view(6, 8), shared.view(8, 6)
    before = shared.clone()
    with pytest.raises(ValueError, match=r"'a\.weight' and .*'b\.weight' share memory"):
        reg.accumulate_grad_()
    assert torch.equal(shared, before)


def test_an_edit_of_a_gradient_that_a_graph_has_saved_is_noticed():
    model = nn.Linear(4, 4, bias=False)
    reg, x = SpectralRegularizer(model, strength=10.0), torch.randn(3, 4)
    (found,) = torch.autograd.grad((model(x) ** 3).sum(), model.weight, create_graph=True)
    model.weight.grad = found
    loss = (model.weight.grad**2).sum()
    reg.accumulate_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
