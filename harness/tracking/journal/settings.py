"""What a run's publisher was told, kept for `harness sync`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import TrackingError
from harness.io.durable_files import read_record, replace_file

SETTINGS = "settings.json"
# Others stay as they are: addresses that were written down before are still the same.
_ESCAPES = str.maketrans({character: f"%{ord(character):02X}" for character in "%?"})


def write_settings(outbox_dir: Path, settings: Mapping[str, Any]) -> None:
    """Keep them; the address is one that holds from any directory, and has no password in it."""
    replace_file(outbox_dir / SETTINGS, json.dumps(dict(settings), indent=2) + "\n", is_private=True)


def read_settings(outbox_dir: Path) -> dict[str, Any] | None:
    """What was kept; None where there was no tracking.

    Raises:
        TrackingError: if the file is damaged.
    """
    settings = read_record(outbox_dir / SETTINGS)
    if settings is None and (outbox_dir / SETTINGS).exists():
        raise TrackingError(f"{outbox_dir / SETTINGS}: is damaged; the next attempt at the run writes it anew")
    return settings


def absolute_sqlite(uri: str) -> str:
    """A ``sqlite:///`` URI with a relative path as one that holds from any directory.

    In a URI a path ends at ``?`` and ``%`` begins an escape, so these are escaped in the working directory's path.
    What stands in `uri` is a URI already.
    """
    prefix = "sqlite:///"
    if not uri.startswith(prefix) or uri.startswith(prefix + "/") or ":memory:" in uri:
        return uri
    path, mark, query = uri.removeprefix(prefix).partition("?")
    directory = str(Path.cwd()).translate(_ESCAPES)
    return f"{prefix}{Path(directory, path)}{mark}{query}"
