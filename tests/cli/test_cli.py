import contextlib
import os
import signal
import subprocess
import time

import pytest
import torch

from spectral_kernels import cli
from spectral_kernels.backends import choice
from tests import TIMEOUT
from tests.support import processes

EXTRAS = ("sklearn", "matplotlib", "rich")


@pytest.fixture
def extras():
    for name in EXTRAS:
        pytest.importorskip(name)


def wait_until_gone(group):
    deadline = time.monotonic() + TIMEOUT
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
        pytest.fail("processes were left behind")


def test_env_names_versions_and_every_backend(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in out.splitlines())
    assert rows["torch"].strip() == torch.__version__
    assert rows["threads"].strip() == str(torch.get_num_threads())
    for name in choice.NAMES:
        reason = choice.unavailable(name)
        assert rows[f"backend {name}"].strip() == ("works" if reason is None else f"no: {reason}")
    if choice.unavailable("cpu") is None:
        native = choice.native_module().cpu
        assert rows["instruction set"].split()[0] == native.level()
        assert all(level in rows["instruction set"] for level in native.levels())
        why = native.without_openmp
        assert rows["openmp"].strip() == (f"no, one thread: {why}" if why else "yes")


def test_env_says_why_a_backend_cannot_run(capsys, monkeypatch):
    why = {"cpu": "the compiled module is missing"}
    monkeypatch.setattr(choice, "unavailable", why.get)
    assert cli.main(["env"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["backend cpu"].strip() == "no: the compiled module is missing"
    assert rows["backend reference"].strip() == "works"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "command"),
        (
            ["demo", "--tasks", "0"],
            "argument --tasks: expected an integer from 1 to 2**63 - 1, got '0'",
        ),
        (
            ["demo", "--epochs", "x"],
            "argument --epochs: expected an integer from 1 to 2**63 - 1, got 'x'",
        ),
        (["demo", "--seed", "-1"], "got '-1'"),
        (["demo", "--seed", str(2**64)], "argument --seed: expected an integer from 0"),
        (["demo", "--out", "demo.jpg"], "argument --out: expected a name that ends in "),
        (
            ["demo", "--out", "no/such/folder/demo.png"],
            "argument --out: expected a file in a folder",
        ),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, said):
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.takes_seconds
@pytest.mark.parametrize("command", ["env", "inspect"])
def test_a_reader_that_goes_away_is_no_traceback(command, request):
    arguments = [request.getfixturevalue("saved")] if command == "inspect" else []
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        processes.command(command, *arguments),
        stdout=write, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", EXTRAS)
def test_a_missing_extra_is_one_line(extras, tmp_path, name):
    done = processes.run_without(name, "demo", "--out", tmp_path / "demo.png")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"spectral-kernels: the demo needs {name}: pip install 'spectral_kernels[demo]'\n"
    )


@pytest.mark.takes_seconds
def test_a_small_demo_prints_every_arm_and_writes_a_picture(extras, tmp_path):
    path = tmp_path / "demo.png"
    done = subprocess.run(
        processes.command("demo", "--tasks", 2, "--epochs", 1, "--out", path),
        capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    table = done.stdout[done.stdout.index("singular") :]
    arms = ["none", "L2", "spectral", "SpectralAdamW"]
    assert [word for word in table.split() if word in arms] == arms
    for arm in arms:
        assert f"{arm:13}  task 2/2" in done.stdout
    assert str(path) in done.stdout
    assert processes.png_size(path) == (1400, 600)


def test_a_failing_arm_is_an_exit_code(extras, capsys, monkeypatch, tmp_path):
    from spectral_kernels.cli.demo import experiment

    def fail(*_):
        raise experiment.WorkerError("the 'L2' arm died, exit code -9")

    monkeypatch.setattr(experiment, "run", fail)
    assert cli.main(["demo", "--out", str(tmp_path / "demo.png")]) == 1
    assert capsys.readouterr().err == "spectral-kernels: the 'L2' arm died, exit code -9\n"
    assert not (tmp_path / "demo.png").exists()


def test_the_traceback_of_an_arm_keeps_its_lines(extras, capsys, monkeypatch, tmp_path):
    from spectral_kernels.cli.demo import experiment

    def fail(*_):
        raise experiment.WorkerError("the 'L2' arm failed:\nTraceback\n  \x1b[2J")

    monkeypatch.setattr(experiment, "run", fail)
    assert cli.main(["demo", "--out", str(tmp_path / "demo.png")]) == 1
    expected = "spectral-kernels: the 'L2' arm failed:\nTraceback\n  \\x1b[2J\n"
    assert capsys.readouterr().err == expected


def test_a_demo_whose_picture_cannot_be_written_shows_its_table(
    extras, capsys, monkeypatch, tmp_path
):
    from spectral_kernels.cli.demo import experiment

    folder = tmp_path / "folder"
    folder.mkdir()
    done = [experiment.TaskResult(0.5, (1.0,) * 4, 1.0)]

    def run(*_):
        folder.rmdir()
        return experiment.Results(1, 1, 0, {"none": done})

    monkeypatch.setattr(experiment, "run", run)
    assert cli.main(["demo", "--out", str(folder / "demo.png")]) == 1
    out, err = capsys.readouterr()
    assert "0.500" in out
    assert "picture" not in out
    assert err == f"spectral-kernels: {folder / 'demo.png'}: No such file or directory\n"


def test_ctrl_c_before_any_task_is_finished(extras, tmp_path, capsys, monkeypatch):
    from spectral_kernels.cli.demo import experiment

    results = experiment.Results(3, 1, 0, {"none": [], "L2": []}, interrupted=True)
    monkeypatch.setattr(experiment, "run", lambda *_: results)
    assert cli.main(["demo", "--out", str(tmp_path / "demo.png")]) == 130
    said = "spectral-kernels: interrupted before any task was finished\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "demo.png").exists()


@pytest.mark.takes_seconds
def test_ctrl_c_in_a_terminal_keeps_finished_tasks_and_leaves_nothing_behind(extras, tmp_path):
    path = tmp_path / "demo.png"
    arguments = ["demo", "--tasks", 200, "--epochs", 2, "--out", path]
    shown, group = processes.interrupted(arguments, rb"task +(?!1/)\d+/200")
    processes.check_ending(shown)
    assert shown.rindex(b"singular") > shown.rindex(b"\x1b[?25h")
    assert processes.png_size(path) == (1400, 600)
    wait_until_gone(group)
