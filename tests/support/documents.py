"""What the Markdown documents contain: blocks of code, commands, links and headings."""

import re
import shlex
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tests import ROOT

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_PROGRAMS = ("python", "python3", "pytest", "torchrun", "spectral-kernels", "pip", "git")
_INLINE = re.compile(r"`((?:python3? -m|pytest|torchrun|spectral-kernels) [^`]+)`")


class Block(NamedTuple):
    """A fenced block: its language, its text and the number of the fence's line, from 1."""

    language: str
    text: str
    line: int


def documents() -> list[str]:
    """Return the paths of all documents, relative to the root; those of results are only read."""
    found = [
        *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/**/*.md"),
        *ROOT.glob("examples/*.md"), *ROOT.glob(".github/**/*.md"),
    ]  # fmt: skip
    return sorted(str(path.relative_to(ROOT)) for path in found)


@lru_cache
def text_of(document: str) -> str:
    """Return a document."""
    return (ROOT / document).read_text("utf-8")


def blocks(document: str) -> list[Block]:
    """Return the fenced blocks of a document, from top to bottom."""
    text = text_of(document)
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in _BLOCK.finditer(text)]


def installations() -> list[str]:
    """Return the README's two commands: one runs the demo, the other the tests."""
    text = text_of("README.md")
    return re.findall(r"^```sh\n(python3 -m venv .*)\n```$", text, re.M)


def quickstart() -> str:
    """Return the README's quickstart."""
    (found,) = [b.text for b in blocks("README.md") if "print(reg)" in b.text]
    return found


def prose(document: str) -> str:
    """Return a document without its blocks."""
    return _BLOCK.sub("", text_of(document))


def commands(document: str) -> list[list[str]]:
    """Return the commands in blocks of the shell and between backticks, as lists of words.

    Joined ones (``a && b``) are several. Assignments to variables before a command are left out.
    """
    lines = []
    for block in blocks(document):
        if block.language == "sh":
            lines += block.text.replace("\\\n", " ").splitlines()
    lines += [" ".join(found.split()) for found in _INLINE.findall(prose(document))]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while command and re.match(r"[A-Z_]+=", command[0]):
                command = command[1:]
            if command and command[0] in _PROGRAMS:
                found.append(command)
    return found


def extras() -> set[str]:
    """Return the names of the package's extras."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    (table,) = re.findall(r"^\[project\.optional-dependencies\]\n(.*?)^\[", text, re.M | re.S)
    return set(re.findall(r"^([\w-]+) = \[", table, re.M))


def links(document: str) -> list[tuple[Path, str]]:
    """Return (file, anchor) of the relative links of a document; the anchor may be empty."""
    found = re.findall(r"\]\((?!https?:|mailto:)([^)\s]*)\)", prose(document))
    parts = [target.partition("#") for target in found]
    here = ROOT / document
    return [((here.parent / path) if path else here, anchor) for path, _, anchor in parts]


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a Markdown file, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", _BLOCK.sub("", path.read_text("utf-8")), re.M)
    found: set[str] = set()
    for heading in headings:
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # the text of links
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        repeated = (f"{slug}-{i}" for i in range(1, 100))
        found.add(next(repeated) if slug in found else slug)
    return found
