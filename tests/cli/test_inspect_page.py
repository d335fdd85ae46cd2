"""``spectral-kernels inspect --html``: what is on the page, and that names cannot become code."""

import base64
import hashlib
import html.parser
import json
import math
import re
import shutil
import subprocess

import pytest
import torch

from spectral_kernels import cli
from spectral_kernels.cli.inspect import report
from spectral_kernels.diagnostics.untrusted import printable
from tests import TIMEOUT

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.takes_seconds]

HOSTILE = [
    "<script>document.title='run'</script>", "</script><script>document.title='run'</script>",
    "\"><img src=x onerror=\"document.title='run'\">", "' onclick='x", "</table></div>",
    "&lt;b&gt;", "a\u202eb", "\x1b[2J", "--><!--", "]]>", "{{x}}", "$\\frac$.0.w", "=cmd()",
]  # fmt: skip
VOID = {"meta", "input", "wbr", "br", "img", "link", "base"}


class Page(html.parser.HTMLParser):
    """The elements of a page: tags with attributes, and the cells of its tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.data, self.open = [], [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append([dict(attrs), ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in self.open, tag
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not self.open:
            return
        if self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1][1] += data
        tag = self.open[-1]
        self.data[tag] = self.data.get(tag, "") + data

    def columns(self, table=0):
        """Return the cells of a table by the keys of its columns: (attributes, text) per row."""
        head, *rows = self.tables[table]
        keys = [attributes["data-key"] for attributes, _ in head]
        assert all(len(row) == len(keys) for row in rows)
        return {key: [row[i] for row in rows] for i, key in enumerate(keys)}


def written(tmp_path, *arguments):
    """Return the page and the JSON document of the same call."""
    page, document = tmp_path / "page.html", tmp_path / "page.json"
    files = ["--html", str(page), "--json", str(document)]
    assert cli.main(["inspect", *map(str, arguments), *files]) == 0
    text = page.read_bytes().decode("utf-8")
    return text, json.loads(document.read_text())


def numbers(cells):
    """Return the exact numbers of a column, None where they are not finite."""
    found = [float(attributes["data-v"]) for attributes, _ in cells]
    return [value if math.isfinite(value) else None for value in found]


@pytest.fixture
def hostile(tmp_path):
    """A checkpoint with names that try to be code, and one matrix that is not finite."""
    tensors = {name: torch.randn(4, 3) for name in HOSTILE}
    tensors["nan"] = torch.full((3, 3), math.nan)
    tensors["<i>skipped</i>"] = torch.ones(3, 3, dtype=torch.int8)
    path = tmp_path / "<b>'x'.pt"
    torch.save(tensors, path)
    return path


def test_the_page_has_the_numbers_of_the_json(saved, tmp_path, capsys):
    text, document = written(tmp_path, saved, "--convolutions", "operator")
    assert f"page: {tmp_path}/page.html\n" in capsys.readouterr().out
    columns = Page(text).columns()
    rows = document["matrices"]
    assert [name for _, name in columns["name"]] == [row["name"] for row in rows]
    assert [size for _, size in columns["shape"]] == ["x".join(map(str, r["shape"])) for r in rows]
    assert numbers(columns["shape"]) == [math.prod(row["shape"]) for row in rows]
    for key in ("sigma", "stable_rank", "norm", "usual_sigma", "ratio"):
        assert numbers(columns[key]) == [row[key] for row in rows]
        for (_, shown), row in zip(columns[key], rows, strict=True):
            assert float(shown) == pytest.approx(row[key], rel=6e-3)
    for (attributes, shown), row in zip(columns["operator_norm"], rows, strict=True):
        assert (shown == "") == ("data-v" not in attributes) == (row["operator_norm"] is None)
    filled = {k for row in rows for k, v in row.items() if v is not None and v != []}
    assert set(columns) == filled
    assert "operator_norm" not in Page(written(tmp_path, saved)[0]).columns()


def test_two_checkpoints_have_their_values_and_changes(saved, tensors, tmp_path):
    other = tmp_path / "other.pt"
    changed = {n: 3 * t for n, t in tensors.items() if n != "conv.weight"}
    torch.save(changed | {"new.weight": torch.randn(3, 3)}, other)
    text, document = written(tmp_path, saved, other, "--sort", "change")
    page = Page(text)
    columns, rows = page.columns(), document["matrices"]
    assert [name for _, name in columns["name"]] == [row["name"] for row in rows]
    for key in ("sigma", "stable_rank", "norm"):
        assert numbers(columns[key]) == [row[key] for row in rows]
        assert numbers(columns[f"other_{key}"]) == [row["other"][key] for row in rows]
        changes = [row["change_percent"][key] for row in rows]
        assert numbers(columns[f"{key}_change_percent"]) == changes
    assert "other_shape" not in columns  # the same in all rows
    only = [[name for _, name in page.columns(table)["name"]] for table in (1, 2)]
    assert only == [["conv.weight"], ["new.weight"]]
    assert page.data["summary"] == f"1 only in {saved}1 only in {other}"


def test_columns_that_are_added_to_the_report_are_on_the_page(saved, tmp_path, monkeypatch):
    drawn = {}

    def spectrum(row):
        return drawn.setdefault(row.name, tuple(torch.rand(3).tolist()))

    monkeypatch.setitem(report.COLUMNS, "values", spectrum)
    monkeypatch.setitem(report.COLUMNS, "rank_90", lambda row: min(row.shape))
    monkeypatch.setitem(
        report.COLUMNS, "alpha", lambda row: row.sigma if "h." in row.name else None
    )
    monkeypatch.setitem(report.COLUMNS, "nothing", lambda row: None)
    monkeypatch.setitem(report.COLUMNS, "none_of_them", lambda row: ())
    text, document = written(tmp_path, saved)
    page = Page(text)
    columns, rows = page.columns(), document["matrices"]
    orders = {cell["data-key"]: cell["data-order"] for cell, _ in page.tables[0][0]}
    assert {"nothing", "none_of_them"}.isdisjoint(columns)
    assert orders["values"] == orders["rank_90"] == orders["alpha"] == orders["shape"] == "number"
    assert orders["name"] == orders["dtype"] == "text"
    found = [[*map(float, attributes["data-v"].split())] for attributes, _ in columns["values"]]
    assert found == [row["values"] for row in rows]
    assert numbers(columns["rank_90"]) == [row["rank_90"] for row in rows]
    assert [cell.get("data-v") for cell, _ in columns["alpha"]] == [
        None if row["alpha"] is None else repr(row["alpha"]) for row in rows
    ]


def test_names_cannot_become_code_or_leave_their_cell(hostile, tmp_path):
    text, document = written(tmp_path, hostile)
    page = Page(text)
    names = [name for _, name in page.columns()["name"]]
    assert names == [row["name"] for row in document["matrices"]]
    assert set(names) == {*map(printable, HOSTILE), "nan"}
    assert page.columns(1)["name"][0][1] == "<i>skipped</i>"
    assert page.data["h1"] == "Singular values of <b>'x'.pt"
    assert all(c.isprintable() or c == "\n" for c in text)
    assert not page.open, "elements that are not closed"
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert {"img", "i", "b", "link", "iframe", "object", "a"}.isdisjoint(tags)
    for _, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes)
    assert "2 matrices" not in text
    assert page.data["p"].startswith("1 matrix is not finite")
    rows = [attributes for tag, attributes in page.tags if tag == "tr"]
    assert [r.get("class") for r in rows].count("bad") == 1


def test_the_page_loads_nothing_and_only_its_own_script_may_run(saved, tmp_path):
    text, _ = written(tmp_path, saved)
    page = Page(text)
    policies = [a["content"] for tag, a in page.tags
                if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]  # fmt: skip
    digest = base64.b64encode(hashlib.sha256(page.data["script"].encode()).digest()).decode()
    assert policies == [
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    ]
    # It stands before everything that it governs.
    assert text.index("Content-Security-Policy") < min(text.index(t) for t in ("<style", "<script"))
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(key, "#").startswith("#"), (tag, attributes)
    assert not re.search(r"url\((?!#)|@import", text)
    addresses = set(re.findall(r"https?://[^\"\s<]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_several_values_attention_and_what_is_added_have_their_columns(tmp_path):
    path, model = tmp_path / "tuned.pt", tmp_path / "base.pt"
    tensors = {f"h.{i}.{n}_proj.weight": torch.randn(16, 16) for i in range(2) for n in "qk"}
    torch.save(tensors, model)
    torch.save({name: t + 0.1 * torch.randn(16, 16) for name, t in tensors.items()}, path)
    text, document = written(tmp_path, path, "--values", "3", "--heads", "2", "--base", model)
    page = Page(text)
    columns, layers = page.columns(), page.columns(1)
    for row, (attributes, _) in zip(document["matrices"], columns["values"], strict=True):
        assert [float(x) for x in attributes["data-v"].split()] == row["values"]
    for key in ("condition", "alpha", "n_above_edge"):
        assert numbers(columns[key]) == [row[key] for row in document["matrices"]]
    for key in ("base_sigma", "relative_update", "intruders"):
        assert numbers(columns[key]) == [row["added"][key] for row in document["matrices"]]
    assert [name for _, name in layers["name"]] == [row["layer"] for row in document["attention"]]
    assert numbers(layers["largest"]) == [row["largest"] for row in document["attention"]]
    assert [len(a["data-v"].split()) for a, _ in layers["sigma"]] == [2, 2]


def test_a_page_without_a_matrix_says_so(tmp_path):
    path = tmp_path / "biases.pt"
    torch.save({"b": torch.randn(3), "n": torch.ones(3, 3, dtype=torch.int8)}, path)
    text, document = written(tmp_path, path)
    page = Page(text)
    assert document["matrices"] == []
    assert page.columns() == {"name": []}
    assert page.columns(1)["name"][0][1] == "n"
    assert "biases.pt: no matrices" in page.data["p"]


def test_the_same_checkpoint_gives_the_same_page(saved, tmp_path):
    first, _ = written(tmp_path, saved)
    again, _ = written(tmp_path, saved)
    assert first == again
    assert first.count("<svg ") == 2
    ids = re.findall(r'\bid="([^"]*)"', first)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]*)', first))
    assert used
    assert used <= set(ids)


def test_wrong_names_of_pages_are_refused(saved, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["inspect", str(saved), "--html", "x.txt"])
    assert raised.value.code == 2
    said = "argument --html: expected a name that ends in .html or .htm, got 'x.txt'\n"
    assert capsys.readouterr().err.endswith(said)


# A script of the test's own, which the policy of the page must not stop.
SORTED = """
const rows = () => [...document.querySelectorAll("#matrices tbody tr")].map(
  (row) => row.cells[0].textContent);
const found = { title: document.title, file: rows() };
const button = [...document.querySelectorAll("#matrices thead button")].find(
  (b) => b.textContent === "sigma_1");
button.click(); found.descending = rows();
button.click(); found.ascending = rows();
button.click(); found.third = rows();
const input = document.getElementById("filter");
const type = (text) => { input.value = text; input.dispatchEvent(new Event("input")); };
type("SCRIPT"); found.part = rows();
type("*.?.w"); found.pattern = rows();
type("[2J"); found.bracket = rows();
found.count = document.getElementById("count").textContent;
document.documentElement.replaceChildren();
const out = document.createElement("pre");
out.textContent = "RESULT" + JSON.stringify(found) + "END";
document.documentElement.append(out);
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_sorts_and_filters_and_runs_no_name(hostile, tmp_path):
    text, document = written(tmp_path, hostile)
    digest = base64.b64encode(hashlib.sha256(SORTED.encode()).digest()).decode()
    text = text.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
    page = tmp_path / "tried.html"
    page.write_text(text.replace("</body>", f"<script>{SORTED}</script></body>"), "utf-8")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, timeout=TIMEOUT, check=True,
    )  # fmt: skip
    dumped = html.unescape(done.stdout.decode("utf-8"))
    found = json.loads(re.search(r"RESULT(.*)END", dumped, re.DOTALL)[1])
    sigmas = {row["name"]: row["sigma"] for row in document["matrices"]}
    names = list(sigmas)
    by_sigma = sorted(names, key=lambda n: -math.inf if sigmas[n] is None else -sigmas[n])
    assert found["file"] == found["third"] == names
    assert found["descending"] == by_sigma
    assert by_sigma[0] == "nan"
    assert found["ascending"] == by_sigma[::-1]
    assert found["part"] == [name for name in names if "script" in name]
    assert found["pattern"] == ["$\\frac$.0.w"]
    assert found["bracket"] == [r"\x1b[2J"]
    assert found["count"] == f"1 of {len(names)}"
    assert "run" not in found["title"]
