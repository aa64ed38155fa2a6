from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.checkpoint.format.commit import MANIFEST
from harness.checkpoint.format.files import LocalFiles
from harness.checkpoint.restore.remote_files import RemoteFiles
from harness.checkpoint.restore.visibility import open_checkpoint, open_weights
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError, DamagedError

ALONE = Collectives(0, 1)


def refuse_to_say(line: str) -> None:
    raise AssertionError(line)


def test_manifest_is_damaged_or_gone_when_rank_zero_cannot_take_it(make_checkpoint: Callable[..., Path]) -> None:
    path = make_checkpoint({"weight": torch.ones(3)})
    manifest, files = open_checkpoint(path, ALONE, RemoteFiles(ALONE), refuse_to_say)
    assert manifest.key == "key" and isinstance(files, LocalFiles) and files.readers is None
    (path / MANIFEST).write_text("{")
    with pytest.raises(DamagedError, match="is damaged"):
        open_checkpoint(path, ALONE, RemoteFiles(ALONE), refuse_to_say)
    (path / MANIFEST).unlink()
    with pytest.raises(DamagedError, match="is gone"):
        open_checkpoint(path, ALONE, RemoteFiles(ALONE), refuse_to_say)


def test_weights_are_refused_when_rank_zero_has_none(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = make_checkpoint({"weight": torch.ones(3)})
    records, files = open_weights(path, ALONE, RemoteFiles(ALONE), refuse_to_say)
    assert [record.name for record in records] == ["model.safetensors"] and files.directory == path
    with pytest.raises(CheckpointError, match="has 0 safetensors files"):
        open_weights(tmp_path, ALONE, RemoteFiles(ALONE), refuse_to_say)
