"""The command ``spectral-kernels inspect``: what is shown, compared, drawn and refused."""

import csv
import io
import json
import math
import re

import pytest
import torch

from spectral_kernels import cli
from spectral_kernels.cli.inspect.measure import Patterns, measure, planned
from spectral_kernels.cli.inspect.rows import MatrixRow, kind
from spectral_kernels.diagnostics.checkpoints import Checkpoint
from tests.support import processes
from tests.support.checkpoints import values

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("rich")
pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("shape", [(512, 256), (256, 512), (64, 32, 3, 3)])
def test_fresh_layers_of_torch_are_near_the_usual_value(shape):
    layer = torch.nn.Linear(shape[1], shape[0]) if len(shape) == 2 else torch.nn.Conv2d(32, 64, 3)
    weight = layer.weight.detach().flatten(1)
    sigma = float(torch.linalg.svdvals(weight)[0])
    row = MatrixRow("w", "w", shape, *weight.shape, "float32", sigma, float(weight.norm()))
    assert 0.95 < row.ratio < 1.03


def test_splits_and_stacks_are_those_of_the_regularizer(tmp_path, capsys):
    tensors = {"a.qkv.weight": torch.randn(12, 8), "experts.w1": torch.randn(3, 6, 5)}
    path = tmp_path / "fused.safetensors"
    safetensors.save_file(tensors, path)
    rows = values(path, "--splits", "*.qkv.weight=8,2,2", "--stacked", "experts.*", capsys=capsys)
    sigmas = {row["name"]: row["sigma"] for row in rows["matrices"]}
    parts = {f"a.qkv.weight[{i}]": p
             for i, p in enumerate(tensors["a.qkv.weight"].split((8, 2, 2)))}  # fmt: skip
    parts |= {f"experts.w1[{i}]": p for i, p in enumerate(tensors["experts.w1"])}
    assert list(sigmas) == list(parts)
    for name, part in parts.items():
        assert sigmas[name] == pytest.approx(float(torch.linalg.svdvals(part)[0]), rel=1e-4)
    patterns = Patterns(None, (), {"*.qkv.weight": 2}, ("experts.*",))
    found = measure(planned(Checkpoint(path), patterns))
    kinds = [row.kind for row in found.rows]
    assert kinds == ["a.qkv.weight[0]", "a.qkv.weight[1]", *["experts.w1[*]"] * 3]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.h.11.mlp.c_fc.weight", "transformer.h.*.mlp.c_fc.weight"),
        ("layer1.0.conv2.weight", "layer*.*.conv2.weight"),
        ("layer2.0.downsample.0.weight", "layer*.*.downsample.*.weight"),
        ("fc1.weight", "fc1.weight"),
        ("0.weight", "*.weight"),
        ("layer1.0", "layer1.*"),
        ("blocks.12", "blocks.*"),
        ("encoder_layer_3", "encoder_layer_*"),
        ("h_0_mlp", "h_*_mlp"),
        ("layers_10_attention_q.kernel", "layers_*_attention_q.kernel"),
        ("params/layers_3/fc1/kernel", "params/layers_*/fc1/kernel"),
        ("lstm.weight_ih_l0", "lstm.weight_ih_l0"),
        ("mixer.w1", "mixer.w1"),
        ("conv_3x3.weight", "conv_3x3.weight"),
    ],
)
def test_the_kind_of_a_layer_is_its_name_without_numbers(name, expected):
    assert kind(name) == expected


def test_rows_are_sorted_cut_and_filtered(saved, tensors, capsys):
    def names(*arguments):
        return [row["name"] for row in values(saved, *arguments, capsys=capsys)["matrices"]]

    sigma = {n: float(torch.linalg.svdvals(t.flatten(1))[0])
             for n, t in tensors.items() if t.dim() > 1}  # fmt: skip
    by_sigma = sorted(sigma, key=sigma.get, reverse=True)
    assert by_sigma[0] == "h.10.fc.weight"
    assert names("--sort", "sigma") == by_sigma
    assert names("--top", 2) == by_sigma[:2]
    assert names("--sort", "name", "--top", 1) == ["conv.weight"]
    assert names("--sort", "ratio")[0] == "h.10.fc.weight"
    assert names("--sort", "size")[:2] == ["h.2.fc.weight", "h.10.fc.weight"]
    rank = {n: float(tensors[n].norm() / s) for n, s in sigma.items()}
    assert names("--sort", "stable-rank") == sorted(rank, key=rank.get, reverse=True)
    assert names("--filter", "h.*") == ["h.2.fc.weight", "h.10.fc.weight"]
    assert names("--include", "h.*", "--include", "conv*", "--exclude", "h.2.*") == [
        "conv.weight", "h.10.fc.weight"
    ]  # fmt: skip


def test_csv_and_json_have_the_numbers_of_each_other(saved, tmp_path, capsys):
    document = values(saved, capsys=capsys)
    table, text = tmp_path / "out.csv", tmp_path / "out.json"
    assert cli.main(["inspect", str(saved), "--csv", str(table), "--json", str(text)]) == 0
    assert "conv.weight" in capsys.readouterr().out
    assert json.loads(text.read_text()) == document
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [row["name"] for row in rows] == [row["name"] for row in document["matrices"]]
    for row, expected in zip(rows, document["matrices"], strict=True):
        assert float(row["sigma"]) == expected["sigma"]
        assert row["shape"] == "x".join(map(str, expected["shape"]))
    assert cli.main(["inspect", str(saved), "--csv", "-"]) == 0
    assert capsys.readouterr().out == table.read_text()


def test_two_checkpoints_are_compared_by_name(saved, tmp_path, tensors, capsys):
    other = tmp_path / "other.pt"
    changed = {n: 2 * t for n, t in tensors.items() if n != "conv.weight"}
    changed["new.weight"] = torch.eye(3)
    torch.save(changed, other)
    document = values(saved, other, "--sort", "change", capsys=capsys)
    assert {row["name"] for row in document["matrices"]} == {"h.2.fc.weight", "h.10.fc.weight"}
    for row in document["matrices"]:
        assert row["change_percent"]["sigma"] == pytest.approx(100, abs=0.05)
        assert row["change_percent"]["stable_rank"] == pytest.approx(0, abs=0.05)
        assert row["other"]["sigma"] == pytest.approx(2 * row["sigma"], rel=2e-4)
    assert [row["name"] for row in document["only_in_checkpoint"]] == ["conv.weight"]
    assert [row["name"] for row in document["only_in_other"]] == ["new.weight"]
    # A pattern may match in only one of them.
    assert cli.main(["inspect", str(saved), str(other), "--exclude", "new.*"]) == 0
    out = capsys.readouterr().out
    assert f"only in {saved}: conv.weight\n" in out
    assert f"only in {other}" not in out
    assert out.count("+100.0 %") == 2
    assert cli.main(["inspect", str(saved), str(other), "--csv", "-"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows][2:] == ["conv.weight", "new.weight"]
    assert all(None not in row.values() for row in rows)


def test_values_above_the_limit_are_an_exit_code_and_named(saved, tmp_path, capsys):
    rows = values(saved, "--top", 2, capsys=capsys)["matrices"]
    limit = sum(row["sigma"] for row in rows) / 2
    assert cli.main(["inspect", str(saved), "--fail-above", str(limit), "--top", "1"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"spectral-kernels: {rows[0]['name']}: sigma_1 {rows[0]['sigma']:.4g} is above {limit:g}"
    )
    assert cli.main(["inspect", str(saved), "--fail-above", "1e6"]) == 0
    broken = tmp_path / "nan.pt"
    torch.save({"w": torch.full((2, 2), math.nan)}, broken)
    assert cli.main(["inspect", str(broken), "--fail-above", "1e6"]) == 3


def test_names_cannot_steer_a_terminal(tmp_path, capsys):
    path = tmp_path / "names.pt"
    torch.save({"\x1b[2Jw[red]": torch.eye(2)}, path)
    assert cli.main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[2Jw[red]" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--top", "0"], "argument --top: expected an integer from 1 to 2**63 - 1, got '0'"),
        (["--sort", "x"], "argument --sort"),
        (["--splits", "w"], "argument --splits: expected PATTERN=N or "),
        (
            ["--fail-above", "nan"],
            "argument --fail-above: expected a finite number >= 0, got 'nan'",
        ),
        (["--plot", "x.jpg"], "expected a name that ends in .png, .pdf or .svg, got 'x.jpg'"),
        (
            ["--json", "no/such/folder/x.json"],
            "argument --json: expected a file in a folder that can",
        ),
        (
            ["--include", "nothing*"],
            "include: expected a pattern that matches a parameter, got 'nothing*'",
        ),
        (
            ["--splits", "conv*=3"],
            "splits['conv*']: expected a number of equal parts or sizes that add up to the 8",
        ),
        (["--sort", "change"], "--sort change: expected two checkpoints, got one"),
        (["--json", "-", "--csv", "-"], "only one of them"),
    ],
)
def test_wrong_usage_is_exit_code_2(saved, capsys, arguments, said):
    try:
        code = cli.main(["inspect", str(saved), *arguments])
    except SystemExit as raised:
        code = raised.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["safetensors", "rich", "matplotlib"])
def test_a_missing_package_is_one_line(saved, tmp_path, name):
    done = processes.run_without(name, "inspect", saved, "--plot", tmp_path / "x.png")
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith(f"needs {name}: pip install 'spectral_kernels[inspect]'\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.takes_seconds
def test_the_picture_shows_every_kind(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or
                        save(self, *a, **k))  # fmt: skip
    path, other = tmp_path / "many.pt", tmp_path / "other.pt"
    tensors = {f"h.{i}.{n}.weight": torch.randn(4, 3) for i in range(40) for n in ("q", "k")}
    tensors["embed.weight"] = torch.randn(9, 3)
    torch.save(tensors, path)
    torch.save({n: t for n, t in tensors.items() if "39" not in n}, other)
    for more, expected in ([], 4), ([str(other)], 6):
        picture = tmp_path / "many.png"
        assert cli.main(["inspect", str(path), *more, "--plot", str(picture), "--top", "1"]) == 0
        assert f"picture: {picture}" in capsys.readouterr().out
        assert processes.png_size(picture) == (1275, 630)
        (axes,) = drawn[-1].axes
        labels = axes.get_legend_handles_labels()[1]
        assert labels[:3] == ["h.*.q.weight", "h.*.k.weight", "embed.weight"]
        assert len(labels) == expected
        assert labels[-1] == "usual (of a fresh layer)"
        assert axes.get_yscale() == "log"
        assert axes.get_xlabel() == "layer (h.*)"
        assert 10 <= len(axes.get_xticks()) <= 24
        (legend,) = drawn[-1].legends
        assert legend.get_window_extent().x0 > axes.get_window_extent().x1
    many = {f"{'x' * i}.weight": torch.eye(2) for i in range(1, 60)}
    torch.save(many, path)
    assert cli.main(["inspect", str(path), "--plot", str(picture)]) == 0
    assert len(drawn[-1].axes[0].get_legend_handles_labels()[1]) == 38


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(saved, tmp_path, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(["inspect", str(saved)]) == 0
    short = capsys.readouterr().out
    assert re.search(r"h\.10\.fc\.weight +24x16 +\d+\.\d{3} +\d+\.\d +\d+\.\d\d +\d+\.\d\d", short)
    path = tmp_path / "long.pt"
    name = f"model.layers.10.{'mixture_of_experts.' * 3}down_proj.weight"
    torch.save({name: torch.eye(9), "b": torch.eye(2).half()}, path)
    for more in ([], [str(path)]):
        assert cli.main(["inspect", str(path), *more]) == 0
        table = capsys.readouterr().out.split(f"{path}")[0]
        assert max(map(len, table.splitlines())) <= width
        rows = [line for line in table.splitlines() if "…" in line]
        assert not rows
        words = re.sub(r"(?<=\.) *\n\s+|(?<=\.) [\d.x +%]+\n\s+", "", table)
        assert name.split(".")[-2] in words


def test_output_that_is_no_terminal_has_a_line_per_matrix(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    path = tmp_path / "long.pt"
    name = "model." + "block." * 30 + "weight"
    torch.save({name: torch.eye(9)}, path)
    assert cli.main(["inspect", str(path)]) == 0
    assert re.search(rf"{re.escape(name)} +9x9 +1\.000 +9\.0 +3\.00", capsys.readouterr().out)


@pytest.mark.takes_seconds
def test_ctrl_c_in_a_terminal_ends_cleanly(tmp_path):
    path = tmp_path / "large.pt"
    torch.save({f"{i}.w": torch.randn(1500, 1500) for i in range(40)}, path)
    shown, _ = processes.interrupted(["inspect", path], rb"1\.w")
    processes.check_ending(shown)
