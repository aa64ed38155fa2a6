"""Replace functions of other modules, including modules that are imported later, and restore them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

Function = Callable[..., Any]


@dataclass(frozen=True)
class Replacement:
    """Describes a function and what replaces it: one row of a table.

    Args:
        name: the name within the module: ``function`` or ``Class.method``.
        why: what the replacement observes or does.
        around: called in its place, with the original and the arguments of the call.
    """

    module: str
    name: str
    why: str
    around: Function


class Replacements(MetaPathFinder):
    """Installs a table of replacements, now or when a module is imported, and removes it.

    While installed it is a finder on `sys.meta_path`, so that it sees imports.

    Effects: not collective; main thread; nothing on disk.

    Args:
        table: the replacements. If a function has several, the later ones wrap the earlier ones.
    """

    def __init__(self, table: Sequence[Replacement]) -> None:
        self._table = table
        self._is_installed = False
        self._made: list[tuple[Any, str, Any, Any]] = []
        self._not_imported = {row.module for row in table}

    def install(self) -> None:
        """Replace the functions. A second call does nothing."""
        if self._is_installed:
            return
        self._is_installed = True
        for module in {row.module for row in self._table}:
            if module in sys.modules:
                self.replace_in(sys.modules[module])
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Restore the functions. A replacement that other code has wrapped stays, but only calls the original."""
        self._is_installed = False
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for owner, name, original, ours in reversed(self._made):
            if vars(owner).get(name) is ours:
                setattr(owner, name, original)
        self._made = []

    def replace_in(self, module: ModuleType) -> None:
        """Replace the functions of a module that has just been imported."""
        if not self._is_installed:
            return
        for row in self._table:
            if row.module == module.__name__:
                *owners, name = row.name.split(".")
                owner = functools.reduce(getattr, owners, module)
                # Other versions of the library may lack the function.
                if name in vars(owner):
                    self._replace(owner, name, row.around)

    def _replace(self, owner: Any, name: str, around: Function) -> None:
        original = vars(owner)[name]

        @functools.wraps(original)
        def ours(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs) if self._is_installed else original(*args, **kwargs)

        setattr(owner, name, ours)
        self._made.append((owner, name, original, ours))

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a module of the table with the other finders, with a loader that replaces its functions."""
        if fullname not in self._not_imported:
            return None
        self._not_imported = self._not_imported - {fullname}  # the search below asks this finder again
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Loads a module with its own loader, then replaces its functions."""

    def __init__(self, inner: Any, replacements: Replacements) -> None:
        self._inner = inner
        self._replacements = replacements

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._inner.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._replacements.replace_in(module)
