"""Models whose constructors ask for classes in the ways that annotations have, for `test_trusted_classes`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import Enum
from numbers import Number
from pathlib import Path, PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from subprocess import Popen  # noqa: F401 (a name that is defined elsewhere)
from types import ModuleType
from typing import Any, Literal, NamedTuple, NewType, TypedDict

from jsonargparse.typing import PositiveInt, RegisteredType
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int = 2, extra: Any = None) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)


@dataclass
class Settings:
    width: int = 2
    extra: Any = None


@dataclass
class Outer:
    inner: Settings = field(default_factory=lambda: Settings(5, "kept"))
    depth: int = 1


class Kind(Enum):
    SMALL = 1


class Size(NamedTuple):
    height: int
    width: int = 2


class Rates(TypedDict, total=False):
    first: float
    extra: Any


class Named(dict[str, Any]):
    """A mapping of a class of its own."""


class OwnPath(PosixPath):
    """A path of a class of its own."""


Depth = NewType("Depth", int)


class Net(nn.Module):
    """Keeps what it was given."""

    def __init__(
        self,
        anything: Any = None,
        untyped=None,  # type: ignore[no-untyped-def]
        values: dict[str, Any] | None = None,
        name: str | None = None,
        text_or_anything: str | Any = None,
        block: nn.Module | None = None,
        blocks: Sequence[Block] = (),
        by_name: dict[str, Block] | None = None,
        activation: Callable[..., Any] = nn.functional.relu,
        kind: type[nn.Module] = nn.ReLU,
        word_or_module: str | nn.Module = "relu",
        module_or_word: nn.Module | str = "relu",
        settings: Settings = Settings(),  # noqa: B008
        maybe_settings: Settings | None = None,
        untyped_text="x",  # type: ignore[no-untyped-def]
        make_norm: Callable[[int], nn.Module] = nn.LayerNorm,
        widths: tuple[int, ...] = (),
        size: Size | None = None,
        rates: Rates | None = None,
        kind_of: Kind | Literal["other"] = "other",
        path: Path | None = None,
        pure_path: PurePath | None = None,
        posix_path: PurePosixPath | None = None,
        windows_path: PureWindowsPath | None = None,
        other_path: WindowsPath | None = None,
        own_path: OwnPath | None = None,
        count_or_path: int | PurePath | None = None,
        word_or_path: str | PurePath | None = None,
        moment: datetime | None = None,
        amount: Decimal | None = None,
        positive: PositiveInt | None = None,
        registered: RegisteredType | None = None,
        number: Number | None = None,
        depth: Depth = Depth(1),
        by_index: dict[int, set[str]] | None = None,
        anythings: list[Any] | None = None,
        named: Named | None = None,
        module: ModuleType | None = None,
        unresolved: NotDefinedAnywhere = None,  # type: ignore[name-defined]  # noqa: F821
        preset: Settings = Settings(5, "kept"),  # noqa: B008
        outer: Outer | None = Outer(depth=4),  # noqa: B008
        **rest: Any,
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}


class Wide(Net):
    """Passes on what it does not take itself."""

    def __init__(self, factor: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.given["factor"] = factor


class Makes:
    """No task: it has `model` alone."""

    def model(self) -> nn.Module:
        return Net()
