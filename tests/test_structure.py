"""The parts and which way they depend on each other; what is loaded with the package."""

import ast
import re
import sys
from pathlib import Path

import pytest

import spectral_kernels
from spectral_kernels import backends
from tests import processes

PACKAGE = Path(spectral_kernels.__file__).parent
# A module may import those below it; the leaves import nothing of the package.
ORDER = [
    "__main__", "cli", "inspection", "inspection_report", "plotting", "log_plots", "demo", "plots",
    "inspection_rows", "__init__", "optim", "optim_base", "optim_check", "regularizer",
    "named_values", "readings", "logs", "untraced", "ops", "attach", "autograd", "checkpoint",
    "diagnostics", "lanczos", "update", "buckets", "bucket", "backends", "self_check", "reference",
    "distributed", "state", "plan", "device_tables", "memory", "shards", "layout", "listing",
    "selection", "owners", "checkpoint_files", "arguments", "_version",
]  # fmt: skip

# Of the Triton kernels, of which their modules' tl.constexpr(...) are some.
CONSTANTS = {
    node.target.id
    for path in (PACKAGE / "_triton").glob("*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.AnnAssign) and "constexpr(" in ast.unparse(node)
}


def imported(path):
    """Names of the package's own modules that a file imports at run time."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
    return found - {"__version__"}


def test_imports_go_down_the_list_only():
    files = {path.stem: path for path in PACKAGE.glob("*.py")}
    assert set(files) == set(ORDER)
    for name, path in files.items():
        for other in imported(path) & set(ORDER):
            assert ORDER.index(other) > ORDER.index(name), f"{name} imports {other}"


def test_files_can_be_read_in_one_sitting():
    root = PACKAGE.parent
    limits = {"*.py": 420, "*.cpp": 500, "*.h": 500, "*.cu": 500, "*.cuh": 500}
    paths = [(p, n) for folder in ("spectral_kernels", "csrc") for g, n in limits.items()
             for p in (root / folder).rglob(g)]  # fmt: skip
    assert len(paths) > 10
    for path, limit in paths:
        assert len(path.read_text().splitlines()) <= limit, path


def test_no_constant_of_a_kernel_stands_before_a_tensor():
    """Triton's interpreter makes CONSTANT * tensor a constant up to 3.8, and fails then."""
    found = []
    for path in (PACKAGE / "_triton").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
                found.append(node)
    assert len(found) > 400
    wrong = [n for n in found if isinstance(n.left, ast.Name) and n.left.id in CONSTANTS]
    assert [ast.unparse(n) for n in wrong] == []


def test_one_openmp_runtime_is_mapped():
    if (reason := backends.unavailable("cpu")) is not None:
        pytest.skip(reason)
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/maps")
    result = processes.run(
        "import torch, spectral_kernels.backends as b; n = b.native_module();"
        "print(n.cpu.openmp); print(open('/proc/self/maps').read())"
    )
    assert result.returncode == 0, result.stderr
    found = set(re.findall(r"/\S*lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*", result.stdout))
    assert len(found) == 1, found
    assert result.stdout.startswith("True")


def test_without_the_compiled_module_the_reference_serves_and_says_so_once():
    result = processes.run(
        "import sys; sys.modules['spectral_kernels._native'] = None\n"
        "import torch, warnings\n"
        "from spectral_kernels import SpectralRegularizer\n"
        "model = torch.nn.Linear(3, 4)\n"
        "for _ in range(2): SpectralRegularizer(model).penalty().backward()\n"
        "print(model.weight.grad.norm() > 0)\n"
        "try: SpectralRegularizer(model, backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert result.returncode == 0, result.stderr
    assert "tensor(True)" in result.stdout
    assert "the compiled module is missing" in result.stdout
    assert result.stderr.count("UserWarning") == 1
    assert "PyTorch reference" in result.stderr


def test_a_module_built_from_other_tables_is_refused(monkeypatch):
    if (reason := backends.unavailable("cpu")) is not None:
        pytest.skip(reason)
    native = backends.native_module()
    monkeypatch.setattr(native, "table_sizes", {**native.table_sizes, "tile": 8})
    assert "another version" in backends.unavailable("cpu")
    with pytest.raises(RuntimeError, match=r"backend: 'cpu' cannot run here.*reinstall"):
        backends.check_name("cpu")


def test_an_unknown_level_is_refused():
    if (reason := backends.unavailable("cpu")) is not None:
        pytest.skip(reason)
    cpu = backends.native_module().cpu
    with pytest.raises(ValueError, match="'v9'"):
        cpu.set_level("v9")
    assert cpu.level() in cpu.levels()
