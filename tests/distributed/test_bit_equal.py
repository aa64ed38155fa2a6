"""What the engine writes is, byte for byte, what `save_file` writes of the gathered state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.checkpoint.format.commit import read_manifest
from tests.distributed.bit_equal import STEPS, TORN_STEP, save_all
from tests.distributed.test_saver import ranks

LIMIT_S = 120


def parts(path: Path) -> tuple[dict[str, object], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def saved(
    tmp_path: Path, strategy: str, num_processes: int, models: str, num_groups: int, transport: str = "auto"
) -> Path:
    out = tmp_path / "out"
    with ranks(num_processes, save_all, out, strategy, models, num_groups, transport) as processes:
        for process in processes:
            process.join(LIMIT_S)
        assert [process.exitcode for process in processes] == [0] * num_processes
    return out / models.split(",")[-1]


def check(out: Path, *, with_optimizer: bool = True) -> None:
    """Of each model."""
    for model in out.parent.iterdir():
        check_model(model, with_optimizer=with_optimizer)


def check_model(out: Path, *, with_optimizer: bool) -> None:
    # The one whose weights were written while they were copied is not there.
    assert not (out / "it/checkpoints" / f"step-{TORN_STEP:08d}").exists()
    for step in (f"step-{number:08d}" for number in STEPS):
        written, expected = out / "it/checkpoints" / step, out / "expected" / step
        read_manifest(written)
        names = ["model.safetensors", *(["optimizer.safetensors"] if with_optimizer else [])]
        for name in names:
            header, data = parts(written / name)
            expected_header, expected_data = parts(expected / name)
            assert header == expected_header, name
            assert list(header)[1:] == list(expected_header)[1:], name
            assert data == expected_data, name
            assert (written / name).stat().st_size == (expected / name).stat().st_size


def test_files_equal_gathered_state_when_there_is_one_process(tmp_path: Path) -> None:
    check(saved(tmp_path, "single", 1, "uneven,convolutional,channels_last,eighth,gpt2,llama,peft", 1))


OURS_AND_OTHERS = "uneven,convolutional,gpt2,llama,peft"


@pytest.mark.parametrize(
    ("strategy", "models"),
    [
        ("ddp", f"{OURS_AND_OTHERS},channels_last"),
        # accelerate keeps the first model's way of wrapping layers, so each has a launch of its own.
        *(("fsdp2", model) for model in OURS_AND_OTHERS.split(",")),
        ("fsdp1", "uneven"),
        *((strategy, f"{OURS_AND_OTHERS},channels_last") for strategy in ("zero1", "zero2", "zero3")),
    ],
)
def test_files_equal_gathered_state_when_two_ranks_share(tmp_path: Path, strategy: str, models: str) -> None:
    check(saved(tmp_path, strategy, 2, models, 1))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_files_equal_gathered_state_when_three_ranks_share(tmp_path: Path, strategy: str) -> None:
    check(saved(tmp_path, strategy, 3, "uneven", 1))


@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp", "zero1", "zero3"])
def test_files_equal_gathered_state_when_four_ranks_share(tmp_path: Path, strategy: str) -> None:
    check(saved(tmp_path, strategy, 4, "uneven", 1))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero3"])
def test_files_equal_gathered_state_when_there_are_several_groups(tmp_path: Path, strategy: str) -> None:
    is_zero = strategy.startswith("zero")
    out = saved(tmp_path, strategy, 2, "uneven", 3)
    check(out, with_optimizer=not is_zero)
    if not is_zero:
        return
    # DeepSpeed's own accessors fail here, so its moments are compared with DDP's.
    (tmp_path / "ddp").mkdir()
    same = saved(tmp_path / "ddp", "ddp", 2, "uneven", 3)
    # Until weights are written outside a step, which DeepSpeed's masters undo.
    for step in (f"step-{number:08d}" for number in STEPS if number < TORN_STEP):
        mine, theirs = (load_file(path / "it/checkpoints" / step / "optimizer.safetensors") for path in (out, same))
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)
        groups = [
            json.loads((path / "it/checkpoints" / step / "trainer_state.json").read_text())["optimizer"]["param_groups"]
            for path in (out, same)
        ]
        for my_group, group in zip(*groups, strict=True):
            assert sorted(my_group["params"]) == sorted(group["params"])
            assert my_group["weight_decay"] == group["weight_decay"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_files_equal_gathered_state_when_rank_zero_writes_for_all(tmp_path: Path, strategy: str) -> None:
    check(saved(tmp_path, strategy, 3, "uneven", 1, "gather"))
