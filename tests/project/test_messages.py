"""The form of messages: ``NAME: expected WHAT, got VALUE``, one line, advice in parentheses."""

import ast
import re

import pytest

from tests import ROOT

PYTHON = [
    path for folder in ("spectral_kernels", "bench") for path in (ROOT / folder).rglob("*.py")
]
NATIVE = [
    path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")
]
FORM = re.compile(r"(?P<name>[^:].*: )?expected .+, got (?P<got>.+)")
# Their messages come after a name that argparse puts there, or after that of a file.
NAMELESS = ("ArgumentTypeError", "PickleError")


def wrong(text, is_named=True):
    """Return what is wrong with the text of a message, ``{}`` standing for a value, or None."""
    if re.search(r"\baccepted (is|are|there|with|for)\b|; accepted\b", text):
        return "says what is accepted in place of what was expected"
    if text.endswith("."):
        return "ends with a full stop"
    if not re.search(r"\bgot\b|: expected\b|^expected\b", text):
        return None
    found = FORM.fullmatch(text)
    if found is None:
        return "is not of the form NAME: expected WHAT, got VALUE"
    if is_named and not found["name"]:
        return "does not begin with the name of what is wrong"
    if ";" in re.sub(r"\(.*\)", "", found["got"]):
        return "has advice behind the value that is not in parentheses"
    return None


def text_of(node):
    """Return a string of a syntax tree, with ``{}`` for what is known at run time only."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "expected":
        name, wanted, _ = map(text_of, node.args)
        return f"{name}: expected {wanted}, got {{}}"
    return "{}"


def messages(path):
    """Yield line, class and text of what a Python file raises, warns of, or says and ends."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        kind = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if kind in ("warn", "say", "error", "NothingSelected") or kind.endswith("Error"):
            yield node.lineno, kind, text_of(node.args[0])


def thrown(path):
    """Yield line and text of what a C++ file throws."""
    source = path.read_text()
    for statement in re.finditer(
        r"\bthrow\b[^;]*?\((?:\"(?:[^\"\\]|\\.)*\"|[^;\"])*\)\s*;", source
    ):
        parts = re.findall(r"\"((?:[^\"\\]|\\.)*)\"|(\+[^\"]+)", statement[0])
        text = "".join(literal or "{}" for literal, _ in parts)
        if text:
            yield source[: statement.start()].count("\n") + 1, text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("strength: got -1; accepted are numbers >= 0", "accepted"),
        ("parameter 'w' has strides (2,); accepted is a contiguous one", "accepted"),
        ("strength: got -1", "form"),
        ("strength: expected a number >= 0", "form"),
        ("strength: got -1, expected a number >= 0", "form"),
        ("expected a number >= 0, got -1", "name"),
        ("params: expected names, got none; pass the module", "parentheses"),
        ("strength: expected a number >= 0, got -1.", "full stop"),
    ],
)
def test_other_forms_are_found(text, said):
    assert said in wrong(text)


@pytest.mark.parametrize(
    "text",
    [
        "strength: expected a number >= 0, got -1",
        "params: expected names, got none (pass the module; or names)",
        "state: vectors of 'w': expected shape (1, 3), got (1, 4)",
        "parameter 'w' is sharded, and second derivatives are not supported; use backward()",
    ],
)
def test_the_form_itself_is_not_found(text):
    assert wrong(text) is None


def test_messages_have_one_form():
    found = [(path, line, kind, text) for path in PYTHON for line, kind, text in messages(path)]
    found += [(path, line, "throw", text) for path in NATIVE for line, text in thrown(path)]
    assert len(found) > 250
    assert sum("expected" in text for _, _, _, text in found) > 120
    assert sum(kind == "throw" for _, _, kind, _ in found) > 12
    bad = [f"{path.relative_to(ROOT)}:{line}: {text!r} {why}" for path, line, kind, text in found
           if (why := wrong(text, kind not in NAMELESS))]  # fmt: skip
    assert not bad, "\n".join(bad)


def test_no_part_of_a_message_says_what_is_accepted():
    """Also of texts that are put together in a variable, or handed to a helper."""
    bad = []
    for path in PYTHON:
        tree = ast.parse(path.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        bad += [f"{path.relative_to(ROOT)}:{node.lineno}" for node in ast.walk(tree)
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
                and id(node) not in docs and re.search(r"\baccepted\b", node.value)]  # fmt: skip
    bad += [str(path.relative_to(ROOT)) for path in NATIVE
            if re.search(r"\"[^\"\n]*\baccepted\b", path.read_text())]  # fmt: skip
    assert not bad, "\n".join(bad)
