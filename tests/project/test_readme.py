"""The README's code runs, and its commands, figures and links are correct."""

import re

import pytest
import torch
import torch.distributed as dist

from tests import ROOT

README = (ROOT / "README.md").read_text()
PASTED = ("Quickstart", "Optimizers with the penalty in their step", "Sharded weights")


def pasted(title):
    """Run the only block of Python below a title."""
    (section,) = re.findall(rf"\n## {title}\n(.*?)\n## ", README, re.S)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_quickstart_works_when_pasted(capsys):
    pasted(PASTED[0])
    printed = capsys.readouterr().out
    assert "2 matrices" in printed
    assert "0.weight (128, 64)" in printed


def test_the_optimizer_works_when_pasted(capsys):
    names = pasted(PASTED[1])
    assert "['0.weight', '2.weight'] tensor([" in capsys.readouterr().out
    exact = torch.linalg.svdvals(names["model"][0].weight.detach())[0]
    assert 0.95 * exact < names["optimizer"].sigma[0] <= 1.0001 * exact


def test_the_sharded_model_works_when_pasted():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = torch.nn.TransformerEncoder(layer, 2)
        optimizer = pasted(PASTED[2])["build"](model)
        before = model.layers[0].linear1.weight.full_tensor().clone()
        model(torch.randn(3, 4, 16)).square().mean().backward()
        optimizer.step()
        assert not torch.equal(model.layers[0].linear1.weight.full_tensor(), before)
        assert len(optimizer.sigma) == 12
    finally:
        dist.destroy_process_group()


def test_no_other_block_of_python_is_there():
    assert README.count("```python\n") == len(PASTED)


def test_the_ci_runs_exactly_the_test_command():
    commands = re.findall(r"```\n(python3 -m venv .*?)\n```", README, re.S)
    assert len(commands) == 2
    steps = commands[1].split(" && ")
    ci = (ROOT / ".ci" / "run").read_text()
    for step in steps[2:]:
        assert f"\n{step}\n" in ci, step


REPORTS = re.findall(r"\]\((bench/results/\S+)/report\.md\)", README)


@pytest.mark.parametrize("path", REPORTS)
def test_reports_are_those_of_the_results_beside_them(path):
    results = pytest.importorskip("bench.report.results", reason="needs the bench folder")
    tables = pytest.importorskip("bench.report.tables", reason="needs the bench folder")
    run = results.load(sorted((ROOT / path).glob("*.json")))
    written = (ROOT / path / "report.md").read_text()
    assert written.startswith(tables.tables(run))
    assert all((ROOT / path / name).exists() for name in re.findall(r"\]\((\S+)\)", written))


def test_the_tables_of_figures_are_those_of_the_results():
    results = pytest.importorskip("bench.report.results", reason="needs the bench folder")
    tables = pytest.importorskip("bench.report.tables", reason="needs the bench folder")
    run = results.load(sorted((ROOT / REPORTS[0]).glob("*.json")))
    assert tables.summary(run) in README
    report = (ROOT / REPORTS[0] / "report.md").read_text()
    sections = re.findall(r"^### optimizer_step.*?(?=^###)", report, re.M | re.S)
    rows = [row for section in sections for row in re.findall(r"^\|.*", section, re.M)]
    assert len(rows) == 12
    assert all(f"\n{row}\n" in README for row in rows)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_links_and_pictures_exist(target):
    assert (ROOT / target).exists()
