"""The background thread's side of a save: copy the rest, write, report to rank 0, commit.

    QUEUED -> COPYING -> WRITING -> COMMITTING -> COMMITTED
                 |          |           |
                 +----------+-----------+-------> FAILED     a copy is torn, a disk refuses, a rank reports no record
                 +----------+-----------+-------> ABORTED    a rank could not start

Every rank copies and writes its part, and publishes a record in the commit store. Rank 0 collects the records, commits
the checkpoint and publishes the outcome, so that the state at the end is the same on all ranks. A failed save leaves
the earlier checkpoints as they are; nothing is raised in the background thread.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from harness.checkpoint.format import commit
from harness.checkpoint.format.commit import FileRecord, Manifest
from harness.checkpoint.save.commit_store import CommitStore
from harness.checkpoint.save.fence import Fence
from harness.checkpoint.save.hooks import CheckpointHooks, RunFacts
from harness.checkpoint.save.pipeline import SavePipeline, SmallState
from harness.checkpoint.save.snapshot import PendingCopy
from harness.checkpoint.save.source_guard import SourceGuard
from harness.checkpoint.save.transport import Gatherer, Transport
from harness.checkpoint.save.writer import describe_os_error
from harness.checkpoint.save.writer_client import sync_files, write_json
from harness.checkpoint.state import kept_tensors, trainer_state
from harness.checkpoint.state.trainer_state import Moment
from harness.config.schema import CheckpointConfig
from harness.errors import CheckpointError

_NICENESS = 5
# Limit from the last rank's record to the outcome, the publication included.
_COMMIT_S = 120.0
_ABORTED = "aborted"
# Precedes the name of a tensor that was written while a rank copied it.
_TORN = "torn: "


class SaveState(Enum):
    """Where a save is; see the diagram at the top of this module."""

    QUEUED = "queued"
    COPYING = "copying"
    WRITING = "writing"
    COMMITTING = "committing"
    COMMITTED = "committed"
    FAILED = "failed"
    ABORTED = "aborted"


class SaveAborted(Exception):
    """A rank could not take part in a save that others had started."""


class TornSnapshotError(CheckpointError):
    """A tensor was written while a save copied it, so the copy mixes two moments.

    Attributes:
        tensor: its name.
    """

    def __init__(self, tensor: str) -> None:
        self.tensor = tensor
        super().__init__(
            f"{tensor} was written outside an optimizer step while it was copied (load_state_dict, averaged weights "
            "for an evaluation, an optimizer's train() or eval(), weights changed in forward), so the checkpoint is "
            "not committed; from now on training continues only after a save's copy"
        )


@dataclass
class Save:
    """One save. The background thread owns it from `SaveRunner.start` until the future is done.

    Attributes:
        small: what is not in the pipeline's staging memory.
        begun_s: `time.perf_counter` at the call of `Saver.save`.
        seconds: cost of each stage, by name.
        guard: of a copy that overlaps training; None if the copy was complete before training continued.
        state: see `SaveState`.
        error: None unless the save failed.
        status: how the save ended, as text.
    """

    number: int
    moment: Moment
    final: Path
    temporary: Path
    pipeline: SavePipeline
    small: SmallState
    begun_s: float
    seconds: dict[str, float] = field(default_factory=dict)
    guard: SourceGuard | None = None
    state: SaveState = SaveState.QUEUED
    error: Exception | None = None
    status: str = ""


@dataclass(frozen=True)
class SaveContext:
    """What all saves of an attempt share.

    Args:
        config: limits, and the metric that ranks checkpoints.
        commit_store: carries the ranks' records and the outcome.
        transport: how bytes reach the disk.
        gatherer: sends the tensors to rank 0 where it alone writes; None: each rank writes.
        facts: for the manifest.
        hooks: of the owner.
    """

    config: CheckpointConfig
    commit_store: CommitStore
    transport: Transport
    gatherer: Gatherer | None
    facts: RunFacts
    hooks: CheckpointHooks


class RankRecord(NamedTuple):
    """What a rank reports of its part of a save: JSON values, and the digests of its ranges."""

    values: dict[str, Any]
    digests: bytes

    def encoded(self) -> bytes:
        """Encode as a line of JSON and the raw digests, which are most of the data of a thousand ranks."""
        return json.dumps(self.values).encode() + b"\n" + self.digests

    @classmethod
    def decoded(cls, data: bytes) -> RankRecord:
        """Decode the result of `encoded`."""
        line, _, digests = data.partition(b"\n")
        return cls(json.loads(line), digests)

    def require_success(self, rank: int) -> None:
        """Raise what the rank reported.

        Raises:
            SaveAborted: if the rank took no part.
            TornSnapshotError: if its copy was torn.
            CheckpointError: if it failed otherwise.
        """
        if self.values.get("aborted"):
            raise SaveAborted
        if "torn" in self.values:
            raise TornSnapshotError(self.values["torn"])
        if "error" in self.values:
            raise CheckpointError(f"rank {rank}: {self.values['error']}" if rank else self.values["error"])


class SaveRunner:
    """Runs one save after another in a background thread.

    Effects: one daemon thread. Leaves ``<checkpoints_dir>/<name>/`` of each save that is committed.

    Args:
        context: shared by all saves of the attempt.
        fence: opened once all that may change is copied.
        device: of this rank.
    """

    def __init__(self, context: SaveContext, fence: Fence, device: torch.device) -> None:
        self.context = context
        self._commit_store = context.commit_store
        self._gatherer = context.gatherer
        self._is_rank_zero = context.commit_store.rank == 0
        self._fence = fence
        # accelerate's device of a single process has no index.
        self._cuda_index = None
        if device.type == "cuda":
            self._cuda_index = torch.cuda.current_device() if device.index is None else device.index
        self._queue: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        # Started before the first save: it would cost the training thread 1 to 3 ms on busy cores.
        threading.Thread(target=self._serve, name="harness-checkpoint", daemon=True).start()

    def start(self, save: Save, copy: PendingCopy) -> Future[None]:
        """Queue a save. The future is done when the save is committed, has failed or is aborted."""
        return self.submit(lambda: self._run(save, copy))

    def submit(self, run: Callable[[], None]) -> Future[None]:
        """Queue a function behind the saves; it must not raise."""
        future: Future[None] = Future()
        self._queue.put((run, future))
        return future

    def end(self) -> None:
        """End the thread once its queue is empty."""
        self._queue.put(None)

    def _serve(self) -> None:
        # With more threads than cores, the next forward takes precedence; while it waits at the fence, a core is free.
        if sys.platform == "linux":
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while (task := self._queue.get()) is not None:
            run, future = task
            run()
            # Between tasks this thread must not keep a snapshot and its staging memory alive.
            del task, run
            future.set_result(None)
            del future

    def _run(self, save: Save, copy: PendingCopy) -> None:
        values: dict[str, Any] = {}
        digests = b""
        try:
            digests = self._copy_and_write(save, copy)
        except Exception as error:
            values = {"error": _text_of(error), "aborted": isinstance(error, SaveAborted)}
            if isinstance(error, TornSnapshotError):
                values["torn"] = error.tensor
        finally:
            self._fence.open()
        outcome: str | None = None
        try:
            rank_state = save.small.rank_state
            values["rank_state"] = None if rank_state is None else rank_state.encoded()
            save.state = SaveState.COMMITTING
            self._commit_store.publish_record(save.number, RankRecord(values, digests).encoded())
            if self._is_rank_zero:
                self._commit(save)
            else:
                outcome = self._commit_store.await_outcome(save.number, self._remaining_s(save) + _COMMIT_S)
                _require_success(outcome)
                save.status = _written(save)
            save.state = SaveState.COMMITTED
        except SaveAborted:
            save.state, outcome = SaveState.ABORTED, _ABORTED
        except Exception as error:
            save.state, outcome = SaveState.FAILED, _outcome_of(error)
            # Its frames would keep the snapshot and the staging memory alive.
            save.error = error.with_traceback(None)
            save.status = f"{save.moment.name} FAILED: {_text_of(error)}"
        if self._is_rank_zero:
            # A store that is gone ended with the run.
            with suppress(RuntimeError):
                self._commit_store.publish_outcome(save.number, outcome)

    def _copy_and_write(self, save: Save, copy: PendingCopy) -> bytes:
        """Copy and write this rank's part. Returns the digests of its ranges."""
        pipeline, begun_s = save.pipeline, time.perf_counter()
        writes_files = self._is_rank_zero or self._gatherer is None
        failure: Exception | None = None
        try:
            if self._cuda_index is not None:
                # Otherwise this thread would create a context on the first GPU.
                torch.cuda.set_device(self._cuda_index)
            if save.small.failure is not None:
                raise save.small.failure
            save.state = SaveState.COPYING
            pipeline.writer.request(save.temporary if writes_files else None, 0)
            copy.run(self._fence, pipeline.writer)
            pipeline.writer.report_ready(pipeline.staging.size_bytes)
            save.state = SaveState.WRITING
            save.seconds["copy_s"] = time.perf_counter() - begun_s
            if save.guard is not None:
                self._require_one_moment(save.guard, save.seconds["copy_s"])
            if self._gatherer is not None and self._is_rank_zero:
                save.temporary.mkdir(parents=True, exist_ok=True)
        except Exception as error:
            failure = error
            # What follows may take long, and the next step does not depend on it.
            self._fence.open()
        try:
            if self._gatherer is not None:
                # After a failure of this rank too: the other ranks wait for it. The record reports the failure.
                if self._is_rank_zero:
                    self._gatherer.receive(pipeline.plan, None if failure is not None else save.temporary)
                else:
                    self._gatherer.send(pipeline.staging.bytes, pipeline.plan.staging_bytes)
        except Exception as error:
            failure = failure or error
        if failure is not None:
            # Before rank 0 removes the temporary directory: the writer would create it again.
            pipeline.writer.cancel()
            raise failure
        digests, seconds = pipeline.writer.await_digests(self._remaining_s(save))
        save.seconds.update(seconds)
        return digests

    def _require_one_moment(self, guard: SourceGuard, copy_s: float) -> None:
        """Refuse an overlapped save whose sources were written while they were copied.

        Raises:
            TornSnapshotError: if a source was.
        """
        torn = guard.find_torn_copy()
        if torn is None:
            # A version is counted at the end of a write. A write that ran beside the copy ends after as long a time
            # again. A write that begins later is harmless, and must not cost a checkpoint.
            self._fence.await_passed(copy_s)
            # In this order: versions that were read before the fence was passed are not those of a step.
            written = guard.find_written()
            torn = guard.written if self._fence.is_passed else written
        if torn is not None:
            raise TornSnapshotError(torn)

    def _remaining_s(self, save: Save) -> float:
        """Seconds until the save times out; at least one, so that a finished part is still seen."""
        return max(1.0, self.context.config.timeout_s - (time.perf_counter() - save.begun_s))

    def _commit(self, save: Save) -> None:
        """Commit on rank 0, once every rank has written its part; set the status."""
        try:
            collected = self._commit_store.collect_records(save.number, self._remaining_s(save))
            records = [RankRecord.decoded(data) for data in collected]
            for rank, record in enumerate(records):
                record.require_success(rank)
            manifest = self._write_manifest_files(save, records)
            self.context.hooks.on_checkpoint_committing()
            commit.commit(save.temporary, save.final, manifest)
        except BaseException:
            commit.discard(save.temporary)
            raise
        save.status = _written(save)
        try:
            self.context.hooks.on_checkpoint_committed(save.moment.name, manifest)
        except Exception as error:
            # The checkpoint stays. If the disk is full, the training thread's next metrics end the run.
            save.status = f"{save.moment.name} written, but not published: {error}"

    def _write_manifest_files(self, save: Save, records: list[RankRecord]) -> Manifest:
        """Write rank 0's small files, sync all files, and return the manifest, which is written last."""
        plan = save.pipeline.plan
        assert plan.all_ranges is not None
        files: list[FileRecord] = plan.all_ranges.records([record.digests for record in records])
        if plan.layout.index is not None:
            files.append(write_json(save.temporary / "model.safetensors.index.json", plan.layout.index))
        if (state := save.small.trainer_state) is not None:
            groups = state["optimizer"]["param_groups"]
            for group, names in zip(groups, save.pipeline.shards.group_names(), strict=True):
                group["params"] = names
            state["ranks"] = [record.values["rank_state"] for record in records]
            files.append(write_json(save.temporary / trainer_state.FILE, state))
        if save.small.tensors:
            files.append(kept_tensors.write(save.temporary / commit.STATES, save.small.tensors))
        sync_files(save.temporary, plan.layout)
        save.seconds["durable_s"] = time.perf_counter() - save.begun_s
        config, facts = self.context.config, self.context.facts
        # What `harness checkpoints` finds the best checkpoint by.
        ranking = {} if config.monitor is None else {"monitor": config.monitor, "mode": config.mode}
        return Manifest(
            key=uuid.uuid4().hex,
            epoch=save.moment.epoch,
            step=save.moment.step,
            time_ms=time.time_ns() // 1_000_000,
            metrics=save.moment.metrics,
            files=tuple(files),
            topology=facts.topology,
            versions=facts.versions,
            save={"transport": self.context.transport, **save.seconds, **ranking},
        )


def _written(save: Save) -> str:
    return f"{save.moment.name} written in {time.perf_counter() - save.begun_s:.1f} s"


def _outcome_of(error: Exception) -> str:
    """The outcome of a failed save as text. All ranks learn of a torn copy, and stop overlapping."""
    return f"{_TORN}{error.tensor}" if isinstance(error, TornSnapshotError) else _text_of(error)


def _require_success(outcome: str | None) -> None:
    """Raise what rank 0 published as the outcome of a save; None: it is committed."""
    if outcome == _ABORTED:
        raise SaveAborted
    if outcome is not None:
        is_torn = outcome.startswith(_TORN)
        raise TornSnapshotError(outcome.removeprefix(_TORN)) if is_torn else CheckpointError(outcome)


def _text_of(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return describe_os_error(error, "a file of the checkpoint")
    return str(error) or type(error).__name__
