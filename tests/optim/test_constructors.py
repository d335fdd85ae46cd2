"""What the optimizers are built from: torch's keywords, parameters and names, and their errors."""

import collections
import io
import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD, spectral_norms
from spectral_kernels.diagnostics import spectra

COUNTERPARTS = {SpectralAdamW: torch.optim.AdamW, SpectralSGD: torch.optim.SGD}
FREE = ("foreach", "fused", "capturable")
REFUSED = ("amsgrad", "maximize", "differentiable")
both = pytest.mark.parametrize("kind", COUNTERPARTS, ids=lambda kind: kind.__name__)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def train(model, *optimizers, steps=3):
    """Take steps with the optimizers, which hold the model's parameters together."""
    one = model[0].weight
    for step in range(steps):
        model.zero_grad()
        model(torch.full((4, 5), 1.0 + step).to(one)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    return model


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def flags_of(kind, names):
    return [name for name in names if name in COUNTERPARTS[kind](net().parameters()).defaults]


# ------------------------------------------------------------------------------ torch's keywords


@both
def test_torchs_harmless_keywords_change_nothing(kind):
    model = net()
    plain = train(model, kind(model, lr=0.1, strength=0.1))
    given = [(name, value) for name in flags_of(kind, FREE) for value in (False, True)]
    given += [(name, False) for name in flags_of(kind, REFUSED)]
    assert len(given) == {SpectralAdamW: 9, SpectralSGD: 6}[kind]
    for name, value in given:
        model = net()
        optimizer = kind(model, lr=0.1, strength=0.1, **{name: value})
        assert same(train(model, optimizer), plain)
        assert optimizer.param_groups[0][name] is value


@both
def test_keywords_that_would_change_the_step_are_refused(kind):
    for name in flags_of(kind, REFUSED):
        with pytest.raises(ValueError, match=f"^{name}: expected False, got True"):
            kind(net(), **{name: True})
        with pytest.raises(TypeError, match=f"^{name}: expected True or False, got 'false'"):
            kind(net(), **{name: "false"})


@both
def test_groups_have_the_keys_and_values_of_torchs(kind):
    options = {"lr": 0.1, "fused": True, "foreach": False, "weight_decay": 0.2}
    theirs, ours = (
        cls(net().named_parameters(), **options).state_dict()["param_groups"]
        for cls in (COUNTERPARTS[kind], kind)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: SpectralAdamW(m, lr_=1), "SpectralAdamW: expected a known keyword, got 'lr_'"),
        (lambda m: SpectralAdamW(m, lr_=1), "did you mean 'lr'?"),
        (lambda m: SpectralAdamW(m, warmups=1), "did you mean 'warmup'?"),
        (lambda m: SpectralAdamW(m, fuse=True), "did you mean 'fused'?"),
        (lambda m: SpectralSGD(m, momentun=1), "SpectralSGD: expected a known keyword, got 'mome"),
        (lambda m: SpectralSGD(m, amsgrad=False), "SpectralSGD: expected a known keyword, got 'am"),
        (lambda m: type("Mine", (SpectralSGD,), {})(m, lrr=1), "Mine: expected a known keyword"),
        (lambda m: SpectralRegularizer(m, strenght=1), "SpectralRegularizer: expected a known"),
        (lambda m: SpectralRegularizer(m, strenght=1), "did you mean 'strength'?"),
        (lambda m: SpectralRegularizer(m, zz=1), "got 'zz' (known are model, strength, exponent, "),
        (lambda m: spectral_norms(m, backends="cpu"), "spectral_norms: expected a known "),
        (lambda m: spectral_norms(m, biases=False), "a known keyword, got 'biases'"),
        (lambda m: spectra(m, includes="*"), "a known keyword, got 'includes' (did you mean "),
    ],
)  # fmt: skip
def test_an_unknown_keyword_is_told_with_the_nearest_name(call, says):
    with pytest.raises(TypeError) as caught:
        call(net())
    assert says in str(caught.value)


# ------------------------------------------------------------------------- torch's own test cases


@pytest.fixture
def cases():
    """Return a function: the inputs of torch's tests for a class, those with errors or others."""
    pytest.importorskip("expecttest", reason="torch's tests of optimizers need expecttest")
    common = pytest.importorskip("torch.testing._internal.common_optimizers")

    def of(kind, errors=False):
        (info,) = [i for i in common.optim_db if i.optim_cls is COUNTERPARTS[kind]]
        if errors:
            return info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
        found = info.optim_inputs_func(device="cpu", dtype=torch.float64)
        if kind is SpectralAdamW:  # torch has this case for GPUs alone
            wide = {"dtype": torch.float64}
            betas = torch.tensor([[[0.9]]], **wide), torch.tensor([[0.99]], **wide)
            kwargs = {"lr": torch.tensor(0.001, **wide), "betas": betas}
            found.append(common.OptimizerInput(params=None, kwargs=kwargs, desc="tensors"))
        return found

    return of


@pytest.mark.takes_seconds
@both
def test_at_strength_zero_torchs_cases_give_torchs_steps(kind, cases):
    n_equal = 0
    for case in cases(kind):
        if any(case.kwargs.get(name) for name in REFUSED):
            with pytest.raises(ValueError, match="expected False, got True"):
                kind(net(), strength=0, **case.kwargs)
            continue
        a, b = net(torch.float64), net(torch.float64)
        start = [p.detach().clone() for p in b.parameters()]
        train(a, COUNTERPARTS[kind](a.parameters(), **case.kwargs), steps=5)
        train(b, kind(b, strength=0, **case.kwargs), steps=5)
        for p, q, before in zip(a.parameters(), b.parameters(), start, strict=True):
            torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-14, msg=case.desc)
            assert not torch.equal(q, before)
        n_equal += 1
    assert n_equal >= 4


@pytest.mark.takes_seconds
@both
def test_what_torchs_cases_say_is_wrong_is_refused_in_the_same_way(kind, cases):
    n_refused = 0
    for case in cases(kind, errors=True):
        given = case.optimizer_error_input
        if given.kwargs.get("foreach"):
            continue  # of no effect here, with tensors too
        params = list(net().parameters()) if given.params is None else given.params
        holder = nn.Module()
        groups = [params] if isinstance(params, torch.Tensor) else params
        for item in itertools.chain(*(g["params"] if isinstance(g, dict) else [g] for g in groups)):
            p = item[1] if isinstance(item, tuple) else item
            if isinstance(p, nn.Parameter):
                holder.register_parameter(f"p{len(list(holder.parameters()))}", p)
        expected = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
        with expected(case.error_type):
            kind(params, model=holder, roles={"*": "matrix"}, **given.kwargs)
        n_refused += 1
    assert n_refused >= 7


@pytest.mark.parametrize("betas", [(0.9, torch.tensor(0.99)), (torch.tensor(0.9), 0.99)])
def test_betas_are_two_numbers_or_two_tensors(betas):
    with pytest.raises(
        ValueError, match=r"^betas: expected two numbers in \[0, 1\), or two tensors.*, got"
    ):
        SpectralAdamW(net(), betas=betas)


def test_betas_that_are_tensors_may_change_in_place():
    (a, b), beta = (net(), net()), torch.tensor(0.9)
    first = torch.optim.AdamW(a.parameters(), betas=(beta, torch.tensor(0.99)))
    second = SpectralAdamW(b, betas=(beta, torch.tensor(0.99)), strength=0)
    for value in (0.9, 0.5):
        beta.fill_(value)
        train(a, first), train(b, second)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# ------------------------------------------------------------------------- parameters and names


def test_parameters_without_names_need_the_module():
    model = net()
    for params in (iter([*model.parameters()]), [model[0].weight], [{"params": model[0].weight}]):
        with pytest.raises(TypeError, match=r"without names \(pass their module as model=") as e:
            SpectralAdamW(params)
        assert "tensor" not in str(e.value)
    other = train(model, SpectralAdamW(model, strength=0.1))
    model = net()
    assert same(train(model, SpectralAdamW(model.parameters(), model=model, strength=0.1)), other)


def test_parameters_of_the_module_that_are_not_given_are_left_out():
    """Two optimizers of one model, as of an actor and a critic."""
    model = net()
    halves = [SpectralAdamW(part.parameters(), model=model, strength=0.1)
              for part in (model[0], model[2])]  # fmt: skip
    assert [o.names for o in halves] == [["0.weight"], ["2.weight"]]
    other = net()
    train(model, *halves), train(other, SpectralAdamW(other, strength=0.1))
    assert same(model, other)
    with pytest.raises(
        ValueError, match=r"expected parameters as they are in model now .*, got none"
    ):
        SpectralAdamW(net().parameters(), model=model)


@pytest.fixture
def process_group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.takes_seconds
@pytest.mark.filterwarnings("ignore")
def test_wrappers_that_build_an_optimizer_from_its_class(process_group):
    from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward

    options = {"lr": 0.1, "strength": 0.1}
    other = net()
    train(other, SpectralAdamW(other, **options))
    model = net()
    zero = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=SpectralAdamW, model=model, **options
    )
    assert same(train(model, zero), other)
    model = net()
    _apply_optimizer_in_backward(
        SpectralAdamW, model.parameters(), {**options, "model": model}
    )  # one per parameter, whose step is taken as soon as there is a gradient
    for p, q in zip(train(model).parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def groups_in(form, model):
    named = list(model.named_parameters())
    if form == "pairs":
        return named
    if form == "groups of pairs":
        return [{"params": named[:1], "lr": 0.1}, {"params": iter(named[1:])}]
    return [{"params": [p for _, p in named[:1]]}, {"params": (p for _, p in named[1:])}]


@both
@pytest.mark.parametrize("form", ["pairs", "groups of pairs", "groups"])
def test_names_are_kept_as_torch_keeps_them(kind, form):
    model, extra = net(), nn.Parameter(torch.ones(2, 2))
    theirs = COUNTERPARTS[kind](groups_in(form, model))
    ours = kind(groups_in(form, model), model=model)
    named, plain = {"params": [("extra", extra)]}, {"params": extra}
    fits, other = (plain, named) if form == "groups" else (named, plain)
    for optimizer in (theirs, ours):
        if form != "groups" or optimizer is theirs:  # ours then leaves the names out
            with pytest.raises(ValueError, match="param groups should be with/without names"):
                optimizer.add_param_group(dict(other))
        optimizer.add_param_group(dict(fits))
    kept = [[g.get("param_names") for g in o.state_dict()["param_groups"]] for o in (theirs, ours)]
    assert kept[0] == kept[1]
    assert kept[0][-1] == (None if form == "groups" else ["extra"])
    train(model, ours)
    assert theirs.param_groups[0].get("param_names") == ours.param_groups[0].get("param_names")


def test_a_named_parameter_that_is_added_has_its_name_in_errors():
    model, extra = net(), nn.Parameter(torch.ones(4))
    optimizer = SpectralAdamW(model.named_parameters())
    optimizer.add_param_group({"params": [("extra", extra)]})
    extra.grad = torch.ones(4).to_sparse()
    with pytest.raises(ValueError, match="gradient of parameter 'extra'"):
        optimizer.step()


def test_names_for_some_parameters_only_are_refused():
    model = net()
    named, plain = list(model.named_parameters()), list(model.parameters())
    for params in ([named[0], plain[1]], [{"params": named[:1]}, {"params": plain[1:]}]):
        for options in ({}, {"model": model}):
            with pytest.raises(
                ValueError, match="expected names for all or for none, got names for some"
            ):
                SpectralAdamW(params, **options)


def test_a_parameter_twice_in_a_group_counts_once_with_torchs_warning():
    a, b = net(), net()
    with pytest.warns(UserWarning, match="group with duplicate parameters"):
        optimizer = SpectralAdamW([*a.named_parameters(), ("0.bias", a[0].bias)], strength=0.1)
    train(a, optimizer), train(b, SpectralAdamW(b, strength=0.1))
    assert same(a, b)
    assert float(optimizer.state[a[0].bias]["step"]) == 3


def test_a_parameter_twice_that_is_not_regularized():
    model, scale = net(), nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="group with duplicate parameters"):
        optimizer = SpectralSGD([*model.named_parameters(), ("a", scale), ("b", scale)], lr=0.5)
    scale.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(scale, torch.full((3,), 0.5))


def test_a_parameter_in_two_groups_is_refused():
    model = net()
    groups = [{"params": list(model.named_parameters())}, {"params": [("w", model[0].weight)]}]
    with pytest.raises(ValueError, match="more than one parameter group"):
        SpectralAdamW(groups)
    optimizer = SpectralAdamW(model)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": model[0].weight})


@pytest.mark.parametrize(
    ("params", "error", "says"),
    [
        (torch.ones(2, 2), TypeError, r"params: expected a module.*, got Tensor of shape \(2, 2\)"),
        ("model.pt", TypeError, "params: expected a module.*, got 'model.pt'"),
        ({"w": torch.ones(2, 2)}, TypeError, "params: expected a module, its .*, got "),
        (None, TypeError, "params: expected .*, got None"),
        ([], ValueError, "params: expected .*, got no parameters"),
        ([("w", [1.0])], TypeError, r"params: expected .*, got \('w', \[1.0\]\)"),
        ([(1, torch.ones(2, 2))], TypeError, r"params: expected .*, got \(1, Tensor of shape"),
        ([{"params": {torch.ones(2, 2)}}], TypeError, "params: expected a list.*, got a set"),
        ([{"lr": 0.1}], TypeError, "params: expected"),
        ([{"params": []}, torch.ones(2)], TypeError, "params: .*, got groups and parameters"),
    ],
)  # fmt: skip
def test_bad_parameters_are_named_without_their_contents(params, error, says):
    with pytest.raises(error, match=f"^{says}|{says}") as caught:
        SpectralAdamW(params)
    assert "tensor(" not in str(caught.value)


def test_complex_parameters_are_refused_at_construction_by_name():
    model = net()
    model.spectrum = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    says = r"got parameter 'spectrum' of torch\.complex64 .* an optimizer of its own"
    for params in (model, model.named_parameters()):
        with pytest.raises(ValueError, match=says):
            SpectralAdamW(params)
    optimizer = SpectralAdamW(model.__class__(*model[:3]))
    n_groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"got parameter '\?' of torch\.complex64"):
        optimizer.add_param_group({"params": model.spectrum})
    assert len(optimizer.param_groups) == n_groups
    model.spectrum.requires_grad_(False)
    optimizer = SpectralAdamW(model)
    train(model, optimizer)
    model.spectrum.requires_grad_(True)
    with pytest.raises(ValueError, match=says):
        optimizer.step()


@both
def test_sparse_gradients_are_refused_with_what_to_do(kind):
    """Of an embedding that is not regularized, and of one that is."""
    says = r"gradient of parameter '0\.weight': expected a dense one.*, got layout .*sparse_coo"
    for options in ({}, {"include": "*"}):
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3))
        optimizer = kind(model, **options)
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(ValueError, match=says):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    rest = kind(model[1].parameters(), model=model, lr=0.1)
    table = torch.optim.SparseAdam(model[0].parameters())
    rest.step(), table.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# -------------------------------------------------------------------- values of other libraries


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SpectralAdamW, {"lr": np.float32(0.5), "eps": np.float64(1e-8)}),
        (SpectralAdamW, {"lr": np.array(0.5), "weight_decay": np.array(1)}),
        (SpectralAdamW, {"betas": np.array([0.9, 0.99])}),
        (SpectralAdamW, {"betas": collections.UserList([0, 0.99])}),
        (SpectralAdamW, {"betas": (np.float32(0.5), np.float64(0.99))}),
        (SpectralSGD, {"momentum": np.float32(0.5), "nesterov": np.bool_(True)}),
        (SpectralSGD, {"momentum": np.float32(0.5), "dampening": np.float64(0.25)}),
        (SpectralSGD, {"strength": np.float32(0.5), "n_vectors": np.int64(2), "seed": np.int8(0)}),
    ],
)  # fmt: skip
def test_numbers_and_lists_of_other_libraries_are_taken_as_pythons(kind, options):
    def as_python(value):
        if isinstance(value, tuple | collections.UserList):
            return tuple(map(as_python, value))
        return value.tolist() if isinstance(value, np.generic | np.ndarray) else value

    models = []
    for own in (options, {name: as_python(value) for name, value in options.items()}):
        for params in ("defaults", "a group"):
            model = net()
            in_group = {k: own[k] for k in flags_of(kind, own)}
            rest = {k: v for k, v in own.items() if k not in in_group}
            if params == "defaults":
                optimizer = kind(model, **own)
            else:
                group = collections.UserDict({"params": model.parameters(), **in_group})
                optimizer = kind([group], model=model, **rest)
            models.append(train(model, optimizer))
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            optimizer.load_state_dict(torch.load(saved, weights_only=True))
    assert all(same(models[0], model) for model in models[1:])


@pytest.mark.parametrize(
    ("kind", "options", "error", "says"),
    [
        (SpectralAdamW, {"lr": "1e-3"}, TypeError, "lr: expected a number, got '1e-3'"),
        (SpectralAdamW, {"lr": True}, TypeError, "lr: expected .*, got True"),
        (SpectralAdamW, {"lr": torch.ones(2)}, ValueError, r"lr: .*, got Tensor of shape \(2,\)"),
        (SpectralAdamW, {"lr": torch.tensor(-1.0)}, ValueError, "lr: expected a finite .*, got -1"),
        (SpectralAdamW, {"betas": "ab"}, ValueError, "betas: expected .*, got 'ab'"),
        (SpectralAdamW, {"betas": ("0.9", 0.99)}, TypeError, "betas: expected .*, got '0.9'"),
        (SpectralAdamW, {"betas": 0.9}, ValueError, "betas: expected .*, got 0.9"),
        (SpectralAdamW, {"eps": None}, TypeError, "eps: expected .*, got None"),
        (SpectralAdamW, {"decoupled": "no"}, TypeError, "decoupled: expected .*, got 'no'"),
        (SpectralAdamW, {"n_power_iterations": "1"}, TypeError, "n_power_iterations: .*, got '1'"),
        (SpectralSGD, {"momentum": "0.9"}, TypeError, "momentum: expected .*, got '0.9'"),
        (SpectralSGD, {"dampening": float("nan")}, ValueError, "dampening: expected .*, got nan"),
        (SpectralSGD, {"nesterov": "yes"}, TypeError, "nesterov: expected .*, got 'yes'"),
    ],
)  # fmt: skip
def test_values_that_are_no_numbers_are_named(kind, options, error, says):
    with pytest.raises(error, match=f"^{says}"):
        kind(net(), **options)
    in_group = {k: v for k, v in options.items() if k in kind(net()).defaults}
    if in_group:
        optimizer, extra = kind(net()), nn.Parameter(torch.ones(2))
        with pytest.raises(error, match=f"^{says}"):
            optimizer.add_param_group({"params": extra, **in_group})
        assert len(optimizer.param_groups) == 1


# -------------------------------------------------------------------------------------- states


@both
def test_a_loaded_state_is_a_copy(kind):
    """The optimizer that it came from goes on training, as in population based training."""
    more = {"momentum": 0.9} if kind is SpectralSGD else {}
    models = net(), net()
    first, second = (kind(m, lr=0.1, strength=0.1, **more) for m in models)
    for model, optimizer in zip(models, (first, second), strict=True):
        train(model, optimizer)
    second.load_state_dict(first.state_dict())
    kept = [x.clone() for state in second.state.values() for x in state.values()]
    assert kept
    train(models[0], first)
    now = [x for state in second.state.values() for x in state.values()]
    assert all(torch.equal(x, y) for x, y in zip(kept, now, strict=True))


def test_options_of_a_loaded_state_become_pythons_own():
    """Such as those of a checkpoint of torch's, whose learning rate was set to a numpy number."""
    model = net()
    other = torch.optim.AdamW(model.parameters(), lr=0.25)
    other.param_groups[0].update(lr=np.float64(0.5), betas=[np.float64(0.5), 0.75])
    optimizer = SpectralAdamW(model)
    optimizer.load_state_dict(other.state_dict())
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    (group,) = torch.load(saved, weights_only=True)["param_groups"]
    assert (group["lr"], group["betas"]) == (0.5, (0.5, 0.75))


def test_constructors_do_not_change_what_they_are_given():
    model = net()
    group = {"params": list(model.named_parameters()), "lr": np.float32(0.5)}
    before = dict(group)
    optimizer = SpectralAdamW([group])
    assert group == before
    other = {"params": [("extra", nn.Parameter(torch.ones(2)))]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group(other)
    assert other["params"][0][0] == "extra"
    assert list(other) == ["params"]
