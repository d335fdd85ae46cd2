"""``spectral-kernels plot``: what it reads of a log, what it draws, what it refuses."""

import math

import numpy as np
import pytest
import torch

from spectral_kernels import cli
from spectral_kernels.diagnostics import log as logs
from tests.support import processes

SUFFIXES = (".csv", ".jsonl")


def written(path, names, values, steps=None):
    """Write a log of ``values`` [T, 2, n_matrices]; return its path."""
    rows = iter(torch.as_tensor(np.asarray(values)))
    log = logs.Log(path, names, lambda: next(rows))
    for step in range(len(values)) if steps is None else steps:
        log(step)
    return path


def random_log(path, n, rows=5):
    names = [f"blocks.{i // 4}.{'abcd'[i % 4]}.weight" for i in range(n)]
    return written(path, names, np.random.default_rng(0).uniform(0.1, 3, (rows, 2, n)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_read_is_what_was_written(tmp_path, suffix):
    values = np.random.default_rng(0).uniform(0.1, 3, (5, 2, 3))
    path = written(tmp_path / f"run{suffix}", ["a", "b,c", "é"], values, range(0, 50, 10))
    found = logs.read(path)
    assert found.names == ["a", "b,c", "é"]
    assert found.steps.tolist() == [0, 10, 20, 30, 40]
    np.testing.assert_allclose(found.sigma, values[:, 0], rtol=1e-8)
    np.testing.assert_allclose(found.residual, values[:, 1], rtol=1e-8)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_half_a_line_at_the_end_is_left_out(tmp_path, suffix):
    path = random_log(tmp_path / f"run{suffix}", 3)
    whole = path.read_bytes()
    for cut in (1, 7):
        path.write_bytes(whole[:-cut])
        assert logs.read(path).steps.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_run_that_went_back_replaces_what_it_had_written(tmp_path, suffix):
    values = np.arange(1.0, 7)[:, None, None] * np.ones((6, 2, 1))
    path = written(tmp_path / f"run{suffix}", ["w"], values, [0, 10, 20, 30, 10, 25])
    found = logs.read(path)
    assert found.steps.tolist() == [0, 10, 25]
    assert found.sigma[:, 0].tolist() == [1, 5, 6]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_not_finite_is_seen(tmp_path, suffix):
    path = written(tmp_path / f"run{suffix}", ["a", "b"], [[[math.nan, 1], [math.inf, 0]]])
    found = logs.read(path)
    assert np.isfinite(found.sigma).tolist() == [[False, True]]
    assert np.isfinite(found.residual).tolist() == [[False, True]]


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures that are drawn, instead of writing them."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    return drawn


def draw(figures, path):
    assert cli.main(["plot", str(path), "--out", str(path.with_suffix(".png"))]) == 0
    (figure,) = figures
    figure.canvas.draw()
    return figure.axes[:3]


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.takes_seconds
def test_few_matrices_are_all_named_the_largest_first(tmp_path, figures):
    sigma = np.array([[1.0, 5, 3], [2, 1, 4]])
    path = written(tmp_path / "run.csv", ["a", "b", "c"], np.stack((sigma, 0.1 + 0 * sigma), 1))
    top, layers, bottom = draw(figures, path)
    assert labels(top) == ["c", "a", "b"]
    assert labels(bottom) == ["b", "a", "c"]
    curves = {line.get_label(): line for line in top.lines}
    np.testing.assert_allclose(curves["b"].get_ydata(), [5, 1])
    below = {line.get_label(): line for line in bottom.lines}
    np.testing.assert_allclose(below["c"].get_ydata(), [0.1 / 3, 0.1 / 4])
    assert all(curves[name].get_color() == below[name].get_color() for name in "abc")
    assert [text.get_text() for text in layers.get_yticklabels()] == ["a", "b", "c"]
    np.testing.assert_allclose(10 ** layers.collections[0].get_array(), sigma.T)
    assert top.get_yscale() == bottom.get_yscale() == "log"
    assert top.get_xlim() == layers.get_xlim() == bottom.get_xlim() == (0, 2)


@pytest.mark.takes_seconds
def test_of_many_matrices_the_extremes_are_named_beside_median_and_range(tmp_path, figures):
    path = random_log(tmp_path / "run.csv", 200)
    history = logs.read(path)
    top, layers, bottom = draw(figures, path)
    order = np.argsort(-history.sigma[-1])
    assert labels(top)[:3] == ["range of all", "middle half", "median"]
    assert labels(top)[3:] == [history.names[i] for i in (*order[:4], *order[-2:])]
    assert len(labels(bottom)) == 3 + 4
    (median,) = [line for line in top.lines if line.get_label() == "median"]
    np.testing.assert_allclose(median.get_ydata(), np.median(history.sigma, axis=1))
    names = [text.get_text() for text in layers.get_yticklabels()]
    assert names[:2] == ["blocks.0", "blocks.2"]
    assert len(names) <= 40


@pytest.mark.takes_seconds
@pytest.mark.parametrize("n", [3, 30])
def test_long_names_stay_inside(tmp_path, figures, n):
    names = [f"{'resnet.encoder.stages.0.' * 3}{i}.convolution.weight" for i in range(n)]
    path = written(tmp_path / "run.csv", names, np.random.default_rng(0).random((4, 2, n)) + 0.1)
    panels = draw(figures, path)
    whole = panels[0].figure.bbox
    for axes in (panels[0], panels[2]):
        legend = axes.get_legend().get_window_extent()
        assert whole.x0 <= legend.x0 < legend.x1 <= whole.x1
        assert whole.y0 <= legend.y0
        assert axes.get_window_extent().height > 0.1 * whole.height


def test_long_names_stay_apart():
    plots = pytest.importorskip("spectral_kernels.cli.style", reason="needs matplotlib")
    alike = [f"resnet.encoder.stages.{i}.layers.{j}.layer.{k}.convolution.weight"
             for i in range(4) for j in range(2) for k in range(2)]  # fmt: skip
    for names in (alike, [name[::-1] for name in alike], ["head.weight"]):
        found = plots.apart(names)
        assert list(found) == names
        assert len(set(found.values())) == len(names)
        assert max(map(len, found.values())) <= 44
    assert found == {"head.weight": "head.weight"}


@pytest.mark.takes_seconds
def test_long_runs_keep_their_spikes_on_the_map(tmp_path, figures):
    values = np.ones((2500, 2, 2))
    values[1234, 0, 1] = 50
    _, layers, bottom = draw(figures, written(tmp_path / "run.csv", ["a", "b"], values))
    cells = layers.collections[0].get_array()
    assert cells.shape[1] <= 800
    assert 10 ** cells.max() == pytest.approx(50)
    assert "medians of 13 rows" in bottom.get_legend().get_title().get_text()


def test_broken_and_zero_matrices_are_told(tmp_path, figures):
    values = np.ones((4, 2, 3))
    values[2:, :, 1] = math.nan
    values[:, :, 2] = 0
    top, layers, _ = draw(figures, written(tmp_path / "run.csv", ["a", "b", "c"], values))
    assert labels(top) == ["b\n(not finite at step 2)", "a", "c (zero)"]
    assert layers.get_title(loc="left").endswith("(orange: not finite)")
    assert layers.collections[0].get_array().mask.sum() == 2


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("n", "rows", "fill"),
    [(1, 1, 1.0), (13, 1, 0.0), (30, 2, math.nan), (4, 3, 1e-30), (300, 3, 1.0)],
)
def test_pictures_of_unusual_logs(tmp_path, capsys, n, rows, fill):
    pytest.importorskip("matplotlib")
    path = written(tmp_path / "a.csv", [f"w{i}" for i in range(n)], np.full((rows, 2, n), fill))
    assert cli.main(["plot", str(path)]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    number = "1 matrix" if n == 1 else f"{n} matrices"
    length = "1 row" if rows == 1 else f"{rows} rows"
    assert out.startswith(f"{number}, {length}, steps 0 to {rows - 1}\npicture: ")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "x", "expected a name that ends in .csv or .jsonl"),
        ("a.csv", "", "line 1 is not a header"),
        ("a.csv", "step,sigma/a,resid", "line 1 is not a header"),
        ("a.csv", "x,y,z\n1,2,3\n", "line 1 is not a header"),
        ("a.csv", "step,sigma/a,residual/b\n", "line 1 is not a header"),
        ("a.csv", "step,sigma/a,residual/a\n", "holds no step yet"),
        ("a.csv", "step,sigma/a,residual/a\n1,2", "holds no step yet"),
        ("a.csv", "step\n1\n", "holds no matrix"),
        ("a.csv", "step,sigma/a,residual/a\n1,2,3\n1,x,3\n", "line 3 is not a row of numbers"),
        ("a.csv", "step,sigma/a,residual/a\n1,2\n", "line 2: expected 3 columns, got 2"),
        ("a.csv", "\x00\n", "not a log of log_to()"),
        ("a.csv", f"{'x' * 200_000}\n", "not a log of log_to(): field larger"),
        ("a.jsonl", "", "holds no step yet"),
        ("a.jsonl", "[1]\n", "line 1 is not a line of log_to()"),
        ("a.jsonl", '{"step": 1}\n', "line 1 is not a line of log_to()"),
        ("a.jsonl", '{"step": 1, "sigma": {"a": 1}, "residual": {"b": 1}}\n', "other matrices"),
        ("a.jsonl", '{"step": 1, "sigma": {"a": "?"}, "residual": {"a": 1}}\n', "is not a line of"),
        ("none.csv", None, "none.csv: No such file or directory"),
    ],
)
def test_what_is_no_log_is_one_line_and_an_exit_code(tmp_path, capsys, name, text, said):
    pytest.importorskip("matplotlib")
    if text is not None:
        (tmp_path / name).write_text(text)
    assert cli.main(["plot", str(tmp_path / name)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"spectral-kernels: {tmp_path / name}: ")
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.takes_seconds
def test_without_matplotlib_it_says_what_to_install(tmp_path):
    done = processes.run_without("matplotlib", "plot", random_log(tmp_path / "run.csv", 3))
    assert done.returncode == 1
    assert done.stderr == (
        "spectral-kernels: plot needs matplotlib: pip install 'spectral_kernels[plot]'\n"
    )
