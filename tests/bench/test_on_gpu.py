"""The command that measures on a GPU: budgets, kills, what is kept, and a rehearsal on a CPU."""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import on_gpu
from bench.gpu import __main__ as one_stage
from bench.gpu import checks, inputs, job, loops, measure, outside, parallel, stages, table
from bench.gpu.environment import Device
from bench.gpu.lines import FILE, Lines, read
from bench.gpu.stages import Stage
from bench.support import baselines
from spectral_kernels.backends import choice
from spectral_kernels.backends.base import Reference
from tests import ROOT, TIMEOUT

KEYS = {"stage", "case", "dtype", "backend", "what", "value", "unit", "dry_run"}


def stage(name, code, seconds=100.0, **options):
    return Stage(name, seconds, lambda until: [sys.executable, "-c", code], **options)


def run(folder, *own, budget=400.0):
    return stages.run(own, folder, budget, dry_run=True, say=lambda text: None)


def ended(folder):
    return {x["stage"]: x for x in read(folder)[0] if x["what"] == "ended"}


def is_gone(pid):
    """Return whether a process has ended (it may be left as a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < TIMEOUT
        time.sleep(0.02)


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
    [(["--only", "no such"], "no such"), (["--cases", "vit_b,x"], "got x; accepted are vit_b"),
     (["--budget", "0"], "got '0'; accepted are seconds")],
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
        (["--dry-run"], "has results"),
        (["--only", "loops"], "a dry run and of a GPU"),
    ):
        assert on_gpu.main([str(tmp_path), *options]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(on_gpu, "sources", lambda: "others")
    assert on_gpu.main([str(tmp_path), "--dry-run", "--only", "loops"]) == 2
    assert "other sources" in capsys.readouterr().err
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


def full(folder):
    """Lines of a run in which everything was measured, and much failed."""
    lines = Lines(folder, "run", False)
    lines.put("environment", None, None, environment={"device": "NVIDIA H100", "torch": "2.11"})
    what = {"kernels": ("gram_matvec_replayed", "finish_replayed", "step", "step_replayed", "host"),
            "optimizers": ("AdamW step", "host"), "loops": ("step", 'step, "auto"')}  # fmt: skip
    for name in on_gpu.SECONDS:
        lines = Lines(folder, name, False)
        lines.put("started", 30.0, "s")
        lines.put("bandwidth of copy", 3000.0, "GB/s")
        for case, dtype in inputs.KERNELS:
            where = {"case": case, "dtype": dtype}
            if name == "kernels":
                lines.put("floor", 50.0, "us", **where, percent_of_copy=99.0, cold=case != "mlp")
            for backend in ("triton", "cuda", "torch", "attached"):
                for one in what.get(name, ()):
                    more = {"beside": "autograd_loop+inplace_loop"} if one == "step" else {}
                    more = more if name == "loops" else {"percent_of_copy": 73.4}
                    if "auto" in one:
                        more = {"beside": "variants", "times_one": 3.25}
                    lines.put(one, 79.125, "us", backend=backend, **where, **more)
                lines.failed("group", f"{case} {name} " + 100 * "long ", backend=backend, **where)
        if name in ("cuda", "triton"):
            for dtype in ("float32", "bfloat16", "float16"):
                lines.put("1 vector", 0.5, "s", dtype=dtype, backend=name)
            lines.failed("4 vectors", "sigma is wrong", dtype="float16", backend=name)
        lines.put("ended", 29.0, "s", outcome="ok")
    return read(folder)


def test_the_table_is_short_whatever_happened(tmp_path):
    lines, _ = full(tmp_path)
    text = table.table(lines)
    assert len(text.splitlines()) <= 60
    assert len(text) < 11_000
    assert "llama_1b bf16" in text
    assert "79.1  73%" in text
    assert "kernels: ok, 29 of 30 s" in text
    assert "ok: 1 vector (fp32 bf16 fp16); FAILED: 4 vectors (fp16)" in text
    assert "FAILED: build triton group vit_b bf16 (and 7 more): vit_b build" in text
    assert "more: grep reason results.jsonl" in text
    assert "DRY RUN" not in text


def test_the_table_of_a_file_that_was_cut_off(tmp_path, capsys):
    full(tmp_path)
    whole = (tmp_path / FILE).read_text()
    where = whole.index('"stage": "optimizers"')
    (tmp_path / FILE).write_text(whole[: where + 40])
    assert on_gpu.main([str(tmp_path), "--table"]) == 0
    text = capsys.readouterr().out
    assert "cut off: 1 lines could not be read" in text
    assert "kernels: ok" in text
    assert "optimizers:" not in text
    assert "79.1  73%" in text


def test_the_table_of_a_stage_that_was_cut_off(tmp_path):
    Lines(tmp_path, "loops", False).put("started", 30.0, "s")
    assert "loops: cut off" in table.table(read(tmp_path)[0])


def test_a_table_without_lines(tmp_path):
    assert "unknown device" in table.table(*read(tmp_path))


# ------------------------------------------------------------------------------- inside the stages


def test_timing_stops_at_its_share_but_after_three_rounds():
    found = measure.in_turn_for({"slow": lambda: time.sleep(0.02)}, 0.0, "cpu")
    assert len(found["slow"].durations) == 3
    start = time.monotonic()
    found = measure.in_turn_for({"slow": lambda: time.sleep(0.02)}, 0.5, "cpu", {"slow": 4})
    assert time.monotonic() - start < 1.5
    assert 3 < len(found["slow"].durations) <= 25
    assert found["slow"].median == pytest.approx(0.005, rel=0.5)


def test_the_time_of_enqueueing_does_not_count_waiting():
    def busy():
        end = time.thread_time() + 0.005
        while time.thread_time() < end:
            pass

    assert 0 <= measure.host_seconds(lambda: time.sleep(0.01), "cpu") < 0.002
    assert 0.004 < measure.host_seconds(busy, "cpu") < 0.02


def a_job(folder, seconds=100.0, **options):
    return job.Job(Lines(folder, "kernels", True), "cpu", time.monotonic() + seconds, **options)


@pytest.mark.takes_seconds
def test_groups_get_equal_parts_and_what_is_not_begun_is_written_down(tmp_path):
    wanted = [("mlp", "float32"), ("vit_b", "bfloat16"), ("gpt2", "bfloat16")]
    own = a_job(tmp_path, cases=("mlp", "vit_b"))
    seconds = {case: seconds for case, _, seconds in own.groups(wanted)}
    assert seconds == pytest.approx({"mlp": 47.5, "vit_b": 95}, rel=0.05)
    assert list(a_job(tmp_path, seconds=0.1).groups(wanted)) == []
    reasons = [x["reason"] for x in read(tmp_path)[0]]
    assert reasons == ["the stage's time is used up"] * 3


@pytest.mark.takes_seconds
def test_a_stage_goes_on_without_the_backend_that_broke_the_device(tmp_path, monkeypatch):
    commands = []
    own = a_job(tmp_path, without=("mlp/float32/cuda",))
    monkeypatch.setattr(os, "execv", lambda program, command: commands.append(command))
    own.go_on_where_the_device_broke("vit_b", torch.bfloat16, "triton")
    assert commands == []  # the device works

    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "synchronize", broken)
    own.go_on_where_the_device_broke("vit_b", torch.bfloat16, "triton")
    (command,) = commands
    assert "--without=mlp/float32/cuda,vit_b/bfloat16/triton" in command
    assert "--after=vit_b/bfloat16" in command
    assert f"--until={own.until}" in command
    again = a_job(tmp_path, without=("vit_b/bfloat16/triton",), after="vit_b/bfloat16")
    assert [case for case, *_ in again.groups(inputs.KERNELS[:2])] == ["vit_b", "llama_1b"]
    assert not again.takes_part("vit_b", torch.bfloat16, "triton")
    assert again.takes_part("vit_b", torch.float32, "triton")
    with pytest.raises(RuntimeError, match="illegal"):  # no endless restarts
        again.go_on_where_the_device_broke("vit_b", torch.bfloat16, "triton")


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("name", "case"), [("kernels", "mlp"), ("optimizers", "resnet18"), ("loops", "resnet18")]
)
def test_a_backend_that_cannot_run_is_left_out_of_a_stage_once(tmp_path, monkeypatch, name, case):
    monkeypatch.setattr(choice, "unavailable", lambda backend: f"no {backend} here")
    loop = baselines.CONTENDERS["inplace_loop"]
    monkeypatch.setitem(baselines.CONTENDERS, "compiled_loop", loop)
    lines = Lines(tmp_path, name, True)
    one_stage._measure(lines, argparse.Namespace(until=time.monotonic() + TIMEOUT, cases=case,
                                                 without="", after=None))  # fmt: skip
    found, _ = read(tmp_path)
    assert lines.failures == 0
    said = {
        (x["what"], x["backend"], x["reason"]) for x in found if x["backend"] in ("triton", "cpu")
    }
    assert said == {("available", x, f"no {x} here") for x in ("triton", "cpu")}
    assert sum(x["what"] == "available" for x in found) == 2
    assert any(x["case"] == case and x["value"] for x in found)  # the others are measured
    text = table.table(found)
    assert f"left out: {name} triton available: no triton here" in text
    assert not any(row.split()[2:3] == ["triton"] for row in text.splitlines())


@pytest.mark.takes_seconds
def test_the_compiled_loop_follows_the_eager_ones_of_the_first_case(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(loops, "_group", lambda job, case, dtype, own, s: order.append((case, own)))
    monkeypatch.setattr(loops, "_variants", lambda job, case, *more: order.append((case, "ours")))
    loops.run(a_job(tmp_path))
    eager, compiled = ("autograd_loop", "inplace_loop"), ("compiled_loop",)
    assert order == [
        ("vit_b", eager), ("vit_b", compiled), ("vit_b", "ours"), ("resnet18", eager),
        ("resnet18", compiled), ("llama_1b", eager), ("llama_1b", compiled),
    ]  # fmt: skip


@pytest.mark.takes_seconds
def test_a_compilation_that_does_not_fit_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "_group", lambda *arguments: None)
    monkeypatch.setattr(loops, "_variants", lambda *arguments: None)
    loops.run(a_job(tmp_path, seconds=4.0))
    left = [x["case"] for x in read(tmp_path)[0] if x["what"] == "compiled_loop"]
    assert left == ["vit_b", "resnet18", "llama_1b"]


def in_parallel(functions, seconds=TIMEOUT):
    return dict(parallel.answers(functions, 2, time.monotonic() + seconds))


def test_a_process_that_dies_takes_no_other_answer_with_it():
    found = in_parallel({
        "dies": os.abort, "raises": partial(int, "x"), "fine": partial(abs, -1),
        "too": partial(abs, -2),
    })  # fmt: skip
    assert found["dies"].error == "its process ended with signal SIGABRT"
    assert found["raises"].error.startswith("ValueError: invalid literal")
    assert [found[name][:2] for name in ("fine", "too")] == [(1, None), (2, None)]


@pytest.mark.takes_seconds
def test_what_is_not_done_in_time_is_killed_and_written_down():
    hangs, start = partial(time.sleep, 600), time.monotonic()
    found = in_parallel({"a": hangs, "b": hangs, "late": os.abort}, seconds=1.0)
    assert time.monotonic() - start < 5
    assert multiprocessing.active_children() == []
    assert [x.error for x in found.values()] == [parallel.NOT_DONE] * 2 + [parallel.NOT_BEGUN]


def first_dies(what, *more):  # in a process that imports this file
    if what == parallel.CHECKS[0]:
        os.abort()
    return None, None


def cannot_run(*what):
    return "no compiler", None


def checked(folder, monkeypatch, checks, name="triton", device="cuda"):
    monkeypatch.setattr(parallel, "CHECKS", checks)
    monkeypatch.setattr(parallel, "DTYPES", ("float32",))
    monkeypatch.setattr(parallel, "PROCESSORS_LEFT", 0)
    parallel.backend(Lines(folder, name, True), name, time.monotonic() + TIMEOUT, device)
    return {x["what"]: x for x in read(folder)[0]}


@pytest.mark.takes_seconds
def test_checks_that_die_lose_no_other_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "one_check", first_dies)
    found = checked(tmp_path, monkeypatch, parallel.CHECKS[:2])
    assert found["1 vector"]["failed"]
    assert "SIGABRT" in found["1 vector"]["reason"]
    assert found["ragged shapes"]["value"] is not None


@pytest.mark.takes_seconds
def test_a_backend_that_cannot_run_is_one_line_of_its_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "one_check", cannot_run)
    found = checked(tmp_path, monkeypatch, parallel.CHECKS)
    assert [x["reason"] for x in found.values()] == ["no compiler"]


@pytest.mark.takes_seconds
def test_checks_run_in_parallel(tmp_path, monkeypatch):
    if (reason := choice.unavailable("cpu")) is not None:
        pytest.skip(reason)
    own = ("4 vectors", "SpectralSGD")
    found = checked(tmp_path, monkeypatch, own, "cpu", "cpu")
    assert set(found) == {"available", *own}
    assert all(x["value"] is not None for x in found.values()), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [None, "s", "t"])
def test_two_steps_are_compared_with_float64(monkeypatch, dtype, wrong):
    right = Reference.gram_matvec

    def gram_matvec(self, plan, state):
        right(self, plan, state)
        if wrong == "s":
            state.s *= 1.1
        elif wrong == "t":
            plan.t_partial[:3] *= 1.1

    monkeypatch.setattr(Reference, "gram_matvec", gram_matvec)
    weights = checks.gate.leaves(inputs.ragged_shapes(True), dtype)
    found = checks.two_steps(weights, "reference")
    assert (found is None) == (wrong is None), found


@pytest.mark.takes_seconds
def test_the_plugin_writes_failures_and_counts(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_right(): pass\ndef test_wrong(): assert 1 == 2, 'no'\n"
        "@pytest.mark.skip\ndef test_left(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError('fixture')\ndef test_setup(broken): pass\n"
    )
    variables = {**os.environ, "BENCH_GPU_LINES": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path),
               "-p", "bench.gpu.pytest_lines", "-p", "no:cacheprovider", str(tmp_path)]  # fmt: skip
    subprocess.run(command, env=variables, capture_output=True, timeout=TIMEOUT, check=False)
    lines, _ = read(tmp_path)
    reasons = {x["test"].rpartition("::")[2]: x["reason"] for x in lines if x["what"] == "test"}
    assert reasons["test_wrong"].startswith("AssertionError: no")
    assert "fixture" in reasons["test_setup"]
    counts = {x["what"]: x["value"] for x in lines if x["what"].startswith("tests ")}
    assert counts == {"tests passed": 1, "tests failed": 2, "tests skipped": 1}


def test_the_build_is_for_the_device_alone_and_finds_the_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(outside, "cuda_device", lambda: Device("some GPU", "9.0", 2**36))
    monkeypatch.setattr(outside.shutil, "which", lambda name: None)
    (tmp_path / "nvcc").touch()
    monkeypatch.setattr(outside, "CUDA", tmp_path)
    found = outside.build_variables()
    assert found["CUDAARCHS"] == "90-real"
    assert found["PATH"].endswith(f"{os.pathsep}{tmp_path}")


@pytest.mark.parametrize("code", [0, 1])
def test_where_pip_cannot_cmake_builds_into_the_package(tmp_path, monkeypatch, code):
    commands = []

    def run(command, variables=None):
        commands.append(command)
        return 1 if "pip" in command else code

    monkeypatch.setattr(outside, "run", run)
    monkeypatch.setattr(outside, "_cmake", lambda *where: run(["cmake", *map(str, where[:2])]))
    lines = Lines(tmp_path, "build", False)
    outside.build(lines)
    assert [command[0] for command in commands] == [sys.executable, "cmake"]
    assert commands[1][2] == str(ROOT / "spectral_kernels")
    assert lines.failures == code
    assert json.loads((tmp_path / FILE).read_text().splitlines()[-1])["stage"] == "build"


def test_memcheck_says_what_is_missing_and_what_it_found(tmp_path, monkeypatch):
    lines = Lines(tmp_path, "memcheck", False)
    monkeypatch.setattr(outside, "CUDA", tmp_path)
    monkeypatch.setattr(outside.shutil, "which", lambda name: None)
    check = partial(outside.memcheck, lines, ("cuda",), time.monotonic() + TIMEOUT)
    check()
    tool = tmp_path / outside._TOOL
    for errors, code in ((0, 0), (2, 9)):
        tool.write_text(f"#!/bin/sh\necho '=== ERROR SUMMARY: {errors} errors'\nexit {code}\n")
        tool.chmod(0o755)
        check()
    for code in (0, 1):
        tool.write_text(f"#!/bin/sh\necho '=== Device not supported'\nexit {code}\n")
        check()
    missing, right, wrong, *refused = read(tmp_path)[0]
    assert [x["reason"] for x in refused] == [
        f"exit code {code}: Device not supported, see stages.log" for code in (0, 1)
    ]
    assert (missing["failed"], missing["reason"]) == (False, "there is no compute-sanitizer")
    assert right["value"] == 0
    assert (wrong["failed"], wrong["reason"]) == (True, "2 errors, see stages.log")


@pytest.mark.takes_seconds
def test_a_sanitizer_that_hangs_leaves_the_other_backend_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(outside, "CUDA", tmp_path)
    monkeypatch.setattr(outside.shutil, "which", lambda name: None)
    tool = tmp_path / outside._TOOL
    tool.write_text(
        "#!/bin/sh\nfor backend; do :; done\n"  # the last argument
        f"if [ $backend = triton ]; then sleep 600 & echo $! > {tmp_path}/child; wait; fi\n"
        "echo '=== ERROR SUMMARY: 0 errors'\n"
    )
    tool.chmod(0o755)
    lines, start = Lines(tmp_path, "memcheck", False), time.monotonic()
    outside.memcheck(lines, ("triton", "cuda"), start + 8.0)
    assert time.monotonic() - start < 8
    hung, right = read(tmp_path)[0]
    assert (hung["failed"], hung["reason"]) == (True, "killed after 4 s")
    assert (right["backend"], right["value"]) == ("cuda", 0)
    wait_for(lambda: is_gone(int((tmp_path / "child").read_text())))


@pytest.mark.takes_seconds
def test_memcheck_leaves_out_a_backend_that_cannot_run(tmp_path, monkeypatch):
    monkeypatch.setattr(outside, "CUDA", tmp_path)
    monkeypatch.setattr(outside.shutil, "which", lambda name: None)
    tool = tmp_path / outside._TOOL
    tool.write_text(  # the command after "--error-exitcode 9"
        "#!/bin/sh\nshift 4\nCUDA_VISIBLE_DEVICES= \"$@\"\necho '=== ERROR SUMMARY: 0 errors'\n"
        "exit 1\n"
    )
    tool.chmod(0o755)
    lines = Lines(tmp_path, "memcheck", False)
    outside.memcheck(lines, ("cuda",), time.monotonic() + TIMEOUT)
    (line,) = read(tmp_path)[0]
    assert (line["what"], line["failed"]) == ("available", False)
    assert line["reason"]
    assert lines.failures == 0


@pytest.mark.parametrize("shape", [(70001, 1), (1, 70001)])
def test_gradients_of_the_ragged_shapes_are_within_float16(monkeypatch, shape):
    monkeypatch.setattr(inputs, "ragged_shapes", lambda dry_run: [shape])
    assert checks.problem("ragged shapes", torch.float16, "cpu", torch.device("cpu"), False) is None
