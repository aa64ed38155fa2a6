"""A script under `harness run` finds what it finds under `python`, and its own modules."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.script import LATE_IMPORTS
from tests.launching import BIN, ROOT, environment

LOOK = """
import atexit, json, os, sys, warnings

class Noted:
    value: int

def at_exit():
    found["at_exit"] = sys.modules["__main__"] is me and sys.modules["__main__"].__name__
    with open(os.environ["FOUND"], "w") as file:
        json.dump(found, file)

me = sys.modules["__main__"]
spec = __spec__
atexit.register(at_exit)
found = {
    "argv": sys.argv,
    "path": sys.path,
    "flags": str(sys.flags),
    "file": __file__,
    "name": __name__,
    "package": __package__,
    "cached": __cached__,
    "doc": __doc__,
    "annotations": __annotations__,
    "builtins": __builtins__ is sys.modules["builtins"],
    "loader": type(__loader__).__name__,
    "spec": None if spec is None else [spec.name, spec.origin, spec.parent],
    "globals": sorted(name for name in globals() if name.startswith("__")),
    "is_main": vars(me) is globals(),
    "annotation": repr(Noted.__annotations__["value"]),
    "warn_options": sys.warnoptions,
    "stdin": sys.stdin.read(),
}
import torch, accelerate
found["filters"] = sorted({repr(each) for each in warnings.filters})
"""


def look(words: list[str | Path], cwd: Path, **extra: str) -> dict[str, Any]:
    found = cwd / "found.json"
    found.unlink(missing_ok=True)
    done = subprocess.run(
        words,
        cwd=cwd,
        input="what is piped in",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment({"FOUND": str(found), **extra}),
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(found.read_text())
    return result


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["look.py", "--lr", "1"], {}),
        (["package/look.py"], {}),
        (["link.py"], {"PYTHONWARNINGS": "ignore::ResourceWarning"}),
        (["-m", "package.look", "-m"], {}),
        (["look.py"], {"PYTHONSAFEPATH": "1"}),
    ],
    ids=lambda value: " ".join(value),
)
def test_environment_is_pythons_when_the_script_runs_as(
    tmp_path: Path, words: list[str | Path], extra: dict[str, str]
) -> None:
    for path in ("look.py", "package/look.py", "elsewhere/look.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(LOOK)
    (tmp_path / "link.py").symlink_to(tmp_path / "elsewhere" / "look.py")
    alone = look([sys.executable, *words], tmp_path, **extra)
    ours = look([BIN / "harness", "run", *words], tmp_path, **extra)
    # A package of the extras that only harness imports may add filters for its own warnings.
    assert set(alone.pop("filters")) <= set(ours.pop("filters"))
    assert ours == alone


TRAIN = """
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(4, 1)
model, optimizer, loader = accelerator.prepare(
    model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(TensorDataset(torch.ones(8, 4)), 4)
)
for _ in range(2):
    for (inputs,) in loader:
        accelerator.backward(model(inputs).mean())
        optimizer.step()
        optimizer.zero_grad()
"""


def finished(cwd: Path, script: str, *, closed: tuple[int, ...] = ()) -> str:
    """Standard error of a script that is logged to its end."""
    closing = "".join(f" {descriptor}>&-" for descriptor in closed)
    words = f"exec {BIN}/harness run --every_n_epochs 1 --run_name it {script}{closing}"
    done = subprocess.run(
        ["bash", "-c", words], cwd=cwd, capture_output=True, text=True, timeout=120, check=False, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert (cwd / "runs" / "it" / "checkpoints" / "epoch-0002").is_dir()
    assert json.loads((cwd / "runs" / "it" / "outbox" / "delivered.json").read_text())
    return done.stderr


OWN_HARNESS = {
    "harness/__init__.py": "NAME = 'mine'",
    "harness/config.py": "CONFIG = 'mine'",
    "harness/errors.py": "",
    "harness/checkpoint.py": "CHECKPOINT = 'mine'",
}


@pytest.mark.parametrize(
    ("files", "script", "first", "closed"),
    [
        ({"launch.py": "EPOCHS = 2"}, "train.py", "from launch import EPOCHS", (1,)),
        (
            OWN_HARNESS,
            "train.py",
            "from harness import NAME\nfrom harness.config import CONFIG\nfrom harness.checkpoint import CHECKPOINT\n"
            "import harness.errors\nassert NAME == CONFIG == CHECKPOINT == 'mine'",
            (),
        ),
        ({"signal.py": "", "launch/__init__.py": "", "harness/__init__.py": ""}, "src/train.py", "", (0, 1, 2)),
        (OWN_HARNESS, "-m harness.train", "from harness import NAME\nassert NAME == 'mine'", ()),
        ({}, "train.py", "", (2,)),
    ],
    ids=["launch.py", "harness/", "in the working directory", "-m harness.train", "no modules"],
)
def test_script_is_logged_when_its_modules_are_named_like_ours(
    tmp_path: Path, files: dict[str, str], script: str, first: str, closed: tuple[int, ...]
) -> None:
    path = tmp_path / ("harness/train.py" if script.startswith("-m") else script)
    for name, content in {**files, str(path): f"{first}\n{TRAIN}"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    errors = finished(tmp_path, script, closed=closed)
    assert ("as `harness`; the training is logged and saved" in errors) == ("from harness" in first)


def test_warning_is_first_when_the_training_is_not_detected(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "import sys, torch\n"
        "net = torch.nn.Linear(4, 1)\n"
        "optimizer = torch.optim.SGD(net.parameters(), 0.1)\n"
        "for step in range(3):\n"
        "    net(torch.ones(2, 4)).mean().backward()\n"
        "    optimizer.step()\n"
        "    print('step', step, file=sys.stderr, flush=True)\n"
    )
    done = subprocess.run(
        [BIN / "harness", "run", "plain.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(),
    )
    first, *rest = done.stderr.splitlines()
    assert (done.returncode, rest) == (0, ["step 0", "step 1", "step 2"])
    assert "an optimizer steps, and accelerator.backward was not called" in first
    assert not (tmp_path / "runs").exists()


# Imported in other processes than a script's, or by functions that such a script cannot call.
ELSEWHERE = {
    "harness.training.app",
    "harness.diagnostics.report",
    "harness.tracking.mlflow.artifacts",
    "harness.tracking.mlflow.client",
    "harness.tracking.mlflow.store",
    "harness.tracking.mlflow.uploads",
}


def test_late_imports_are_listed_when_functions_import() -> None:
    found = set()
    for path in (ROOT / "harness").rglob("*.py"):
        functions = [each for each in ast.walk(ast.parse(path.read_text())) if isinstance(each, ast.FunctionDef)]
        for node in (each for function in functions for each in ast.walk(function)):
            if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("harness"):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                modules = {name for name in inner if (ROOT / (name.replace(".", "/") + ".py")).exists()}
                found |= modules or {node.module}
    # `launch.run` imports the others late.
    assert found - ELSEWHERE == set(LATE_IMPORTS) - {"harness.__main__", "harness.autologging.exit_hooks"}
