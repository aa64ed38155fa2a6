"""Models whose constructors ask for classes in the ways that annotations have, for `test_trusted_classes`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from subprocess import Popen  # noqa: F401 (a name that is defined elsewhere)
from typing import Any

from torch import nn


class Block(nn.Module):
    def __init__(self, width: int = 2, extra: Any = None) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)


@dataclass
class Settings:
    width: int = 2
    extra: Any = None


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
        settings: Settings = Settings(),  # noqa: B008
        maybe_settings: Settings | None = None,
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}


class Makes:
    """No task: it has `model` alone."""

    def model(self) -> nn.Module:
        return Net()
