"""From any of these to any other: every value is what was saved, and training goes on from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.restoring_ranks import (
    begin_with_weights_under,
    fail_to_restore,
    restore_under,
    restore_weights_under,
    save_under,
    save_unevenly,
)
from tests.distributed.saved_models import MODELS
from tests.distributed.test_saver import ranks

FILES = ("model.safetensors", "optimizer.safetensors")
SAVED = [("single", 1), ("ddp", 2), ("fsdp1", 2), ("fsdp2", 3), ("hsdp", 4), ("zero1", 2), ("zero2", 3), ("zero3", 2)]
RESTORED = [
    ("single", 1),
    ("ddp", 3),
    ("fsdp1", 3),
    ("fsdp2", 2),
    ("hsdp", 6),
    ("zero1", 3),
    ("zero2", 2),
    ("zero3", 3),
]


def run(world_size: int, target: object, *arguments: object) -> None:
    with ranks(world_size, target, *arguments) as processes:  # type: ignore[arg-type]
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * world_size


def same_files(mine: Path, theirs: Path) -> bool:
    return all((mine / file).read_bytes() == (theirs / file).read_bytes() for file in FILES)


def test_values_are_what_was_saved_when_restored_on_any_topology(tmp_path: Path) -> None:
    checkpoints = {}
    for strategy, world_size in SAVED:
        name = f"{strategy}-{world_size}"
        run(world_size, save_under, tmp_path / name, strategy, "fp32", "AdamW", 2, "large")
        checkpoints[name] = tmp_path / name
    for strategy, world_size in sorted({*SAVED, *RESTORED}):
        mine = f"{strategy}-{world_size}"
        names = {
            name: str(path / "step-3")
            for name, path in checkpoints.items()
            if name == mine or (strategy, world_size) in RESTORED
        }
        into = tmp_path / f"into-{mine}"
        run(world_size, restore_under, into, strategy, names, "fp32", "AdamW", 2, "large")
        for name in names:
            # All of it, padding or not, is in what the same ranks save again.
            assert same_files(into / name, checkpoints[name] / "step-3"), f"{name} into {mine}"
            check_next(into / f"{name}-next", checkpoints[name] / "step-4", is_same=name == mine)
            # What a rank reads beyond what it holds is for digests of what a border between ranks cuts.
            reports = json.loads((into / f"{name}.json").read_text())
            assert all(read <= 1.1 * wanted for wanted, read, _ in reports), f"{name} into {mine}: {reports}"
            assert all(notes == [] for _, _, notes in reports)
        shutil.rmtree(into)


def check_next(mine: Path, theirs: Path, *, is_same: bool) -> None:
    """The step after: bit for bit on the same topology, else within what the order of sums makes."""
    if is_same:
        assert same_files(mine, theirs), mine
    else:
        assert_close_tensors(mine, theirs)


def notes_of(into: Path, name: str) -> list[str]:
    reports = json.loads((into / f"{name}.json").read_text())
    notes: list[str] = reports[0][2]
    assert all(each == notes for _, _, each in reports)
    return notes


def test_nothing_is_lost_when_precision_changes_and_changes_back(tmp_path: Path) -> None:
    run(2, save_under, tmp_path / "zero1", "zero1", "bf16")
    first = tmp_path / "zero1/step-3"
    weights, state = load_file(first / FILES[0]), load_file(first / FILES[1])
    assert weights["embed.weight"].dtype == torch.bfloat16
    assert state["master.embed.weight"].dtype == torch.float32

    for strategy, world_size in (("zero1", 2), ("zero2", 3), ("zero3", 2)):
        into = tmp_path / f"into-{strategy}"
        run(world_size, restore_under, into, strategy, {"same": str(first)}, "bf16")
        assert same_files(into / "same", first)
        assert notes_of(into, "same") == []
        if strategy == "zero1":
            assert same_files(into / "same-next", tmp_path / "zero1/step-4")

    for strategy, world_size in (("single", 1), ("fsdp2", 2), ("zero3", 2)):
        into = tmp_path / f"into-fp32-{strategy}"
        run(world_size, restore_under, into, strategy, {"wide": str(first)})
        # What has no master, frozen weights and buffers, has been rounded for good.
        notes = notes_of(into, "wide")
        assert len(notes) == 1 and "had been rounded when they were saved: frozen from BF16 to F32" in notes[0]
        wide, wide_state = load_file(into / "wide" / FILES[0]), load_file(into / "wide" / FILES[1])
        assert {name for name in state if not name.startswith("master.")} == wide_state.keys()
        for name, value in wide.items():
            expected = state.get(f"master.{name}", weights[name])
            assert torch.equal(value, expected.to(value.dtype)), name
        for name, value in wide_state.items():
            assert torch.equal(value, state[name]), name

    back = tmp_path / "back"
    run(3, restore_under, back, "zero3", {"back": str(tmp_path / "into-fp32-fsdp2/wide")}, "bf16")
    assert same_files(back / "back", first)


@pytest.mark.parametrize("kind", ["SGD", "SGD with momentum", "Adagrad", "RMSprop"])
def test_state_is_what_was_saved_when_the_optimizer_is(tmp_path: Path, kind: str) -> None:
    run(2, save_under, tmp_path / "fsdp2", "fsdp2", "fp32", kind, 1)
    run(2, save_under, tmp_path / "zero2", "zero2", "fp32", kind, 1)
    names = {strategy: tmp_path / strategy for strategy in ("fsdp2", "zero2")}
    for strategy, world_size in (("single", 1), ("fsdp2", 3), ("zero2", 2), ("zero3", 2)):
        into = tmp_path / f"into-{strategy}"
        paths = {name: str(path / "step-3") for name, path in names.items()}
        run(world_size, restore_under, into, strategy, paths, "fp32", kind, 1)
        for name, path in names.items():
            assert_same_tensors(into / name, path / "step-3")
            # DeepSpeed makes Adagrad anew, without what is a group's own (its weight decay).
            if kind != "Adagrad" or strategy.startswith("zero") == name.startswith("zero"):
                assert_close_tensors(into / f"{name}-next", path / "step-4")


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_state_is_what_was_saved_when_in_containers_or_of_no_parameter(tmp_path: Path, strategy: str) -> None:
    run(2, save_under, tmp_path / "saved", strategy, "fp32", "Queued", 1)
    run(2, restore_under, tmp_path / "into", strategy, {"it": str(tmp_path / "saved/step-3")}, "fp32", "Queued", 1)
    for mine, theirs in (("it", "step-3"), ("it-next", "step-4")):
        found, expected = tmp_path / "into" / mine, tmp_path / "saved" / theirs
        assert same_files(found, expected)
        assert (found / "states.safetensors").read_bytes() == (expected / "states.safetensors").read_bytes()
        records = [json.loads((path / "trainer_state.json").read_text())["optimizer"] for path in (found, expected)]
        assert records[0] == records[1]
        # ZeRO-3 steps the optimizer once for each of its sub-groups.
        num_steps, remainder = divmod(records[0]["added"]["total_step"], 3 if mine == "it" else 4)
        assert num_steps >= 1 and remainder == 0


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    # SGD without momentum has no file for the optimizer.
    return {
        f"{file}:{name}": value
        for file in FILES
        if (checkpoint / file).exists()
        for name, value in load_file(checkpoint / file).items()
    }


def assert_same_tensors(mine: Path, theirs: Path) -> None:
    found, expected = tensors_of(mine), tensors_of(theirs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), f"{mine}: {name}"


def assert_close_tensors(mine: Path, theirs: Path) -> None:
    found, expected = tensors_of(mine), tensors_of(theirs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{mine} {name}: {text}"
        )


def test_flat_state_is_zero_where_the_checkpoint_has_none(tmp_path: Path) -> None:
    run(1, save_unevenly, tmp_path / "uneven", 3)
    checkpoint = tmp_path / "uneven/saved"
    expected = load_file(checkpoint / FILES[1])
    assert "step.scale" not in expected and expected["step.blocks.2.norm.bias"] == 2
    for strategy in ("single", "fsdp1", "fsdp2", "zero1", "zero3"):
        into = tmp_path / f"into-{strategy}"
        run(
            1 if strategy == "single" else 2, restore_under, into, strategy, {"it": str(checkpoint)}, "fp32", "AdamW", 1
        )
        assert (into / "it" / FILES[0]).read_bytes() == (checkpoint / FILES[0]).read_bytes()
        found = load_file(into / "it" / FILES[1])
        notes = notes_of(into, "it")
        assert "1 trained parameters had no state in the checkpoint, and start anew: scale" in notes
        if not strategy.startswith("zero"):
            assert_same_tensors(into / "it", checkpoint)
            continue
        assert found["exp_avg.scale"].item() == found["exp_avg_sq.scale"].item() == 0
        for name, value in expected.items():
            if not name.startswith("step."):
                assert torch.equal(found[name], value), name
        # Of one flat partition there is one number of steps.
        steps = {name: value.item() for name, value in found.items() if name.startswith("step.")}
        if strategy == "zero1":
            assert set(steps.values()) == {3.0}
            assert any("step: differed among parameters" in note for note in notes)


def test_there_is_no_state_when_a_checkpoint_is_of_before_the_first_step(tmp_path: Path) -> None:
    run(1, save_unevenly, tmp_path / "uneven", 0)
    checkpoint = tmp_path / "uneven/saved"
    for strategy in ("fsdp1", "fsdp2", "zero2", "zero3"):
        into = tmp_path / f"into-{strategy}"
        run(2, restore_under, into, strategy, {"it": str(checkpoint)}, "fp32", "AdamW", 1)
        assert_same_tensors(into / "it", checkpoint)
        assert notes_of(into, "it") == []
        assert load_file(into / "it-next" / FILES[1])["step.scale"] == 1


@pytest.mark.parametrize(
    ("strategy", "precision"), [("fsdp1", "fp32"), ("fsdp2", "fp32"), ("zero1", "bf16"), ("zero3", "bf16")]
)
def test_masters_follow_when_weights_alone_are_restored(tmp_path: Path, strategy: str, precision: str) -> None:
    run(1, save_under, tmp_path / "single", "single")
    checkpoint = tmp_path / "single/step-3"
    run(2, restore_weights_under, tmp_path / "into", strategy, str(checkpoint), precision)
    expected = load_file(checkpoint / FILES[0])
    found = tensors_of(tmp_path / "into/restored")
    for name, value in expected.items():
        mine = found[f"{FILES[0]}:{name}"]
        assert torch.equal(mine, value.to(mine.dtype)), name
        if precision == "bf16" and name != "frozen" and f"exp_avg.{name}" in load_file(checkpoint / FILES[1]):
            assert torch.equal(found[f"{FILES[1]}:master.{name}"], value), name
    notes = json.loads((tmp_path / "into/notes.json").read_text())
    assert (notes == []) == (precision == "fp32"), notes


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_shards_take_the_weights_of_transformers_when_a_run_begins(tmp_path: Path, strategy: str) -> None:
    torch.manual_seed(1)
    model: Any = MODELS["gpt2"]()
    model.save_pretrained(tmp_path / "hub", max_shard_size="5KB")
    run(2, begin_with_weights_under, tmp_path / "into", strategy, str(tmp_path / "hub"))
    found = tensors_of(tmp_path / "into/begun")
    for name, value in model.named_parameters():
        assert torch.equal(found[f"{FILES[0]}:{name}"], value), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2", "zero2", "zero3"])
def test_all_ranks_say_the_same_when_one_cannot_restore(tmp_path: Path, strategy: str) -> None:
    run(1, save_under, tmp_path / "single", "single")
    checkpoint = tmp_path / "single/step-3"
    run(2, fail_to_restore, tmp_path, strategy, [str(checkpoint), str(tmp_path / "nowhere")], "uneven")
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert "nowhere" in said[1] and said[0] == f"rank 1: {said[1]}"
    run(2, fail_to_restore, tmp_path, strategy, [str(checkpoint)], "convolutional")
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert "has no conv.weight, norm.weight, norm.bias and 4 more, and has " in said[0]
    assert "which is not there now; resume with the model" in said[0]
