"""``spectral-kernels plot`` of logs that are broken, hostile or extreme: a picture or one line."""

import math
import os
import random
import re
import sys

import numpy as np
import pytest
import torch

from spectral_kernels import cli
from spectral_kernels.diagnostics import log as logs

pytest.importorskip("matplotlib")
from matplotlib import cbook
from matplotlib.figure import Figure

from spectral_kernels.cli.plot import picture

SUFFIXES = (".csv", ".jsonl")
LARGEST, SMALLEST = sys.float_info.max, 5e-324
NAMES = [
    "a.0.weight", "_orig_mod.0.weight", "", "$a$b", r"$\frac$", "cost$", r"a\$b_{x}^2", "a\nb",
    "c\r", "a\x1b[2Jb", "\x07\x00\x7f", "\t", "\u202eb", "\ud800", "\ufffe", "\u4e2d\u6587",
    "\U0001f600", "=1+1", '"', ",", "'", "%s{0}", "x" * 3000, "e\u0301",
]  # fmt: skip
VALUES = [0.0, 1.0, 1e308, LARGEST, SMALLEST, 1e-310, 2.5e-308, math.nan, math.inf, 1 + 1e-16]
DEEP = "[" * 10_000 + "]" * 10_000
TOKENS = [
    "0", "1", "-1", "1.5", "1e400", "-1e400", "1e308", "5e-324", "9" * 400, "9" * 5000, "nan",
    "inf", "NaN", "Infinity", "-Infinity", "null", "true", "", " 1", "1_0", "x", '"1"', '"', "[]",
    "{}", DEEP, "\x1b[31m", "\x00", "$", r'"\ud800"', f"{2**53 + 1}", f"{2**63 - 1}", f"{2**63}",
]  # fmt: skip


def write(path, names, steps, rows):
    """Write a log of ``rows`` [T, 2, n_matrices]."""
    values = iter(torch.as_tensor(np.asarray(rows, np.float64)))
    log = logs.Log(path, names, lambda: next(values))
    for step in steps:
        log(int(step))
    return path


def write_extreme(path, draw):
    """Write a log that is right, of hostile names and extreme steps and values."""
    names = draw.sample(NAMES, draw.choice([1, 3, 16]))
    n_rows = draw.choice([1, 2, 5])
    start = draw.choice([0, 7, 2**53, 2**63 - n_rows])
    far = 10 ** draw.choice([0, 3, 15]) if start < 2**63 - n_rows else 1
    values = [draw.choice(VALUES) if draw.random() < 0.5 else 10 ** draw.uniform(-322, 308)
              for _ in range(n_rows * 2 * len(names))]  # fmt: skip
    steps = [start + far * i for i in range(n_rows)]
    return write(path, names, steps, np.reshape(values, (n_rows, 2, len(names))))


def broken(text, draw):
    """Return the bytes of a log with something changed in it."""
    lines = text.split(b"\n")
    token = draw.choice(TOKENS).encode()
    i = draw.randrange(len(lines))
    kind = draw.randrange(7)
    if kind == 0:  # another number or name
        places = [m.span() for m in re.finditer(rb'(?<=[ ,])[^ ,}]+|"[^"]*"|^[^,]+', lines[i])]
        if places:
            a, b = draw.choice(places)
            lines[i] = lines[i][:a] + token + lines[i][b:]
    elif kind == 1:
        lines.insert(i, token)
    elif kind == 2:
        lines.insert(i, draw.randbytes(draw.choice([1, 3, 50])))
    elif kind == 3:
        del lines[i]
    elif kind == 4:
        lines[i] = lines[i][: draw.randrange(len(lines[i]) + 1)]
    elif kind == 5:
        lines.insert(i, lines[draw.randrange(len(lines))])
    else:
        place = draw.randrange(len(text) + 1)
        return text[:place] + draw.choice([token, draw.randbytes(3)]) + text[place:]
    return b"\n".join(lines)


def ends_well(path, capsys):
    """Plot a file; assert that there is a picture and no message, or one line and no picture."""
    out = path.with_suffix(".png")
    out.unlink(missing_ok=True)
    code = cli.main(["plot", str(path)])
    shown, said = capsys.readouterr()
    if code == 0:
        assert said == ""
        assert shown.count("\n") == 2
        assert out.read_bytes().startswith(b"\x89PNG")
    else:
        assert code == 1
        assert shown == ""
        assert re.fullmatch(r"spectral-kernels: .*run\.(csv|jsonl): .+\n", said)
        assert said[:-1].isprintable()
        assert not out.exists()
    return code == 0


def drawn(path, monkeypatch):
    """Plot a file that must become a picture; return the figure."""
    figures, save = [], Figure.savefig

    def keep(self, *arguments, **options):
        figures.append(self)
        save(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        assert cli.main(["plot", str(path)]) == 0
    return figures[0]


@pytest.mark.takes_seconds
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_broken_log_is_a_picture_or_one_line(tmp_path, capsys, monkeypatch, suffix):
    draw, path, n_drawn = random.Random(0), tmp_path / f"run{suffix}", 0
    for _ in range(300):
        path.unlink(missing_ok=True)
        write_extreme(path, draw)
        for _ in range(draw.choice([1, 1, 3])):
            path.write_bytes(broken(path.read_bytes(), draw))
        if n_drawn == 5:  # that is enough of what takes half a second
            monkeypatch.setattr(picture, "draw", lambda _, __, out: out.write_bytes(b"\x89PNG"))
        n_drawn += ends_well(path, capsys)
    assert 30 < n_drawn < 270


@pytest.mark.takes_seconds
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(8))
def test_an_extreme_log_is_a_picture(tmp_path, capsys, seed):
    draw = random.Random(seed)
    assert ends_well(write_extreme(tmp_path / "run.csv", draw), capsys)
    assert ends_well(write_extreme(tmp_path / "run.jsonl", draw), capsys)


@pytest.mark.takes_seconds
@pytest.mark.filterwarnings("error")
def test_names_are_shown_as_they_are(tmp_path, monkeypatch):
    names = [
        "$a$b",
        r"$\frac$",
        r"a\$b_{x}^2",
        "_orig_mod.w",
        "a\x1b[2J",
        "\ud800",
        "\u202e",
        "\uffff",
        "",
    ]
    path = tmp_path / "$x$\x07.jsonl"
    figure = drawn(write(path, names, [0], np.ones((1, 2, len(names)))), monkeypatch)
    top, layers, _ = figure.axes[:3]
    shown = [
        names[0],
        names[1],
        names[2],
        " _orig_mod.w",
        r"a\x1b[2J",
        r"\ud800",
        r"\u202e",
        r"\uffff",
        "''",
    ]
    for texts in (top.get_legend().get_texts(), layers.get_yticklabels()):
        assert not any(cbook.is_math_text(text.get_text()) for text in texts)
        assert [text.get_text().replace(r"\$", "$") for text in texts] == shown
    assert not cbook.is_math_text(figure.get_suptitle())
    assert figure.get_suptitle() == r"\$x\$\x07.jsonl: 9 matrices"


@pytest.mark.takes_seconds
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values",
    [(SMALLEST, LARGEST), (SMALLEST, 2 * SMALLEST), (1e308, LARGEST), (LARGEST,) * 2,
     (1e-320, 1e-300), (SMALLEST,) * 2, (1, 1 + 1e-15), (0, SMALLEST), (0, math.nan)],
)  # fmt: skip
def test_values_at_the_ends_of_the_floats_are_drawn_where_they_are(tmp_path, monkeypatch, values):
    sigma = np.array([values, values[::-1], values], np.float64)
    path = write(tmp_path / "run.csv", ["a", "b"], range(3), np.stack((sigma, sigma), 1))
    read = logs.read(path).sigma
    figure = drawn(path, monkeypatch)
    top, layers = figure.axes[:2]
    curves = {line.get_label().partition("\n")[0][0]: line.get_ydata() for line in top.lines}
    np.testing.assert_array_equal(curves["a"], np.where(read[:, 0] > 0, read[:, 0], np.nan))
    np.testing.assert_array_equal(curves["b"], np.where(read[:, 1] > 0, read[:, 1], np.nan))
    low, high = top.get_ylim()
    positive = read[read > 0]
    if positive.size:
        assert 0 < low <= positive.min() <= positive.max() <= high <= LARGEST
        ticks = top.get_yticks()
        assert ((low <= ticks) & (ticks <= high)).all()
        cells = layers.collections[0].get_array()
        finite = read.T[np.isfinite(read.T)]
        expected = np.log10(np.where(finite > 0, finite, SMALLEST))
        np.testing.assert_allclose(cells.compressed(), expected, atol=0.02)
    else:
        assert low < high


def test_a_ratio_that_no_float_holds_is_the_nearest_one():
    residual = np.array([LARGEST, SMALLEST, 1, 0, 0, 1, math.nan, math.inf])
    sigma = np.array([SMALLEST, LARGEST, 2, 2, 0, 0, 1, 1])
    expected = [LARGEST, SMALLEST, 0.5, 0, 0, math.inf, math.nan, math.inf]
    np.testing.assert_array_equal(picture._ratio(residual, sigma), expected)


def test_a_median_of_large_numbers_is_one_of_them():
    column = np.array([LARGEST, LARGEST, 1.0, 3.0, SMALLEST, SMALLEST])
    found = picture._medians(column, np.array([0, 2, 4]))
    assert found.tolist() == [LARGEST, 2.0, SMALLEST]


@pytest.mark.takes_seconds
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "steps",
    [[2**63 - 1], [2**63 - 3, 2**63 - 2], [0, 2**63 - 1], [10**18, 10**18 + 7], [2**53, 2**53 + 1]],
)
def test_huge_steps_are_drawn(tmp_path, capsys, steps):
    path = write(tmp_path / "run.jsonl", ["a"], steps, np.ones((len(steps), 2, 1)))
    assert logs.read(path).steps.tolist() == steps
    assert cli.main(["plot", str(path)]) == 0
    out, err = capsys.readouterr()
    assert f"steps {steps[0]} to {steps[-1]}\n" in out
    assert err == ""


ROW = '{"step": %s, "sigma": {"a": %s}, "residual": {"a": %s}}\n'
HEADER = "step,sigma/a,residual/a\n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", ROW % ("1e400", 1, 1), "line 1 is not a line of log_to()"),
        ("a.jsonl", ROW % (10**400, 1, 1), "line 1: expected a step from 0 to 2**63 - 1, got 1000"),
        ("a.jsonl", ROW % ("9" * 5000, 1, 1), "line 1 is not a line of log_to()"),
        ("a.jsonl", ROW % (1, 10**400, 1), "line 1 is not a line of log_to()"),
        ("a.jsonl", ROW % (1, 1, DEEP), "line 1 is not a line of log_to()"),
        ("a.jsonl", ROW % (1, 1, 1) + DEEP + "\n", "line 2 is not a line of log_to()"),
        ("a.jsonl", ROW % ("true", 1, 1), "line 1 is not a line of log_to()"),
        ("a.jsonl", ROW % ('"1"', 1, 1), "line 1 is not a line of log_to()"),
        ("a.jsonl", ROW % (1, "true", 1), "line 1 is not a line of log_to()"),
        ("a.jsonl", ROW % (1, '"1"', 1), "line 1 is not a line of log_to()"),
        (
            "a.jsonl",
            ROW % (7, 1, -1),
            "step 7: residual: expected a number >= 0, inf or nan, got -1.0",
        ),
        ("a.csv", HEADER + f"{10**400},1,1\n", "line 2: expected a step from 0 to 2**63 - 1"),
        ("a.csv", HEADER + "-1,1,1\n", "line 2: expected a step from 0 to 2**63 - 1, got -1"),
        ("a.csv", HEADER + "1e400,1,1\n", "line 2 is not a row of numbers"),
        ("a.csv", HEADER + f"{'9' * 5000},1,1\n", "line 2 is not a row of numbers"),
        (
            "a.csv",
            HEADER + "7,-1e-9,1\n",
            "step 7: sigma: expected a number >= 0, inf or nan, got -1e-09",
        ),
        ("a\x1b[2J\n.csv", HEADER, r"a\x1b[2J\n.csv: holds no step yet"),
    ],
)
def test_what_no_log_holds_is_named(tmp_path, capsys, name, text, said):
    (tmp_path / name).write_text(text)
    assert cli.main(["plot", str(tmp_path / name)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert err[:-1].isprintable()


@pytest.mark.parametrize(
    ("kind", "target"),
    [("a FIFO", None), ("a FIFO", "fifo"), ("a device", "/dev/zero"), ("a directory", "folder")],
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, capsys, kind, target):
    path = tmp_path / "run.csv"
    if target is not None:
        path.symlink_to(target)
    if kind == "a FIFO":
        os.mkfifo(tmp_path / (target or path))
    (tmp_path / "folder").mkdir()
    assert cli.main(["plot", str(path)]) == 1
    said = f"spectral-kernels: {path}: expected a regular file, got {kind}\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("path", [".", "/", "..", ""])
def test_a_path_without_a_name_is_one_line(capsys, path):
    assert cli.main(["plot", path]) == 1
    assert "expected a name that ends in .csv or .jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_line_without_an_end_is_not_read_as_a_whole(tmp_path, capsys, monkeypatch, suffix):
    monkeypatch.setattr(logs, "_LONGEST_LINE", 1000)
    path = write(tmp_path / f"run{suffix}", ["a"], [0], np.ones((1, 2, 1)))
    os.truncate(path, 1 << 40)  # which takes no room on the disk
    assert cli.main(["plot", str(path)]) == 1
    assert "not a log of log_to(): a line is over 1000 bytes long" in capsys.readouterr().err


def test_a_log_that_does_not_fit_into_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def fail(path):
        raise MemoryError

    monkeypatch.setattr(logs, "read", fail)
    assert cli.main(["plot", str(tmp_path / "run.csv")]) == 1
    assert "needs more memory than this machine has" in capsys.readouterr().err
