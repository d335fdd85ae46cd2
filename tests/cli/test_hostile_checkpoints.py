"""``spectral-kernels inspect`` of names, files and sizes that somebody chose to do harm."""

import csv
import io
import json
import os
import socket
import sys
import time

import pytest
import torch

from spectral_kernels import cli
from spectral_kernels.backends import choice
from spectral_kernels.cli import console
from spectral_kernels.cli.inspect import values as values_of_matrix
from spectral_kernels.diagnostics import untrusted
from spectral_kernels.diagnostics.checkpoints import Checkpoint, files
from tests.support.checkpoints import check_against_svd, error_of, values

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("rich")
pytestmark = pytest.mark.usefixtures("seeded")

# Title and colour of a terminal, a bell, a line of its own, text from right to left.
HOSTILE = "\x1b]0;T\x07\x1b[31m\nx\u202e"
SHOWN = r"\x1b]0;T\x07\x1b[31m\nx\u202e"


@pytest.fixture(autouse=True)
def any_width(monkeypatch):
    """Tables are as wide as they need, whatever runs the tests."""
    monkeypatch.delenv("COLUMNS", raising=False)


def is_harmless(text):
    return all(line.isprintable() for line in text.split("\n"))


# ----------------------------------------------------------------------------------------- names


def test_names_of_files_cannot_steer_a_terminal(tmp_path, capsys):
    folder = tmp_path / f"d{HOSTILE}"
    folder.mkdir()
    for name in (f"a{HOSTILE}", "b"):
        torch.save({"w": torch.eye(2), "i": torch.eye(2).int()}, folder / f"{name}.pt")
    assert cli.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert is_harmless(out)
    assert f"a{SHOWN}.pt:w" in out
    assert f"d{SHOWN}: 2 matrices" in out
    one, other = (str(folder / f"{name}.pt") for name in (f"a{HOSTILE}", "b"))
    torch.save({"only": torch.eye(2), "w": torch.eye(2)}, other)
    picture = str(folder / "x.png")
    assert cli.main(["inspect", one, other, "--fail-above", "0.5", "--plot", picture]) == 3
    out, err = capsys.readouterr()
    assert is_harmless(out + err)
    assert f"only in {tmp_path}/d{SHOWN}/b.pt: only" in out
    assert f"picture: {tmp_path}/d{SHOWN}/x.png\n" in out
    assert err.count("\n") == 3


def test_errors_cannot_steer_a_terminal(tmp_path, capsys):
    path = tmp_path / f"a{HOSTILE}.pt"
    for content in (None, b"PK\x03\x04junk", b"junk"):
        if content is not None:
            path.write_bytes(content)
        said = error_of(path, capsys)
        assert is_harmless(said)
        assert f"a{SHOWN}.pt: " in said
    for suffix in ("pt", "safetensors"):
        path = tmp_path / f"b\udcff.{suffix}"  # a byte that is not UTF-8
        path.write_bytes(b"")
        assert rf"b\udcff.{suffix}: its path is not UTF-8" in error_of(path, capsys)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": f"{HOSTILE}.safetensors"}}))
    said = error_of(index, capsys)
    assert is_harmless(said)
    assert f"{SHOWN}.safetensors is missing" in said


@pytest.mark.parametrize(
    "arguments", [["inspect", "a", "b", HOSTILE], ["inspect", "a", "--csv", f"{HOSTILE}/x.csv"]]
)
def test_wrong_usage_cannot_steer_a_terminal(capsys, arguments):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    err = capsys.readouterr().err
    assert is_harmless(err)
    assert "x1b" in err


def test_env_cannot_steer_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(choice, "unavailable", lambda name: f"{name}: {HOSTILE}")
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert is_harmless(out)
    assert f"no: cpu: {SHOWN}\n" in out


def test_details_of_an_error_keep_their_lines(capsys):
    assert console.say("it\nfailed\x07", 5, details=["  File \x1b", "end"]) == 5
    assert capsys.readouterr().err == (
        "spectral-kernels: it\\nfailed\\x07\n  File \\x1b\nend\n"
    )  # fmt: skip


def test_names_that_escaping_makes_the_same_are_told_apart(tmp_path, capsys):
    path = tmp_path / "same.pt"
    names = ["a\x1b", r"a\x1b", r"a\x1b#2", "b"]
    torch.save({name: (i + 1) * torch.eye(2) for i, name in enumerate(names)}, path)
    rows = values(path, capsys=capsys)["matrices"]
    found = [(row["name"], round(row["sigma"])) for row in rows]
    assert found == [(r"a\x1b", 1), (r"a\x1b#3", 2), (r"a\x1b#2", 3), ("b", 4)]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("option", [None, "--json", "--csv"])
def test_output_is_utf_8_whatever_the_locale(tmp_path, monkeypatch, encoding, option):
    path = tmp_path / "é.pt"
    torch.save({"\u4e2d": torch.eye(2)}, path)
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["inspect", str(path), *([option, "-"] if option else [])]) == 0
    text = stream.buffer.getvalue().decode("utf-8")
    # JSON has escapes of its own.
    assert (r"\u4e2d" if option == "--json" else "\u4e2d") in text
    if option is None:
        assert "é.pt: 1 matrix" in text
    assert (stream.encoding, stream.errors) == (encoding, "strict")


def test_a_terminal_keeps_its_encoding(tmp_path, monkeypatch):
    path = tmp_path / "é.pt"
    torch.save({"\u4e2d": torch.eye(2)}, path)
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["inspect", str(path)]) == 0
    text = stream.buffer.getvalue().decode("ascii")
    assert r"\u4e2d" in text
    assert r"\xe9.pt: 1 matrix" in text


@pytest.mark.takes_seconds
def test_a_picture_shows_names_as_they_are(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or
                        save(self, *a, **k))  # fmt: skip
    path = tmp_path / r"$\frac$.pt"
    names = [r"$\frac$.0.w", "$b$.1.w", "_orig_mod.2.w", "\u4e2d.3.w"]
    scales = [1e-150, 1.0, 1e150, 0.0]
    torch.save({n: s * torch.eye(2).double() for n, s in zip(names, scales, strict=True)}, path)
    assert cli.main(["inspect", str(path), "--plot", str(tmp_path / "x.png")]) == 0
    (figure,) = drawn
    (axes,), (legend,) = figure.axes, figure.legends
    shown = [text.get_text().replace(r"\$", "$").strip() for text in legend.get_texts()]
    usual = "usual (of a fresh layer): 1.15"
    assert shown == [r"$\frac$.*.w", "$b$.*.w", "_orig_mod.*.w", "zero", usual]
    ticks = [text.get_text().replace(r"\$", "$").strip() for text in axes.get_xticklabels()]
    assert ticks == [r"$\frac$.0", "$b$.1", "_orig_mod.2", r"\u4e2d.3"]
    low, high = axes.get_ylim()
    assert 0 < low < 1e-150 < 1e150 < high


# ------------------------------------------------------------------------------------------- CSV


@pytest.mark.parametrize(
    "start", ["=", "+", "-", "@", " =", "\uff1d", "\uff0b", "\uff0d", "\uff20"]
)
def test_a_name_is_no_formula_in_a_spreadsheet(tmp_path, capsys, start):
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    name = f"{start}HYPERLINK(1)"
    torch.save({name: 2 * torch.eye(2), f"{start}a": torch.eye(2), "-": torch.eye(2)}, one)
    torch.save({name: torch.eye(2), f"{start}b": torch.eye(2), "-": torch.eye(2)}, other)
    assert cli.main(["inspect", str(one), str(other), "--csv", "-"]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    expected = [f"'{name}", "'-", f"'{start}a", f"'{start}b"]
    assert [row[0] for row in rows[1:]] == expected
    # Numbers stay numbers.
    changed = dict(zip(rows[0], rows[1], strict=True))
    assert float(changed["sigma_change_percent"]) == pytest.approx(-50, rel=1e-3)
    document = values(one, capsys=capsys)["matrices"]
    assert document[0]["name"] == name


@pytest.mark.parametrize("text", ["\t=1", "\r=1"])
def test_tab_and_return_begin_no_cell(text):
    assert untrusted.csv_cell(text) == f"'{text}"
    assert untrusted.csv_cell("h.0.=weight") == "h.0.=weight"


def test_files_are_utf_8_in_any_locale(tmp_path, monkeypatch):
    path, out = tmp_path / "a.pt", tmp_path / "a.csv"
    torch.save({"\u4e2d": torch.eye(2)}, path)
    # What open() takes where a locale says ASCII.
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "ascii")
    assert cli.main(["inspect", str(path), "--csv", str(out), "--json", str(tmp_path / "j")]) == 0
    assert "\u4e2d" in out.read_text("utf-8")


# ----------------------------------------------------------------------------------------- files


def special(path, kind, monkeypatch):
    """Make a file that no reader should open."""
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as opened, monkeypatch.context() as context:
            context.chdir(path.parent)  # the path of a socket has at most 107 bytes
            opened.bind(path.name)
    else:
        path.symlink_to("/dev/zero")


KINDS = ["a FIFO", "a socket", "a device"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "safetensors.index.json"])
@pytest.mark.parametrize("is_link", [False, True])
def test_what_is_no_regular_file_is_refused_at_once(
    tmp_path, capsys, monkeypatch, kind, suffix, is_link
):
    path = tmp_path / f"model.{suffix}"
    if is_link:
        special(tmp_path / "target", kind, monkeypatch)
        path.symlink_to("target")
    else:
        special(path, kind, monkeypatch)
    said = f"spectral-kernels: {path}: expected a regular file, got {kind}\n"
    assert error_of(path, capsys) == said
    assert error_of(tmp_path, capsys) == said


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_file_that_an_index_names_is_refused_at_once(tmp_path, capsys, monkeypatch, kind):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "w.safetensors"}}))
    special(tmp_path / "w.safetensors", kind, monkeypatch)
    for path in (index, tmp_path):
        assert f"w.safetensors: expected a regular file, got {kind}" in error_of(path, capsys)


@pytest.mark.parametrize("name", ["b.safetensors", "model.safetensors.index.json"])
def test_a_link_to_nothing_is_named(saved, capsys, name):
    (saved.parent / name).symlink_to("gone")
    assert f"{name}: there is no such file" in error_of(saved.parent, capsys)


@pytest.mark.parametrize("n_bytes", [1 << 40, files._INDEX_BYTES + 1])
def test_an_index_that_is_gigantic_is_refused(tmp_path, capsys, n_bytes):
    path = tmp_path / "model.safetensors.index.json"
    path.touch()
    os.truncate(path, n_bytes)  # which takes no room on the disk
    for given in (path, tmp_path):
        assert f"{path}: expected an index of at most " in error_of(given, capsys)


@pytest.mark.parametrize("command", ["inspect", "plot", "demo"])
def test_a_name_that_is_too_long_for_a_file_is_no_traceback(saved, capsys, command):
    long = str(saved.parent / f"{'x' * 300}.png")
    wanted = {"inspect": [str(saved), "--plot"], "plot": [str(saved), "--out"], "demo": ["--out"]}
    folder = str(saved.parent / ("x" * 300) / "a.png")
    with pytest.raises(SystemExit):
        cli.main([command, *wanted[command], folder])
    assert "expected a file in a folder that can be written to" in capsys.readouterr().err
    if command == "inspect":
        pytest.importorskip("matplotlib")
        assert cli.main([command, *wanted[command], long]) == 1
        assert "File name too long" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- sizes


def test_small_matrices_have_the_sigma_of_large_ones(tmp_path, monkeypatch, capsys):
    shapes = [(1, 1), (1, 9), (9, 1), (5, 3), (8, 4, 3, 3), (0, 3), (3, 0), (120, 130), (2, 9000)]
    tensors = {f"w{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    path = tmp_path / "shapes.safetensors"
    safetensors.save_file(tensors, path)
    found = {}
    for limit in (0, 1 << 14):
        monkeypatch.setattr(values_of_matrix, "_SMALL", limit)
        document = values(path, capsys=capsys)
        found[limit] = [row["sigma"] for row in document["matrices"]]
    assert found[0] == pytest.approx(found[1 << 14], rel=1e-4)
    assert found[0] != found[1 << 14]
    tensors = {name: t for name, t in tensors.items() if t.numel()}
    document["matrices"] = [row for row in document["matrices"] if row["name"] in tensors]
    check_against_svd(document, tensors)


@pytest.mark.takes_seconds
def test_thousands_of_tensors_are_listed_in_seconds(tmp_path, capsys):
    n, path = 5000, tmp_path / "many.safetensors"
    tensors = {f"h.{i}.experts.w": torch.randn(4, 4) for i in range(n)}
    tensors |= {f"h.{i}.experts.b": torch.randn(4) for i in range(n)}
    safetensors.save_file(tensors, path)
    start = time.process_time()
    assert cli.main(["inspect", str(path)]) == 0
    seconds = time.process_time() - start
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if ".experts.w " in line]) == n
    assert seconds < 6  # one second; a plan per matrix and a rich table take over ten


def test_a_narrow_terminal_keeps_the_names(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    path = tmp_path / "narrow.pt"
    torch.save({"model.layers.0.projection_without_a_dot": torch.eye(2)}, path)
    assert cli.main(["inspect", str(path)]) == 0
    table = capsys.readouterr().out.partition(f"\n{path}")[0]
    column = "".join(line[1:17].strip() for line in table.splitlines()[4:])
    assert column == "model.layers.0.projection_without_a_dot"


def test_wide_characters_keep_columns_in_line(tmp_path, capsys):
    from rich.cells import cell_len

    path = tmp_path / "wide.pt"
    torch.save({"\u4e2d\u6587.w": torch.eye(2), "latin": torch.eye(2)}, path)
    assert cli.main(["inspect", str(path)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "2x2" in line]
    assert len(rows) == 2
    assert len({cell_len(row.partition("2x2")[0]) for row in rows}) == 1
    assert Checkpoint(path).tensors[0].name == "\u4e2d\u6587.w"
