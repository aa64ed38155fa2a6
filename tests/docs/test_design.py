"""The paths of `docs/design.md` name functions that exist, and stay short."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs.pages import section
from tests.launching import ROOT

DESIGN = ROOT / "docs" / "design.md"
# Path -> files that a reader may open at most.
PATHS = {
    "A metric, from log to MLflow": 10,
    "A checkpoint, from due to LoggedModel": 22,
    "A resume": 18,
    "harness run script.py": 15,
}


def defined_in(path: str) -> set[str]:
    """Functions and classes of a file, methods as `Class.method`."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def test_each_function_named_in_the_design_exists() -> None:
    items = re.findall(r"`((?:harness|launch)/[\w/]+\.py):([\w.]+)`", DESIGN.read_text())
    assert len(items) > 50
    missing = [f"{path}:{name}" for path, name in items if name not in defined_in(path)]
    assert missing == []


@pytest.mark.parametrize("title", PATHS)
def test_a_path_takes_few_files(title: str) -> None:
    files = set(re.findall(r"`((?:harness|launch)/[\w/]+\.py)", section(DESIGN, title)))
    assert 3 <= len(files) <= PATHS[title]
