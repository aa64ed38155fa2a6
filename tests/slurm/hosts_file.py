"""Names of nodes in /etc/hosts, in lines that are marked as ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_FILE = Path("/etc/hosts")


def add(addresses: Mapping[str, str], mark: str) -> None:
    """Name -> address, each in a line with the mark. The caller holds the lock (`cluster.only_one`)."""
    remove(mark)
    lines = "".join(f"{address} {name} # {mark}\n" for name, address in addresses.items())
    text = _FILE.read_text()
    _write(text + ("" if text.endswith("\n") or not text else "\n") + lines)


def remove(mark: str) -> None:
    """Take the lines with the mark away."""
    lines = _FILE.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.rstrip().endswith(f"# {mark}")]
    if kept != lines:
        _write("".join(kept))


def _write(text: str) -> None:
    # In place: in a container it is a mount, and cannot be replaced.
    with _FILE.open("r+") as stream:
        stream.write(text)
        stream.truncate()
