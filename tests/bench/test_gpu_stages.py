"""The stages of a run on a GPU: timing, checks in parallel processes, builds and memcheck."""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from bench.gpu import __main__ as one_stage
from bench.gpu import checks, inputs, job, loops, measure, outside, parallel, table
from bench.gpu.environment import Device
from bench.gpu.lines import FILE, Lines, read
from bench.support import baselines
from spectral_kernels.backends import choice
from spectral_kernels.backends.base import Reference
from tests import ROOT, TIMEOUT
from tests.support.processes import is_gone, wait_for


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
