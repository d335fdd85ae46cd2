"""``python -m bench.checkpoints``: the checkpoint that it makes, and its report."""

import sys

import pytest
import torch

from spectral_kernels import open_checkpoint

pytest.importorskip("safetensors")
pytest.importorskip("pytest_benchmark")
from bench.checkpoints import __main__ as checkpoints


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shapes that take no time."""
    monkeypatch.setattr(checkpoints, "MATRICES", {"self_attn.q_proj": (24, 24), "mlp.up": (40, 24)})
    for name, size in (("HIDDEN", 24), ("VOCABULARY", 50)):
        monkeypatch.setattr(checkpoints, name, size)


@pytest.mark.parametrize("n_layers", [1, 4])
def test_the_checkpoint_has_all_layers(tmp_path, n_layers):
    total = checkpoints.save(tmp_path, n_layers)
    with open_checkpoint(tmp_path) as opened:
        shapes = [tensor.shape for _, tensor in opened]
        assert len(opened) == 2 + 4 * n_layers
        assert sum(torch.Size(shape).numel() for shape in shapes) == total
        tensor = dict(opened)["model.layers.0.mlp.up.weight"]
        assert (tensor.dtype, tensor.shape) == ("bfloat16", (40, 24))
        assert float(tensor.read().float().std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.slow
@pytest.mark.takes_seconds
def test_the_report_has_a_row_for_every_contender(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["x", "--out", str(out), "--rounds", "1", "--layers", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert checkpoints.main() == 0
    assert capsys.readouterr().out == f"{out / 'report.md'}\n"
    text = (out / "report.md").read_text()
    for name in ("read (cat)", "inspect --check", "inspect --values 8", "torch.linalg.svdvals"):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")][:1]
        assert float(row.split("|")[2]) >= 0


def test_a_command_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="exit code 3"):
        checkpoints.command(sys.executable, "-c", "raise SystemExit(3)")
    seconds, megabytes = checkpoints.command(sys.executable, "-c", "x = bytearray(100_000_000)")
    assert 0 < seconds < 60
    assert megabytes > 100
    assert checkpoints.command("true")[1] < 50  # not what this process holds
