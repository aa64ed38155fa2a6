"""The arrows between the modules, read from the sources; and what importing them costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for package in ("harness", "launch") for path in (ROOT / package).rglob("*.py"))
WITHOUT_TORCH = (
    "harness",
    "harness.config.schema",
    "harness.errors",
    "harness.config.task",
    "harness.config.cadence",
    "harness.config.parsing",
    "harness.diagnostics.report",
    "harness.checkpoint.format.commit",
    "harness.tracking.journal.writer",
    "harness.tracking.publisher.process",
    "launch.cli",
    "launch.local",
    "launch.rank",
    "launch.submit",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def import_nodes(path: Path, *, only_when_imported: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements; `only_when_imported`: those that run when the module itself is imported."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(), str(path))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        if only_when_imported:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if is_type_checking(node):  # type: ignore[arg-type]
                assert isinstance(node, ast.If)
                waiting += node.orelse
                continue
        waiting += ast.iter_child_nodes(node)


def imported(path: Path, *, only_when_imported: bool = False) -> set[str]:
    """Full names of the modules that a file imports (`from a import b`: a.b where that is a module)."""
    found = set()
    for node in import_nodes(path, only_when_imported=only_when_imported):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0 and node.module is not None, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def importers_of(package: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(name.partition(".")[0] == package for name in imported(path))
    }


def test_sources_are_found_when_read() -> None:
    assert {"harness", "harness.config.schema", "harness.checkpoint.format.commit", "launch.cli"} <= set(MODULES)


def test_harness_never_imports_launch_when_read() -> None:
    assert {path for path in importers_of("launch") if path.startswith("harness/")} == set()
    assert "launch/cli.py" in importers_of("harness")


def test_few_files_import_mlflow_when_read() -> None:
    assert importers_of("mlflow") == {
        "harness/tracking/mlflow/artifacts.py",
        "harness/tracking/mlflow/client.py",
        "harness/tracking/mlflow/models.py",
        "harness/tracking/mlflow/store.py",
        "harness/tracking/mlflow/uploads.py",
    }


def test_one_file_alone_imports_deepspeed_when_read() -> None:
    assert importers_of("deepspeed") == {"harness/distributed/cpu_strategies.py"}


@pytest.mark.parametrize("framework", ["transformers", "lightning", "keras"])
def test_one_integration_alone_imports_its_framework_when_read(framework: str) -> None:
    assert importers_of(framework) == {f"harness/integrations/{framework}.py"}
    others = {name for name, path in MODULES.items() if f"harness.integrations.{framework}" in imported(path)}
    assert others == set()


def test_there_is_no_circle_when_modules_import_each_other() -> None:
    graph = {name: imported(path, only_when_imported=True) & set(MODULES) - {name} for name, path in MODULES.items()}
    # The graph is not empty.
    assert graph["harness.training.app"] >= {"harness.training.fit", "harness.training.periodic_logger"}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, with the circle
    assert order.index("harness.errors") < order.index("harness.config.schema") < order.index("harness.training.app")


# Each package imports only those before it, also within functions and for type checking.
DIRECTION = (
    *("errors", "io", "config", "data", "distributed", "metrics", "checkpoint", "run", "tracking", "models"),
    *("training", "diagnostics", "autologging", "integrations", "tasks"),
)
WITHIN = {
    "checkpoint": ("format", "sharding", "state", "save", "restore", "tools"),
    "tracking": ("journal", "mlflow", "publisher", "provenance", "tracker"),
}


def test_packages_import_in_one_direction_when_read() -> None:
    def places(name: str) -> list[int]:
        first, *rest = name.split(".")[1:]
        return [DIRECTION.index(first), *([WITHIN[first].index(rest[0])] if first in WITHIN and rest else [])]

    inner = {name for name in MODULES if name.startswith("harness.") and name.split(".")[1] in DIRECTION}
    upward = [
        f"{name} -> {other}"
        for name in sorted(inner)
        for other in sorted(imported(MODULES[name]) & set(MODULES))
        if other not in inner or places(other) > places(name)
    ]
    assert upward == []
    assert {name.split(".")[1] for name in inner} == set(DIRECTION)


FOLDERS = sorted(path.parent for path in (ROOT / "harness").rglob("__init__.py"))


@pytest.mark.parametrize("folder", FOLDERS[1:], ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_listed_when_a_package_is_documented(folder: Path) -> None:
    listed = re.findall(
        r"^    ([\w/]+)  ", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "", re.M
    )
    there = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    there += [f"{path.parent.name}/" for path in folder.glob("*/__init__.py")]
    assert sorted(listed) == sorted(there)


def test_composition_root_is_imported_late_when_imported_at_all() -> None:
    for name, path in MODULES.items():
        assert "harness.training.app" not in imported(path, only_when_imported=True), name


def import_alone(module: str) -> subprocess.CompletedProcess[str]:
    """Import it in a fresh process, which fails if anything heavy came along."""
    heavy = "{'torch', 'accelerate', 'mlflow', 'numpy'}"
    code = f"import sys, {module}; found = {heavy} & set(sys.modules); sys.exit(f'imported: {{found}}' if found else 0)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_torch_is_not_imported_when_the_publisher_has_its_store() -> None:
    names = "harness.tracking.publisher.process, harness.tracking.mlflow.store"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_torch_is_not_imported_when_a_light_module_is(module: str) -> None:
    done = import_alone(module)
    assert done.returncode == 0, done.stderr


def test_heavy_module_is_noticed_when_it_is_imported() -> None:
    done = import_alone("numpy")
    assert done.returncode == 1
    assert done.stderr == "imported: {'numpy'}\n"


def test_help_is_there_at_once_when_asked() -> None:
    durations_s = []
    for _ in range(5):
        begun_s = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        durations_s.append(time.perf_counter() - begun_s)
        assert "harness train" in done.stdout
    assert min(durations_s) < 0.5


def test_every_folder_of_tests_is_a_package() -> None:
    """Elsewhere two files of one name are one module to pytest, and the second cannot be collected."""
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []
