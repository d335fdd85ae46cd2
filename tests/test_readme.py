"""The README keeps its promises."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_quickstart_works_when_pasted(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "2 matrices" in printed
    assert "0.weight (128, 64)" in printed


def test_the_ci_runs_exactly_the_test_command():
    commands = re.findall(r"```\n(python3 -m venv .*?)\n```", README, re.S)
    assert len(commands) == 2
    steps = commands[1].split(" && ")
    ci = (ROOT / ".ci" / "run").read_text()
    for step in steps[2:]:
        assert f"\n{step}\n" in ci, step


def test_the_table_of_figures_is_that_of_the_results():
    report = pytest.importorskip("bench.report", reason="needs the bench folder")
    (path,) = re.findall(r"\]\((bench/results/\S+)/report\.md\)", README)
    run = report.load(sorted((ROOT / path).glob("*.json")))
    assert report.summary(run) in README
    written = (ROOT / path / "report.md").read_text()
    assert written.startswith(report.tables(run))
    assert all((ROOT / path / name).exists() for name in re.findall(r"\]\((\S+)\)", written))


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_links_and_pictures_exist(target):
    assert (ROOT / target).exists()
