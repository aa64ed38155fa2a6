"""One checkpoint from due to committed: who takes part, in which thread, and what when it fails.

every rank, main thread        look tensors up -> say whether it can -> copy what may change at once
every rank, background thread  copy the rest -> write -> say so on the board
rank zero, background thread   wait for the board -> manifest -> rename -> tell the caller and the others
every rank, main thread        the next optimizer step waits until the copy is done
every rank, main thread        after that step: read what the others have said

A rank that can begin does so before it knows what the others have said, which is nearly always the same.
Where it is not, those that could not put that on the board, and nothing is committed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from harness import random_state
from harness.agreement import Agreement
from harness.checkpoint import commit, trainer_state
from harness.checkpoint.board import Board
from harness.checkpoint.commit import FileRecord, Manifest
from harness.checkpoint.gather import Gatherer
from harness.checkpoint.plan import Plan, make_plan
from harness.checkpoint.rank_state import RankState
from harness.checkpoint.shards.held import Held, find_held, innermost
from harness.checkpoint.snapshot import CopyRest, Fence, Lower, ModeChoice, Ready, Snapshot, StagingMemory
from harness.checkpoint.trainer_state import Moment, Watched, check_scheduler, take_trainer_state
from harness.checkpoint.transport import Transport, choose
from harness.checkpoint.write import WriterProcess, file_records, sync_files, write_json
from harness.checkpoint.writer import told
from harness.config import CheckpointConfig
from harness.errors import CheckpointError
from harness.peers import connect

_NICENESS = 5
# How long rank zero may take from the last rank's record to a committed checkpoint, published included.
_COMMIT_S = 120.0
_CALLED_OFF = "called off"


@dataclass(frozen=True)
class _Engine:
    """What is made once for a structure: of the model, of the optimizer's state."""

    held: Held
    plan: Plan
    staging: StagingMemory
    snapshot: Snapshot
    writer: WriterProcess
    mode: ModeChoice


@dataclass(frozen=True)
class _Small:
    """What of a rank's state is no tensor: rank zero's trainer state, and each rank's own; or why not."""

    trainer_state: Any
    rank_state: RankState | None
    failure: Exception | None = None


class _CalledOff(Exception):
    """A save that some ranks had begun when another could not."""


@dataclass
class _Save:
    """One save on its way."""

    number: int
    moment: Moment
    final: Path
    temporary: Path
    engine: _Engine
    small: _Small
    begun_s: float
    seconds: dict[str, float] = field(default_factory=dict)


class Saver:
    """Saves when told to, at most one at a time.

    Effects: `prepare`, `check`, `save` and `close` are collective and for the main thread, between steps;
    they block as said there. One background thread and one writer process on each rank; a hook on
    optimizer steps. Leaves ``<checkpoints_dir>/<name>/``.

    Args:
        accelerator: which ranks and which strategy.
        agreement: for what the ranks decide alike.
        config: what to save, and what if busy.
        checkpoints_dir: where to; it exists on rank zero.
        topology: for the manifest.
        versions: for the manifest.
        committed: called in the background thread, on rank zero, with each committed checkpoint.
        take_rank_state: called in the main thread at each save; None: only random numbers are taken.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        agreement: Agreement,
        config: CheckpointConfig,
        checkpoints_dir: Path,
        topology: Mapping[str, str],
        versions: Mapping[str, str],
        committed: Callable[[str, Manifest], None],
        take_rank_state: Callable[[], RankState] | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._agreement = agreement
        self._config = config
        self._checkpoints_dir = checkpoints_dir
        self._topology = topology
        self._versions = versions
        self._committed = committed
        self._take_rank_state = take_rank_state or (lambda: RankState(random_state.take(accelerator.device)))
        self._rank = agreement.rank
        self._transport: Transport = choose(config.transport, checkpoints_dir, agreement)
        self._attempt = agreement.from_rank_zero("name this attempt", lambda: uuid.uuid4().hex[:12])
        store = connect() if agreement.world_size > 1 else None
        if store is None and agreement.world_size > 1:
            raise CheckpointError(
                "MASTER_ADDR and MASTER_PORT are not set, so the ranks cannot say when their part is written; start "
                "them with accelerate launch, torchrun or srun with these variables"
            )
        # accelerate's device of a single process has no index.
        device = accelerator.device
        self._cuda_index = None
        if device.type == "cuda":
            self._cuda_index = torch.cuda.current_device() if device.index is None else device.index
        self._board = Board(self._rank, agreement.world_size, store, self._attempt)
        self._gatherer: Gatherer | None = None
        if self._transport == "gather" and agreement.world_size > 1:
            self._gatherer = Gatherer(dist.new_group(backend="gloo"), self._rank, config.timeout_s)
        self._fence = Fence()
        self._dtype = None if config.dtype is None else getattr(torch, config.dtype)
        self._background = _Background()
        self._saving: Future[None] | None = None
        self._watched: Watched | None = None
        self._engine: _Engine | None = None
        # What the others have said to the last save, until it is read; and what came of it.
        self._others: Callable[[], list[int]] | None = None
        self._goes_on = True
        self._must_prepare = False
        self._number = 0
        self._steps_at_prepare = 0
        self._measured: _Save | None = None
        self.status = "no checkpoint yet"
        self.num_skipped = 0
        self.num_failed = 0
        self.last_error: Exception | None = None
        self.last_seconds: Mapping[str, float] = {}
        self._is_reported = True

    # ------------------------------------------------------------------ before training

    def check(self, watched: Watched) -> None:
        """Refuse, before training and on all ranks alike, what could not be saved.

        Raises:
            CheckpointError: if the model's sharding, or what there is of the optimizer's state, is not
                understood, or the scheduler's state is not JSON.
        """
        self._await_save()
        self._watched = watched
        self._drop_engine()
        self._plan(watched)
        if not self._config.save_weights_only:
            check_scheduler(watched)

    def prepare(self) -> None:
        """Plan, and allocate what saving needs, once the optimizer has a state: after the first step.

        Blocks for the allocation, and for one copy, by which later ones are measured.
        """
        assert self._watched is not None
        self.settle()
        self._await_save()
        self._drop_engine()
        self._must_prepare = False
        held, plan = self._plan(self._watched)
        failure: Exception | None = None
        try:
            self._engine = self._make_engine(held, plan)
        except (CheckpointError, OSError, RuntimeError, MemoryError) as error:
            failure = error
        # All or none: a rank without memory must not leave the others waiting at the first save.
        states = self._agreement.gather_numbers("the preparation of checkpoints", [failure is not None])
        failed = [rank for rank, (has_failed,) in enumerate(states) if has_failed]
        if failed:
            self._drop_engine()
            needed = f"{plan.staging_bytes[failed[0]]:,} bytes of host memory"
            raise CheckpointError(
                f"rank {failed[0]} cannot prepare to save ({needed}): {failure or 'see its own output'}; give the node "
                "more memory, more ranks, or use checkpoint.save_weights_only"
            ) from failure
        # That torch calls the hook before another optimizer's steps says nothing of this one's.
        self._fence.watched = innermost(self._watched.optimizer)
        self._steps_at_prepare = self._fence.num_steps

    def _make_engine(self, held: Held, plan: Plan) -> _Engine:
        device = self._accelerator.device
        staging = StagingMemory(plan.staging_bytes[self._rank], pinned=device.type == "cuda")
        writer = WriterProcess(staging, plan.layout, plan.ranges[self._rank], makes_files=self._rank == 0)
        try:
            snapshot = Snapshot(held, plan, staging, device)
            writer.start()
            snapshot.look_up()
            begun_s = time.perf_counter()
            snapshot.begin()(_no_matter, _no_matter)
            mode = ModeChoice(time.perf_counter() - begun_s)
        except BaseException:
            writer.close()
            staging.close()
            raise
        return _Engine(held, plan, staging, snapshot, writer, mode)

    def _plan(self, watched: Watched) -> tuple[Held, Plan]:
        """Find what this rank holds, and plan; if one rank does not understand its state, all say so."""
        held, failure = None, None
        try:
            held = find_held(
                self._accelerator,
                watched.model,
                watched.optimizer,
                weights_only=self._config.save_weights_only,
                dtype=self._dtype,
            )
        except CheckpointError as error:
            failure = error
        told = self._agreement.gather("whether the state is understood", None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for rank, text in enumerate(told):
            if text is not None:
                raise CheckpointError(f"rank {rank}: {text}")
        assert held is not None
        return held, make_plan(held, self._agreement, self._config.max_shard_size_bytes)

    def _drop_engine(self) -> None:
        if self._engine is not None:
            self._engine.writer.close()
            self._engine.staging.close()
            self._engine = None
        self._measured = None

    # ------------------------------------------------------------------------- one save

    def save(self, moment: Moment, *, must: bool = False) -> bool:
        """Take a checkpoint of this moment; whether this rank has begun it (`settle`: whether it goes on).

        Blocks until what may change at once is copied; the next optimizer step waits for the rest. Only a
        rank that cannot begin at once waits for what the others say. With `must` it waits for the save
        before, where this one would be skipped.

        Raises:
            CheckpointError: on all ranks, here or from `settle`, if the one before failed and
                ``checkpoint.when_failed`` is stop.
        """
        begun_s = time.perf_counter()
        self.settle()
        self._learn_mode()
        if must or self._config.when_busy == "wait":
            self._await_save()
        if self._engine is not None:
            # On every rank, busy or not: FSDP2's next forward gathers only on ranks that hold shards.
            self._engine.held.reshard()
        is_busy = self._saving is not None and not self._saving.done()
        # Not while it is being copied from: looking up may have to make another snapshot.
        is_changed = not is_busy and (self._engine is None or self._must_prepare or not self._engine.snapshot.look_up())
        has_failed = self.last_error is not None and self._config.when_failed == "stop"
        mine = [is_busy, is_changed, has_failed]
        self._others = self._agreement.begin_count("the checkpoint", [*mine, any(mine)])
        # What a gatherer sends, it sends to a rank that receives.
        if not any(mine) and self._gatherer is None:
            assert self._engine is not None
            self._begin(moment, self._engine, self._take_small(moment, self._engine.held), begun_s)
            return True
        num_hindered = self._read_answers()
        if self._goes_on:
            if self._must_prepare:
                self.prepare()
            assert self._engine is not None
            self._begin(moment, self._engine, self._take_small(moment, self._engine.held), begun_s)
        elif self._gatherer is None and num_hindered < self._agreement.world_size:
            # Others have begun: they learn on the board, too, that this rank has not.
            assert self._engine is not None
            self._call_off(moment, self._engine, begun_s)
        return self._goes_on

    def settle(self) -> bool:
        """Whether the save that was begun last goes on; the same on every rank.

        Effects: collective; blocks until the other ranks have called `save`, which they have where a step
        lies between.

        Raises:
            CheckpointError: as `save`.
        """
        if self._others is not None:
            self._read_answers()
        return self._goes_on

    def _read_answers(self) -> int:
        """What follows from what the ranks have said to the last save; how many could not begin at once."""
        assert self._others is not None
        others, self._others = self._others, None
        num_busy, num_changed, num_failed, num_hindered = others()
        if num_failed:
            raise CheckpointError(
                f"{self._checkpoints_dir}: a checkpoint could not be written, and checkpoint.when_failed is stop: "
                f"{self.last_error}"
            )
        self._must_prepare |= num_changed > 0
        # Where all ranks have seen a change, it is planned for at once; where some have, the others have begun.
        is_alike = num_changed in (0, self._agreement.world_size) or self._gatherer is not None
        self._goes_on = not num_busy and is_alike
        if not self._goes_on:
            self.num_skipped += 1
            what = "the one before is still being written" if num_busy else "tensors of some ranks have changed"
            self.status = f"skipped one: {what}"
        return num_hindered

    def _next_save(self, moment: Moment, engine: _Engine, small: _Small, begun_s: float) -> _Save:
        self._number += 1
        final = self._checkpoints_dir / moment.name
        temporary = commit.temporary_of(final, f"{self._attempt}-{self._number}")
        return _Save(
            number=self._number,
            moment=moment,
            final=final,
            temporary=temporary,
            engine=engine,
            small=small,
            begun_s=begun_s,
        )

    def _call_off(self, moment: Moment, engine: _Engine, begun_s: float) -> None:
        """Say, after what this rank is at, that it takes no part in a save."""
        save = self._next_save(moment, engine, _Small(None, None, _CalledOff()), begun_s)
        self._saving = self._background.submit(lambda: self._run(save, _copied_nothing))

    def _begin(self, moment: Moment, engine: _Engine, small: _Small, begun_s: float) -> None:
        save = self._next_save(moment, engine, small, begun_s)
        copy_rest = engine.snapshot.begin()
        # Overlapped only where torch has been seen to call the hook before this optimizer's steps.
        is_overlapped = engine.mode.mode == "overlapped" and self._fence.num_steps > self._steps_at_prepare
        save.seconds["overlapped"] = float(is_overlapped)
        if is_overlapped:
            self._fence.raise_()
            self._measured = save
        else:
            copy_rest = _copied(copy_rest)
        self.status = f"writing {moment.name}"
        self._saving = self._background.submit(lambda: self._run(save, copy_rest))
        save.seconds["blocked_s"] = time.perf_counter() - begun_s

    def _take_small(self, moment: Moment, held: Held) -> _Small:
        """What is no tensor, as it is now."""
        if self._config.save_weights_only:
            return _Small(None, None)
        assert self._watched is not None
        state = None
        try:
            if self._rank == 0:
                state = take_trainer_state(moment, self._watched, held.hyperparameters(), self._accelerator.scaler)
            return _Small(state, self._take_rank_state())
        except Exception as error:
            # A scheduler's state that is no longer what it was when it was checked: this rank's alone.
            return _Small(None, None, error)

    def take_report(self) -> tuple[dict[str, float], str | None]:
        """What the last save has cost this rank, as metrics, and what went wrong with it; once for each save.

        ``checkpoint/blocked_s`` is all that the trainer's thread has waited: for the call, and at the fence.
        """
        if self._is_reported or (self._measured is not None and not self._fence.is_passed):
            return {}, None
        self._is_reported = True
        self._learn_mode()
        seconds = self.last_seconds
        found = {
            "checkpoint/blocked_s": seconds["blocked_s"] + seconds.get("fence_s", 0.0),
            "checkpoint/num_failed": float(self.num_failed),
            "checkpoint/overlapped": seconds["overlapped"],
        }
        if "durable_s" in seconds:
            found["checkpoint/durable_s"] = seconds["durable_s"]
        return found, None if self.last_error is None else self.status

    def _learn_mode(self) -> None:
        """Take what the last overlapped save has cost into account, once its fence is passed."""
        if self._measured is not None and self._fence.is_passed:
            self._measured.seconds["fence_s"] = self._fence.waited_s
            self._measured.engine.mode.add(self._fence.waited_s)
            self._measured = None

    # ------------------------------------------------------------ the background thread

    def _run(self, save: _Save, copy_rest: CopyRest) -> None:
        """Never raises; a failed save leaves the checkpoints before it."""
        record: dict[str, Any]
        try:
            record = self._copy_and_write(save, copy_rest)
        except Exception as error:
            record = {"error": _told(error), "called_off": isinstance(error, _CalledOff)}
        finally:
            self._fence.lower()
        try:
            rank_state = save.small.rank_state
            record["rank_state"] = None if rank_state is None else rank_state.encoded()
            self._board.put(save.number, json.dumps(record).encode())
            if self._rank == 0:
                self._finish(save)
            elif (outcome := self._board.hear(save.number, self._remaining_s(save) + _COMMIT_S)) is not None:
                raise _CalledOff if outcome == _CALLED_OFF else CheckpointError(outcome)
            self.last_error = None
        except _CalledOff:
            self._tell(save, _CALLED_OFF)
            return
        except Exception as error:
            # Its frames would keep the snapshot and the staging memory.
            self.last_error = error.with_traceback(None)
            self.num_failed += 1
            self.status = f"{save.moment.name} FAILED: {_told(error)}"
        self._tell(save, None if self.last_error is None else _told(self.last_error))
        self.last_seconds = save.seconds
        self._is_reported = False

    def _tell(self, save: _Save, outcome: str | None) -> None:
        """Rank zero: let the others know how it ended."""
        if self._rank == 0:
            # A store that is gone went with the run.
            with suppress(RuntimeError):
                self._board.tell(save.number, outcome)

    def _copy_and_write(self, save: _Save, copy_rest: CopyRest) -> dict[str, Any]:
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
                    self._gatherer.send(engine.staging.bytes, engine.plan.staging_bytes[self._rank])
        except Exception as error:
            failure = failure or error
        if failure is not None:
            # Before anybody removes what it writes: afterwards it would make it again.
            engine.writer.give_up()
            raise failure
        digests, seconds = engine.writer.answer(self._remaining_s(save))
        save.seconds.update(seconds)
        return {"digests": digests}

    def _remaining_s(self, save: _Save) -> float:
        """Until the save is given up; a moment at least, so that what is done already is seen."""
        return max(1.0, self._config.timeout_s - (time.perf_counter() - save.begun_s))

    def _finish(self, save: _Save) -> None:
        """Rank zero: commit once every rank has written."""
        try:
            records = [json.loads(text) for text in self._board.collect(save.number, self._remaining_s(save))]
            for rank, record in enumerate(records):
                if record.get("called_off"):
                    raise _CalledOff
                if "error" in record:
                    raise CheckpointError(f"rank {rank}: {record['error']}" if rank else record["error"])
            manifest = self._manifest(save, records)
            commit.commit(save.temporary, save.final, manifest)
        except BaseException:
            commit.discard(save.temporary)
            raise
        self.status = f"{save.moment.name} written in {time.perf_counter() - save.begun_s:.1f} s"
        try:
            self._committed(save.moment.name, manifest)
        except Exception as error:
            # The checkpoint stands. The trainer's next metrics meet the same full disk, and end the run.
            self.status = f"{save.moment.name} written, but not published: {error}"

    def _manifest(self, save: _Save, records: list[dict[str, Any]]) -> Manifest:
        plan = save.engine.plan
        files: list[FileRecord] = file_records(plan, [record["digests"] for record in records])
        if plan.layout.index is not None:
            files.append(write_json(save.temporary / "model.safetensors.index.json", plan.layout.index))
        if (state := save.small.trainer_state) is not None:
            for group, names in zip(state["optimizer"]["param_groups"], save.engine.held.group_names(), strict=True):
                group["params"] = names
            state["ranks"] = [record["rank_state"] for record in records]
            files.append(write_json(save.temporary / trainer_state.FILE, state))
        sync_files(save.temporary, plan.layout)
        save.seconds["durable_s"] = time.perf_counter() - save.begun_s
        return Manifest(
            key=uuid.uuid4().hex,
            epoch=save.moment.epoch,
            step=save.moment.step,
            time_ms=time.time_ns() // 1_000_000,
            metrics=save.moment.metrics,
            files=tuple(files),
            topology=self._topology,
            versions=self._versions,
            save={"transport": self._transport, **save.seconds, **self._ranking()},
        )

    def _ranking(self) -> dict[str, str]:
        """What `harness checkpoints` marks the best by."""
        config = self._config
        return {} if config.monitor is None else {"monitor": config.monitor, "mode": config.mode}

    # -------------------------------------------------------------------------- the end

    def _await_save(self) -> None:
        if self._saving is not None:
            try:
                self._saving.result(timeout=self._config.timeout_s + 60)
            except FutureTimeoutError as error:
                raise CheckpointError(
                    f"{self._checkpoints_dir}: the checkpoint before is not done after {self._config.timeout_s:.0f} s"
                ) from error

    def wait(self) -> None:
        """Wait until the save in flight is on disk, or has failed."""
        self._await_save()

    def close(self) -> None:
        """Wait for the save in flight.

        Raises:
            CheckpointError: on all ranks, if the last checkpoint could not be written.
        """
        try:
            self.settle()
            self._await_save()
            self._agreement.from_rank_zero("finish the last checkpoint", self._require_success)
        finally:
            self._fence.close()
            self._background.end()
            self._drop_engine()

    def _require_success(self) -> None:
        if self.last_error is not None:
            raise CheckpointError(
                f"{self._checkpoints_dir}: the last checkpoint could not be written: {self.last_error}"
            ) from self.last_error

    def abandon(self, timeout_s: float) -> None:
        """After a failure: let a save in flight finish for so many seconds. Not collective."""
        deadline_s = time.monotonic() + timeout_s
        if self._saving is not None:
            # Half of it for the other ranks' part: they may be gone.
            timer = threading.Timer(timeout_s / 2, self._board.stop)
            timer.daemon = True
            timer.start()
            try:
                self._saving.result(timeout=max(0.0, deadline_s - time.monotonic()))
            except FutureTimeoutError:
                self.status = "the last checkpoint was not finished"
            timer.cancel()
        self._board.stop()
        self._background.end()
        self._fence.close()
        if self._saving is None or self._saving.done():
            self._drop_engine()


def _copied(copy_rest: CopyRest) -> CopyRest:
    """Copy now; what remains for the other thread is to fail if this did."""
    failure: list[RuntimeError] = []
    try:
        copy_rest(_no_matter, _no_matter)
    except RuntimeError as error:  # this rank's alone
        failure.append(error)

    def remains(lower: Lower, ready: Ready) -> None:
        if failure:
            raise failure[0]

    return remains


def _copied_nothing(lower: Lower, ready: Ready) -> None:
    """There is nothing to copy."""


def _no_matter(_: object) -> None:
    """Nobody waits for it."""


class _Background:
    """One thread that does not keep the process from ending; it is there already when a save begins.

    To start one takes the trainer's thread 1 to 3 ms on busy cores: it waits until the other runs.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        threading.Thread(target=self._serve, name="harness-checkpoint", daemon=True).start()

    def submit(self, run: Callable[[], None]) -> Future[None]:
        """Have it run; it must not raise."""
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


def _told(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return told(error, "a file of the checkpoint")
    return str(error) or type(error).__name__
