"""The README: its code runs, its commands are those of the CI, its figures are those measured."""

import re

import pytest
import torch
from torch import nn

from spectral_kernels import SpectralRegularizer
from tests import ROOT
from tests.support import documents

README = documents.text_of("README.md")
MEASURED = documents.text_of("docs/measurements.md")
BEFORE_AND_AFTER = documents.blocks("README.md")[0].text
QUICKSTART = documents.quickstart()


def test_no_other_block_of_python_is_there():
    found = [b.text for b in documents.blocks("README.md") if b.language == "python"]
    assert found == [BEFORE_AND_AFTER, QUICKSTART]


def test_it_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 130


def test_before_and_after_have_the_same_gradient(seeded):
    """Of the exact SVD and of the power iteration, once its vectors have settled."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5))
    weights = [layer.weight for layer in model]
    with torch.no_grad():
        for weight in weights:
            u, sigmas, v = torch.linalg.svd(weight, full_matrices=False)
            sigmas[0] = 3  # well above the others: power iteration has settled after its warm-up
            weight.copy_(u * sigmas @ v)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    names = {"torch": torch, "model": model, "weights": weights, "optimizer": optimizer,
             "loss": torch.zeros(()), "SpectralRegularizer": SpectralRegularizer}  # fmt: skip
    exec(compile(BEFORE_AND_AFTER, "README.md", "exec"), names)
    names["loss"].backward()
    expected = [weight.grad.clone() for weight in weights]
    before = [weight.detach().clone() for weight in weights]
    optimizer.zero_grad()
    optimizer.step()  # of the penalty alone, with lr = 1
    for old, new, gradient in zip(before, weights, expected, strict=True):
        assert torch.allclose(old - new, gradient, atol=1e-3 * float(gradient.abs().max()))


def test_the_quickstart_works_when_pasted(capsys):
    names = {}
    exec(compile(QUICKSTART, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "2 matrices" in printed
    assert "0.weight (128, 64)" in printed
    sigma = names["spectral_norms"](names["model"])["0.weight"]
    assert 0.9 * sigma < names["reg"].sigma[0] <= 1.0001 * sigma


@pytest.mark.takes_seconds
def test_the_quickstart_works_in_a_notebook_and_says_when_a_cell_is_run_twice():
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    cells = QUICKSTART.split("\n\n")
    (twice,) = [cell for cell in cells if "reg.attach(" in cell]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute(cwd=str(ROOT))
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.outputs)
    assert "0.weight (128, 64)" in printed

    again = [nbformat.v4.new_code_cell(cell) for cell in (*cells[:3], twice)]
    notebook = nbformat.v4.new_notebook(cells=again)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"replace=True"):
        nbclient.NotebookClient(notebook, kernel_name="python3").execute(cwd=str(ROOT))


def test_the_ci_runs_exactly_the_test_command():
    _, command = documents.installations()
    ci = (ROOT / ".ci" / "run").read_text()
    for step in command.split(" && ")[2:]:
        assert f"\n{step}\n" in ci, step


REPORTS = re.findall(r"\]\((\.\./bench/results/\S+)/report\.md\)", MEASURED)


def results():
    """Return the modules that read and write reports."""
    reason = "needs the bench folder"
    return (pytest.importorskip("bench.report.results", reason=reason),
            pytest.importorskip("bench.report.tables", reason=reason))  # fmt: skip


@pytest.mark.parametrize("path", REPORTS)
def test_reports_are_those_of_the_results_beside_them(path):
    read, tables = results()
    folder = ROOT / "docs" / path
    run = read.load(sorted(folder.glob("*.json")))
    written = (folder / "report.md").read_text()
    assert written.startswith(tables.tables(run))
    assert all((folder / name).exists() for name in re.findall(r"\]\((\S+)\)", written))


def test_the_tables_of_figures_are_those_of_the_results():
    read, tables = results()
    folder = ROOT / "docs" / REPORTS[0]
    run = read.load(sorted(folder.glob("*.json")))
    summary = tables.summary(run)
    assert summary in MEASURED
    report = (folder / "report.md").read_text()
    sections = re.findall(r"^### optimizer_step.*?(?=^###)", report, re.M | re.S)
    rows = [row for section in sections for row in re.findall(r"^\|.*", section, re.M)]
    assert len(rows) == 12
    assert all(f"\n{row}\n" in MEASURED for row in rows)
    for model in ("mlp", "vit_b"):  # the README's rows of a CPU
        row = re.search(rf"^\| {model} \| .*", summary, re.M)[0].split(" | ")
        kind, rival, ours = *row[3].split(", "), row[4].strip("*")
        rival += {"compiled": ", compiled loop", "in place": ", loop in place"}[kind]
        assert f" | {ours} | {rival} | {row[6]} times" in README
