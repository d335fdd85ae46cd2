"""Values as configuration files and other libraries hand them over."""

import collections
import copy
import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from spectral_kernels import SpectralRegularizer
from spectral_kernels.selection.arguments import check_count, check_flag, check_number, shown
from spectral_kernels.selection.rules import select

from ..support.selecting import names_of, skipped


class Config:
    """Like a mapping, and not one: has keys and items by key alone."""

    def __init__(self, **entries):
        self.entries = entries

    def keys(self) -> Iterator[str]:
        return iter(self.entries)

    def __getitem__(self, key):
        return self.entries[key]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6))


LISTS = {
    "a list": list,
    "a tuple": tuple,
    "a set": set,
    "a dict": dict.fromkeys,
    "a generator": iter,
    "a UserList": collections.UserList,
    "an array": np.array,
}


@pytest.mark.parametrize("kind", LISTS)
def test_patterns_may_come_in_any_container(kind):
    made = LISTS[kind]
    assert names_of(net(), exclude=made(["2.*", "*.bias"])) == ["0.weight"]
    assert names_of(net(), include=made(["2.weight"])) == ["2.weight"]
    model = nn.ParameterDict({"experts": torch.randn(2, 3, 4)})
    assert names_of(model, stacked=made(["experts"])) == ["experts[0]", "experts[1]"]


def test_patterns_of_a_set_are_used_in_the_same_order_every_time():
    """The order of a set of strings differs from process to process."""
    patterns = {"2" + "?" * n + "*" for n in range(6)}
    assert set(skipped(net(), exclude=patterns).values()) == {"exclude '2*'"}


def test_a_string_is_one_pattern():
    assert names_of(net(), exclude="2.*") == ["0.weight"]
    assert names_of(net(), include="2.*") == ["2.weight"]
    assert names_of(nn.ParameterDict({"e": torch.randn(2, 3, 4)}), stacked="e") == ["e[0]", "e[1]"]
    with pytest.raises(ValueError, match=r"exclude: expected a pattern .*, got '3'"):
        select(net(), exclude="3")


@pytest.mark.parametrize(
    "sizes", [2, np.int64(2), np.array(2), [3, 3], (3, 3), np.array([3, 3]), iter([3, 3]),
              collections.UserList([np.int32(3), 3])], ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_parts_and_sizes_of_splits(sizes):
    made = collections.UserDict({"2.weight": sizes})
    assert names_of(net(), splits=made) == ["0.weight", "2.weight[0]", "2.weight[1]"]


@pytest.mark.parametrize("kind", [dict, collections.UserDict, lambda d: Config(**d)])
def test_strength_and_target_may_come_in_any_mapping(kind):
    plain = SpectralRegularizer(net(), {"2.*": 0, "*": 0.5}, target={"2.*": "initial", "*": 2})
    other = SpectralRegularizer(
        net(),
        kind({"2.*": np.int64(0), "*": np.float64(0.5)}),
        target=kind({"2.*": np.str_("initial"), "*": np.array(2)}),
    )
    assert other.strength == plain.strength == {"2.*": 0, "*": 0.5}
    assert other.target == plain.target
    assert {type(x) for x in other.strength.values()} == {int, float}
    with torch.no_grad():
        assert torch.equal(plain.penalty(), other.penalty())


def test_a_mapping_is_copied():
    given = {"*": 0.5}
    reg = SpectralRegularizer(net(), given, target=given)
    given["*"] = 7.0
    reg.strength["*"] = reg.target["*"] = 8.0
    assert reg.strength == reg.target == {"*": 0.5}


@pytest.mark.parametrize(
    "options",
    [
        {"strength": np.float32(0.5)}, {"strength": np.array(0.5)}, {"strength": 1},
        {"exponent": np.int64(3)}, {"exponent": np.float16(1.5)}, {"target": np.float64(2)},
        {"n_power_iterations": np.int64(2)}, {"n_power_iterations": np.str_("auto")},
        {"n_vectors": np.int8(2)}, {"warmup": np.uint8(3)}, {"seed": np.array(4)},
        {"biases": np.bool_(False)}, {"norms": 0},
    ],
    ids=repr,
)  # fmt: skip
def test_numbers_of_numpy_are_pythons_from_the_start(options):
    """They give the same penalty and repr, and a state that torch.load takes by default."""
    ((name, value),) = options.items()
    python = value.item() if isinstance(value, np.generic | np.ndarray) else value
    python = str(python) if isinstance(value, np.str_) else python
    regs = [SpectralRegularizer(net(), **{name: x}) for x in (value, python)]
    assert repr(regs[0]) == repr(regs[1])
    assert "np." not in repr(regs[0])
    with torch.no_grad():
        first, second = (reg.penalty() for reg in regs)
    assert torch.equal(first, second)
    saved = io.BytesIO()
    torch.save(regs[0].state_dict(), saved)
    saved.seek(0)
    assert regs[1].load_state_dict(torch.load(saved, weights_only=True)) == ([], [])
    assert repr(copy.deepcopy(regs[0])) == repr(regs[0])


@pytest.mark.parametrize("bad", ["1", "1e-3", True, np.bool_(True), None, [1], np.ones(2), 1j])
def test_no_number_and_no_count(bad):
    for check in (check_number, check_count):
        with pytest.raises(TypeError, match=r"^name: expected an? \w+, got "):
            check("name", bad, 0)


@pytest.mark.parametrize("bad", ["true", "", None, 2, 0.0, np.ones(2), [True]])
def test_no_flag(bad):
    with pytest.raises(TypeError, match=r"^name: expected True or False, got "):
        check_flag("name", bad)


def test_errors_show_values_without_the_contents_of_tensors():
    assert shown(torch.ones(2, 3)) == "Tensor of shape (2, 3)"
    assert shown([np.ones(3), "a"]) == "[ndarray of shape (3,), 'a']"
    assert shown({"w": torch.ones(2)}) == "{'w': Tensor of shape (2,)}"
    assert shown(collections.UserList([torch.ones(2)])) == "UserList"
    assert shown("x" * 200) == repr("x" * 200)[:80]
