"""Launches of the Triton kernels on a GPU, tested without one."""

from contextlib import contextmanager

import pytest
import torch

launch = pytest.importorskip(
    "spectral_kernels.backends.triton.launch", reason="triton is not installed"
)

from spectral_kernels.backends.triton.sizes import sizes  # noqa: E402

SECOND = torch.device("cuda", 1)


class Recorder:
    """Replaces a compiled kernel."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, torch.cuda.current_device(),
                                                        arguments))  # fmt: skip


@pytest.fixture
def devices(monkeypatch):
    """Two CUDA devices of which the first is the current one."""
    current = [0]

    @contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)


def chosen():
    """A new variant, whose kernels are not compiled yet."""
    constants = {"WITH_T": True}
    return launch.Variant("collect", 90, 4, 4, {**constants, "VECTORS": 4})


def test_a_launch_is_on_the_device_of_the_tensors(devices):
    found, kernel = chosen(), Recorder()
    found._compiled[1] = kernel
    tensors = [torch.randn(3) for _ in range(6)]
    found.launch(SECOND, 5, tensors, (7,))
    ((grid, device, arguments),) = kernel.launches
    assert (grid, device) == ((5, 1, 1), 1)
    assert torch.cuda.current_device() == 0
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert arguments == (*addresses, 7, *found.constants)


def test_each_device_has_a_kernel_of_its_own(devices, monkeypatch):
    found, made = chosen(), []
    monkeypatch.setattr(launch.Variant, "compile", lambda self: made.append(Recorder()) or made[-1])
    for device in (SECOND, torch.device("cuda", 0), SECOND):
        found.launch(device, 1, [torch.zeros(1)] * 6, (1,))
    assert [[where for _, where, _ in kernel.launches] for kernel in made] == [[1, 1], [0]]


def test_the_exponent_and_what_a_step_lacks_are_no_constants():
    """One compilation serves all exponents, and steps with and without a scale or found_inf."""
    for name, kernel in launch.KERNELS.items():
        constants = set(kernel.fn.__annotations__)
        assert not constants & {"K", "WITH_SCALE", "WITH_GRAD_SCALE", "WITH_FOUND_INF"}, name
        assert not constants & set(launch.POINTERS)


def test_tables_are_not_looked_at_for_alignment():
    tables = {"matrices", "tiles", "vectors", "chunks", "scale", "grad_scale", "found_inf"}
    for kernel in launch.KERNELS.values():
        left = set(getattr(kernel, "do_not_specialize_on_alignment", None) or
                   kernel.kwargs["do_not_specialize_on_alignment"])  # fmt: skip
        assert tables & set(kernel.arg_names) <= left


def test_rocm_has_no_limit_of_registers(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    constants = {"RULE": 0, "WITH_MOMENT": True, "DECOUPLED": False, "PRODUCTS": True,
                 "DTYPE": None, "MOMENT_TYPE": None}  # fmt: skip
    assert "maxnreg" not in launch.Variant("update", 90, 2, 1, constants).options
    monkeypatch.setattr(torch.version, "hip", None)
    most = sizes(90, 2).update_registers
    assert launch.Variant("update", 90, 2, 1, constants).options["maxnreg"] == most > 0


def test_arguments_are_pointers_then_numbers_then_constants():
    """A launch passes them by position."""
    for name, kernel in launch.KERNELS.items():
        constants = list(kernel.fn.__annotations__)
        arguments = [n for n in kernel.arg_names if n not in constants]
        assert kernel.arg_names == [*arguments, *constants], name
        kinds = [n in launch.POINTERS for n in arguments]
        assert kinds == sorted(kinds, reverse=True), name
