"""The pages keep the shape that a reader relies on: a short README, short paragraphs, short lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, page_id, without_code
from tests.launching import ROOT

MAX_PARAGRAPH_LINES = 5
# By what a translated sentence is known.
BANNED = re.compile(r"\b(is told|are told|goes on|go on|nobody|somebody|hands over|puts? back|what there is)\b")


def paragraphs(page: Path) -> list[str]:
    """Paragraphs and list items, without tables."""
    text = re.sub(r"^\|.*\n", "", without_code(page.read_text()), flags=re.MULTILINE)
    return re.split(r"\n\s*\n|\n(?=\s*(?:- |\d+\. ))", text)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_paragraphs_are_short_and_plain(page: Path) -> None:
    long = [each for each in paragraphs(page) if len(each.strip().splitlines()) > MAX_PARAGRAPH_LINES]
    assert long == []
    assert BANNED.findall(without_code(page.read_text())) == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_pictures_are_small() -> None:
    for path in (ROOT / "docs" / "images").iterdir():
        assert path.stat().st_size < 150_000
