"""Metrics for a logger, and the file of sigma and residual over the steps."""

import contextlib
import csv
import itertools
import json
import math
import os
import re
import resource

import pytest
import torch
import torch.distributed as dist
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD
from spectral_kernels.diagnostics import log as logs

from ..support import models

pytestmark = pytest.mark.usefixtures("seeded")
SUFFIXES = (".csv", ".jsonl")


def net(*sizes):
    return nn.Sequential(*(nn.Linear(n, m) for n, m in itertools.pairwise(sizes)))


def steps(model, optimizer, n=3):
    for _ in range(n):
        optimizer.zero_grad()
        model(torch.randn(5, model[0].in_features)).square().mean().backward()
        optimizer.step()


def attached(model, **arguments):
    reg = SpectralRegularizer(model, **arguments)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    reg.attach(optimizer)
    return reg, optimizer


# -------------------------------------------------------------------------------------- metrics


def test_metrics_are_those_of_the_last_step(backend):
    model = net(8, 12, 5, 3)
    reg, optimizer = attached(model, strength=0.1, target=0.5, backend=backend)
    steps(model, optimizer)
    (bucket,) = reg._buckets.buckets
    penalty = float((bucket.state.strength * bucket.state.raw_penalty).sum())
    before = bucket.state.v_next.clone()
    found = reg.metrics()
    sigma, residual = reg.sigma, reg.residual
    assert found == pytest.approx({
        "spectral/sigma_max": float(sigma.max()),
        "spectral/sigma_median": float(sigma.median()),
        "spectral/sigma_min": float(sigma.min()),
        "spectral/residual_max": float((residual / sigma).max()),
        "spectral/above_target": float((sigma - residual > 0.5).sum()),
        "spectral/penalty": penalty,
    })  # fmt: skip
    assert all(type(x) is float for x in found.values())
    assert torch.equal(bucket.state.v_next, before)


def test_the_penalty_is_that_of_the_last_step_with_its_strength(backend):
    model = net(8, 12, 5)
    reg = SpectralRegularizer(model, {"0.*": 0.3, "*": 0.1}, warmup=500, backend=backend)
    first = reg.metrics()["spectral/penalty"]
    with torch.no_grad():
        model[0].weight.mul_(3)
        expected = float(reg.penalty())
    assert reg.metrics()["spectral/penalty"] == first != pytest.approx(expected, rel=0.1)
    reg.accumulate_grad_()
    assert reg.metrics()["spectral/penalty"] == pytest.approx(expected, rel=1e-5)


def test_metrics_per_layer_carry_names():
    model = models.mixed()
    reg = SpectralRegularizer(model)
    found, summary = reg.metrics(per_layer=True), reg.metrics()
    assert {name: found[name] for name in summary} == summary
    for row in reg.report():
        assert found[f"spectral/sigma/{row.name}"] == row.sigma
        ratio = found[f"spectral/residual/{row.name}"]
        assert ratio == pytest.approx(row.residual / row.sigma, rel=1e-6)
    assert found["spectral/attention/attention"] == summary["spectral/attention_max"]
    assert len(found) == len(summary) + 2 * len(reg.names) + 1


def test_the_largest_residual_is_the_largest_of_the_layers():
    reg = SpectralRegularizer(models.mixed())
    reg.accumulate_grad_()
    found = reg.metrics(per_layer=True)
    each = [x for name, x in found.items() if name.startswith("spectral/residual/")]
    assert max(each) == found["spectral/residual_max"]


def test_regularizers_with_prefixes_of_their_own_share_no_name():
    model = net(8, 12, 5)
    actor, critic = (SpectralRegularizer(model, include=f"{i}.*") for i in range(2))
    plain = actor.metrics(per_layer=True)
    found = [reg.metrics(True, prefix) for reg, prefix in ((actor, "actor"), (critic, "c/r"))]
    assert not set(found[0]) & set(found[1])
    assert found[0] == {name.replace("spectral/", "actor/"): x for name, x in plain.items()}
    assert all(name.startswith("c/r/") for name in found[1])
    assert SpectralAdamW(model).metrics(prefix="x").keys() >= {"x/sigma_max", "x/residual_max"}
    with pytest.raises(TypeError, match=r"^prefix: expected a string, got 3"):
        actor.metrics(prefix=3)


def test_metrics_of_several_dtypes_are_in_the_order_of_names():
    model = net(8, 12, 5, 3)
    model[1].double()
    reg = SpectralRegularizer(model, n_vectors=2)
    found = reg.metrics(per_layer=True)
    sigmas = [found[f"spectral/sigma/{name}"] for name in reg.names]
    assert sigmas == pytest.approx(reg.sigma.tolist(), rel=1e-12)
    with torch.no_grad():
        assert found["spectral/penalty"] == pytest.approx(float(reg.penalty()), rel=0.1)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.float64)])
def test_vectors_alone_have_a_penalty_and_no_sigma(dtypes):
    model = nn.Sequential(*(nn.LayerNorm(4).to(dtype) for dtype in dtypes))
    nn.init.constant_(model[0].weight, 2)
    reg = SpectralRegularizer(model, strength=0.5)
    found = reg.metrics(per_layer=True)
    assert found == {"spectral/penalty": pytest.approx(18.0), "spectral/above_target": 0}
    assert reg.sigma.shape == reg.residual.shape == (0,)
    assert reg.report() == []


def test_zero_matrices_have_no_residual_and_broken_ones_are_seen():
    model = net(4, 4, 4)
    nn.init.zeros_(model[0].weight)
    found = SpectralRegularizer(model, backend="reference").metrics()
    assert found["spectral/sigma_min"] == 0
    assert math.isfinite(found["spectral/residual_max"])
    nn.init.constant_(model[1].weight, math.nan)
    found = SpectralRegularizer(model, backend="reference").metrics()
    assert math.isnan(found["spectral/sigma_max"])


@pytest.mark.parametrize("kind", [SpectralAdamW, SpectralSGD])
def test_optimizers_have_the_same(tmp_path, kind):
    model = net(8, 12, 5)
    optimizer = kind(model, lr=0.01, strength=0.1)
    log = optimizer.log_to(tmp_path / "run.csv")
    steps(model, optimizer)
    log(3)
    assert optimizer.metrics(per_layer=True) == optimizer.regularizer.metrics(per_layer=True)
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 2


# ----------------------------------------------------------------------------------------- files


def rows_of(path):
    """Step, sigmas and residuals of every row, as another program would read them."""
    lines = path.read_text().splitlines()
    if path.suffix == ".csv":
        _, *rows = csv.reader(lines)
        numbers = [(int(step), [float(x) for x in rest]) for step, *rest in rows]
        return [(n, x[: len(x) // 2], x[len(x) // 2 :]) for n, x in numbers]
    rows = [json.loads(line) for line in lines]
    return [(r["step"], [*r["sigma"].values()], [*r["residual"].values()]) for r in rows]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_call_appends_the_sigma_and_residual_of_that_step(tmp_path, suffix):
    model, path = net(8, 12, 5), tmp_path / f"run{suffix}"
    reg, optimizer = attached(model)
    log, expected = reg.log_to(path), []
    for step in range(3):
        steps(model, optimizer, 1)
        log(step)
        expected.append((step, reg.sigma.tolist(), reg.residual.tolist()))
        # What was logged is in the file at once.
        found = rows_of(path)
        assert [row[0] for row in found] == list(range(step + 1))
    for (_, *a), (_, *b) in zip(found, expected, strict=True):
        assert a[0] == pytest.approx(b[0], rel=1e-7)
        assert a[1] == pytest.approx(b[1], rel=1e-7, abs=1e-12)


def test_names_of_columns_and_keys(tmp_path):
    weights = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 2))]
    reg = SpectralRegularizer([("a,b", weights[0]), ("c", weights[1])])
    for suffix in SUFFIXES:
        reg.log_to(tmp_path / f"run{suffix}")(7)
    header = next(csv.reader((tmp_path / "run.csv").open()))
    assert header == ["step", "sigma/a,b", "sigma/c", "residual/a,b", "residual/c"]
    row = json.loads((tmp_path / "run.jsonl").read_text())
    assert [*row] == ["step", "sigma", "residual"]
    assert [*row["sigma"]] == [*row["residual"]] == ["a,b", "c"]


def test_what_is_not_finite(tmp_path):
    model = net(4, 4)
    nn.init.constant_(model[0].weight, math.nan)
    reg = SpectralRegularizer(model)
    for suffix in SUFFIXES:
        reg.log_to(tmp_path / f"run{suffix}")(0)
    assert (tmp_path / "run.csv").read_text().endswith("\n0,nan,nan\n")
    assert json.loads((tmp_path / "run.jsonl").read_text())["sigma"] == {"0.weight": None}


def test_every_leaves_steps_out(tmp_path):
    log = SpectralRegularizer(net(3, 3)).log_to(tmp_path / "run.csv", every=10)
    for step in range(31):
        log(step)
    assert [row[0] for row in rows_of(tmp_path / "run.csv")] == [0, 10, 20, 30]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("cut", [0, 1, 9], ids=lambda n: f"{n} bytes lost")
def test_a_file_of_the_same_matrices_is_continued(tmp_path, suffix, cut):
    path, reg = tmp_path / f"run{suffix}", SpectralRegularizer(net(3, 5, 4))
    log = reg.log_to(path)
    for step in range(4):
        log(step)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    reg.log_to(path)(9)
    kept = {0: [0, 1, 2, 3], 1: [0, 1, 2], 9: [0, 1, 2]}[cut]
    assert [row[0] for row in rows_of(path)] == [*kept, 9]


def plain_log(path, names=("a",)):
    """A log of ones that needs no model."""
    return logs.Log(path, names, lambda: torch.ones(2, len(names)))


@contextlib.contextmanager
def room_for(n_bytes, path):
    """While this lasts, the file grows by so many bytes at most, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = path.stat().st_size if path.exists() else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("n_before", [0, 3])
@pytest.mark.parametrize("n_bytes", [0, 1, 5])
def test_a_line_that_does_not_fit_on_the_disk_is_an_error_and_taken_back(
    tmp_path, suffix, n_before, n_bytes
):
    path = tmp_path / f"run{suffix}"
    log = plain_log(path)
    for step in range(n_before):
        log(step)
    before = path.read_bytes()
    with room_for(n_bytes, path):
        for step in (3, 4):
            with pytest.raises(OSError, match=re.escape(str(path))):
                log(step)
            assert path.read_bytes() == before
    log(5)
    assert logs.read(path).steps.tolist() == [*range(n_before), 5]
    plain_log(path)(6)
    assert logs.read(path).steps.tolist() == [*range(n_before), 5, 6]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_half_a_line_is_removed_before_the_next_one(tmp_path, suffix):
    path = tmp_path / f"run{suffix}"
    log = plain_log(path)
    log(0)
    line = path.read_bytes().splitlines()[-1]
    with path.open("ab") as file:
        file.write(line[: len(line) // 2])
    assert logs.read(path).steps.tolist() == [0]
    log(1)
    assert logs.read(path).steps.tolist() == [0, 1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_first_line_that_is_cut_is_replaced_once_the_first_name_is_in_it(tmp_path, suffix):
    path, names = tmp_path / f"run{suffix}", ["a: 5, null", "é\n"]
    plain_log(path, names)(12)
    first = path.read_bytes().splitlines()[0]
    end_of_name = first.index(b"null") + len(b'null"')
    for cut in range(1, len(first) + 1):
        path.write_bytes(first[:cut])
        if cut < end_of_name:
            with pytest.raises(
                ValueError, match="expected a new name or a log of these 2 matrices, got"
            ):
                plain_log(path, names)
            assert path.read_bytes() == first[:cut]
        else:
            plain_log(path, names)(13)
            assert logs.read(path).steps.tolist() == [13]


NO_LOGS = [
    "other\n", "other", "\n", "\0" * 99, "[1]\n", '{"step": 1}\n', "step", "step,",
    "step,sigma/", '{"st',
    '{"step": 1000, "loss": 0.25, "notes": "three days of GPU time"}',
    '{"step": 1, "sigma": {"0.weight": 1}, "residual": {"0.weight": 1}, "loss": 2}\n',
    '{"step": "1", "sigma": {"0.weight": 1}, "residual": {"0.weight": 1}}\n',
    '{"step": 1, "sigma": {"0.weight": 1}, "loss": "of three days"',
    "step,sigma/0.weight,residual/0.weight,loss", "[" * 20_000 + "\n", "9" * 5_000 + "\n",
]  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("text", NO_LOGS, ids=lambda text: repr(text)[:40])
def test_a_file_that_is_no_log_is_refused_and_left_alone(tmp_path, suffix, text):
    path = tmp_path / f"run{suffix}"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^path: expected a new name or .*, got '.*run{suffix}'"):
        plain_log(path, ["0.weight"])
    assert path.read_text() == text


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_takes_the_place_of_the_log_is_left_alone(tmp_path, suffix):
    path = tmp_path / f"run{suffix}"
    log = plain_log(path)
    log(0)
    path.rename(tmp_path / f"old{suffix}")
    log(1)
    assert logs.read(path).steps.tolist() == [1]
    path.write_text("other\n")
    with pytest.raises(ValueError, match="which exists and is no such log"):
        log(2)
    assert path.read_text() == "other\n"


@pytest.mark.parametrize(
    ("kind", "target"),
    [("a FIFO", None), ("a FIFO", "fifo"), ("a device", "/dev/zero"), ("a directory", "folder")],
)
def test_what_is_no_regular_file_is_refused(tmp_path, kind, target):
    path = tmp_path / "run.csv"
    if target is not None:
        path.symlink_to(target)
    if kind == "a FIFO":
        os.mkfifo(tmp_path / (target or path))
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        ValueError, match=rf"^path: expected a regular file, got '.*run.csv', {kind}"
    ):
        plain_log(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_long_line_of_a_foreign_file_is_not_read_as_a_whole(tmp_path, suffix):
    path = tmp_path / f"run{suffix}"
    path.touch()
    os.truncate(path, 1 << 40)  # without a line break; it takes no room on the disk
    with pytest.raises(ValueError, match="which exists and is no such log"):
        plain_log(path)
    assert path.stat().st_size == 1 << 40


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_that_no_csv_can_hold_are_escaped(tmp_path, suffix):
    path, names = tmp_path / f"run{suffix}", ["a\nb", "c\rd", "\ud800", "\x1b[2J", 'q"u,o', "é"]
    plain_log(path, names)(0)
    plain_log(path, names)(1)
    found = logs.read(path)
    assert found.steps.tolist() == [0, 1]
    if suffix == ".csv":
        names[:4] = [r"a\nb", r"c\rd", r"\ud800", r"\x1b[2J"]
    assert found.names == names


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_other_matrices_is_refused_and_left_alone(tmp_path, suffix):
    path = tmp_path / f"run{suffix}"
    SpectralRegularizer(net(3, 5)).log_to(path)(0)
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=rf"^path: expected a new name or a log.*, got '.*run{suffix}'"
    ):
        SpectralRegularizer(net(3, 5, 4)).log_to(path)
    assert path.read_bytes() == before


def test_bad_arguments_are_named(tmp_path):
    reg = SpectralRegularizer(net(3, 3))
    with pytest.raises(ValueError, match=r"^path: expected .*csv or .jsonl, got .*run.txt'"):
        reg.log_to(tmp_path / "run.txt")
    with pytest.raises(
        FileNotFoundError, match=r"^path: expected a file in a folder that exists, got "
    ):
        reg.log_to(tmp_path / "none" / "run.csv")
    with pytest.raises(ValueError, match=r"^every: expected an integer >= 1, got 0"):
        reg.log_to(tmp_path / "run.csv", every=0)
    with pytest.raises(TypeError, match=r"^step: expected an integer, got 'x'"):
        reg.log_to(tmp_path / "run.csv")("x")
    with pytest.raises(ValueError, match=r"^step: expected .*2\*\*63 - 1, got one of 64 bits"):
        reg.log_to(tmp_path / "run.csv")(2**63)
    assert (tmp_path / "run.csv").read_text() == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_ranks_the_first_writes(tmp_path, monkeypatch, rank):
    path, reg = tmp_path / "run.csv", SpectralRegularizer(net(3, 3))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        reg.log_to(path)(0)
    finally:
        dist.destroy_process_group()
    assert path.exists() == (rank == 0)
