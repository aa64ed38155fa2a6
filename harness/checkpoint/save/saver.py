"""One checkpoint from due to committed: who takes part, in which thread, and what when it fails.

look tensors up -> say whether it can -> copy what may change at once     here, in the main thread
copy the rest -> write -> commit                                          beside training: save_runner
the next optimizer step waits until the copy is done
after that step: read what the others have said                           here

A rank that can begin does so before it knows what the others have said, which is nearly always the same.
Where it is not, those that could not put that on the board, and nothing is committed.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator

from harness.checkpoint.format import commit
from harness.checkpoint.save.commit_store import CommitStore
from harness.checkpoint.save.fence import Fence, Overlap
from harness.checkpoint.save.gather import Gatherer
from harness.checkpoint.save.hooks import CheckpointHooks, RunFacts
from harness.checkpoint.save.pipeline import SavePipeline, make_engine, plan_saves
from harness.checkpoint.save.save_runner import (
    CalledOff,
    Save,
    SaveContext,
    SaveRunner,
    SmallState,
    TornSnapshotError,
)
from harness.checkpoint.save.snapshot import copied, copy_nothing
from harness.checkpoint.save.transport import choose
from harness.checkpoint.sharding.local_shards import LocalShards, innermost
from harness.checkpoint.state.kept_tensors import KeptTensors
from harness.checkpoint.state.optimizer_record import (
    added_state,
    check_step,
    groups_record,
    has_own_state_dict,
    record_of,
)
from harness.checkpoint.state.trainer_state import AnyWatched, Moment, capture_trainer_state, check_scheduler
from harness.config.schema import CheckpointConfig
from harness.distributed.collectives import Collectives, PendingCount
from harness.distributed.failure_monitor import connect_to_store
from harness.distributed.strategies import strategy_of
from harness.errors import CheckpointError


class Saver:
    """Saves when told to, at most one at a time.

    Effects: `prepare`, `check`, `save` and `close` are collective and for the main thread, between steps;
    they block as said there. One background thread and one writer process on each rank; a hook on
    optimizer steps. Leaves ``<checkpoints_dir>/<name>/``.

    Args:
        accelerator: which ranks and which strategy.
        collectives: for what the ranks decide alike.
        config: what to save, and what if busy.
        checkpoints_dir: where to; it exists on rank zero.
        facts: of the run, for the manifest.
        hooks: of the owner.

    Attributes:
        num_skipped: saves that were skipped.
        last_skip: why the last of them was; `status` may tell of an earlier save that has ended since.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        collectives: Collectives,
        config: CheckpointConfig,
        checkpoints_dir: Path,
        facts: RunFacts,
        hooks: CheckpointHooks,
    ) -> None:
        self._accelerator = accelerator
        self._collectives = collectives
        self._config = config
        self._checkpoints_dir = checkpoints_dir
        self._hooks = hooks
        self._rank = collectives.rank
        transport = choose(config.transport, checkpoints_dir, collectives)
        self._attempt = collectives.broadcast_from_rank_zero("name this attempt", lambda: uuid.uuid4().hex[:12])
        store = connect_to_store() if collectives.world_size > 1 else None
        if store is None and collectives.world_size > 1:
            raise CheckpointError(
                "MASTER_ADDR and MASTER_PORT are not set, so the ranks cannot say when their part is written; start "
                "them with accelerate launch, torchrun or srun with these variables"
            )
        self._board = CommitStore(self._rank, collectives.world_size, store, self._attempt)
        self._gatherer: Gatherer | None = None
        if transport == "gather" and collectives.world_size > 1:
            self._gatherer = Gatherer(dist.new_group(backend="gloo"), self._rank, config.timeout_s)
        self._fence = Fence()
        self._overlap = Overlap()
        self._notes: list[str] = []
        shared = SaveContext(config, self._board, transport, self._gatherer, facts, hooks)
        self._runner = SaveRunner(shared, self._fence, accelerator.device)
        self._saving: Future[None] | None = None
        self._watched: AnyWatched | None = None
        self._engine: SavePipeline | None = None
        # What the others have said to the last save, until it is read; and what came of it.
        self._others: PendingCount | None = None
        self._goes_on = True
        self._must_prepare = self._is_rank_zeros = False
        self._number = 0
        self._steps_at_prepare = 0
        self._measured: Save | None = None
        self.num_skipped = 0
        self.last_skip = ""

    @property
    def status(self) -> str:
        """How the last save went, for a person."""
        return self._runner.status

    @property
    def num_failed(self) -> int:
        """Saves that failed."""
        return self._runner.num_failed

    @property
    def last_error(self) -> Exception | None:
        """Of the last save that has ended; None: it succeeded."""
        return self._runner.last_error

    @property
    def last_seconds(self) -> Mapping[str, float]:
        """What the last save has cost."""
        return self._runner.last_seconds

    # ------------------------------------------------------------------ before training

    def check(self, watched: AnyWatched) -> None:
        """Refuse, before training and on all ranks alike, what could not be saved.

        Raises:
            CheckpointError: if the model's sharding, or what there is of the optimizer's state, is not
                understood, the optimizer needs a closure, or the scheduler's state is not JSON.
        """
        self._await_save()
        if not self._config.save_weights_only:
            for part in watched.parts:
                check_step(part.optimizer)
        self._watched = watched
        self._drop_engine()
        plan_saves(self._accelerator, self._collectives, self._config, watched, is_rank_zeros=self._is_rank_zeros)
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
        self._engine = make_engine(
            self._accelerator, self._collectives, self._config, self._watched, is_rank_zeros=self._is_rank_zeros
        )
        # That torch calls the hook before one optimizer's steps says nothing of another's.
        self._fence.expect([innermost(part.optimizer) for part in self._watched.parts if part.optimizer is not None])
        self._steps_at_prepare = self._fence.num_steps

    def ranks_differ(self) -> bool:
        """From now on ranks that held the same may hold different values; whether checkpoints were not rank zero's yet.

        Effects: not collective, but every rank calls it alike; main thread; the next save plans anew.
        """
        if self._is_rank_zeros or strategy_of(self._accelerator) != "ddp":
            return False
        self._is_rank_zeros, self._must_prepare = True, self._engine is not None
        return True

    def _drop_engine(self) -> None:
        self._fence.disarm()
        self._overlap.forget()
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._measured = None

    # ------------------------------------------------------------------------- one save

    def save(self, moment: Moment, *, must: bool = False) -> bool:
        """Take a checkpoint of this moment; whether this rank has begun it (`settle`: whether it goes on).

        Blocks until what may change at once is copied; the next optimizer step waits for the rest. Only a
        rank that cannot begin at once waits for what the others say. With `must`, the same on all ranks, all of
        them do, it is not skipped, and it waits for the save before: for what comes after the last step.

        Raises:
            CheckpointError: on all ranks, here or from `settle`, if the one before failed and
                ``checkpoint.when_failed`` is stop.
        """
        has_begun = self._try(moment, must)
        if not must or self.settle():
            return has_begun
        # Some ranks alone had seen tensors change. All know that now, and prepare for it alike.
        self.num_skipped -= 1
        self._try(moment, must)
        return self.settle()

    def _try(self, moment: Moment, must: bool) -> bool:
        """Begin, or not; whether this rank has."""
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
        # A torn snapshot is no fault of the disk, and the next save does not overlap.
        is_fault = self.last_error is not None and not isinstance(self.last_error, TornSnapshotError)
        has_failed = is_fault and self._config.when_failed == "stop"
        mine = [is_busy, is_changed, has_failed]
        self._others = self._collectives.start_count("the checkpoint", [*mine, any(mine)])
        if not any(mine) and not self._waits_for_all:
            assert self._engine is not None
            self._begin(moment, self._engine, self._take_small(moment, self._engine.held), begun_s)
            return True
        num_hindered = self._read_answers()
        if self._goes_on:
            if self._must_prepare:
                self.prepare()
            assert self._engine is not None
            self._begin(moment, self._engine, self._take_small(moment, self._engine.held), begun_s)
        elif not self._waits_for_all and num_hindered < self._collectives.world_size:
            # Others have begun: they learn on the board, too, that this rank has not.
            assert self._engine is not None
            self._call_off(moment, self._engine, begun_s)
        return self._goes_on

    @property
    def _waits_for_all(self) -> bool:
        """Whether a save begins only once it is known that all ranks take part.

        What a gatherer sends, it sends to a rank that receives; and an optimizer's own `state_dict` may be collective.
        """
        if self._gatherer is not None:
            return True
        parts = () if self._watched is None or self._config.save_weights_only else self._watched.parts
        return any(has_own_state_dict(part.optimizer) for part in parts)

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
        num_busy, num_changed, num_failed, num_hindered = others.wait()
        if num_failed:
            raise CheckpointError(
                f"{self._checkpoints_dir}: a checkpoint could not be written, and checkpoint.when_failed is stop: "
                f"{self.last_error}"
            )
        self._must_prepare |= num_changed > 0
        # Where all ranks have seen a change, it is planned for at once; where some have, the others have begun.
        is_alike = num_changed in (0, self._collectives.world_size) or self._waits_for_all
        self._goes_on = not num_busy and is_alike
        if not self._goes_on:
            self.num_skipped += 1
            what = "the one before is still being written" if num_busy else "tensors of some ranks have changed"
            self.last_skip = self._runner.status = f"skipped one: {what}"
        return num_hindered

    def _next_save(self, moment: Moment, engine: SavePipeline, small: SmallState, begun_s: float) -> Save:
        self._number += 1
        final = self._checkpoints_dir / moment.name
        temporary = commit.temporary_of(final, f"{self._attempt}-{self._number}")
        return Save(
            number=self._number,
            moment=moment,
            final=final,
            temporary=temporary,
            engine=engine,
            small=small,
            begun_s=begun_s,
        )

    def _call_off(self, moment: Moment, engine: SavePipeline, begun_s: float) -> None:
        """Say, after what this rank is at, that it takes no part in a save."""
        save = self._next_save(moment, engine, SmallState(None, None, CalledOff()), begun_s)
        self._saving = self._runner.start(save, copy_nothing)

    def _begin(self, moment: Moment, engine: SavePipeline, small: SmallState, begun_s: float) -> None:
        save = self._next_save(moment, engine, small, begun_s)
        copy_rest = engine.snapshot.begin()
        guard, kind = engine.snapshot.guard, moment.name.partition("-")[0]
        # Overlapped only once torch has called the hook before a step of each optimizer.
        is_seen = self._fence.num_steps > self._steps_at_prepare and not self._fence.unseen
        is_overlapped = engine.mode.mode == "overlapped" and is_seen and self._overlap.allows(kind)
        save.seconds["overlapped"] = float(is_overlapped)
        guard.compares_samples = not is_overlapped
        self._fence.raise_(guard)
        if is_overlapped:
            save.guard, self._measured = guard, save
        else:
            copy_rest = copied(copy_rest)
            self._fence.lower()
        self._overlap.observe(kind, guard)
        self._runner.status = f"writing {moment.name}"
        self._saving = self._runner.start(save, copy_rest)
        save.seconds["blocked_s"] = time.perf_counter() - begun_s

    def _take_small(self, moment: Moment, held: LocalShards) -> SmallState:
        """What is no tensor, as it is now."""
        if self._config.save_weights_only:
            return SmallState(None, None)
        assert self._watched is not None
        state, kept = None, KeptTensors()
        try:
            # On every rank that takes part, which are all where an optimizer has a state_dict() of its own.
            added = [added_state(part.optimizer) for part in self._watched.parts]
            if self._rank == 0:
                groups = groups_record(held, kept)
                optimizers = [
                    record_of(part.optimizer, each, kept) for part, each in zip(self._watched.parts, added, strict=True)
                ]
                scaler = self._accelerator.scaler
                state = capture_trainer_state(moment, self._watched, groups, optimizers, scaler, kept)
            return SmallState(state, self._hooks.capture_rank_state(), tensors=kept.tensors)
        except Exception as error:
            # A scheduler's state that is no longer what it was when it was checked: this rank's alone.
            return SmallState(None, None, error)

    def take_report(self) -> tuple[dict[str, float], str | None]:
        """What the last save has cost this rank, as metrics, and what went wrong since the last call.

        Each save is told of once, and a failure also where other saves have ended since.

        ``checkpoint/blocked_s`` is all that the trainer's thread has waited: for the call, and at the fence.
        """
        if self._runner.is_reported or (self._measured is not None and not self._fence.is_passed):
            return {}, None
        self._runner.is_reported = True
        self._learn_mode()
        seconds = self.last_seconds
        found = {
            "checkpoint/blocked_s": seconds["blocked_s"] + seconds.get("fence_s", 0.0),
            "checkpoint/num_failed": float(self.num_failed),
            "checkpoint/overlapped": seconds["overlapped"],
        }
        if "durable_s" in seconds:
            found["checkpoint/durable_s"] = seconds["durable_s"]
        failures = [self._runner.failures.popleft() for _ in range(len(self._runner.failures))]
        notes, self._notes = self._notes, []
        return found, "; ".join([*failures, *notes]) or None

    def _learn_mode(self) -> None:
        """Take what the last save has cost, and what its guard has seen, into account, once its fence is passed."""
        torn = self._overlap.note_write(self._runner.written)
        if not self._fence.is_passed:
            return
        if self._measured is not None:
            self._measured.seconds["fence_s"] = self._fence.waited_s
            self._measured.engine.mode.add(self._fence.waited_s)
            self._measured = None
        seen = self._overlap.learn()
        if seen is not None and torn is None:
            self._notes.append(
                f"{seen} changes outside optimizer steps, so training continues only after each checkpoint's copy "
                "(checkpoint/overlapped is 0)"
            )

    def finish_copy(self) -> None:
        """Block until the save in flight has copied everything: what follows may write weights outside a step.

        Effects: not collective; main thread; blocks for the rest of the copy, not for the disk.
        """
        self._fence.pass_()

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
            self._collectives.broadcast_from_rank_zero("finish the last checkpoint", self._require_success)
        finally:
            self._fence.close()
            self._runner.end()
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
                self._runner.status = "the last checkpoint was not finished"
            timer.cancel()
        self._board.stop()
        self._runner.end()
        self._fence.close()
        if self._saving is None or self._saving.done():
            self._drop_engine()
