"""What is in a checkpoint, from headers and manifest alone. Importing this never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.checkpoint.format.commit import Manifest, read_manifest
from harness.checkpoint.format.layout import read_header
from harness.checkpoint.format.ranges import Ranges


def contents(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint as JSON values: the manifest's facts, its files, and each tensor with its owners.

    Raises:
        CheckpointError: if it is no whole checkpoint.
    """
    manifest = read_manifest(checkpoint)
    tensors: list[dict[str, Any]] = []
    aliases: dict[str, str] = {}
    for file in manifest.files:
        if not file.name.endswith(".safetensors"):
            continue
        stored, metadata = read_header(checkpoint / file.name, file)
        aliases |= {name: first for name, first in metadata.items() if name != "format" and first in stored}
        for name, tensor in stored.items():
            tensors.append(
                {
                    "name": name,
                    "file": file.name,
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "bytes": tensor.end - tensor.start,
                    "ranks": _owners(file.ranges, tensor.start, tensor.end),
                }
            )
    return {
        "epoch": manifest.epoch,
        "step": manifest.step,
        "metrics": dict(manifest.metrics),
        "topology": dict(manifest.topology),
        "save": dict(manifest.save),
        "files": [{"name": f.name, "bytes": f.size_bytes, "ranges": len(f.ranges)} for f in manifest.files],
        "aliases": aliases,
        "tensors": tensors,
    }


def _owners(ranges: Ranges, start: int, end: int) -> list[int]:
    """The ranks that wrote any of these bytes."""
    found = set()
    for number in range(ranges.index_at(start), len(ranges)):
        part = ranges[number]
        if part.start >= end:
            break
        if part.end > start:
            found.add(part.rank)
    return sorted(found)


def text(checkpoint: Path) -> str:
    """The same, for reading."""
    found = contents(checkpoint)
    manifest = read_manifest(checkpoint)
    lines = [_head(checkpoint, manifest)]
    for file in found["files"]:
        lines.append(f"\n{file['name']}  {file['bytes']:,} bytes in {file['ranges']} ranges")
        rows = [
            (t["name"], t["dtype"], str(t["shape"]), f"{t['bytes']:,}", _ranks(t["ranks"]))
            for t in found["tensors"]
            if t["file"] == file["name"]
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(5)]
        for name, dtype, shape, size, ranks in rows:
            lines.append(
                f"  {name:{widths[0]}}  {dtype:{widths[1]}}  {shape:{widths[2]}}  {size:>{widths[3]}}  {ranks}".rstrip()
            )
        if file["name"].startswith("model") and file["name"].endswith(".safetensors"):
            own = {t["name"] for t in found["tensors"] if t["file"] == file["name"]}
            lines += [f"  {alias} is {first}" for alias, first in found["aliases"].items() if first in own]
    return "\n".join(lines)


def _head(checkpoint: Path, manifest: Manifest) -> str:
    facts = manifest.topology
    return (
        f"{checkpoint}: epoch {manifest.epoch}, step {manifest.step}, {manifest.size_bytes:,} bytes, "
        f"by {facts.get('world_size', '?')} x {facts.get('strategy', '?')}"
    )


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}" if ranks else ""
