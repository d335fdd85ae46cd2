"""The parts of the package and the direction of their imports; what is loaded with it."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

import spectral_kernels
from spectral_kernels.backends import choice
from tests import ROOT
from tests.support import processes

PACKAGE = Path(spectral_kernels.__file__).parent
# A part may import only those that come after it.
ORDER = [
    "__main__", "cli", "integrations", "__init__", "optim", "regularizer", "diagnostics", "engine",
    "sharding", "backends", "tables", "selection",
]  # fmt: skip

# Names of the Triton kernels' constants, annotated assignments with constexpr(...).
CONSTANTS = {
    node.target.id
    for path in (PACKAGE / "backends/triton").glob("*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.AnnAssign) and "constexpr(" in ast.unparse(node)
}

# Two steps of a regularizer in a process of its own.
STEPS = (
    "import torch\n"
    "from spectral_kernels import SpectralRegularizer\n"
    "model = torch.nn.Linear(3, 4)\n"
    "for _ in range(2): SpectralRegularizer(model).penalty().backward()\n"
    "print(model.weight.grad.norm() > 0)\n"
)


def imported(path):
    """Parts of the package that a file imports, at its top or later, except for type checks."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            names = node.module.split(".") if node.module else [a.name for a in node.names]
            if above:  # within a part
                found.add(above[0])
            elif names == ["__version__"]:
                found.add("__init__")
            else:
                found |= {names[0]} if node.module else set(names)
    return found - {"_native"}


def test_imports_go_down_only():
    """The order is that of the parts; within one of them files may import each other."""
    parts = {path.stem: [path] for path in PACKAGE.glob("*.py")}
    for folder in PACKAGE.iterdir():
        if folder.is_dir() and (folder / "__init__.py").exists():
            parts[folder.name] = list(folder.rglob("*.py"))
    assert set(parts) == set(ORDER)
    seen = {name: set().union(*map(imported, paths)) for name, paths in parts.items()}
    assert set().union(*seen.values()) <= set(ORDER)
    assert sum(map(len, seen.values())) > 30
    for name, others in seen.items():
        for other in others - {name}:
            assert ORDER.index(other) > ORDER.index(name), f"{name} imports {other}"


def test_files_of_a_part_do_not_import_each_other_in_a_circle():
    def file_of(package, names):
        path = PACKAGE.joinpath(*package, *names)
        return next(
            (p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None
        )

    graph = {}
    for path in PACKAGE.rglob("*.py"):
        package, found = path.relative_to(PACKAGE).parts[:-1], set()
        for node in ast.parse(path.read_text()).body:  # when the file is loaded
            if isinstance(node, ast.ImportFrom) and node.level:
                above = package[: len(package) - node.level + 1]
                names = node.module.split(".") if node.module else []
                modules = [file_of(above, [*names, a.name]) for a in node.names]
                found |= {m or file_of(above, names) for m in modules}
        graph[path] = found - {None}
    assert sum(map(len, graph.values())) > 100
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the files of a circle


def test_modules_that_are_named_exist():
    """In code, strings and documents: every part is a folder, a module, or a name in a module."""
    count, folders = 0, (PACKAGE, ROOT / "bench", ROOT / "tests", ROOT / "docs")
    paths = [path for folder in folders for path in folder.rglob("*")
             if path.suffix in (".py", ".md")]  # fmt: skip
    others = ("pt", "egg", "_native", "penalty", "__")  # files, the compiled module, an operator
    for path in [*paths, *ROOT.glob("*.md")]:
        names = re.findall(r"(?<![.\w])spectral_kernels((?:\.[a-z_]\w*)+)", path.read_text())
        for name in names:
            place = PACKAGE
            for part in name.split(".")[1:]:
                if part.startswith(others) and place == PACKAGE:
                    break
                below = place / part
                if below.is_dir() or below.with_suffix(".py").exists():
                    place, count = below, count + 1
                    continue
                module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
                assert part in module.read_text(), f"{path}: spectral_kernels{name}"
                break
    assert count > 200


def test_a_folder_is_seen_at_a_glance():
    """Few entries, and no module with the name of a function of its package."""
    tracked = [p for p in PACKAGE.iterdir() if not p.name.startswith(("_native", "__pycache__"))]
    assert len(tracked) <= 13
    for package in PACKAGE.rglob("__init__.py"):
        names = {a.asname or a.name for node in ast.parse(package.read_text()).body
                 if isinstance(node, ast.ImportFrom) for a in node.names}  # fmt: skip
        modules = {path.stem for path in package.parent.iterdir()}
        assert not names & modules, package


def test_files_can_be_read_in_one_sitting():
    paths = [p for folder in (PACKAGE, ROOT / "csrc") for p in folder.rglob("*")
             if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]  # fmt: skip
    assert len(paths) > 100
    for path in paths:
        assert len(path.read_text().splitlines()) <= 500, path


def test_no_constant_of_a_kernel_stands_before_a_tensor():
    """Up to Triton 3.8 the interpreter makes CONSTANT * tensor a constant, and fails."""
    found = []
    for path in (PACKAGE / "backends/triton").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
                found.append(node)
    assert len(found) > 400
    wrong = [n for n in found if isinstance(n.left, ast.Name) and n.left.id in CONSTANTS]
    assert [ast.unparse(n) for n in wrong] == []


@pytest.mark.takes_seconds
def test_tests_are_collected_without_triton():
    result = processes.run(
        "import sys; sys.modules['triton'] = None; import pytest;"
        f"sys.exit(pytest.main(['--collect-only', '-q', {str(ROOT / 'tests/selection')!r}]))"
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.takes_seconds
def test_readers_of_checkpoints_are_loaded_when_they_are_wanted():
    result = processes.run(
        "import sys, spectral_kernels as package\n"
        "readers = 'spectral_kernels.diagnostics.checkpoints'\n"
        "assert readers not in sys.modules\n"
        "from spectral_kernels import open_checkpoint\n"
        "assert package.open_checkpoint is open_checkpoint\n"
        "assert readers in sys.modules\n"
        "assert not hasattr(package, 'no_such_name')\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.takes_seconds
def test_one_openmp_runtime_is_mapped():
    if (reason := choice.unavailable("cpu")) is not None:
        pytest.skip(reason)
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/maps")
    result = processes.run(
        "import torch, spectral_kernels.tables.native as t; n = t.native_module();"
        "print(n.cpu.without_openmp); print(open('/proc/self/maps').read())"
    )
    assert result.returncode == 0, result.stderr
    found = set(re.findall(r"/\S*lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*", result.stdout))
    assert len(found) == 1, found
    assert result.stdout.startswith(("\n", "the compiler was Clang")), result.stdout


@pytest.mark.takes_seconds
def test_without_the_compiled_module_the_reference_serves_and_says_so_once():
    result = processes.run(
        "import sys; sys.modules['spectral_kernels._native'] = None\n"
        + STEPS
        + "try: SpectralRegularizer(model, backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert result.returncode == 0, result.stderr
    assert "tensor(True)" in result.stdout
    assert "the compiled module is missing" in result.stdout
    assert result.stderr.count("UserWarning") == 1
    assert "PyTorch reference" in result.stderr


@pytest.mark.takes_seconds
def test_a_broken_module_is_not_used_by_half_and_is_reported_once():
    result = processes.run(
        "import sys, types\n"
        "native = types.ModuleType('spectral_kernels._native')\n"
        "native.tables, native.describe = {}, lambda *tensors: sys.exit('it was used')\n"
        "sys.modules['spectral_kernels._native'] = native\n" + STEPS
    )
    assert result.returncode == 0, result.stderr
    assert "tensor(True)" in result.stdout
    assert result.stderr.count("UserWarning") == 1
    assert result.stderr.count("built from another version") == 1


def test_a_module_built_from_other_tables_is_refused(monkeypatch):
    if (reason := choice.unavailable("cpu")) is not None:
        pytest.skip(reason)
    native = choice.native_module()
    changed = {**native.tables["Tile"], "row_end": 8}
    monkeypatch.setattr(native, "tables", {**native.tables, "Tile": changed})
    assert "another version" in choice.unavailable("cpu")
    with pytest.raises(RuntimeError, match=r"backend: 'cpu' cannot run here.*reinstall"):
        choice.check_backend("cpu")


def test_an_unknown_level_is_refused():
    if (reason := choice.unavailable("cpu")) is not None:
        pytest.skip(reason)
    cpu = choice.native_module().cpu
    with pytest.raises(ValueError, match="'v9'"):
        cpu.set_level("v9")
    assert cpu.level() in cpu.levels()
