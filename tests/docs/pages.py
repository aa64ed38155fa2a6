"""The pages of the documentation, and what is in them."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from tests.launching import ROOT

PAGES = sorted(
    [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
)


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE):
        text = unicodedata.normalize("NFKD", heading.replace("`", "")).lower()
        found.add(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text)).strip("-"))
    return found


def section(page: Path, heading: str) -> str:
    """The text below a heading of the second level."""
    _, _, rest = page.read_text().partition(f"\n## {heading}\n")
    assert rest, f"{page}: no section {heading}"
    return rest.partition("\n## ")[0]
