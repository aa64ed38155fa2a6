"""What reads a checkpoint gives exactly what was written, or a DamagedError, whatever happened to the bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.checkpoint.format.commit import (
    MANIFEST,
    VERSION,
    Manifest,
    commit,
    read_manifest,
    scan_checkpoints,
    sealed,
    temporary_of,
)
from harness.checkpoint.format.json_values import encode
from harness.checkpoint.format.layout import read_header
from harness.checkpoint.save.writer_client import write_json
from harness.checkpoint.state.kept_tensors import KeptTensors
from harness.checkpoint.state.rank_state import RankState
from harness.checkpoint.state.trainer_state import (
    FILE,
    Moment,
    TrainerState,
    Watched,
    capture_trainer_state,
    read_trainer_state,
)
from harness.data import rng_state
from harness.errors import CheckpointError, DamagedError

# The fixtures' files are written anew for each example.
MANY = settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
MODEL = {"fc.weight": torch.arange(60.0).reshape(6, 10), "fc.bias": torch.ones(6, dtype=torch.bfloat16)}
OPTIMIZER = {"exp_avg.fc.weight": torch.arange(60.0), "step.fc.weight": torch.tensor(3, dtype=torch.int64)}

KEPT = Path(__file__).parent / "kept" / "809e21d"

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([-1, 0, 1, 2, 1 << 31, 1 << 63, 1 << 64, 10**400, "", "..", "a/b", "F32", "\ud800", "$float"]),
        st.floats(),
        st.text(max_size=5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.text(max_size=5), st.sampled_from(["$tensor", "$dict", "$set"])), inner, max_size=3
        ),
    ),
    max_leaves=6,
)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with some bits flipped, or a part cut out, put in, repeated, or zeroed."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        if not found:
            break
        first = draw(st.integers(0, len(found) - 1))
        last = min(len(found), first + draw(st.integers(0, 40)))
        how = draw(st.sampled_from(["flip", "flip", "cut off", "cut out", "put in", "repeat", "zero"]))
        if how == "flip":
            found[first] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut off":
            del found[first:]
        elif how == "cut out":
            del found[first:last]
        elif how == "put in":
            found[first:first] = draw(st.one_of(st.binary(max_size=8), st.just(b"[" * 3000), st.just(b"1" * 5000)))
        elif how == "repeat":
            found[first:first] = found[first:last]
        else:
            found[first:last] = bytes(last - first)
    return bytes(found)


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """The JSON value with one place in it replaced, taken out, or put in twice."""
    root = [copy.deepcopy(value)]
    holder: Any = root
    key: Any = 0
    while isinstance(holder[key], (list, dict)) and holder[key] and draw(st.integers(0, 5)):
        holder = holder[key]
        key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
    how = draw(st.sampled_from(["replace", "replace", "take out", "put in"]))
    if how == "replace":
        holder[key] = draw(VALUES)
    elif how == "take out" and holder is not root:
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, draw(VALUES))
    else:
        holder[draw(st.text(max_size=3))] = draw(VALUES)
    return root[0]


def written(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class Trained(NamedTuple):
    """A checkpoint with a trainer's state, and what that is."""

    path: Path
    manifest: Manifest
    state: TrainerState


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(MODEL, OPTIMIZER, aliases={"head.weight": "fc.weight"}, num_ranks=2)


@pytest.fixture
def trained(tmp_path: Path, accelerator: Accelerator) -> Trained:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)  # it holds an infinity
    groups = [
        {key: encode(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    moment = Moment("a", 2, 20, 4, {}, states={"harness": {"is_stopped": True}})
    state = capture_trainer_state(
        moment, Watched(model, optimizer, scheduler), {"param_groups": groups}, [{}], None, KeptTensors()
    )
    state["ranks"] = [RankState(rng_state.capture(accelerator.device)).encoded()]
    final = tmp_path / "trained"
    temporary = temporary_of(final, "test")
    temporary.mkdir()
    commit(temporary, final, Manifest("key", 2, 20, 1, {}, (write_json(temporary / FILE, state),), {}, {}))
    manifest = read_manifest(final)
    return Trained(final, manifest, read_trainer_state(final, manifest))


# ------------------------------------------------------------------------- the manifest


@MANY
@given(data=st.data())
def test_damage_is_found_when_any_byte_of_the_manifest_changes(checkpoint: Path, data: st.DataObject) -> None:
    path = checkpoint / MANIFEST
    content = path.read_bytes()
    damaged = data.draw(damaged_bytes(content))
    path.write_bytes(damaged)
    try:
        if damaged == content:
            assert len(scan_checkpoints(checkpoint.parent).good) == 1
            return
        with pytest.raises(DamagedError) as caught:
            read_manifest(checkpoint)
        assert str(caught.value).startswith(str(path))
        assert scan_checkpoints(checkpoint.parent) == ([], [(checkpoint.name, str(caught.value))])
    finally:
        path.write_bytes(content)


@MANY
@given(data=st.data())
def test_version_2_manifest_is_equal_or_refused_when_damaged(tmp_path: Path, data: st.DataObject) -> None:
    original = KEPT / "epoch-0002"
    path = tmp_path / MANIFEST
    path.write_bytes(data.draw(damaged_bytes((original / MANIFEST).read_bytes())))
    try:
        assert read_manifest(tmp_path) == read_manifest(original)
    except DamagedError as error:
        assert str(error).startswith(str(path))


@MANY
@given(data=st.data())
def test_manifest_is_equal_or_refused_when_values_are_edited(checkpoint: Path, data: st.DataObject) -> None:
    path = checkpoint / MANIFEST
    content = path.read_bytes()
    original = read_manifest(checkpoint)
    path.write_bytes(written(json.dumps(data.draw(edited(json.loads(content))))))
    try:
        assert read_manifest(checkpoint) == original
    except DamagedError as error:
        assert str(error).startswith(str(path))
    finally:
        path.write_bytes(content)


@MANY
@given(data=st.data())
def test_manifest_is_valid_or_refused_when_another_writer_sealed_it(checkpoint: Path, data: st.DataObject) -> None:
    path = checkpoint / MANIFEST
    content = path.read_bytes()
    record = data.draw(edited(json.loads(content)))
    try:
        if isinstance(record, dict):
            record.pop("checksum", None)
            path.write_bytes(written(sealed(record)))
        else:
            path.write_bytes(written(json.dumps(record)))
        found = read_manifest(checkpoint)
        assert found.size_bytes == sum(part.end - part.start for file in found.files for part in file.ranges)
        assert all((checkpoint / file.name).parent == checkpoint for file in found.files)
        assert min(found.epoch, found.step, found.time_ms) >= 0
    except DamagedError:
        pass
    except CheckpointError as error:
        assert f"this harness reads 2 to {VERSION}; u" in str(error)  # update it, or use the one that wrote it
    except ValueError as error:  # sealed: a number that JSON has not
        assert "JSON compliant" in str(error)
    finally:
        path.write_bytes(content)


# ------------------------------------------------------------------------- headers


@MANY
@given(data=st.data(), keeps_size=st.booleans())
def test_header_is_equal_or_refused_when_bytes_are_damaged(
    checkpoint: Path, data: st.DataObject, keeps_size: bool
) -> None:
    path = checkpoint / data.draw(st.sampled_from(["model.safetensors", "optimizer.safetensors"]))
    record = next(file for file in read_manifest(checkpoint).files if file.name == path.name)
    content = path.read_bytes()
    original = read_header(path, record)
    end = record.ranges[0].end
    damaged = data.draw(damaged_bytes(content[:end])) + content[end:]
    path.write_bytes(damaged.ljust(len(content), b" ")[: len(content)] if keeps_size else damaged)
    _check_header(path, record, original, content)


@MANY
@given(data=st.data())
def test_header_is_equal_or_refused_when_values_are_edited(checkpoint: Path, data: st.DataObject) -> None:
    path = checkpoint / "optimizer.safetensors"
    (record,) = (file for file in read_manifest(checkpoint).files if file.name == path.name)
    content = path.read_bytes()
    original = read_header(path, record)
    end = record.ranges[0].end
    text = written(json.dumps(data.draw(edited(json.loads(content[8:end]))), ensure_ascii=data.draw(st.booleans())))
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    _check_header(path, record, original, content)


def _check_header(path: Path, record: Any, original: Any, content: bytes) -> None:
    end = record.ranges[0].end
    is_same = path.read_bytes()[:end] == content[:end]
    size_bytes = path.stat().st_size
    try:
        assert read_header(path, record) == original
        assert is_same
    except DamagedError as error:
        assert str(error).startswith(str(path))
    try:
        # A file without a manifest: what it says may be another thing, but one that can be.
        tensors, metadata = read_header(path)
        places = [(tensor.start, tensor.end) for tensor in tensors.values()]
        assert sum(last - first for first, last in places) <= size_bytes
        assert all(first <= last <= size_bytes for first, last in places)
        json.dumps([tensors, metadata], ensure_ascii=False).encode()
    except DamagedError as error:
        assert str(error).startswith(str(path))
    finally:
        path.write_bytes(content)


# ------------------------------------------------------------------------- the trainer's state


@MANY
@given(data=st.data())
def test_trainer_state_is_equal_or_refused_when_bytes_are_damaged(trained: Trained, data: st.DataObject) -> None:
    path = trained.path / FILE
    content = path.read_bytes()
    path.write_bytes(data.draw(damaged_bytes(content)))
    try:
        assert read_trainer_state(trained.path, trained.manifest) == trained.state
    except DamagedError as error:
        assert str(error).startswith(str(path))
    finally:
        path.write_bytes(content)


@MANY
@given(data=st.data())
def test_trainer_state_is_typed_or_refused_when_values_are_edited(
    trained: Trained, tmp_path: Path, data: st.DataObject
) -> None:
    record = data.draw(edited(json.loads((trained.path / FILE).read_text())))
    other = tmp_path / "other"
    other.mkdir(exist_ok=True)
    manifest = Manifest("key", 2, 20, 1, {}, (write_json(other / FILE, record),), {}, {})
    try:
        found = read_trainer_state(other, manifest)
        assert min(found.epoch, found.step, found.loaders_done, found.batches_in_epoch) >= 0
        assert all(isinstance(group, dict) for group in found.param_groups)
        assert found.is_stopped in (True, False)
    except DamagedError as error:
        assert str(error).startswith(str(other / FILE))


def test_trainer_state_equals_the_captured_one_when_read(trained: Trained) -> None:
    state = trained.state
    assert (state.epoch, state.step, state.loaders_done, state.batches_in_epoch) == (2, 20, 0, 4)
    (group,) = state.param_groups
    assert (group["lr"], group["betas"]) == (0.1, (0.9, 0.999))
    (part,) = state.parts
    assert part.scheduler["best"] == float("inf")
    assert (state.scaler, part.loss_scale, len(state.ranks)) == (None, None, 1)


def rewritten(directory: Path, record: Any) -> TrainerState:
    """What another writer has written, with digests that are right."""
    directory.mkdir()
    return read_trainer_state(directory, Manifest("key", 2, 20, 1, {}, (write_json(directory / FILE, record),), {}, {}))


@pytest.mark.parametrize("is_stopped", [None, 1, "true"])
def test_error_has_the_path_when_is_stopped_is_not_a_bool(trained: Trained, tmp_path: Path, is_stopped: Any) -> None:
    record = json.loads((trained.path / FILE).read_text())
    with pytest.raises(DamagedError, match=f"{tmp_path / 'other' / FILE}: is damaged: is_stopped is .*neither"):
        rewritten(tmp_path / "other", {**record, "is_stopped": is_stopped})


def test_trainer_state_is_read_when_it_has_the_old_data_epoch(trained: Trained, tmp_path: Path) -> None:
    record = json.loads((trained.path / FILE).read_text())
    assert "epoch" not in record["position"]
    assert rewritten(tmp_path / "other", {**record, "position": {**record["position"], "epoch": 2}}) == trained.state


def test_error_has_the_remedy_when_there_are_only_weights(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds weights only .* so training cannot be resumed from it"):
        read_trainer_state(checkpoint, read_manifest(checkpoint))


def test_error_has_the_path_when_the_trainer_state_is_missing(trained: Trained) -> None:
    (trained.path / FILE).unlink()
    with pytest.raises(DamagedError, match=f"{trained.path / FILE}: No such file or directory"):
        read_trainer_state(trained.path, trained.manifest)
