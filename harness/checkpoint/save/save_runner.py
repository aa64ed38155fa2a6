"""What of a save runs beside training: copy the rest, write, tell the others, commit.

every rank    copy the rest -> write -> say so on the board
rank zero     wait for the board -> manifest -> rename -> tell the caller and the others

Nothing here raises: a save that fails leaves the checkpoints before it, and its error for the next one to see.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from harness.checkpoint.format import commit
from harness.checkpoint.format.commit import FileRecord, Manifest
from harness.checkpoint.save.commit_store import CommitStore
from harness.checkpoint.save.fence import Fence
from harness.checkpoint.save.gather import Gatherer
from harness.checkpoint.save.hooks import CheckpointHooks, RunFacts
from harness.checkpoint.save.pipeline import SavePipeline
from harness.checkpoint.save.snapshot import CopyRest
from harness.checkpoint.save.source_guard import SourceGuard
from harness.checkpoint.save.transport import Transport
from harness.checkpoint.save.write import sync_files, write_json
from harness.checkpoint.save.writer import told
from harness.checkpoint.state import kept_tensors, trainer_state
from harness.checkpoint.state.rank_state import RankState
from harness.checkpoint.state.trainer_state import Moment
from harness.config.schema import CheckpointConfig
from harness.errors import CheckpointError

_NICENESS = 5
# How long rank zero may take from the last rank's record to a committed checkpoint, published included.
_COMMIT_S = 120.0
_CALLED_OFF = "called off"
# Before the name of a tensor that was written while a rank copied it.
_TORN = "torn: "


@dataclass(frozen=True)
class SmallState:
    """Rank zero's trainer state with the tensors that it refers to, and each rank's own state; or why not."""

    trainer_state: Any
    rank_state: RankState | None
    failure: Exception | None = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


class RankOutcome(NamedTuple):
    """What a rank says of its part of a save: JSON values, and the digests of its ranges."""

    record: dict[str, Any]
    digests: bytes

    def encoded(self) -> bytes:
        """For the board: a line of JSON, and the digests as they are; of a thousand ranks they are the most of it."""
        return json.dumps(self.record).encode() + b"\n" + self.digests

    @classmethod
    def decoded(cls, data: bytes) -> RankOutcome:
        """What `encoded` made."""
        line, _, digests = data.partition(b"\n")
        return cls(json.loads(line), digests)


class CalledOff(Exception):
    """A save that some ranks had begun when another could not."""


class TornSnapshotError(CheckpointError):
    """A tensor was written while a save copied it, so that the save is of no one moment.

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
    """One save on its way.

    Attributes:
        guard: of the snapshot, where the copy overlaps training; None: it was complete before training continued.
    """

    number: int
    moment: Moment
    final: Path
    temporary: Path
    engine: SavePipeline
    small: SmallState
    begun_s: float
    seconds: dict[str, float] = field(default_factory=dict)
    guard: SourceGuard | None = None


@dataclass(frozen=True)
class SaveContext:
    """What all saves of an attempt share.

    Args:
        config: limits, and the metric that ranks checkpoints.
        commit_store: the ranks publish there that their part is written.
        transport: how bytes reach the disk.
        gatherer: sends the tensors to rank 0 where it alone writes; None: each rank writes.
        facts: of the run, for the manifest.
        hooks: of the owner.
    """

    config: CheckpointConfig
    commit_store: CommitStore
    transport: Transport
    gatherer: Gatherer | None
    facts: RunFacts
    hooks: CheckpointHooks


class SaveRunner:
    """Runs one save after another in a thread of its own, and keeps how the last one ended.

    Effects: one background thread, which does not keep the process from ending. Main thread: all but what it
    runs. Leaves ``<checkpoints_dir>/<name>/`` of each save that succeeds.

    Args:
        context: shared by all saves of the attempt.
        fence: opened once all that may change is copied.
        device: of this rank.

    Attributes:
        status: how the last save ended, for a person.
        last_error: of the last save; None: it succeeded.
        failures: of each save that failed, for a person, until they are taken.
        last_seconds: what the last save has cost.
        num_failed: saves.
        is_reported: whether what the last save has cost was taken already.
        written: name of a tensor that was written while any rank copied it; None: none was.
    """

    def __init__(self, context: SaveContext, fence: Fence, device: torch.device) -> None:
        self.context = context
        self._config = context.config
        self._board = context.commit_store
        self._rank = context.commit_store.rank
        self._gatherer = context.gatherer
        self._fence = fence
        # accelerate's device of a single process has no index.
        self._cuda_index = None
        if device.type == "cuda":
            self._cuda_index = torch.cuda.current_device() if device.index is None else device.index
        self._queue: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        # There already when a save begins: to start one takes the trainer's thread 1 to 3 ms on busy cores.
        threading.Thread(target=self._serve, name="harness-checkpoint", daemon=True).start()
        self.status = "no checkpoint yet"
        self.last_error: Exception | None = None
        self.failures: deque[str] = deque()
        self.last_seconds: Mapping[str, float] = {}
        self.num_failed = 0
        self.is_reported = True
        self.written: str | None = None

    def start(self, save: Save, copy_rest: CopyRest) -> Future[None]:
        """Have a save run; done when it is on disk on every rank, or has failed."""
        return self.submit(lambda: self._run(save, copy_rest))

    def submit(self, run: Callable[[], None]) -> Future[None]:
        """Have something run behind the saves that were started; it must not raise."""
        future: Future[None] = Future()
        self._queue.put((run, future))
        return future

    def end(self) -> None:
        """End the thread after what it is at."""
        self._queue.put(None)

    def _serve(self) -> None:
        """What a task holds is not held any longer than it runs: a snapshot, the staging memory."""
        # Where there are more threads than cores, the next forward comes first. When it waits at the fence, the
        # core is free.
        if sys.platform == "linux":
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while (task := self._queue.get()) is not None:
            run, future = task
            run()
            del task, run
            future.set_result(None)
            del future

    def _run(self, save: Save, copy_rest: CopyRest) -> None:
        """Never raises; a failed save leaves the checkpoints before it."""
        record: dict[str, Any] = {}
        digests = b""
        try:
            digests = self._copy_and_write(save, copy_rest)
        except Exception as error:
            record = {"error": _told(error), "called_off": isinstance(error, CalledOff)}
            if isinstance(error, TornSnapshotError):
                record["torn"] = error.tensor
        finally:
            self._fence.lower()
        try:
            rank_state = save.small.rank_state
            record["rank_state"] = None if rank_state is None else rank_state.encoded()
            self._board.put(save.number, RankOutcome(record, digests).encoded())
            if self._rank == 0:
                self._finish(save)
            elif (outcome := self._board.hear(save.number, self._remaining_s(save) + _COMMIT_S)) is not None:
                raise _failure_of(outcome)
            self.last_error = None
        except CalledOff:
            self._tell(save, _CALLED_OFF)
            return
        except Exception as error:
            # Its frames would keep the snapshot and the staging memory.
            self.last_error = error.with_traceback(None)
            if isinstance(error, TornSnapshotError):
                self.written = error.tensor
            self.num_failed += 1
            self.status = f"{save.moment.name} FAILED: {_told(error)}"
            self.failures.append(self.status)
        self._tell(save, None if self.last_error is None else _outcome_of(self.last_error))
        self.last_seconds = save.seconds
        self.is_reported = False

    def _tell(self, save: Save, outcome: str | None) -> None:
        """Rank zero: let the others know how it ended."""
        if self._rank == 0:
            # A store that is gone went with the run.
            with suppress(RuntimeError):
                self._board.tell(save.number, outcome)

    def _copy_and_write(self, save: Save, copy_rest: CopyRest) -> bytes:
        engine, begun_s = save.engine, time.perf_counter()
        writes_itself = self._rank == 0 or self._gatherer is None
        failure: Exception | None = None
        try:
            if self._cuda_index is not None:
                # Otherwise this thread would make a context on the first GPU.
                torch.cuda.set_device(self._cuda_index)
            if save.small.failure is not None:
                raise save.small.failure
            engine.writer.ask(save.temporary if writes_itself else None, 0)
            copy_rest(self._fence.lower, engine.writer.ready)
            engine.writer.ready(engine.staging.size_bytes)
            save.seconds["copy_s"] = time.perf_counter() - begun_s
            if save.guard is not None:
                self._require_one_moment(save.guard, save.seconds["copy_s"])
            if self._gatherer is not None and self._rank == 0:
                save.temporary.mkdir(parents=True, exist_ok=True)
        except Exception as error:
            failure = error
            # What follows may take long, and has nothing to do with the next step.
            self._fence.lower()
        try:
            if self._gatherer is not None:
                # Also after a failure of this rank's: the others wait for it. The digests tell that nothing holds.
                if self._rank == 0:
                    self._gatherer.receive(engine.plan, None if failure is not None else save.temporary)
                else:
                    self._gatherer.send(engine.staging.bytes, engine.plan.staging_bytes)
        except Exception as error:
            failure = failure or error
        if failure is not None:
            # Before anybody removes what it writes: afterwards it would make it again.
            engine.writer.give_up()
            raise failure
        digests, seconds = engine.writer.answer(self._remaining_s(save))
        save.seconds.update(seconds)
        return digests

    def _require_one_moment(self, guard: SourceGuard, copy_s: float) -> None:
        """Refuse an overlapped save whose sources were written while they were copied.

        Raises:
            TornSnapshotError: if one was.
        """
        torn = guard.find_torn_copy()
        if torn is None:
            # A write is counted when it is over. One that ran beside the copy is over after as long a time again. One
            # that begins later does no harm, and should not cost a checkpoint.
            self._fence.await_pass(copy_s)
            # In this order: versions that were read before the fence was passed are not those of a step.
            written = guard.find_written()
            torn = guard.written if self._fence.is_passed else written
        if torn is not None:
            raise TornSnapshotError(torn)

    def _remaining_s(self, save: Save) -> float:
        """Until the save is given up; a moment at least, so that what is done already is seen."""
        return max(1.0, self._config.timeout_s - (time.perf_counter() - save.begun_s))

    def _finish(self, save: Save) -> None:
        """Rank zero: commit once every rank has written."""
        try:
            told = [RankOutcome.decoded(data) for data in self._board.collect(save.number, self._remaining_s(save))]
            for rank, (record, _) in enumerate(told):
                if record.get("called_off"):
                    raise CalledOff
                if "torn" in record:
                    raise TornSnapshotError(record["torn"])
                if "error" in record:
                    raise CheckpointError(f"rank {rank}: {record['error']}" if rank else record["error"])
            manifest = self._manifest(save, told)
            self.context.hooks.on_checkpoint_committing()
            commit.commit(save.temporary, save.final, manifest)
        except BaseException:
            commit.discard(save.temporary)
            raise
        self.status = f"{save.moment.name} written in {time.perf_counter() - save.begun_s:.1f} s"
        try:
            self.context.hooks.on_checkpoint_committed(save.moment.name, manifest)
        except Exception as error:
            # The checkpoint stands. The trainer's next metrics meet the same full disk, and end the run.
            self.status = f"{save.moment.name} written, but not published: {error}"

    def _manifest(self, save: Save, told: list[RankOutcome]) -> Manifest:
        plan = save.engine.plan
        assert plan.all_ranges is not None
        files: list[FileRecord] = plan.all_ranges.records([each.digests for each in told])
        if plan.layout.index is not None:
            files.append(write_json(save.temporary / "model.safetensors.index.json", plan.layout.index))
        if (state := save.small.trainer_state) is not None:
            for group, names in zip(state["optimizer"]["param_groups"], save.engine.held.group_names(), strict=True):
                group["params"] = names
            state["ranks"] = [each.record["rank_state"] for each in told]
            files.append(write_json(save.temporary / trainer_state.FILE, state))
        if save.small.tensors:
            files.append(kept_tensors.write(save.temporary / commit.STATES, save.small.tensors))
        sync_files(save.temporary, plan.layout)
        save.seconds["durable_s"] = time.perf_counter() - save.begun_s
        return Manifest(
            key=uuid.uuid4().hex,
            epoch=save.moment.epoch,
            step=save.moment.step,
            time_ms=time.time_ns() // 1_000_000,
            metrics=save.moment.metrics,
            files=tuple(files),
            topology=self.context.facts.topology,
            versions=self.context.facts.versions,
            save={"transport": self.context.transport, **save.seconds, **_ranking(self._config)},
        )


def _ranking(config: CheckpointConfig) -> dict[str, str]:
    """What `harness checkpoints` marks the best by."""
    return {} if config.monitor is None else {"monitor": config.monitor, "mode": config.mode}


def _outcome_of(error: Exception) -> str:
    """How a save ended, for the other ranks: each of them changes its mode if the snapshot of any was torn."""
    return f"{_TORN}{error.tensor}" if isinstance(error, TornSnapshotError) else _told(error)


def _failure_of(outcome: str) -> Exception:
    if outcome == _CALLED_OFF:
        return CalledOff()
    return TornSnapshotError(outcome.removeprefix(_TORN)) if outcome.startswith(_TORN) else CheckpointError(outcome)


def _told(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return told(error, "a file of the checkpoint")
    return str(error) or type(error).__name__
