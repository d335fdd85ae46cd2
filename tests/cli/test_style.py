"""What the plots share: log axes of any range, layers and their order, formats of files."""

import math
import random

import numpy as np
import pytest
import torch

from spectral_kernels import cli
from tests.support import processes

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from spectral_kernels.cli import style
from spectral_kernels.cli.inspect import picture
from spectral_kernels.cli.inspect.rows import MatrixRow, kind
from spectral_kernels.cli.plot import picture as plot
from spectral_kernels.diagnostics.log import History

pytestmark = pytest.mark.usefixtures("seeded")


# ------------------------------------------------------------------------------------------ axes


def check_ticks(values, most):
    low, high = style.log_limits(np.array(values))
    ticks, names, between = style.log_ticks(low, high, most)
    assert 3 <= len(ticks) == len(names) <= 2 * most, (low, high, most, ticks)
    assert all(low <= x <= high for x in (*ticks, *between))
    assert ticks == sorted(set(ticks))
    assert not set(ticks) & set(between)
    assert len(set(names)) == len(names)
    return ticks, names


def test_an_axis_of_any_range_has_three_round_ticks_or_more():
    draw = random.Random(0)
    for _ in range(3000):
        middle, most = draw.uniform(-323, 308.2), draw.choice([4, 5, 9])
        width = 10 ** draw.uniform(-6, 2.8)
        check_ticks([10 ** min(max(middle + x, -323), 308.2) for x in (-width, width)], most)


def test_an_axis_of_a_common_range_has_labels_that_say_where_the_ticks_are():
    draw = random.Random(1)
    for _ in range(3000):
        middle, width = draw.uniform(-4, 5), 10 ** draw.uniform(-5, 0)
        ticks, names = check_ticks([10 ** (middle + x) for x in (-width, width)], 9)
        assert [float(name) for name in names] == pytest.approx(ticks, rel=1e-5)


def test_an_axis_of_the_smallest_floats_has_three_ticks():
    smallest = math.ulp(0.0)
    for low in range(1, 30):
        for high in range(low, 30):
            check_ticks([low * smallest, high * smallest], 9)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((1.0, 1.005), ["0.98", "1", "1.02"]),
        ((0.9, 1.7), ["1", "1.2", "1.4", "1.6"]),
        ((1.2, 3.7), ["1.5", "2", "2.5", "3", "3.5"]),
        ((0.12, 3.1), ["0.2", "0.5", "1", "2"]),
        ((5.1, 20.4), ["5", "10", "20"]),
        ((1e-3, 1e3), [f"$10^{{{e}}}$" for e in range(-3, 4)]),
    ],
)
def test_ticks_are_the_round_numbers_that_people_expect(ends, expected):
    assert check_ticks(ends, 9)[1] == expected


def test_a_panel_shows_three_labels_for_values_within_one_percent():
    axes = Figure().subplots()
    style.set_log_scale(axes, np.array([math.nan, 0.0, 4.20, 4.22, 4.24]))
    axes.figure.canvas.draw()
    shown = [text.get_text() for text in axes.get_yticklabels()]
    low, high = axes.get_ylim()
    assert len(shown) >= 3
    assert all(low <= float(text) <= high for text in shown)


# ---------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("transformer.h.11.mlp.weight", "transformer.h.11"),
        ("layers_3_attention.kernel", "layers_3"),
        ("encoder/layer_7/fc1/kernel", "encoder/layer_7"),
        ("stages_1.blocks.3.weight", "stages_1"),
        ("layer1.0.conv1.weight", "layer1.0"),
        ("0.weight", "0"),
        ("fc1.weight", None),
        ("blocks.12", None),
        ("embed", None),
    ],
)
def test_the_layer_of_a_name_ends_with_its_first_number(name, layer):
    assert style.layers_of([name]) == [layer]


def test_layers_ascend_and_are_together_wherever_the_file_has_them():
    names = [
        "embed", "h.10.q", "h.2.q", "h.2.k", "norm", "h.10.k", "layer2.1.w", "layer1.0.w", "h.0.k",
        "layers_11_a", "layers_9_a", "layer2.0.w", "head",
    ]  # fmt: skip
    assert [names[i] for i in style.in_layers(names)] == [
        "embed", "h.0.k", "h.2.q", "h.2.k", "h.10.q", "h.10.k", "norm", "layer1.0.w", "layer2.0.w",
        "layer2.1.w", "layers_9_a", "layers_11_a", "head",
    ]  # fmt: skip


def test_the_map_of_a_log_has_layers_from_top_to_bottom(tmp_path, monkeypatch):
    names = [f"h.{i}.w" for i in (10, 2, 0)]
    sigma = np.array([[3.0, 2.0, 1.0], [3.5, 2.5, 1.5]])
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: kept.append(self))
    history = History(names, np.array([0, 1]), sigma, 0.1 * sigma)
    plot.draw(history, "x", tmp_path / "x.png")
    axes = kept[0].axes[1]
    assert [text.get_text() for text in axes.get_yticklabels()] == names[::-1]
    (colours,) = axes.collections
    np.testing.assert_allclose(colours.get_array().data, np.log10(sigma.T[::-1]))


# -------------------------------------------------------------------------------------- pictures


def drawn(rows, monkeypatch, tmp_path, limit=None):
    """Draw rows of one checkpoint and return the axes."""
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: kept.append(self))
    picture.draw_layers([(row, None) for row in rows], ["x.pt"], tmp_path / "x.png", limit)
    return kept[0].axes[0]


def row(name, rows, cols):
    sigma = float(torch.rand(()) + 0.5)
    return MatrixRow(name, kind(name), (rows, cols), rows, cols, "float32", sigma, 2 * sigma)


def test_curves_go_from_left_to_right_by_layer(tmp_path, monkeypatch):
    rows = [row(f"layers_{i}_{n}.kernel", 4, 4) for i in (10, 2, 0, 11, 1) for n in ("q", "k")]
    axes = drawn(rows, monkeypatch, tmp_path)
    by_name = {r.name: r.sigma for r in rows}
    (q,) = [line for line in axes.lines if line.get_label() == "layers_*_q.kernel"]
    assert q.get_xdata().tolist() == [0, 2, 4, 6, 8]
    sigmas = [by_name[f"layers_{i}_q.kernel"] for i in (0, 1, 2, 10, 11)]
    assert q.get_ydata().tolist() == sigmas
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "2", "10", "11"]
    assert axes.get_xlabel() == "layer (layers_*)"


def test_the_usual_value_is_a_line_or_a_mark_for_each_matrix(tmp_path, monkeypatch):
    same = [row(f"h.{i}.w", 8, 8) for i in range(3)]
    axes = drawn(same, monkeypatch, tmp_path)
    (line,) = [line for line in axes.lines if line.get_label().startswith("usual")]
    assert line.get_ydata() == pytest.approx([same[0].usual] * 2)
    assert line.get_label() == f"usual (of a fresh layer): {same[0].usual:.2f}"
    differing = [row("a", 8, 8), row("b", 32, 8), row("c", 32, 8), row("d", 0, 0), row("e", 8, 32)]
    axes = drawn(differing, monkeypatch, tmp_path)
    assert not [line for line in axes.lines if line.get_label().startswith("usual")]
    (marks,) = [c for c in axes.collections if c.get_label() == "usual (of a fresh layer)"]
    found = [segment.tolist() for segment in marks.get_segments()]
    expected = [(differing[i].usual, i - 0.45, j + 0.45) for i, j in ((0, 0), (1, 2), (4, 4))]
    for segment, (height, begin, end) in zip(found, expected, strict=True):
        assert segment == pytest.approx(np.array([[begin, height], [end, height]]))
    low, high = axes.get_ylim()
    assert low < min(r.usual for r in differing if r.usual) < 1.8 < high


def test_the_limit_is_a_line_inside_the_picture(tmp_path, monkeypatch):
    axes = drawn([row("a", 8, 8)], monkeypatch, tmp_path, limit=300.0)
    (line,) = [line for line in axes.lines if line.get_label() == "limit 300"]
    assert line.get_ydata() == [300, 300]
    assert axes.get_ylim()[1] > 300
    axes = drawn([row("a", 8, 8)], monkeypatch, tmp_path, limit=0.0)
    assert not [line for line in axes.lines if line.get_label().startswith("limit")]


@pytest.mark.takes_seconds
def test_the_suffix_says_the_format_and_the_bytes_are_the_same_again(saved, tmp_path, capsys):
    starts = {"png": b"\x89PNG", "pdf": b"%PDF-", "svg": b"<?xml", "SVG": b"<?xml"}
    for suffix, start in starts.items():
        files = [tmp_path / f"{name}.{suffix}" for name in "ab"]
        for file in files:
            assert cli.main(["inspect", str(saved), "--plot", str(file)]) == 0
        one, again = (file.read_bytes() for file in files)
        assert one.startswith(start)
        assert one == again
    assert processes.png_size(tmp_path / "a.png") == (1275, 630)
    log = tmp_path / "run.csv"
    log.write_text("step,sigma/a,residual/a\n0,2.5,0.1\n1,2.51,0.1\n")
    for suffix, start in (("pdf", b"%PDF-"), ("svg", b"<?xml")):
        out = tmp_path / f"log.{suffix}"
        assert cli.main(["plot", str(log), "--out", str(out)]) == 0
        assert out.read_bytes().startswith(start)
    with pytest.raises(SystemExit):
        cli.main(["plot", str(log), "--out", str(tmp_path / "x.jpg")])
    assert "expected a name that ends in .png, .pdf or .svg" in capsys.readouterr().err
