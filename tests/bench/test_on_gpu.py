"""The command that measures on a GPU: budgets, kills, what is kept, and a rehearsal on a CPU."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import on_gpu
from bench.gpu import inputs, stages, table
from bench.gpu.environment import Device
from bench.gpu.lines import FILE, Lines, read
from bench.gpu.stages import Stage
from spectral_kernels.backends import choice
from tests import ROOT, TIMEOUT
from tests.support.processes import is_gone, wait_for

KEYS = {"stage", "case", "dtype", "backend", "what", "value", "unit", "dry_run"}


def stage(name, code, seconds=100.0, **options):
    return Stage(name, seconds, lambda until: [sys.executable, "-c", code], **options)


def run(folder, *own, budget=400.0):
    return stages.run(own, folder, budget, dry_run=True, say=lambda text: None)


def ended(folder):
    return {x["stage"]: x for x in read(folder)[0] if x["what"] == "ended"}


# Starts a child that sleeps, writes a line and the child's process number, then sleeps.
SLEEPS = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
folder = Path({folder!r})
from bench.gpu.lines import Lines
Lines(folder, "slow", True).put("bandwidth of copy", 123.4, "GB/s")
(folder / "child.tmp").write_text(str(child.pid))
(folder / "child.tmp").rename(folder / "child")
time.sleep(600)
"""

# ------------------------------------------------------------------------------------- the stages


@pytest.mark.takes_seconds
def test_a_stage_over_its_limit_is_killed_with_its_children_and_its_lines_are_kept(tmp_path):
    code = SLEEPS.format(folder=str(tmp_path))
    assert run(tmp_path, stage("slow", code), budget=4.0) == stages.KILLED
    wait_for(lambda: is_gone(int((tmp_path / "child").read_text())))
    lines, unreadable = read(tmp_path)
    assert unreadable == 0
    assert [x["value"] for x in lines if x["what"] == "bandwidth of copy"] == [123.4]
    assert ended(tmp_path)["slow"]["outcome"] == "killed"
    assert "slow: killed, 4 of 4 s" in table.table(lines)


def test_stages_after_one_that_fails_run_and_the_exit_code_is_that_of_the_first(tmp_path):
    own = [stage(str(code), f"raise SystemExit({code})") for code in (0, 3, 4)]
    assert run(tmp_path, *own) == 3
    outcomes = {name: line["outcome"] for name, line in ended(tmp_path).items()}
    assert outcomes == {"0": "ok", "3": "exit code 3", "4": "exit code 4"}


@pytest.mark.takes_seconds
def test_the_whole_takes_no_longer_than_the_budget(tmp_path):
    start = time.monotonic()
    own = [stage(name, "import time; time.sleep(600)") for name in "abc"]
    own.append(stage("background", "import time; time.sleep(600)", background=True))
    assert run(tmp_path, *own, budget=3.0) == stages.KILLED
    assert time.monotonic() - start < 4  # one second of these for a busy machine
    assert {name: line["outcome"] for name, line in ended(tmp_path).items()} == dict.fromkeys(
        ["a", "b", "c", "background"], "killed"
    )


@pytest.mark.takes_seconds
def test_a_stage_for_which_no_time_is_left_is_written_down(tmp_path):
    own = [stage("slow", "import time; time.sleep(600)", 1e6), stage("late", "", 1)]
    assert run(tmp_path, *own, budget=2.0) == stages.KILLED
    assert ended(tmp_path)["late"]["reason"] == "the budget was used up"
    assert "late: not started" in table.table(read(tmp_path)[0])


def test_limits_add_up_to_what_is_left_and_what_is_left_over_is_spread():
    own = [Stage(name, seconds, list) for name, seconds in (("a", 10), ("b", 30), ("c", 60))]
    background = Stage("d", 40, list, background=True)
    left = 200.0
    for i, expected in enumerate((20, 60, 120)):
        found = stages.limit(own[i], [background, *own[i:]], left, 200)
        assert found == pytest.approx(expected)
        left -= found
    assert left == pytest.approx(0)
    # The first one leaves 15 of its 20 seconds over.
    assert stages.limit(own[1], own[1:], 195.0, 200) == pytest.approx(65)
    assert stages.limit(background, [background, *own], 200.0, 200) == pytest.approx(20)
    assert stages.limit(background, [background], 5.0, 200) == pytest.approx(5)


def test_an_error_of_the_command_itself_leaves_nothing_running(tmp_path):
    def broken(until):
        wait_for((tmp_path / "child").exists)
        raise OSError("no room")

    own = [stage("slow", SLEEPS.format(folder=str(tmp_path)), background=True),
           Stage("broken", 1, broken)]  # fmt: skip
    with pytest.raises(OSError, match="no room"):
        run(tmp_path, *own)
    wait_for(lambda: is_gone(int((tmp_path / "child").read_text())))


def test_a_stage_waits_for_what_it_needs_while_others_run(tmp_path):
    def wants(name):  # ends when the stage of that name has begun
        return (f"import time, pathlib\nwhile not pathlib.Path({str(tmp_path / name)!r}).exists():"
                "\n    time.sleep(0.02)")  # fmt: skip

    def begins(name):
        return f"import pathlib; pathlib.Path({str(tmp_path / name)!r}).touch()"

    own = [stage("build", wants("other"), background=True),
           stage("needy", begins("needy"), needs=("build", "not in this run")),
           stage("other", begins("other"))]  # fmt: skip
    assert run(tmp_path, *own) == 0
    order = [x["stage"] for x in read(tmp_path)[0] if x["what"] == "started"]
    assert order == ["build", "other", "needy"]


def test_a_stage_ends_with_its_children_when_the_command_is_killed(tmp_path):
    inner = ("from bench.gpu.group import end_with_parent\nend_with_parent()\n") + SLEEPS.format(
        folder=str(tmp_path)
    )
    outer = (
        "import sys; from pathlib import Path; from bench.gpu import stages\n"
        f"one = stages.Stage('slow', 1, lambda until: [sys.executable, '-c', {inner!r}])\n"
        f"stages.run([one], Path({str(tmp_path)!r}), 400, dry_run=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", outer], cwd=ROOT)
    try:
        wait_for((tmp_path / "child").exists)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: is_gone(int((tmp_path / "child").read_text())))


# ------------------------------------------------------------------------------------ the command


def test_only_and_no_build_choose_the_stages(tmp_path):
    def names(*options):
        arguments = on_gpu._parser().parse_args([str(tmp_path), *options])
        return [x.name for x in on_gpu.chosen(arguments, tmp_path)]

    assert names() == list(on_gpu.SECONDS)
    assert names("--no-build") == [x for x in on_gpu.SECONDS if x != "build"]
    assert names("--only", "loops", "--only", "versions") == ["versions", "loops"]
    assert set(on_gpu.CASES) == set(inputs.CASES)


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--only", "no such"], "no such"), (["--cases", "vit_b,x"], "expected some of vit_b"),
     (["--budget", "0"], "expected seconds from 10 to 86400, got '0'")],
)  # fmt: skip
def test_options_that_are_wrong_are_refused(tmp_path, capsys, options, said):
    with pytest.raises(SystemExit) as error:
        on_gpu.main([str(tmp_path), *options])
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_without_a_device_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(on_gpu, "cuda_device", lambda: None)
    assert on_gpu.main([str(tmp_path / "new")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_results_that_do_not_go_together_do_not_go_into_one_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(on_gpu, "cuda_device", lambda: Device("some GPU", "9.0", 2**36))
    own = {"sources": on_gpu.sources()}
    Lines(tmp_path, "run", True).put("environment", None, None, environment=own)
    before = (tmp_path / FILE).read_text()
    for options, said in (
        (["--dry-run"], "expected a new folder"),
        (["--only", "loops"], "a dry run and of a GPU"),
    ):
        assert on_gpu.main([str(tmp_path), *options]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(on_gpu, "sources", lambda: "others")
    assert on_gpu.main([str(tmp_path), "--dry-run", "--only", "loops"]) == 2
    assert "expected results of these sources, got others" in capsys.readouterr().err
    assert (tmp_path / FILE).read_text() == before


def test_told_to_stop_it_shows_the_table_and_leaves_nothing_running(tmp_path):
    command = [sys.executable, "-m", "bench.on_gpu", str(tmp_path), "--dry-run", "--only=versions"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: any(x["what"] == "started" for x in read(tmp_path)[0]))
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + signal.SIGTERM
    assert "versions: cut off" in shown

    def of_this_run(path):
        try:
            return str(tmp_path).encode() in path.read_bytes()
        except OSError:
            return False

    wait_for(lambda: not any(map(of_this_run, Path("/proc").glob("[0-9]*/cmdline"))))


@pytest.mark.takes_seconds
@pytest.mark.slow
def test_a_rehearsal_of_cheap_stages(tmp_path):
    if (reason := choice.unavailable("triton")) is not None and "CUDA device" not in reason:
        pytest.skip(reason)
    command = [sys.executable, "-m", "bench.on_gpu", str(tmp_path), "--dry-run", "--budget=120",
               "--only=versions", "--only=kernels", "--cases=mlp"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT,
                          check=False)  # fmt: skip
    lines, unreadable = read(tmp_path)
    assert unreadable == 0
    assert all(set(x) >= KEYS and x["dry_run"] is True for x in lines)
    assert [x["what"] for x in lines].count("environment") == 1
    timed = {(x["backend"], x["what"]) for x in lines if x["stage"] == "kernels" and x["value"]}
    wanted = {("triton", what) for what in ("gram_matvec", "finish", "step", "host", "first step")}
    assert timed >= wanted | {(None, "floor"), (None, "floor_copy"), ("inplace_loop", "step")}
    assert {x["case"] for x in lines} == {None, "mlp"}
    assert any(x["what"] == "replayed" and "no CUDA graphs" in x["reason"] for x in lines)
    assert done.returncode == int(any(x.get("failed") for x in lines))
    assert len(list(tmp_path.iterdir())) <= 8
    shown = (tmp_path / "table.md").read_text()
    assert shown.startswith("```\nDRY RUN")
    assert shown.strip("`\n") in done.stdout


# --------------------------------------------------------------------------------------- the table
