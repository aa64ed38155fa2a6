from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint.format.commit import (
    MANIFEST,
    TRAINER_STATE,
    FileRecord,
    Manifest,
    commit,
    list_checkpoints,
    remove_leftovers,
    temporary_of,
)
from harness.checkpoint.format.ranges import Ranges
from harness.checkpoint.tools.retention import Retention, best_of, remove, to_remove
from harness.config.schema import CheckpointConfig
from harness.errors import TrackingError
from tests.checkpoint_hooks import NoHooks

FULL = (FileRecord(TRAINER_STATE, 0, Ranges()),)


def manifest(step: int, *, time_ms: int | None = None, files: Any = FULL, **metrics: float) -> Manifest:
    return Manifest(f"key-{step}", step, step, step if time_ms is None else time_ms, metrics, files, {}, {})


def config(save_top_k: int, monitor: str | None = "loss", **rest: Any) -> CheckpointConfig:
    return CheckpointConfig(save_top_k=save_top_k, monitor=monitor, **rest)


def kept(found: list[tuple[str, Manifest]], chosen: CheckpointConfig) -> list[int]:
    gone = to_remove(found, chosen)
    return [manifest.step for name, manifest in found if name not in gone]


def losses(*values: float) -> list[tuple[str, Manifest]]:
    return [(f"s{step}", manifest(step, loss=value)) for step, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("values", "chosen", "expected"),
    [
        ((3, 1, 2, 4), config(-1), [1, 2, 3, 4]),
        ((3, 1, 2, 4), config(0), [4]),
        ((3, 1, 2, 4), config(1), [2, 4]),
        ((3, 1, 2, 4), config(2), [2, 3, 4]),
        ((3, 1, 2, 4), config(1, mode="max"), [4]),
        ((4, 1, 2, 3), config(1, mode="max"), [1, 4]),
        ((3, 1, 2, 4), config(2, monitor=None), [3, 4]),
        ((3, 1, 2, 4), config(9), [1, 2, 3, 4]),
        ((1, 1, 1, 4), config(1), [3, 4]),
        ((1, math.nan, math.nan, 4), config(1), [1, 4]),
        ((math.nan, 5, math.nan, math.nan), config(2), [2, 4]),
        ((math.inf, math.nan, 5, 6), config(2, mode="min"), [3, 4]),
        ((-math.inf, math.inf, 5, 6), config(1), [1, 4]),
        ((math.nan, math.nan, math.nan, math.nan), config(1), [1, 2, 3, 4]),
        ((3, 1, 2, 4), config(1, monitor="los"), [1, 2, 3, 4]),
        ((3, 1, 2, 4), config(0, monitor="los"), [4]),
    ],
)
def test_best_and_newest_are_kept_when_ranked(
    values: tuple[float, ...], chosen: CheckpointConfig, expected: list[int]
) -> None:
    assert kept(losses(*values), chosen) == expected


def test_ones_without_the_metric_count_as_worse_when_others_have_it() -> None:
    found = [("a", manifest(1)), ("b", manifest(2, loss=9.0)), ("c", manifest(3)), ("d", manifest(4))]
    assert kept(found, config(1)) == [2, 4]
    assert kept(found, config(2)) == [2, 4]
    assert kept(found, config(3)) == [2, 3, 4]


def test_one_that_can_be_resumed_is_kept_when_later_ones_are_weights_alone() -> None:
    found = [("a", manifest(1)), ("b", manifest(2)), ("c", manifest(3, files=())), ("d", manifest(4, files=()))]
    assert kept(found, config(0)) == [2, 4]


def test_one_written_last_is_kept_when_another_is_of_a_later_step() -> None:
    found = [("a", manifest(10, time_ms=5)), ("b", manifest(20, time_ms=1)), ("c", manifest(5, time_ms=2))]
    assert kept(found, config(0)) == [10, 20]


@given(
    st.lists(st.tuples(st.floats() | st.none(), st.booleans(), st.integers(0, 5)), max_size=7),
    st.integers(-1, 4),
    st.sampled_from([None, "loss", "other"]),
    st.sampled_from(["min", "max"]),
)
def test_enough_is_kept_when_anything_is_there(
    values: list[tuple[float | None, bool, int]], k: int, monitor: str | None, mode: Any
) -> None:
    found = [
        (f"s{step}", manifest(step, time_ms=t, files=FULL if full else (), **({} if v is None else {"loss": v})))
        for step, (v, full, t) in enumerate(values)
    ]
    steps = kept(found, config(k, monitor, mode=mode))
    assert len(steps) >= min(len(found), max(k, 1))
    assert not found or steps[-1] == found[-1][1].step
    resumable = [m.step for _, m in found if m.can_be_resumed]
    assert not resumable or resumable[-1] in steps
    if k > 0 and monitor is not None and (best := best_of(found, monitor, mode)) is not None:
        assert dict(found)[best].step in steps
    # What was kept once is kept if nothing has changed.
    left = [item for item in found if item[1].step in steps]
    assert kept(left, config(k, monitor, mode=mode)) == steps


def test_best_is_the_newer_when_two_are_as_good() -> None:
    assert best_of(losses(2, 1, 1, 3), "loss", "min") == "s3"
    assert best_of(losses(2, 1, 1, 3), "loss", "max") == "s4"
    assert best_of(losses(2, 1), "other", "min") is None


# ------------------------------------------------------------------------- on disk


def save(directory: Path, name: str, step: int, **metrics: float) -> None:
    temporary = temporary_of(directory / name, "test")
    temporary.mkdir(parents=True)
    (temporary / "model.safetensors").write_bytes(b"x")
    commit(temporary, directory / name, manifest(step, files=(), **metrics))


class Told(NoHooks):
    """What a `Retention` has told."""

    def __init__(self, directory: Path, chosen: CheckpointConfig, failure: Exception | None = None) -> None:
        self.directory = directory
        self.retired: list[str] = []
        self.said: list[str] = []
        self.failure = failure
        self.retention = Retention(directory, chosen, self, self.said.append)

    def on_checkpoint_retired(self, name: str, key: str) -> None:
        # It is told while it is whole.
        assert name in dict(list_checkpoints(self.directory))
        assert key == dict(list_checkpoints(self.directory))[name].key
        if self.failure is not None:
            raise self.failure
        self.retired.append(name)

    def save(self, step: int, **metrics: float) -> list[str]:
        save(self.directory, f"s{step}", step, **metrics)
        self.retention.apply(f"s{step}")
        return sorted(path.name for path in self.directory.iterdir())


def test_disk_has_best_and_newest_when_each_commit_is_followed_by_it(tmp_path: Path) -> None:
    told = Told(tmp_path, config(1))
    assert told.save(1, loss=2.0) == ["s1"]
    assert told.save(2, loss=1.0) == ["s2"]
    assert told.save(3, loss=3.0) == ["s2", "s3"]
    assert told.save(4, loss=2.0) == ["s2", "s4"]
    assert told.save(5, loss=0.5) == ["s5"]
    assert (told.retired, told.said) == (["s1", "s3", "s2", "s4"], [])


def test_checkpoints_of_earlier_attempts_count_when_a_run_goes_on(tmp_path: Path) -> None:
    for step, loss in ((1, 1.0), (2, 5.0), (3, 4.0)):
        save(tmp_path, f"s{step}", step, loss=loss)
    assert Told(tmp_path, config(1)).save(4, loss=2.0) == ["s1", "s4"]


def test_nothing_is_removed_and_it_is_said_once_when_the_monitor_is_misspelt(tmp_path: Path) -> None:
    told = Told(tmp_path, config(1, monitor="los"))
    told.save(1, loss=2.0, accuracy=0.5)
    assert told.save(2, loss=1.0, accuracy=0.5) == ["s1", "s2"]
    (line,) = told.said
    assert "no checkpoint has the metric 'los'" in line
    assert "accuracy, loss" in line


def test_damaged_one_is_left_and_told_once_when_others_are_removed(tmp_path: Path) -> None:
    told = Told(tmp_path, config(0))
    told.save(1)
    (tmp_path / "s1" / MANIFEST).write_text("{")
    assert told.save(2) == ["s1", "s2"]
    assert told.save(3) == ["s1", "s3"]
    (line,) = told.said
    assert line.startswith("harness: warning: s1 is left where it is")
    assert told.retired == ["s2"]


def test_nothing_is_removed_when_what_was_committed_is_not_good(tmp_path: Path) -> None:
    told = Told(tmp_path, config(0))
    told.save(1)
    told.save(2)
    save(tmp_path, "s3", 3)
    (tmp_path / "s3" / MANIFEST).write_text("{")
    told.retention.apply("s3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s2", "s3"]
    assert "no checkpoint was removed" in told.said[-1]


def test_nothing_is_removed_when_its_retirement_cannot_be_written(tmp_path: Path) -> None:
    told = Told(tmp_path, config(0), TrackingError("outbox: no space"))
    told.save(1)
    assert told.save(2) == ["s1", "s2"]
    assert told.said == ["harness: warning: no checkpoint was removed: outbox: no space"]
    told.failure = None
    assert told.save(3) == ["s3"]


def test_links_are_nobodys_checkpoints_when_removing(tmp_path: Path) -> None:
    told = Told(tmp_path / "run", config(0))
    told.save(1)
    save(tmp_path / "other", "s9", 9)
    (tmp_path / "run" / "best").symlink_to(tmp_path / "other" / "s9")
    assert told.save(2) == ["best", "s2"]
    assert (tmp_path / "other" / "s9" / MANIFEST).exists()


def test_it_is_said_and_tried_again_when_a_directory_cannot_be_removed(tmp_path: Path) -> None:
    told = Told(tmp_path, config(0))
    told.save(1)
    # Its temporary name would be too long for the file system, whoever asks.
    long = "a" * 250
    os.rename(tmp_path / "s1", tmp_path / long)
    assert told.save(2) == [long, "s2"]
    assert told.save(3) == [long, "s3"]
    (line,) = told.said
    assert "cannot be removed: File name too long" in line
    assert told.retired == [long, "s2"]
    os.rename(tmp_path / long, tmp_path / "s1")
    assert told.save(4) == ["s4"]


def test_half_of_one_is_no_checkpoint_and_is_cleaned_up_when_cut_off_while_removing(tmp_path: Path) -> None:
    save(tmp_path, "s1", 1)
    save(tmp_path, "s2", 2)
    inside = tmp_path / "s1" / "model.safetensors"
    stream = inside.open("rb")  # somebody reads it
    remove(tmp_path / "s1")
    assert stream.read() == b"x"
    stream.close()
    assert [name for name, _ in list_checkpoints(tmp_path)] == ["s2"]
    os.rename(tmp_path / "s2", temporary_of(tmp_path / "s2", "removed-12345678"))
    assert list_checkpoints(tmp_path) == []
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_manifests_are_parsed_once_when_they_do_not_change(tmp_path: Path) -> None:
    told = Told(tmp_path, config(5))
    for step in (1, 2, 3):
        told.save(step, loss=float(step))
    known = dict(told.retention._known)
    told.save(4, loss=4.0)
    assert all(told.retention._known[path] is found for path, found in known.items())
