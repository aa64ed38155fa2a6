"""The reference lists each configuration key, option and public name, and none that does not exist."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
from typing import Any

import pytest
import yaml

import harness
from harness.config.schema import EarlyStopping, RunConfig
from tests.docs.pages import section
from tests.launching import BIN, ROOT, environment

REFERENCE = ROOT / "docs" / "reference"
COMMANDS = re.findall(r"^## harness (\w+)$", (REFERENCE / "commands.md").read_text(), re.MULTILINE)
# These take the keys of the configuration too.
CONFIGURED = {"train", "debug"}


def keys_of(config: type, prefix: str = "") -> dict[str, Any]:
    """Key -> default of a configuration class; `...` where there is none."""
    found: dict[str, Any] = {}
    for each in dataclasses.fields(config):
        key = prefix + each.name
        default = each.default if each.default is not dataclasses.MISSING else ...
        if each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        if each.name in ("trainer", "checkpoint", "tracking"):
            found |= keys_of(type(default), f"{key}.")
            continue
        found[key] = default
        if each.name == "early_stopping":
            found |= keys_of(EarlyStopping, f"{key}.")
    return found


def test_configuration_has_each_key_with_its_default() -> None:
    text = (REFERENCE / "configuration.md").read_text().partition("## Environment variables")[0]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", text, re.MULTILINE))
    keys = keys_of(RunConfig)
    assert set(rows) == set(keys)
    for key, cell in rows.items():
        if key == "optimizer":
            continue
        default = keys[key]
        assert cell == "required" if default is ... else yaml.safe_load(cell.strip("`")) == default, key


def options_of(command: str) -> set[str]:
    done = subprocess.run(
        [BIN / "harness", command, "--help"], capture_output=True, text=True, check=True, env=environment()
    )
    return set(re.findall(r"^ +(?:-\w, )?(--[\w.]+)", done.stdout, re.MULTILINE)) - {"--help"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_has_each_option_of_help(command: str) -> None:
    documented = set(re.findall(r"`(--\w+)", section(REFERENCE / "commands.md", f"harness {command}")))
    options = options_of(command)
    if command in CONFIGURED:
        keys = {f"--{key}" for key in keys_of(RunConfig)}
        options = {name for name in options if name not in keys and "." not in name}
        options -= {"--task", "--optimizer", "--scheduler", "--trainer", "--checkpoint", "--tracking"}
        documented |= {"--config", "--print_config"}
    assert documented == options


def test_commands_has_each_command() -> None:
    done = subprocess.run([BIN / "harness", "--help"], capture_output=True, text=True, check=True, env=environment())
    listed = re.findall(r"^    (\w+)\b", done.stdout, re.MULTILINE)
    assert set(listed) == set(COMMANDS)


def test_api_has_each_public_name() -> None:
    documented = re.findall(r"^::: harness\.(\w+)$", (REFERENCE / "api.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(harness.__all__)


def test_autologging_lists_each_replaced_function() -> None:
    text = (REFERENCE / "autolog.md").read_text()
    replaced = set()
    for path in (ROOT / "harness" / "autologging" / "sources").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Replacement":
                replaced |= {each.value for each in node.args[1:2] if isinstance(each, ast.Constant)}
    assert len(replaced) > 10
    assert {name for name in replaced if not re.search(rf"\b{name.rpartition('.')[2]}\b", text)} == set()
