"""Methods, problems and models of one's own in the benchmark of continual learning."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.figure import Figure

from bench.continual import __main__ as cli
from bench.continual import figures, own, runner
from bench.continual.arms import Arm
from bench.support.figures import Style
from tests import ROOT, TIMEOUT
from tests.support import documents

SHORT = ["--seeds", "1", "--tasks", "2", "--epochs", "1", "--workers", "1"]
METHOD = "from bench.continual.methods import Method\n"
NETWORK = "import torch\nfrom torch import nn\n"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Work in a new folder, and forget the classes that a test has registered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own, "_registered", {})
    monkeypatch.setattr(sys, "path", [*sys.path])


def run(*arguments, module=True):
    """Run Python on the benchmark or on a file; return the exit code and what it has printed."""
    done = subprocess.run(
        [sys.executable, *(["-m", "bench.continual"] * module), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=TIMEOUT, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def refused(capsys, *options):
    """Return the line with which options are refused before anything is written."""
    before = {path.name for path in Path().iterdir()}
    assert cli.main([*options, "--out", "out"]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert {path.name for path in Path().iterdir()} == before
    return line


def write(name, text):
    Path(name).write_text(text)


# ------------------------------------------------------------------------------------------- runs


@pytest.mark.slow
@pytest.mark.takes_seconds
def test_the_examples_of_the_readme_run_as_its_commands_say(tmp_path):
    page = "bench/continual/README.md"
    method, tables = [b.text for b in documents.blocks(page) if b.language == "python"]
    prose = documents.text_of(page)
    names = re.search(r"`(clipped\.py)`:\n", prose)[1], re.search(r"--problem (\w+\.py):", prose)[1]
    assert len(method.strip().splitlines()) <= 16
    for name, text in zip(names, (method, tables), strict=True):
        write(name, text)
    (command,) = [c for c in documents.commands(page) if "clipped.py:Clipped" in " ".join(c)]
    assert command[:3] == ["python", "-m", "bench.continual"]
    assert cli.main([*command[3:], *SHORT]) == 0
    (own_options,) = re.findall(r"`(--problem tables\.py[^`]+)`", prose)
    arguments = [*own_options.split(), "--method", "none,clipped.py:Clipped", *SHORT]
    assert cli.main(arguments) == 0

    folder = tmp_path / "continual"
    runs = runner.load(folder)
    labels = {run["labels"].get("method") for run in runs if run["method"].startswith("clipped")}
    assert labels == {"clipped gradients"}
    assert {run["labels"]["problem"] for run in runs if "tables" in run["problem"]} == {"Tables"}
    text = (folder / "report.md").read_text()
    assert "| clipped gradients 0.1 | 1 |" in text
    assert "**Tables, Net, 2 tasks of 1 epochs**" in text
    picture = (folder / "Tables-none-Net-2-1.png").read_bytes()

    # The same command resumes; the report needs the runs alone.
    kept = (folder / runner.FILE).read_bytes()
    assert cli.main(arguments) == 0
    assert (folder / runner.FILE).read_bytes() == kept
    for name in names:
        (tmp_path / name).unlink()
    assert run("report", str(folder))[0] == 0
    assert (folder / "report.md").read_text() == text
    assert (folder / "Tables-none-Net-2-1.png").read_bytes() == picture


@pytest.mark.takes_seconds
def test_a_run_that_fails_shows_its_traceback_and_does_not_end_the_others(tmp_path, capsys):
    write("bad.py", f"{METHOD}\nclass Bad(Method):\n    def before_step(self):\n"
                    "        raise OSError(5, 'a [very] bad step', self)\n")  # fmt: skip
    write("short.py", f"{NETWORK}class Short:\n    shape, outputs = (3,), 2\n"
          "    def __init__(self, generator, tasks): pass\n"
          "    def __iter__(self):\n"
          "        yield torch.randn(9, 3), torch.zeros(9, dtype=torch.int64)\n")  # fmt: skip
    options = ["--method", "bad.py:Bad,none", "--problem", "random_labels,short.py:Short",
               *SHORT, "--seeds", "2"]  # fmt: skip
    assert cli.main(options) == 1
    printed = capsys.readouterr().out
    assert printed.count("OSError: [Errno 5] a [very] bad step") == 1  # not per problem and seed
    assert 'bad.py", line 5, in before_step' in printed
    assert printed.count("problem: expected 2 tasks or more, got 1") == 1
    assert "6 of 8 runs failed, the same command tries them again: " in printed
    found = [(run["problem"], run["method"]) for run in runner.load(tmp_path / "continual")]
    assert found == [("random_labels", "none")] * 2
    assert "| none | 2 |" in (tmp_path / "continual" / "report.md").read_text()


@pytest.mark.takes_seconds
def test_a_worker_that_is_killed_is_explained(capsys):
    write("end.py", f"import os\n{METHOD}\nclass End(Method):\n    def before_step(self):\n"
                    "        os._exit(9)\n")  # fmt: skip
    assert cli.main(["--method", "end.py:End", *SHORT]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].endswith("running were: random_labels mlp end.py:End 0 seed 0")
    assert "Traceback" not in printed


def test_a_key_tells_files_and_their_versions_apart_and_labels_follow():
    a, b = METHOD + "class Mine(Method): pass\n", METHOD + "class Mine(Method): strengths = 1,\n"
    for folder in ("x", "y"):
        Path(folder).mkdir()
    write("x/m.py", a)
    write("y/m.py", b)
    first, second = (own.register("method", f"{folder}/m.py:Mine") for folder in "xy")
    assert first.startswith("m.py:Mine@")
    assert first != second
    write("y/m.py", a)
    assert own.register("method", "y/m.py:Mine") == first  # the same text
    assert own.find({}, second).strengths == (1,)  # as it was when it was registered


# ----------------------------------------------------------------------------------------- errors

GOOD = "class M(Method): pass\n"


@pytest.mark.parametrize(
    ("text", "given", "says"),
    [
        (GOOD, "no.py:M", "expected FILE.py:CLASS with a file that exists, got 'no.py:M'"),
        (GOOD, "m.py", "expected FILE.py:CLASS, got 'm.py'"),
        (GOOD, "m.py:N", "expected a class that is in m.py (M), got 'N'"),
        ("def f(:\n", "m.py:M", "expected m.py to be importable, got SyntaxError in line 2:"),
        ("import nowhere\n", "m.py:M", "got ModuleNotFoundError in line 2: No module named"),
        ("class M: pass\n", "m.py:M", "m.py:M to be built with (model, strength, lr), got M()"),
        ("class M(Method):\n    def __init__(self, model): pass\n", "m.py:M", "got M(model)"),
        ("class M(Method):\n    def prepare(self, model): 1 / 0\n", "m.py:M",
         "expected m.py:M to suit mlp, got ZeroDivisionError in line 3: division by zero"),
        ("class M(Method):\n    def prepare(self, model): return 3\n"
         "    def build_optimizer(self): return None\n", "m.py:M",
         "expected m.py:M to have .model, of Module, got int"),
        ("class M(Method):\n    def build_optimizer(self): return None\n", "m.py:M",
         "expected m.py:M to have .optimizer, of Optimizer, got NoneType"),
        ("class M(Method):\n    before_step = None\n", "m.py:M",
         "expected m.py:M to have before_step(), got none"),
        ("class M(Method):\n    def after_step(self): pass\n", "m.py:M",
         "expected m.py:M to have after_step(inputs), got after_step()"),
        ("class M(Method):\n    strengths = 0.1\n", "m.py:M",
         "expected strengths of m.py:M to be a tuple of positive numbers, got 0.1"),
        ("class M(Method):\n    label = '_'\n", "m.py:M", "expected the label of m.py:M to be 1"),
    ],
)  # fmt: skip
def test_a_wrong_method_is_refused_in_a_line(text, given, says, capsys):
    write("m.py", METHOD + text)
    line = refused(capsys, "--method", given)
    assert line.startswith("method: expected ")
    assert says in line


PROBLEM = (
    "class P:\n    shape, outputs, score = (3,), 2, 'accuracy'\n"
    "    def __init__(self, generator, tasks): pass\n"
    "    def __iter__(self): yield self.task()\n"
    "    def task(self): return torch.randn(9, 3), torch.zeros(9, dtype=torch.int64)\n"
)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("generator, tasks", "seed", "built with (generator, tasks), got P(seed)"),
        ("pass", "1 / 0", "a first task of p.py:P, got ZeroDivisionError in line 5"),
        ("(3,)", "3", "shape: expected a tuple of numbers from 1 on, got 3"),
        (", 2, ", ", 'two', ", "outputs: expected a number from 1 on, got 'two'"),
        ("'accuracy'", "'f1'", "score: expected 'accuracy' or 'mse', got 'f1'"),
        ("__iter__", "tasks", "TypeError"),
        ("yield self.task()", "return iter(())", "got ValueError: problem: expected 40 tasks"),
        ("9, 3)", "9, 4)", "x: expected torch.float32 of shape (9, 3), got torch.float32 of"),
        (", dtype=torch.int64", "", "y: expected torch.int64 of shape (9,), got torch.float32"),
        ("torch.zeros", "2 + torch.zeros", "y: expected classes from 0 to 1, got 2 to 2"),
        ("torch.randn(9, 3), ", "", "task: expected (x, y) or (x, y, x_test, y_test), got Tensor"),
        ("(3,), 2, 'accuracy'", "(3,), 2, 'mse'", "y: expected torch.float32 of shape (9, 2)"),
    ],
)
def test_a_wrong_problem_is_refused_in_a_line(old, new, says, capsys):
    assert PROBLEM.count(old) == 1
    write("p.py", NETWORK + PROBLEM.replace(old, new))
    line = refused(capsys, "--problem", "p.py:P")
    assert line.startswith("problem: expected ")
    assert says in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("class M(nn.ReLU): pass\n", "expected m.py:M to be built with (shape, outputs), got"),
        ("class M:\n    def __init__(self, shape, outputs): pass\n", "it is no nn.Module"),
        ("class M(nn.Sequential):\n    def __init__(self, shape, outputs):\n"
         "        super().__init__(nn.Linear(3, outputs))\n", "to suit inputs of shape (1, 8, 8)"),
        ("class M(nn.Sequential):\n    def __init__(self, shape, outputs):\n"
         "        super().__init__(nn.Flatten(), nn.Linear(64, 3))\n",
         "to return outputs of shape [4, 10] for 4 examples, got [4, 3]"),
        ("class M(nn.Sequential):\n    def __init__(self, shape, outputs):\n"
         "        super().__init__(nn.Flatten(), nn.Linear(64, outputs))\n",
         "expected m.py:M to be measurable, got ValueError: model: expected activations that are"),
    ],
)  # fmt: skip
def test_a_wrong_model_is_refused_in_a_line(text, says, capsys):
    write("m.py", NETWORK + text)
    line = refused(capsys, "--model", "m.py:M")
    assert line.startswith("model: expected ")
    assert says in line


def test_a_model_of_the_bench_that_does_not_suit_a_problem_of_ones_own_is_refused(capsys):
    write("p.py", NETWORK + PROBLEM)
    line = refused(capsys, "--problem", "p.py:P", "--model", "resnet")
    assert line.startswith("model: expected resnet to suit inputs of shape (3,), got RuntimeError")


def test_a_method_that_changes_the_network_of_ppo_is_refused(capsys):
    pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    write("m.py", f"from torch import nn\n{METHOD}\nclass M(Method):\n"
                  "    def prepare(self, model): return nn.Sequential(model)\n")  # fmt: skip
    line = refused(capsys, "--problem", "cartpole", "--model", "ppo", "--method", "m.py:M")
    assert line == "method: expected one that keeps the network of 'cartpole', which is PPO's " \
                   "own, got 'm.py:M'"  # fmt: skip


# ---------------------------------------------------------------------------------------- imports

STARTS = "from bench.continual.__main__ import main\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{STARTS}main(['--method', 'm.py:M'])\n", "starts the benchmark"),
        (f"import sys\n{STARTS}sys.exit(main(['--method', 'none']))\n", "starts the benchmark"),
        ("raise SystemExit(2)\n", "ends the process"),
        ("import torch\nw = torch.nn.Parameter(torch.ones(2))\nw.grad = torch.ones(2)\n"
         "torch.optim.SGD([w]).step()\n", "takes a step of an optimizer"),
    ],
)  # fmt: skip
def test_a_file_that_starts_work_when_it_is_imported_is_refused(line, says, capsys):
    write("m.py", METHOD + GOOD + line)
    found = refused(capsys, "--method", "m.py:M")
    assert found == ("method: expected m.py to define things alone when it is imported, got one "
                     f"that {says}: {own.GUARD}")  # fmt: skip
    assert own.VARIABLE not in os.environ
    write("m.py", METHOD + GOOD + 'if __name__ == "__main__":\n    ' + line.replace("\n", "\n    "))
    own.register("method", "m.py:M")


@pytest.mark.slow
@pytest.mark.takes_seconds
def test_a_process_that_a_file_starts_when_it_is_imported_starts_no_benchmark():
    call = "[sys.executable, '-m', 'bench.continual', '--out', 'second'], check=True"
    write("m.py", f"import subprocess, sys\n{METHOD}{GOOD}subprocess.run({call})\n")
    code, printed = run("--method", "m.py:M", *SHORT)
    assert code == 2
    assert f"m.py starts the benchmark while it is imported: {own.GUARD}" in printed
    assert "got CalledProcessError in line 4" in printed
    assert not Path("second").exists()


@pytest.mark.slow
@pytest.mark.takes_seconds
def test_a_script_without_a_guard_is_explained_and_one_with_it_runs(tmp_path):
    call = f"main({[*SHORT, '--method', 'none,script.py:M', '--workers', '2']!r})\n"
    write("script.py", f"import sys\n{STARTS}{METHOD}{GOOD}sys.exit({call.strip()})\n")
    code, printed = run("script.py", module=False)
    assert code == 2
    assert len(printed.splitlines()) == 1
    assert "starts the benchmark" in printed

    # With methods of the bench alone, it is the worker processes that import the script.
    write("script.py", f"{STARTS}code = {call.replace(',script.py:M', '')}print('code', code)\n")
    code, printed = run("script.py", module=False)
    *_, line, last = printed.splitlines()
    assert last == "code 1"
    assert line == (f"{tmp_path / 'script.py'}: every worker process imports this file, and ended "
                    f"at that: {own.GUARD}")  # fmt: skip
    assert "Traceback" not in printed

    guarded = f'if __name__ == "__main__":\n    sys.exit({call.strip()})\n'
    write("script.py", f"import sys\n{STARTS}{METHOD}{GOOD}{guarded}")
    code, printed = run("script.py", module=False)
    assert code == 0, printed
    assert len(runner.load(tmp_path / "continual")) == 2


def test_an_import_that_takes_long_is_explained(capsys, monkeypatch):
    monkeypatch.setattr(own, "LONG", 0.05)
    write("m.py", f"import time\n{METHOD}{GOOD}time.sleep(0.5)\n")
    own.register("method", "m.py:M")
    assert capsys.readouterr().err == (
        "m.py:M: its import has taken 0.05 s, and every worker process imports it too: "
        f"{own.GUARD}\n"
    )


@pytest.mark.parametrize("strengths", [[1e-3], [3e-4], [1e-4, 1e-3, 1e-2]])
def test_strengths_are_labelled_by_decades_alone(strengths):
    runs = [{"accuracy": 0.5}, {"accuracy": 0.6}]
    arms = {Arm(method, x): runs for method in ("l2", "spectral") for x in strengths}
    figure = Figure()
    axes = figure.subplots()
    styles = dict.fromkeys(("l2", "spectral"), Style("C0", "o", "-"))
    figures._sensitivity(axes, arms, styles, lambda run: run["accuracy"], 1.0)
    figure.draw_without_rendering()
    assert all(not text.get_text() for text in axes.get_xticklabels(minor=True))
    low, high = axes.get_xlim()
    assert sum(low <= 10.0**i <= high for i in range(-6, 0)) >= 1
