"""From any of these to any other: every value is what was saved, and each byte is read about once."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from tests.distributed.restoring_ranks import restore_under, save_under
from tests.distributed.test_saver import ranks

TOPOLOGIES = [("replicated", 1), ("replicated", 2), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4)]


def test_values_are_what_was_saved_when_restored_on_any_topology(tmp_path: Path) -> None:
    names = [f"{strategy}-{world_size}" for strategy, world_size in TOPOLOGIES]
    for strategy, world_size in TOPOLOGIES:
        with ranks(world_size, save_under, tmp_path, strategy) as processes:
            for process in processes:
                process.join(60)
            assert [process.exitcode for process in processes] == [0] * world_size
    for strategy, world_size in TOPOLOGIES:
        with ranks(world_size, restore_under, tmp_path, strategy, names) as processes:
            for process in processes:
                process.join(60)
            assert [process.exitcode for process in processes] == [0] * world_size
        for name in names:
            found = tmp_path / f"{name}-into-{strategy}-{world_size}"
            for file in ("model.safetensors", "optimizer.safetensors"):
                expected, mine = load_file(tmp_path / name / "step-3" / file), load_file(found / file)
                assert mine.keys() == expected.keys()
                for key, value in expected.items():
                    assert (mine[key].dtype, mine[key].shape) == (value.dtype, value.shape)
                    assert bool((mine[key] == value).all()), f"{found.name}: {key}"
            # What a rank reads beyond what it holds is for digests that no rank has come by.
            size_bytes = sum(path.stat().st_size for path in (tmp_path / name / "step-3").glob("*.safetensors"))
            reports = json.loads((found / "read.json").read_text())
            assert sum(read - wanted for wanted, read in reports) <= size_bytes
