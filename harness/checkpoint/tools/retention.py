"""Which checkpoints go when another is there, and how they go. Importing this never imports torch.

The order is what makes it safe: the new checkpoint is durable, its publication is in the outbox, the
retirement of the old one is in the outbox behind it, the old directory loses its name, its files go.
"""

from __future__ import annotations

import math
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from harness.checkpoint.format.commit import MANIFEST, Manifest, read_manifest, scan_checkpoints, temporary_of
from harness.checkpoint.format.ranges import Ranges
from harness.checkpoint.save.hooks import CheckpointHooks
from harness.config.schema import CheckpointConfig, Mode
from harness.errors import CheckpointError, HarnessError
from harness.io.durable_files import sync_directory


def to_remove(found: Sequence[tuple[str, Manifest]], config: CheckpointConfig) -> list[str]:
    """Names of the checkpoints that are not kept.

    What is kept in any case: the one that training has come furthest with, the one written last, and the
    furthest that training can be resumed from.

    Args:
        found: name and manifest of each good checkpoint.
        config: `save_top_k`, `monitor` and `mode`.
    """
    num_kept, monitor = config.save_top_k, config.monitor
    if num_kept < 0 or not found or not _can_rank(found, config):
        return []
    newest_first = sorted(found, key=lambda item: (item[1].step, item[1].time_ms), reverse=True)
    kept = {newest_first[0][0], max(found, key=lambda item: item[1].time_ms)[0]}
    kept |= set([name for name, manifest in newest_first if manifest.can_be_resumed][:1])
    ranked = newest_first
    if monitor is not None:
        # Stable: of two that are as good the newer comes first.
        ranked = sorted(newest_first, key=lambda item: _badness(item[1], monitor, config.mode))
    kept |= {name for name, _ in ranked[:num_kept]}
    return [name for name, _ in found if name not in kept]


def best_of(found: Sequence[tuple[str, Manifest]], monitor: str, mode: Mode) -> str | None:
    """Name of the best checkpoint; None where none has the metric."""
    newest_first = sorted(found, key=lambda item: (item[1].step, item[1].time_ms), reverse=True)
    having = [item for item in newest_first if _has(item[1], monitor)]
    return min(having, key=lambda item: _badness(item[1], monitor, mode))[0] if having else None


def _can_rank(found: Sequence[tuple[str, Manifest]], config: CheckpointConfig) -> bool:
    """Not where the monitor is misspelt: what would be removed as the worst could be the best."""
    monitor = config.monitor
    return config.save_top_k < 1 or monitor is None or any(_has(manifest, monitor) for _, manifest in found)


def _has(manifest: Manifest, monitor: str) -> bool:
    return not math.isnan(manifest.metrics.get(monitor, math.nan))


def _badness(manifest: Manifest, monitor: str, mode: Mode) -> tuple[bool, float]:
    if not _has(manifest, monitor):
        return True, 0.0
    value = manifest.metrics[monitor]
    return False, value if mode == "min" else -value


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that no half of it is ever taken for one.

    Effects: not collective; any thread; blocks until the files are gone. Cut off in between it leaves a
    temporary directory, which `commit.remove_leftovers` removes at the next start.

    Raises:
        OSError: if the disk refuses.
    """
    temporary = temporary_of(checkpoint, f"removed-{uuid.uuid4().hex[:8]}")
    os.rename(checkpoint, temporary)
    # The name is gone on the disk itself before the first file is.
    sync_directory(checkpoint.parent)
    shutil.rmtree(temporary)


class Retention:
    """Applies `save_top_k` after each commit.

    Effects: not collective; rank 0's checkpoint thread; removes directories of `checkpoints_dir`.

    Args:
        checkpoints_dir: of the run; the checkpoints of its earlier attempts count too.
        config: what to keep.
        hooks: `on_checkpoint_retired` is called before each removal.
        say: where a line for the user goes.
    """

    def __init__(
        self,
        checkpoints_dir: Path,
        config: CheckpointConfig,
        hooks: CheckpointHooks,
        say: Callable[[str], None],
    ) -> None:
        self._checkpoints_dir = checkpoints_dir
        self._config = config
        self._hooks = hooks
        self._say = say
        self._known: dict[Path, tuple[tuple[int, int, int], Manifest]] = {}
        self._told_keys: set[str] = set()
        self._said: set[str] = set()

    def apply(self, committed: str) -> None:
        """Remove what is not kept, now that the checkpoint `committed` is durable.

        Never raises because of the disk: what could not be removed is said, and tried again at the next commit.
        """
        if self._config.save_top_k < 0:
            return
        try:
            self._apply(committed)
        except (HarnessError, OSError) as error:
            self._say_once(f"no checkpoint was removed: {error}")

    def _apply(self, committed: str) -> None:
        good, bad = scan_checkpoints(self._checkpoints_dir, self._read)
        for name, reason in bad:
            self._say_once(f"{name} is left where it is, and does not count for checkpoint.save_top_k: {reason}")
        # A link is somebody's own, and what it leads to may stand here under another name.
        found = [item for item in good if not (self._checkpoints_dir / item[0]).is_symlink()]
        if committed not in {name for name, _ in found}:
            raise CheckpointError(f"{self._checkpoints_dir / committed}: is not there, though it was written just now")
        if not _can_rank(found, self._config):
            there = ", ".join(sorted({key for _, manifest in found for key in manifest.metrics})) or "none"
            self._say_once(
                f"checkpoint.monitor: no checkpoint has the metric {self._config.monitor!r}, so none is removed "
                f"(metrics that there are: {there})"
            )
        manifests = dict(found)
        for name in to_remove(found, self._config):
            key = manifests[name].key
            if key not in self._told_keys:
                self._hooks.on_checkpoint_retired(name, key)
                self._told_keys.add(key)
            try:
                remove(self._checkpoints_dir / name)
            except OSError as error:
                self._say_once(f"{self._checkpoints_dir / name}: cannot be removed: {error.strerror}")

    def _read(self, checkpoint: Path) -> Manifest:
        """The manifest, parsed again only where the file is another: parsing holds the GIL."""
        try:
            found = os.stat(checkpoint / MANIFEST)
        except OSError:
            return read_manifest(checkpoint)
        is_as = (found.st_ino, found.st_size, found.st_mtime_ns)
        known = self._known.get(checkpoint)
        if known is None or known[0] != is_as:
            manifest = read_manifest(checkpoint)
            # Digests of millions of ranges are not needed here.
            files = tuple(replace(file, ranges=Ranges()) for file in manifest.files)
            known = self._known[checkpoint] = (is_as, replace(manifest, files=files))
        return known[1]

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(f"harness: warning: {text}")
