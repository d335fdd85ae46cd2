"""The documents are true: their code runs, their commands exist, their links lead somewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from functools import lru_cache

import pytest
import torch.utils.cpp_extension  # noqa: F401, before other tests load parts of setuptools
import yaml

from tests import ROOT, TIMEOUT
from tests.support import documents

GUIDE = [name for name in documents.documents() if name.startswith("docs/")]
# Documents in which code runs; the others, of results, describe what once was.
LIVE = [name for name in documents.documents() if not name.startswith("bench/results/")]
LANGUAGES = {"python", "sh", "text", "mermaid", "bibtex"}
# What is run beside the Python of its page; of other commands it is checked that they exist.
RUN = ("spectral-kernels env", "spectral-kernels plot")
# Modules that a page imports, with what its first import may need.
NEEDED = ("tensorboard", "wandb", "transformers", "lightning", "stable_baselines3")


@pytest.mark.takes_seconds
@pytest.mark.parametrize("page", [p for p in GUIDE if documents.blocks(p)])
def test_blocks_of_a_page_run_in_their_order(page, seeded, tmp_path, monkeypatch):
    found = documents.blocks(page)
    for module in NEEDED:
        if any(re.search(rf"^(import|from) .*\b{module}\b", b.text, re.M) for b in found):
            pytest.importorskip(module, reason=f"{page} needs {module}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    names = {"__name__": "__main__"}
    for block in found:
        if block.language == "python":
            code = compile("\n" * block.line + block.text, str(ROOT / page), "exec")
            exec(code, names)
        elif block.language == "sh":
            for command in block.text.strip().split(" && "):
                if command.startswith(RUN):
                    run(["-m", "spectral_kernels", *command.split()[1:]])


def run(arguments, cwd=None):
    """Run Python with arguments; return what it has printed."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, timeout=TIMEOUT, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("page", LIVE)
def test_a_block_names_its_language_and_is_not_indented(page):
    unknown = [b.line for b in documents.blocks(page) if b.language not in LANGUAGES]
    assert not unknown
    indented = re.findall(r"(?:^|\n)\n    (?! *[*\d-])[^\n]+", documents.prose(page))
    assert not indented, "a fence makes it a block that is checked"


COMMANDS = sorted({(page, tuple(words)) for page in LIVE for words in documents.commands(page)})


@lru_cache
def help_of(*arguments):
    """Return what a program of ours says about its options."""
    return run(["-m", *arguments, "--help"], cwd=ROOT)


def program_and_options(words):
    """Return the arguments of ``python -m`` for a program, and the words after them."""
    first, rest = words[0], list(words[1:])
    if first == "spectral-kernels":
        return ["spectral_kernels", rest[0]], rest[1:]
    if first == "pytest" or rest[:2] == ["-m", "pytest"]:
        rest = rest if first == "pytest" else rest[2:]
        return ["pytest", *rest], rest  # folders and plugins bring options of their own
    if first == "torchrun":
        return ["torch.distributed.run"], rest
    return [rest[1]], rest[2:]


@pytest.mark.takes_seconds
@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(w) for _, w in COMMANDS])
def test_a_command_and_its_options_exist(page, words):
    if words[0] == "git" or words[1:3] == ("-m", "venv"):
        return
    if words[0] == "pip":
        asked = [re.search(r"\[(.*)\]", word) for word in words if word.startswith(".[")]
        assert {name for found in asked for name in found[1].split(",")} <= documents.extras()
        return
    files = [word for word in words if word.endswith(".py")]
    assert all((ROOT / file).is_file() for file in files), files
    program, rest = program_and_options(words)
    if importlib.util.find_spec(program[0]) is None:
        pytest.skip(f"{program[0]} is not installed")
    options = [word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)]
    if options or program[0].startswith(("bench", "spectral_kernels")):
        known = set(re.findall(r"(?<![\w-])--?[\w-]+", help_of(*program)))
        assert set(options) <= known


@pytest.mark.parametrize("page", documents.documents())
def test_links_lead_somewhere(page):
    for path, anchor in documents.links(page):
        assert path.exists(), path
        if anchor and path.suffix == ".md":
            assert anchor in documents.anchors(path), f"{path.name}#{anchor}"


def test_the_contents_name_every_page():
    contents = {path.name for path, _ in documents.links("docs/README.md")}
    assert {page.partition("/")[2] for page in GUIDE} - {"README.md"} <= contents


def test_the_citation_names_the_version_of_the_changelog():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert citation["version"] == version


def test_pictures_are_shown_somewhere():
    shown = {p.resolve() for page in documents.documents() for p, _ in documents.links(page)}
    unused = [p.name for p in (ROOT / "docs").glob("*.png") if p.resolve() not in shown]
    assert not unused


@pytest.mark.takes_seconds
def test_sharded_weights_work_when_pasted_on_two_ranks(tmp_path):
    (block,) = [b for b in documents.blocks("docs/sharded.md") if b.language == "python"]
    program = tmp_path / "two_ranks.py"
    program.write_text(block.text + DRIVER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = run([*torchrun, str(program)], cwd=ROOT)
    assert printed.count("12 matrices, another weight") == 2


DRIVER = """

import torch.distributed as dist

dist.init_process_group("gloo")
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
model = nn.TransformerEncoder(layer, 2)
optimizer = build(model)
before = model.layers[0].linear1.weight.full_tensor().clone()
model(torch.randn(3, 4, 16)).square().mean().backward()
optimizer.step()
after = model.layers[0].linear1.weight.full_tensor()
optimizer.regularizer.check_ranks()
another = "another" if not torch.equal(before, after) else "the same"
print(f"{len(optimizer.sigma)} matrices, {another} weight", flush=True)
dist.barrier()
dist.destroy_process_group()
"""
