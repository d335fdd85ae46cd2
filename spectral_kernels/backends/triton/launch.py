"""Launches of the Triton kernels: compiled once per variant and device, then started directly.

Triton's own launch inspects the type of every argument, which takes some 20 microseconds. Here the
types belong to the kernel (POINTERS), so a variant is compiled from them alone, and a launch passes
addresses and numbers unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from .chunks import collect_chunks
from .gram_matvec import gram_matvec
from .gram_matvec_long import gram_matvec_long
from .partials import collect, transposed
from .rank_one import rank_one
from .ritz import ritz
from .sizes import sizes
from .subspace_products import subspace_grams, subspace_products
from .tables import TYPES
from .update import update
from .waves import waves

KERNELS = {
    function.__name__: function
    for function in (
        gram_matvec, gram_matvec_long, rank_one, update, subspace_products, subspace_grams, ritz,
        transposed, collect, collect_chunks, waves,
    )
}  # fmt: skip
# Types of the pointers among their arguments; every other argument is a 32-bit integer, except the
# exponent k. Pointers that are specialized for alignment start at a multiple of 16 bytes.
_BY_TYPE = {
    torch.int64: "matrices tiles operators taps elementwise chunks others matrix_moments "
    "elementwise_moments other_moments",
    torch.int32: "arrivals",
    torch.float64: "gram_partial chunk_squares groups gram",
    torch.float32: "t_partial v v_next s scalars scale steps grad_scale found_inf t",
}
POINTERS = {name: dtype for dtype, names in _BY_TYPE.items() for name in names.split()}
_NUMBER, _EXPONENT = 7, 2.0  # arbitrary: kernels are not specialized for values
_SMALL = 16  # integers up to which a power is a product


def integer_exponent(k: float) -> int:
    """Return the argument ``integer`` of the kernels."""
    return int(k) if float(k).is_integer() and 1 <= k <= _SMALL else -1


class Variant:
    """One kernel with its constants and the compiler's options.

    Args:
        kernel: its name in KERNELS.
        capability: of the device, 90 for 9.0; 0 for the interpreter.
        itemsize: bytes per element of the weights.
        r: vectors per matrix that the sizes of blocks are for.
        constants: beside those of sizes.py; TERMS is 1 and EACH False unless here.
        large: whether the sizes of blocks are for a large plan.
    """

    def __init__(
        self, kernel: str, capability: int, itemsize: int, r: int, constants, large: bool = False
    ):
        own = sizes(capability, itemsize, r, large)
        self.function = KERNELS[kernel]
        names = list(self.function.fn.__annotations__)  # of the constants alone
        values = {"TERMS": 1, "EACH": False, **getattr(own, kernel), **constants}
        self.constants = tuple(values[name] for name in names)
        self.arguments = [n for n in self.function.arg_names if n not in names]
        self.options = {
            "num_warps": getattr(own, f"{kernel}_warps"),
            "enable_fp_fusion": True,  # a * b + c rounded once; no default from Triton 3.10 on
        }
        registers = getattr(own, f"{kernel}_registers", None)
        if registers is not None and torch.version.hip is None:  # ROCm has no such option
            self.options["maxnreg"] = registers
        self._compiled: dict[int, object] = {}  # by index of the device

    def compile(self):
        """Return the kernel compiled for Triton's current device, from its cache if it is there."""
        stand_ins = [
            POINTERS.get(name, _EXPONENT if name == "k" else _NUMBER) for name in self.arguments
        ]
        return self.function.warmup(*stand_ins, *self.constants, grid=(1,), **self.options)

    def launch(
        self, device: torch.device, grid: int, pointers: Sequence, numbers: Sequence
    ) -> None:
        """Start ``grid`` programs in the current stream of ``device``.

        Args:
            device: where the tensors are.
            grid: number of programs, 1 or more.
            pointers: tensors, the first arguments of the kernel.
            numbers: integers, and k, the arguments after them.
        """
        if device.type == "cpu":
            self.function[(grid,)](*pointers, *numbers, *self.constants, **self.options)
        elif torch.cuda.current_device() == device.index:
            self._launch(device.index, grid, pointers, numbers)
        else:
            with torch.cuda.device(device.index):
                self._launch(device.index, grid, pointers, numbers)

    def _launch(self, index: int, grid: int, pointers: Sequence, numbers: Sequence) -> None:
        compiled = self._compiled.get(index)
        if compiled is None:
            compiled = self._compiled[index] = self.compile()
        addresses = [tensor.data_ptr() for tensor in pointers]
        compiled[(grid, 1, 1)](*addresses, *numbers, *self.constants)


@cache
def variant(
    kernel: str, capability: int, dtype: torch.dtype | None = None, r: int = 1,
    large: bool = False, **constants,
) -> Variant:  # fmt: skip
    """Return the variant of ``kernel`` for weights of ``dtype`` and ``r`` vectors per matrix.

    ``constants`` are the kernel's own by their names in lower case; dtypes are torch's.
    """
    itemsize = 4 if dtype is None else dtype.itemsize
    values = {name.upper(): TYPES.get(x, x) if isinstance(x, torch.dtype) else x
              for name, x in constants.items()}  # fmt: skip
    if dtype is not None:
        values["DTYPE"] = TYPES[dtype]
    return Variant(kernel, capability, itemsize, r, {"VECTORS": r, **values}, large)


@cache
def capability_of(device: torch.device) -> int:
    """Return 90 for compute capability 9.0, and 0 for a CPU."""
    if device.type == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def neutral(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one and zero, [1] float32, for a factor and a found_inf that are None."""
    with torch.inference_mode(False):
        return torch.ones(1, device=device), torch.zeros(1, device=device)
