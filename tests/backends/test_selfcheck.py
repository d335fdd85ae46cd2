"""A backend that "auto" would use on a GPU has to agree with the reference first."""

import re
import warnings

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD, spectral_norms
from spectral_kernels.backends import choice, selfcheck
from spectral_kernels.backends.base import Backend, Reference
from spectral_kernels.backends.selfcheck import disagreement

from ..support import sanitized

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_backend_passes(backend, dtype):
    own = choice.choose(backend, torch.get_default_device(), dtype)
    assert disagreement(own, torch.get_default_device(), dtype) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_passes_with_operators(backend, dtype):
    if backend.startswith("cuda"):
        pytest.skip("operators have no kernels in CUDA C++")
    own = choice.choose(backend, torch.get_default_device(), dtype)
    assert disagreement(own, torch.get_default_device(), dtype, operators=True) is None


def test_kernels_of_triton_stand_in_for_cuda(monkeypatch):
    """For operators, which have none in CUDA C++, whether it is named or found."""
    monkeypatch.setattr(choice, "unavailable", lambda name: None)
    monkeypatch.setattr(choice, "_refused", lambda name, device: None)
    monkeypatch.setattr(choice, "failed_check", lambda *_: None)
    made = []
    monkeypatch.setattr(choice, "_make", lambda name, dtype: made.append(name))
    for name in ("auto", "cuda"):
        choice.choose(name, GPU, torch.float32, 1, True)
        choice.choose(name, GPU, torch.float32)
    assert made == ["triton", "cuda", "triton", "cuda"]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["reference", "cpu"])  # too slow in Triton's interpreter
def test_the_steps_for_compute_sanitizer_run(name):
    if (reason := choice.unavailable(name)) is not None:
        pytest.skip(reason)
    sanitized.main(name, "cpu")


def test_random_numbers_stay_as_they_were():
    before = torch.get_rng_state()
    disagreement(Reference(), CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


class Planted(Reference):
    """The reference with a bug."""

    def __init__(self, bug):
        self.bug = bug

    def finish(self, plan, state, grads, accumulate):
        """Finish correctly, then apply the bug."""
        super().finish(plan, state, grads, accumulate)
        self.bug(state, grads)


def skip_a_row(state, grads):
    grads[2][0] *= 1.5


def not_a_number(state, grads):
    state.residual[1] = float("nan")


def stale_v(state, grads):
    state.v_next.copy_(state.v)


def no_image(state, grads):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (skip_a_row, r"the gradient of 2\.weight is wrong by \d\.\de-\d+ of its size"),
        (not_a_number, "the residual is wrong by nan"),
        (stale_v, "the next v is wrong"),
        (no_image, "RuntimeError: no kernel image is available"),
    ],
)
def test_a_bug_is_found_and_named(bug, message):
    found = disagreement(Planted(bug), CPU, torch.float32)
    assert re.search(message, found), found


@pytest.mark.parametrize("optimizer", [SpectralAdamW, SpectralSGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_backend_passes_with_an_optimizer(backend, dtype, optimizer):
    device = torch.get_default_device()
    assert selfcheck.step_disagreement(optimizer, backend, device, dtype) is None


def move_a_row_twice(step):
    step.weights[2][0] *= 1.01


def forget_the_products(step):
    step.state.s[-3:] *= 2


def not_a_step(step):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (move_a_row_twice, r"2\.weight is wrong by \d\.\de-\d+ of its size"),
        (forget_the_products, r"3\.weight is wrong"),
        (not_a_step, "RuntimeError: no kernel image is available"),
    ],
)
def test_a_bug_in_a_step_is_found_and_named(bug, message):
    class PlantedInStep(Reference):
        def update(self, step):
            super().update(step)
            bug(step)

    found = selfcheck.step_disagreement(SpectralAdamW, PlantedInStep(), CPU, torch.float32)
    assert re.search(message, found), found


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    "method",
    ["gram_matvec", "normalize", "rank_one", "finish", "transposed", "collect", "update", "jumps"],
)
@pytest.mark.parametrize("r", [1, 4])
def test_a_method_that_does_nothing_is_found(method, r):
    empty = type("Empty", (Reference,), {method: lambda self, *arguments: None})()
    found = [disagreement(empty, CPU, torch.float32, r)]
    found += [selfcheck.step_disagreement(kind, empty, CPU, torch.float32, r)
              for kind in (SpectralAdamW, SpectralSGD)]  # fmt: skip
    assert found != [None, None, None]
    assert (found[0] is None) == (method == "update")


def test_the_methods_of_a_backend_are_those():
    methods = {name for name, x in vars(Backend).items() if callable(x) and name[0] != "_"}
    assert methods == {"gram_matvec", "normalize", "rank_one", "finish", "transposed", "collect",
                       "update", "jumps"}  # fmt: skip
    assert Backend.__abstractmethods__ == {"gram_matvec", "normalize", "rank_one"}


class Counting(Reference):
    name = "counting"

    def __init__(self):
        self.calls = 0

    def gram_matvec(self, plan, state):
        self.calls += 1
        super().gram_matvec(plan, state)


@pytest.mark.parametrize("way", ["regularizer", "initial", "AdamW", "SGD", "norms"])
def test_a_backend_object_serves_wherever_a_name_does(way):
    model, own = nn.Linear(4, 3), Counting()
    if way == "norms":
        found = spectral_norms(model, backend=own)["weight"]
        assert found == pytest.approx(float(torch.linalg.svdvals(model.weight)[0]), rel=1e-3)
    elif way in ("regularizer", "initial"):
        target = "initial" if way == "initial" else 1.0
        reg = SpectralRegularizer(model, target=target, backend=own, warmup=0)
        assert (own.calls > 0) == (way == "initial")
        reg.penalty().backward()
        assert "counting" in repr(reg)
        assert reg._buckets.buckets[0].backend is own
    else:
        kind = SpectralAdamW if way == "AdamW" else SpectralSGD
        optimizer = kind(model, backend=own)
        optimizer.step()
        assert optimizer.regularizer._buckets.buckets[0].backend is own
    assert own.calls > 0


@pytest.mark.parametrize("kind", [SpectralRegularizer, SpectralAdamW, SpectralSGD, spectral_norms])
def test_what_is_no_backend_is_refused(kind):
    with pytest.raises(TypeError, match=r"backend: expected 'auto', .* or a Backend object, got 3"):
        kind(nn.Linear(4, 3), backend=3)


# ------------------------------------------------------------------------------ what auto does


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU with both backends; the test sets the result of a check."""
    problems = {}
    monkeypatch.setattr(choice, "_checked", {})
    monkeypatch.setattr(choice, "_said", set())
    monkeypatch.setattr(choice, "unavailable", lambda name: None)
    monkeypatch.setattr(choice, "_refused", lambda name, device: None)
    monkeypatch.setattr(choice, "_make", lambda name, dtype: type("Backend", (), {"name": name})())
    monkeypatch.setattr(choice, "disagreement", lambda backend, *_: problems.get(backend.name))
    return problems


def test_auto_takes_cuda_that_passes(gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.choose("auto", GPU).name == "cuda"


@pytest.mark.parametrize("lacks", ["unavailable", "_refused"])
def test_auto_takes_triton_without_a_word_where_cuda_is_not_built(gpu, monkeypatch, lacks):
    reasons = {"cuda": "the compiled module has no CUDA kernels"}
    monkeypatch.setattr(choice, lacks, lambda name, *_: reasons.get(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.choose("auto", GPU).name == "triton"
    reasons["triton"] = "triton cannot be imported"
    with pytest.warns(UserWarning, match="PyTorch reference: the compiled module has no CUDA "
                                         "kernels; triton cannot be imported"):  # fmt: skip
        assert choice.choose("auto", GPU).name == "reference"


def test_auto_says_once_that_it_takes_the_next(gpu):
    gpu["cuda"] = "sigma is wrong by 1.0e-01 of its size"
    with pytest.warns(UserWarning, match="uses its 'triton' backend: 'cuda' failed its check on "
                                         "cuda:0 in torch.float32: sigma is wrong"):  # fmt: skip
        assert choice.choose("auto", GPU).name == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.choose("auto", GPU).name == "triton"
    gpu["triton"] = "RuntimeError: CUDA error"
    with pytest.warns(UserWarning, match="PyTorch reference: 'triton' failed its check"):
        assert choice.choose("auto", GPU, torch.bfloat16).name == "reference"


def test_a_backend_asked_for_by_name_is_not_replaced(gpu):
    gpu["triton"] = "sigma is wrong"
    assert choice.choose("triton", GPU).name == "triton"


def test_float64_goes_to_the_reference_without_a_word(gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.choose("auto", GPU, torch.float64).name == "reference"


def test_an_optimizer_says_once_that_it_takes_the_reference(gpu):
    asked = []

    def differs():
        asked.append(1)
        return "2.weight is wrong by 1.0e-01 of its size after two steps"

    own = choice.choose("auto", GPU)
    with pytest.warns(UserWarning, match="PyTorch reference: SpectralAdamW: 'cuda' failed its "
                                         "check on cuda:0 in torch.float32: 2.weight"):  # fmt: skip
        assert choice.for_steps(own, "SpectralAdamW", GPU, torch.float32, differs).name == (
            "reference"
        )
    choice.for_steps(own, "SpectralAdamW", GPU, torch.float32, differs)
    assert len(asked) == 1
    assert choice.for_steps(own, "SpectralSGD", GPU, torch.float32, lambda: None) is own
    for serves, device in ((own, CPU), (Reference(), GPU)):
        assert choice.for_steps(serves, "SpectralAdamW", device, torch.float32, differs) is serves
    assert len(asked) == 1


def test_an_optimizer_steps_by_the_backend_that_passed(monkeypatch):
    other = Reference()
    monkeypatch.setattr(choice, "for_steps", lambda *_: other)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = SpectralAdamW(model, exclude=["1.*"])
    optimizer.step()
    assert [b.backend for b in optimizer.regularizer._buckets.buckets] == [other]
    assert [u.backend for u in optimizer._updates] == [other]
