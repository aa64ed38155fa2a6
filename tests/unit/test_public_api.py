from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

import harness

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for package in ("harness", "launch") for path in (ROOT / package).rglob("*.py"))

PUBLIC = [
    "CheckpointConfig",
    "ClassSpec",
    "HarnessError",
    "PeriodicLogger",
    "RunConfig",
    "StepOutput",
    "Task",
    "TrackingConfig",
    "TrainerConfig",
    "autolog",
    "load_model",
    "resume",
    "separate_embeddings",
]


def test_public_names_are_the_same_as_ever_when_listed() -> None:
    assert harness.__all__ == PUBLIC


@pytest.mark.parametrize(("module", "function"), [("cpu", "prepare_deepspeed"), ("rendezvous", "init_method")])
def test_function_is_found_when_its_module_is_public(module: str, function: str) -> None:
    assert inspect.isfunction(getattr(getattr(harness, module), function))
    assert getattr(harness, module) is import_module(f"harness.{module}")


@pytest.mark.parametrize("name", PUBLIC)
def test_name_is_a_documented_class_or_function_when_resolved(name: str) -> None:
    found = getattr(harness, name)
    assert inspect.isclass(found) or inspect.isfunction(found)
    assert found.__name__ == name
    assert getattr(import_module(found.__module__), name) is found
    assert inspect.getdoc(found)


def test_error_names_the_attribute_when_there_is_none() -> None:
    with pytest.raises(AttributeError, match="module 'harness' has no attribute 'Periodic'"):
        harness.Periodic  # noqa: B018


def test_version_is_that_of_the_project_when_read() -> None:
    assert f'version = "{harness.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstring_is_there_when_a_name_is_public(path: Path) -> None:
    tree = ast.parse(path.read_text(), str(path))
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), node.name
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                assert ast.get_docstring(method), f"{node.name}.{method.name}"
