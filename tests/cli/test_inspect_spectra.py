"""``spectral-kernels inspect --values``: several singular values, and numbers of all of them."""

import csv
import io
import math

import pytest
import torch

from spectral_kernels import cli
from spectral_kernels.diagnostics import effective_rank, marchenko_pastur_edge, tail_exponent
from tests.support.checkpoints import values

save_file = pytest.importorskip("safetensors.torch").save_file
pytest.importorskip("rich")
pytestmark = pytest.mark.usefixtures("seeded")
COLUMNS = ("sigma_min", "condition", "effective_rank", "alpha", "alpha_distance", "mp_edge",
           "n_above_edge")  # fmt: skip


@pytest.fixture
def spread(tmp_path):
    """A checkpoint with matrices of several shapes, and its tensors."""
    tensors = {
        "h.0.fc.weight": torch.randn(40, 90) * torch.arange(1, 41)[:, None] ** -0.8,
        "h.1.fc.weight": torch.randn(200, 150),
        "h.2.fc.weight": torch.randn(24, 5) @ torch.randn(5, 16),
        "conv.weight": torch.randn(8, 4, 3, 3),
        "head.weight": torch.randn(5, 4000),
    }
    path = tmp_path / "spread.safetensors"
    save_file(tensors, path)
    return path, tensors


@pytest.mark.parametrize("n_values", [1, 3, 8, 16])
@pytest.mark.parametrize("limit", [2048, 0])
def test_the_largest_values_are_those_of_the_svd(spread, n_values, limit, capsys):
    path, tensors = spread
    document = values(path, "--values", n_values, "--spectrum-limit", limit, capsys=capsys)
    for row in document["matrices"]:
        exact = torch.linalg.svdvals(tensors[row["name"]].flatten(1).double())[:n_values]
        error = (torch.tensor(row["values"], dtype=torch.float64) - exact).abs()
        assert float(error.max()) <= 1e-4 * float(exact[0])
        assert row["sigma"] == row["values"][0]
        assert len(row["values"]) == len(exact)
        assert (row["sigma_min"] is None) == (limit == 0)


def test_numbers_of_all_values_are_those_of_the_svd(spread, capsys):
    path, tensors = spread
    rows = {r["name"]: r for r in values(path, "--values", 1, capsys=capsys)["matrices"]}
    for name, tensor in tensors.items():
        weight, row = tensor.flatten(1).double(), rows[name]
        exact = torch.linalg.svdvals(weight)
        fit = tail_exponent(exact)
        edge = marchenko_pastur_edge(exact, weight.shape)
        expected = [float(effective_rank(exact)), fit.alpha, fit.distance, edge]
        found = [row[k] for k in ("effective_rank", "alpha", "alpha_distance", "mp_edge")]
        if name != "h.2.fc.weight":
            assert [math.nan if x is None else x for x in found] == pytest.approx(
                expected, rel=1e-6, nan_ok=True
            )  # fmt: skip
            assert (row["alpha"] is None) == (name == "head.weight")  # of five values
            assert row["sigma_min"] == pytest.approx(float(exact[-1]), rel=1e-5)
            assert row["condition"] == pytest.approx(float(exact[0] / exact[-1]), rel=1e-4)
            assert row["n_above_edge"] == int((exact > edge).sum())
    # Five of its 16 values are not zero up to the rounding of its elements.
    assert rows["h.2.fc.weight"]["condition"] > 1e6
    assert rows["h.2.fc.weight"]["n_above_edge"] >= 5
    assert rows["h.2.fc.weight"]["alpha"] is None


def test_without_values_nothing_more_is_computed(spread, capsys, monkeypatch):
    def never(*arguments):
        raise AssertionError("not asked for")

    monkeypatch.setattr("spectral_kernels.cli.inspect.values.full_spectrum", never)
    for row in values(spread[0], capsys=capsys)["matrices"]:
        assert row["values"] == []
        assert [row[column] for column in COLUMNS] == [None] * len(COLUMNS)


def test_csv_has_the_numbers_of_json(spread, capsys):
    path, _ = spread
    arguments = ["--values", "3", "--spectrum-limit", "39"]
    document = values(path, *arguments, capsys=capsys)
    assert cli.main(["inspect", str(path), *arguments, "--csv", "-"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows if row["condition"] == ""] == [
        "h.0.fc.weight", "h.1.fc.weight"
    ]  # fmt: skip
    for row, expected in zip(rows, document["matrices"], strict=True):
        assert list(map(float, row["values"].split(" "))) == expected["values"]
        for column in COLUMNS:
            if expected[column] is not None:
                assert float(row[column]) == expected[column]
            else:
                assert row[column] in ("", "nan", "inf")


def test_the_table_fits_and_says_what_is_not_in_it(spread, capsys, monkeypatch):
    path, tensors = spread
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["inspect", str(path), "--values", "8", "--spectrum-limit", "39"]) == 0
    out = capsys.readouterr().out
    table, _, below = out.partition(str(path))
    assert max(map(len, table.splitlines())) <= 100
    exact = torch.linalg.svdvals(tensors["h.1.fc.weight"].double())
    (line,) = [text for text in table.splitlines() if "h.1.fc" in text]
    assert f"{exact[0]:.2f}"[:-1] in line
    assert f"{exact[1]:.2f}"[:-1] in line
    assert "alpha" in table
    assert "above" in table
    assert (
        "largest values only, shorter side above --spectrum-limit: h.0.fc.weight, h.1.fc.weight\n"
        in below
    )
    assert cli.main(["inspect", str(path), "--values", "2"]) == 0
    assert "largest values only" not in capsys.readouterr().out


def test_matrices_that_are_not_finite_or_zero_or_empty_have_no_numbers(tmp_path, capsys):
    broken = torch.randn(9, 9)
    broken[2, 3] = torch.inf
    path = tmp_path / "odd.pt"
    torch.save({"broken": broken, "zero": torch.zeros(12, 10), "none": torch.empty(0, 4)}, path)
    rows = {r["name"]: r for r in values(path, "--values", 2, capsys=capsys)["matrices"]}
    assert rows["broken"]["values"] == [None, None]
    assert rows["broken"]["sigma_min"] is None
    assert rows["zero"]["values"] == [0, 0]
    assert rows["zero"]["condition"] is rows["zero"]["alpha"] is None
    assert rows["zero"]["n_above_edge"] == rows["zero"]["sigma_min"] == 0
    assert rows["none"]["values"] == []
    assert cli.main(["inspect", str(path), "--values", "2"]) == 0
    assert "nan .. " not in capsys.readouterr().out


def test_parts_and_stacks_have_numbers_of_their_own(tmp_path, capsys):
    stack, fused = torch.randn(3, 10, 20), torch.randn(30, 12)
    path = tmp_path / "parts.safetensors"
    save_file({"experts": stack, "qkv": fused}, path)
    arguments = ["--stacked", "experts", "--splits", "qkv=3", "--values", 2]
    rows = {r["name"]: r for r in values(path, *arguments, capsys=capsys)["matrices"]}
    parts = {f"experts[{i}]": p for i, p in enumerate(stack)}
    parts |= {f"qkv[{i}]": p for i, p in enumerate(fused.split(10))}
    assert set(rows) == set(parts)
    for name, part in parts.items():
        exact = torch.linalg.svdvals(part.double())
        assert rows[name]["values"] == pytest.approx(exact[:2].tolist(), rel=1e-6)
        assert rows[name]["sigma_min"] == pytest.approx(float(exact[-1]), rel=1e-5)


@pytest.mark.parametrize("text", ["0", "17", "two"])
def test_numbers_of_values_out_of_range_are_refused(spread, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["inspect", str(spread[0]), "--values", text])
    expected = f"argument --values: expected an integer from 1 to 16, got '{text}'"
    assert expected in capsys.readouterr().err
