"""A script whose own package is called `harness` or `launch`, as ours are: it imports its own, and ours go on.

Our modules hold each other as objects that are imported already, so a name in `sys.modules` can be given to the
script. A module of ours that the script's package has no counterpart of stays under its name there: a late import
of ours, and pickle, which looks up a class by its module's name, find it as before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import harness
from harness.errors import ConfigError

PACKAGES = ("harness", "launch")
_OURS = {"harness": Path(harness.__file__).resolve().parent, "launch": Path(__file__).resolve().parent}
# What is imported within a function, and may run while the script does.
LATE_IMPORTS = (
    "harness.__main__",
    "harness.autologging.exit_hooks",
    "harness.autologging.patcher",
)
# Ranks send each other objects of classes in these, by the modules' names.
_SENT = ("harness.checkpoint.", "harness.training.resume_manager", "harness.metrics.system.")


def give_way(package: str, world_size: int) -> str | None:
    """Let the script import its own package of this name, where it would find one on `sys.path` before ours.

    Effects: imports torch and takes modules out of `sys.modules`, if there is such a package.

    Args:
        package: one of `PACKAGES`.
        world_size: number of ranks.

    Returns:
        Where the script's package is; None if the script has none.

    Raises:
        ConfigError: if ranks could no longer exchange what they have to.
    """
    spec = PathFinder.find_spec(package, sys.path)
    if spec is None or spec.origin is None or Path(spec.origin).resolve().parent == _OURS[package]:
        return None
    for late in LATE_IMPORTS:
        import_module(late)
    names = [name for name in _own_modules(package) if _find(name, spec) is not None]
    sent = [name for name in names if name.startswith(_SENT)]
    if world_size > 1 and sent:
        raise ConfigError(
            "",
            f"harness run: {spec.origin} has a module {sent[0]}, as ours has, whose objects the ranks exchange; "
            "rename it, or run the script in one process",
        )
    for name in names:
        del sys.modules[name]
    return str(Path(spec.origin).parent if spec.submodule_search_locations is not None else spec.origin)


def _own_modules(package: str) -> list[str]:
    """Names of our modules of a package that are imported."""
    return [
        name
        for name, module in sys.modules.items()
        if name.partition(".")[0] == package
        and (path := getattr(module, "__file__", None)) is not None
        and _OURS[package] in Path(path).resolve().parents
    ]


def _find(name: str, top: ModuleSpec) -> ModuleSpec | None:
    """The module of this full name within a package, without importing anything."""
    spec: ModuleSpec | None = top
    parts = name.split(".")
    for number in range(2, len(parts) + 1):
        locations: Sequence[str] | None = None if spec is None else spec.submodule_search_locations
        if locations is None:
            return None
        spec = PathFinder.find_spec(".".join(parts[:number]), locations)
    return spec
