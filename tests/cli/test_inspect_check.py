"""``spectral-kernels inspect --check``: values that are not finite, in every tensor."""

import json
import math
import random

import pytest
import torch

from spectral_kernels import cli
from spectral_kernels.cli.inspect import check, finite
from spectral_kernels.diagnostics.checkpoints import Checkpoint
from tests.support.checkpoints import save_sharded

pytestmark = pytest.mark.usefixtures("seeded")

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
BYTES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", [*FLOATS, *BYTES], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_is_found_wherever_it_is(dtype, bad):
    draw = random.Random(f"{dtype}{bad}")
    values = torch.randn(3, 70, 1001).clamp(-3, 3).to(dtype)
    assert finite.not_finite("w", values) is None
    for _ in range(3):
        place = tuple(draw.randrange(n) for n in values.shape)
        broken = values.float() if values.itemsize == 1 else values.clone()
        broken[place] = bad
        broken = broken.to(dtype)
        stored = (broken if broken.is_complex() else broken.float())[place]
        found = finite.not_finite("w", broken)
        expected = (bool(stored.isnan()), *(stored == x for x in (math.inf, -math.inf)))
        if torch.isfinite(stored):  # float8 without infinities saturates
            assert found is None
            continue
        assert (found.nan, found.positive, found.negative) == tuple(map(int, expected))
        assert found.first_index == place


@pytest.mark.parametrize("dtype", BYTES, ids=str)
def test_every_pattern_of_a_byte_is_read_as_torch_reads_it(dtype):
    for byte in range(256):
        value = torch.full((5,), byte, dtype=torch.uint8).view(dtype)
        is_finite = bool(torch.isfinite(value.float()).all())
        assert (finite.not_finite("w", value) is None) == is_finite, byte


def test_a_byte_that_is_an_exponent_has_a_nan():
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    found = finite.not_finite("w", values)
    assert (found.nan, found.inf, found.first) == (1, 0, 255)


@pytest.mark.parametrize("dtype", FLOATS[:4], ids=str)
def test_large_numbers_are_finite_though_their_sum_is_not(dtype):
    values = torch.full((2, 5000), torch.finfo(dtype).max, dtype=dtype)
    assert finite.not_finite("w", values) is None
    assert finite.not_finite("w", -values) is None


@pytest.mark.parametrize(
    "view",
    [lambda t: t.T, lambda t: t[:, ::2], lambda t: t[7], lambda t: t[0, 0], lambda t: t[:0],
     lambda t: t[None, :, None], lambda t: t.view(60, 70, -1).permute(2, 0, 1)],
)  # fmt: skip
def test_strides_and_tiles_change_no_count(view):
    values = torch.randn(600, 70)
    values.view(-1)[torch.randperm(values.numel())[:500]] = math.nan
    values[0, 0] = -math.inf
    seen = view(values)
    total, elements = None, 0
    for tile, offset in finite.tiles(seen, 100):
        assert len(tile) <= 100
        elements += len(tile)
        total = finite.total(total, finite.in_tile("w", tuple(seen.shape), tile, offset))
    assert elements == seen.numel()
    places = (~torch.isfinite(seen)).nonzero()
    if not len(places):
        assert total is None
        return
    assert total.nan == int(seen.isnan().sum())
    assert total.negative == int((seen == -math.inf).sum())
    assert total.first_index == tuple(places[0].tolist())


def write(folder, kind):
    """Write a checkpoint with what is and is not finite, and return what is not."""
    tensors = {
        "0.weight": torch.randn(40, 30), "0.bias": torch.randn(40),
        "steps": torch.arange(5), "scale": torch.tensor(math.inf), "1.weight": torch.randn(6, 4),
    }  # fmt: skip
    tensors["0.bias"][[3, 8]] = math.nan
    tensors["0.bias"][2] = -math.inf
    path = folder / f"a.{kind}"
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(tensors, path)
    elif kind == "bin":
        path = save_sharded(folder, tensors, "bin")
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bin", "pt"])
def test_tensors_that_are_not_finite_are_listed(tmp_path, capsys, kind):
    path = write(tmp_path, kind)
    assert cli.main(["inspect", str(path), "--check"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines[:2]) == ["0.bias: 2 nan, 1 -inf, the first at [2]", "scale: 1 inf"]
    assert lines[2].startswith(f"{path}: 4 tensors, 2 of them not finite; ")
    assert cli.main(["inspect", str(path), "--check", "--json", "-"]) == 3
    document = json.loads(capsys.readouterr().out)
    (bias, scale) = sorted(document["not_finite"], key=lambda one: one["name"])
    assert (bias["nan"], bias["inf"], bias["negative_inf"], bias["first_index"]) == (2, 1, 1, [2])
    assert (scale["nan"], scale["inf"], scale["first_index"]) == (0, 1, [])
    assert document["checked"][0]["bytes"] == 4 * (1200 + 40 + 1 + 24)
    chosen = ["--exclude", "0.bias", "--exclude", "scale"]
    assert cli.main(["inspect", str(path), "--check", *chosen]) == 0
    assert ": 2 tensors, all finite; " in capsys.readouterr().out


def test_moments_of_an_optimizer_are_left_out(tmp_path, capsys):
    path = tmp_path / "a.pt"
    state = {"state": {0: {"exp_avg": torch.full((3,), math.nan)}}, "param_groups": []}
    torch.save({"model": {"w": torch.randn(3, 3)}, "optimizer": state}, path)
    assert cli.main(["inspect", str(path), "--check"]) == 0
    assert "left out: 1 tensor of an optimizer's state" in capsys.readouterr().out
    assert cli.main(["inspect", str(path), "--check", "--include", "*"]) == 3
    assert "optimizer.state.0.exp_avg: 3 nan, the first at [0]" in capsys.readouterr().out


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    path = tmp_path / "a.pt"
    sparse = torch.eye(3).to_sparse()
    weight = torch.randn(2, 2)
    torch.save({"s": sparse, "w": weight, "tied": weight}, path)
    assert cli.main(["inspect", str(path), "--check"]) == 0
    out = capsys.readouterr().out
    assert "not checked, layout sparse_coo: s\n" in out
    assert ": 1 tensor, all finite; " in out


@pytest.mark.parametrize(
    "more",
    [["--csv", "-"], ["--plot", "x.png"], ["--top", "3"], ["--fail-above", "0"],
     ["--html", "x.html"], ["--base", "a.pt"], ["--values", "2"], ["--heads", "2"],
     ["--convolutions", "operator"], ["--spectrum-limit", "9"]],
)  # fmt: skip
def test_options_that_say_nothing_to_it_are_refused(tmp_path, capsys, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.randn(2, 2)}, "a.pt")
    assert cli.main(["inspect", "a.pt", "--check", *more]) == 2
    assert f"--json, got {more[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("n_threads", [1, 3])
def test_pieces_of_a_tensor_are_put_together_by_any_number_of_threads(
    tmp_path, monkeypatch, threads, n_threads
):
    threads(n_threads)
    monkeypatch.setattr(check, "_PIECE", 64)
    monkeypatch.setattr(check, "_MOST_PIECES", 3)
    tensors = {f"{i}": torch.randn(7 * i, 11) for i in range(12)}
    tensors["9"][20:, 3] = math.nan
    torch.save(tensors, tmp_path / "a.pt")
    steps = []
    checkpoint = Checkpoint(tmp_path / "a.pt", effective=False)
    entries = check.chosen(checkpoint.tensors, None, ())
    result = check.check(checkpoint, entries, lambda name, count: steps.append(count))
    (bad,) = result.bad
    assert (bad.name, bad.nan, bad.first_index) == ("9", 43, (20, 3))
    assert sum(steps) == check.elements(entries) == 11 * 7 * sum(range(12))
    assert torch.get_num_threads() == n_threads
