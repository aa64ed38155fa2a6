"""Functions of other modules, replaced and restored."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import accelerate.accelerator
import accelerate.data_loader
import pytest

from harness.autologging.patcher import Patcher
from harness.autologging.replacements import Replacement, Replacements
from harness.autologging.settings import AutologSettings


def owners() -> dict[str, Any]:
    found = (accelerate.accelerator.Accelerator, accelerate.data_loader.DataLoaderShard, sys.modules["argparse"])
    return {f"{owner.__name__}.{name}": value for owner in found for name, value in vars(owner).items()}


def test_functions_are_restored_when_turned_off() -> None:
    before, hook, leave, finders = owners(), sys.excepthook, sys.exit, list(sys.meta_path)
    switch = Patcher(AutologSettings())
    switch.turn_on()
    assert {name for name, value in owners().items() if value is not before[name]} >= {
        "Accelerator.prepare",
        "Accelerator.backward",
        "DataLoaderShard.__iter__",
    }
    switch.turn_off()
    assert owners() == before
    assert (sys.excepthook, sys.exit, sys.meta_path) == (hook, leave, finders)


def test_function_is_replaced_when_its_module_is_imported_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_later.py").write_text("def twice(number):\n    return 2 * number\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    replacements = Replacements(
        [Replacement("imported_later", "twice", "a test", lambda original, number: original(number) + 1)]
    )
    replacements.install()
    module = importlib.import_module("imported_later")
    assert module.twice(2) == 5
    replacements.remove()
    assert module.twice(2) == 4


def test_function_is_replaced_once_when_installed_twice() -> None:
    replacements = Replacements(
        [Replacement("posixpath", "basename", "a test", lambda original, path: original(path) + "!")]
    )
    replacements.install()
    replacements.install()
    assert sys.modules["posixpath"].basename("a/b") == "b!"
    replacements.remove()
    assert sys.modules["posixpath"].basename("a/b") == "b"
