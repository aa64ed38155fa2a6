"""Replacing functions of other people's modules, whenever those are imported, and putting them back."""

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

# Called with what is replaced and the call's own arguments.
Around = Callable[..., Any]


@dataclass(frozen=True)
class Replacement:
    """One function that is replaced.

    Args:
        module: where it is.
        name: within the module: ``function`` or ``Class.method``.
        why: what is learned or done there.
        around: called in its place, with what was there and the arguments of the call.
    """

    module: str
    name: str
    why: str
    around: Around


class Replacements:
    """Puts replacements in place, now or when their module is imported, and takes all of them away.

    Effects: not collective; main thread; nothing on disk.

    Args:
        table: what is replaced.
    """

    def __init__(self, table: Sequence[Replacement]) -> None:
        self._table = table
        self._is_on = False
        self._made: list[tuple[Any, str, Any, Any]] = []
        self._finder = _Finder(self._imported, {each.module for each in table})

    def put(self) -> None:
        """Put them in place, once."""
        if self._is_on:
            return
        self._is_on = True
        for module in {each.module for each in self._table}:
            if module in sys.modules:
                self._imported(sys.modules[module])
        sys.meta_path.insert(0, self._finder)

    def take_away(self) -> None:
        """Put back what was there.

        Where somebody has put a replacement of theirs over ours since, ours stays below it and does nothing.
        """
        self._is_on = False
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        for owner, name, original, ours in reversed(self._made):
            if vars(owner).get(name) is ours:
                setattr(owner, name, original)
        self._made = []

    def _imported(self, module: ModuleType) -> None:
        if not self._is_on:
            return
        for each in self._table:
            if each.module == module.__name__:
                *owners, name = each.name.split(".")
                owner = functools.reduce(getattr, owners, module)
                # Another version may have no such function: then there is nothing of it to be seen.
                if name in vars(owner):
                    self._replace(owner, name, each.around)

    def _replace(self, owner: Any, name: str, around: Around) -> None:
        original = vars(owner)[name]

        @functools.wraps(original)
        def ours(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs) if self._is_on else original(*args, **kwargs)

        setattr(owner, name, ours)
        self._made.append((owner, name, original, ours))


class _Finder(MetaPathFinder):
    """Stands before the other finders, and has a callback called with a module that has just been imported."""

    def __init__(self, imported: Callable[[ModuleType], None], names: set[str]) -> None:
        self._imported = imported
        self._waiting = names

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self._waiting:
            return None
        self._waiting = self._waiting - {fullname}  # or it would be asked again below
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self._imported)
        return spec


class _Then(Loader):
    """Loads as another loader does, and calls back."""

    def __init__(self, inner: Any, imported: Callable[[ModuleType], None]) -> None:
        self._inner = inner
        self._imported = imported

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._inner.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._imported(module)
