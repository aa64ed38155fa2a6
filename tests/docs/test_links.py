"""Every link of README and docs resolves, and every page that code names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, anchors, page_id, without_code
from tests.launching import ROOT


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_of_a_page_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page_id(page)}: there is no {target}"
        assert not anchor or anchor in anchors(file), f"{page_id(page)}: {target} has no such heading"


def test_pages_named_in_code_exist() -> None:
    folders = ("harness", "launch", "tests", "benchmarks", "slurm", "configs", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sbatch")]
    named = {name for path in files for name in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text())}
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_files_named_in_pages_exist() -> None:
    pattern = r"`((?:harness|launch|tests|benchmarks|slurm|configs|examples)/[\w/.-]+\.\w+)"
    for page in PAGES:
        for name in re.findall(pattern, page.read_text()):
            assert (ROOT / name).exists(), f"{page_id(page)}: there is no {name}"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
