"""Every block of Python in the guide runs, page by page from top to bottom."""

import re

import pytest
import torch.utils.cpp_extension  # noqa: F401, before other tests load parts of setuptools

from tests import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.takes_seconds
@pytest.mark.parametrize("page", [p for p in PAGES if p != "README.md"])
def test_blocks_of_a_page_run_in_their_order(page, seeded):
    text = (DOCS / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    names = {}
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, str(DOCS / page), "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", (DOCS / page).read_text()):
        assert (DOCS / target).exists(), target


def test_the_contents_name_every_page():
    contents = (DOCS / "README.md").read_text()
    assert all(f"({page})" in contents for page in PAGES if page != "README.md")
