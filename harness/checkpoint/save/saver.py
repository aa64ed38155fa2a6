"""The main thread's side of a checkpoint, from due to copied. `save_runner` is the background thread's side.

    look tensors up -> vote whether this rank can start -> copy what may change at once   main thread
    copy the rest -> write -> commit                                                      background thread
    wait at the fence before the next optimizer step, until all is copied                 main thread
    read the other ranks' votes after that step                                           main thread

Ranks start optimistically, before they know the other votes. If some ranks cannot start, they report so through the
commit store, and the save is aborted on all ranks.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

from accelerate import Accelerator

from harness.checkpoint.format import commit
from harness.checkpoint.save.commit_store import connect_commit_store
from harness.checkpoint.save.fence import Fence, Overlap
from harness.checkpoint.save.hooks import CheckpointHooks, RunFacts
from harness.checkpoint.save.pipeline import SavePipeline, SmallState, capture_small_state, make_pipeline, plan_saves
from harness.checkpoint.save.save_runner import Save, SaveAborted, SaveContext, SaveRunner, SaveState, TornSnapshotError
from harness.checkpoint.save.snapshot import PendingCopy, completed_copy, no_copy
from harness.checkpoint.save.transport import choose_transport, make_gatherer
from harness.checkpoint.sharding.local_shards import innermost
from harness.checkpoint.state.optimizer_record import check_step, has_own_state_dict
from harness.checkpoint.state.trainer_state import AnyWatched, Moment, check_scheduler
from harness.config.schema import CheckpointConfig
from harness.distributed.collectives import Collectives, PendingCount
from harness.distributed.topology import strategy_of
from harness.errors import CheckpointError


class Saver:
    """Saves checkpoints, at most one at a time.

    Effects: `prepare`, `check`, `save`, `resolve` and `close` are collective; main thread, between steps; they block
    as documented. One background thread and one writer process on each rank, and a hook on optimizer steps. Leaves
    ``<checkpoints_dir>/<name>/``.

    Args:
        accelerator: of the run.
        collectives: of all ranks.
        config: what to save, and what to do if a save is in flight or has failed.
        checkpoints_dir: exists on rank 0.
        facts: for the manifest.
        hooks: of the owner.

    Attributes:
        num_skipped: saves that were skipped.
        last_skip: the reason of the last skip. `status` may describe an earlier save that has ended since.
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
        transport = choose_transport(config.transport, checkpoints_dir, collectives)
        self._attempt = collectives.broadcast_from_rank_zero("name this attempt", lambda: uuid.uuid4().hex[:12])
        self._commit_store = connect_commit_store(collectives, self._attempt)
        self._gatherer = make_gatherer(transport, collectives, config.timeout_s)
        self._fence = Fence()
        self._overlap = Overlap()
        context = SaveContext(config, self._commit_store, transport, self._gatherer, facts, hooks)
        self._runner = SaveRunner(context, self._fence, accelerator.device)
        self._watched: AnyWatched | None = None
        self._pipeline: SavePipeline | None = None
        self._must_prepare = self._rank_zero_only = False
        self._steps_at_prepare = 0
        # The last save's future; the saves whose end is not recorded; the save whose fence is not passed.
        self._saving: Future[None] | None = None
        self._started: deque[tuple[Save, Future[None]]] = deque()
        self._timed: Save | None = None
        self._num_started = 0
        # The votes of all ranks on the last save, until they are read, and their result.
        self._votes: PendingCount | None = None
        self._is_accepted = True
        # How earlier saves ended.
        self._status = "no checkpoint yet"
        self._last_error: Exception | None = None
        self._last_seconds: Mapping[str, float] = {}
        self._num_failed = 0
        self._has_report = False
        self._problems: list[str] = []
        self.num_skipped = 0
        self.last_skip = ""

    @property
    def status(self) -> str:
        """The state of the last save, as text."""
        self._record_end()
        return self._status

    @property
    def num_failed(self) -> int:
        """Number of saves that failed."""
        self._record_end()
        return self._num_failed

    @property
    def last_error(self) -> Exception | None:
        """Error of the last save that ended; None if it was committed."""
        self._record_end()
        return self._last_error

    @property
    def last_seconds(self) -> Mapping[str, float]:
        """Seconds of each stage of the last save that ended, by name."""
        self._record_end()
        return self._last_seconds

    # ------------------------------------------------------------------ before training

    def check(self, watched: AnyWatched) -> None:
        """Refuse, before training and on all ranks alike, what cannot be saved.

        Raises:
            CheckpointError: if the model's sharding or the present state of the optimizer is not understood, the
                optimizer needs a closure, or the scheduler's state is not JSON.
        """
        self.wait()
        if not self._config.save_weights_only:
            for part in watched.parts:
                check_step(part.optimizer)
        self._watched = watched
        self._drop_pipeline()
        plan_saves(self._accelerator, self._collectives, self._config, watched, rank_zero_only=self._rank_zero_only)
        if not self._config.save_weights_only:
            check_scheduler(watched)

    def prepare(self) -> None:
        """Plan and allocate. Call it once the optimizer has a state, which is after the first step.

        Blocks for the allocation and for one copy, whose time later copies are compared with.

        Raises:
            CheckpointError: on all ranks, if one of them cannot allocate, or its state is not understood.
        """
        assert self._watched is not None
        self.resolve()
        self.wait()
        self._drop_pipeline()
        self._must_prepare = False
        self._pipeline = make_pipeline(
            self._accelerator, self._collectives, self._config, self._watched, rank_zero_only=self._rank_zero_only
        )
        # torch may call the hook before the steps of one optimizer and not of another.
        self._fence.expect([innermost(part.optimizer) for part in self._watched.parts if part.optimizer is not None])
        self._steps_at_prepare = self._fence.num_steps

    def save_rank_zero_only(self) -> bool:
        """Save rank 0's values from now on, because replicas may differ. Returns whether that is a change.

        Effects: not collective, but every rank calls it alike; main thread; the next save plans again.
        """
        if self._rank_zero_only or strategy_of(self._accelerator) != "ddp":
            return False
        self._rank_zero_only, self._must_prepare = True, self._pipeline is not None
        return True

    def _drop_pipeline(self) -> None:
        self._fence.drop_guard()
        self._overlap.drop_guard()
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
        self._timed = None

    # ------------------------------------------------------------------------- one save

    def save(self, moment: Moment, *, must: bool = False) -> bool:
        """Save this moment. Returns whether this rank has started; `resolve` returns whether all ranks have.

        Blocks until what may change at once is copied; the next optimizer step waits for the rest. A rank that
        cannot start at once also waits for the other ranks' votes.

        Args:
            moment: of training; the same on all ranks.
            must: do not skip the save: wait for the previous one, and for the votes. For a save after the last step.

        Raises:
            CheckpointError: on all ranks, here or from `resolve`, if the previous save failed and
                ``checkpoint.when_failed`` is stop.
        """
        has_started = self._try_save(moment, must)
        if not must or self.resolve():
            return has_started
        # Only some ranks had seen tensors change. All ranks know that now, and plan again together.
        self.num_skipped -= 1
        self._try_save(moment, must)
        return self.resolve()

    def _try_save(self, moment: Moment, must: bool) -> bool:
        begun_s = time.perf_counter()
        self.resolve()
        self._record_end()
        self._record_fence()
        if must or self._config.when_busy == "wait":
            self.wait()
        if self._pipeline is not None:
            # On every rank, busy or not: FSDP2's next forward gathers only on ranks that hold shards.
            self._pipeline.shards.reshard()
        is_busy = self._saving is not None and not self._saving.done()
        # Not while the copy runs: the lookup may have to replace the snapshot.
        is_changed = not is_busy and (
            self._pipeline is None or self._must_prepare or not self._pipeline.snapshot.look_up()
        )
        # A torn snapshot is not a fault of the disk, and the next save does not overlap.
        is_fault = self.last_error is not None and not isinstance(self.last_error, TornSnapshotError)
        has_failed = is_fault and self._config.when_failed == "stop"
        own_votes = [is_busy, is_changed, has_failed]
        self._votes = self._collectives.start_count("the checkpoint", [*own_votes, any(own_votes)])
        if not any(own_votes) and not self._waits_for_votes:
            self._start(moment, begun_s)
            return True
        num_hindered = self._read_votes()
        if self._is_accepted:
            if self._must_prepare:
                self.prepare()
            self._start(moment, begun_s)
        elif not self._waits_for_votes and num_hindered < self._collectives.world_size:
            # The other ranks have started, and wait for this rank's record.
            self._report_abort(moment, begun_s)
        return self._is_accepted

    @property
    def _waits_for_votes(self) -> bool:
        """Whether a save starts only once all ranks are known to take part.

        A gatherer's send blocks until the receiver takes part, and an optimizer's own `state_dict` may be collective.
        """
        if self._gatherer is not None:
            return True
        parts = () if self._watched is None or self._config.save_weights_only else self._watched.parts
        return any(has_own_state_dict(part.optimizer) for part in parts)

    def resolve(self) -> bool:
        """Return whether all ranks take part in the save that was started last; the same on every rank.

        Effects: collective; blocks until the other ranks have called `save`, which they have after the next step.

        Raises:
            CheckpointError: as `save`.
        """
        if self._votes is not None:
            self._read_votes()
        return self._is_accepted

    def _read_votes(self) -> int:
        """Set what follows from the votes. Returns the number of ranks that could not start at once."""
        assert self._votes is not None
        votes, self._votes = self._votes, None
        num_busy, num_changed, num_failed, num_hindered = votes.wait()
        if num_failed:
            raise CheckpointError(
                f"{self._checkpoints_dir}: a checkpoint could not be written, and checkpoint.when_failed is stop: "
                f"{self.last_error}"
            )
        self._must_prepare |= num_changed > 0
        # If all ranks have seen a change, they plan again at once. If some have, the others have started already.
        is_alike = num_changed in (0, self._collectives.world_size) or self._waits_for_votes
        self._is_accepted = not num_busy and is_alike
        if not self._is_accepted:
            self._record_end()
            self.num_skipped += 1
            reason = "the previous one is still being written" if num_busy else "tensors of some ranks have changed"
            self.last_skip = self._status = f"skipped one: {reason}"
        return num_hindered

    def _start(self, moment: Moment, begun_s: float) -> None:
        assert self._pipeline is not None and self._watched is not None
        small = SmallState()
        if not self._config.save_weights_only:
            small = capture_small_state(
                moment, self._watched, self._pipeline.shards, self._hooks, self._accelerator, self._collectives.rank
            )
        save = self._new_save(moment, small, begun_s)
        snapshot, kind = self._pipeline.snapshot, moment.name.partition("-")[0]
        copy = snapshot.begin()
        # Overlap only once torch has called the hook before a step of each optimizer.
        is_seen = self._fence.num_steps > self._steps_at_prepare and not self._fence.unseen
        is_overlapped = self._pipeline.mode.mode == "overlapped" and is_seen and self._overlap.allows(kind)
        save.seconds["overlapped"] = float(is_overlapped)
        snapshot.guard.compares_samples = not is_overlapped
        self._fence.close(snapshot.guard)
        if is_overlapped:
            save.guard, self._timed = snapshot.guard, save
        else:
            copy = completed_copy(copy)
            self._fence.open()
        self._overlap.observe(kind, snapshot.guard)
        self._status = f"writing {moment.name}"
        self._run(save, copy)
        save.seconds["blocked_s"] = time.perf_counter() - begun_s

    def _report_abort(self, moment: Moment, begun_s: float) -> None:
        """Report through the commit store, after the save in flight, that this rank takes no part in the save."""
        self._run(self._new_save(moment, SmallState(failure=SaveAborted()), begun_s), no_copy())

    def _new_save(self, moment: Moment, small: SmallState, begun_s: float) -> Save:
        assert self._pipeline is not None
        self._num_started += 1
        final = self._checkpoints_dir / moment.name
        temporary = commit.temporary_of(final, f"{self._attempt}-{self._num_started}")
        return Save(self._num_started, moment, final, temporary, self._pipeline, small, begun_s)

    def _run(self, save: Save, copy: PendingCopy) -> None:
        self._saving = self._runner.start(save, copy)
        self._started.append((save, self._saving))

    # --------------------------------------------------------------------- how it ended

    def _record_end(self) -> None:
        """Record how the saves ended that have ended since the last call."""
        while self._started and self._started[0][1].done():
            save, _ = self._started.popleft()
            if save.state is SaveState.ABORTED:
                continue
            self._status, self._last_error, self._last_seconds = save.status, save.error, save.seconds
            self._has_report = True
            if save.error is not None:
                self._num_failed += 1
                self._problems.append(save.status)
            if isinstance(save.error, TornSnapshotError):
                self._overlap.record_write(save.error.tensor)

    def _record_fence(self) -> None:
        """Record what the last save cost at the fence and what its guard has seen, once the fence is passed."""
        if not self._fence.is_passed:
            return
        if self._timed is not None:
            self._timed.seconds["fence_s"] = self._fence.waited_s
            self._timed.pipeline.mode.add(self._fence.waited_s)
            self._timed = None
        written = self._overlap.read_guard()
        if written is not None:
            self._problems.append(
                f"{written} changes outside optimizer steps, so training continues only after each checkpoint's copy "
                "(checkpoint/overlapped is 0)"
            )

    def pop_report(self) -> tuple[dict[str, float], str | None]:
        """Return the costs of the last save on this rank as metrics, and the problems since the last call.

        Each save is reported once. A failure is reported even if other saves have ended since.
        ``checkpoint/blocked_s`` is the whole wait of the training thread: in `save` and at the fence.
        """
        self._record_end()
        if not self._has_report or (self._timed is not None and not self._fence.is_passed):
            return {}, None
        self._has_report = False
        self._record_fence()
        seconds = self._last_seconds
        costs = {
            "checkpoint/blocked_s": seconds.get("blocked_s", 0.0) + seconds.get("fence_s", 0.0),
            "checkpoint/num_failed": float(self._num_failed),
            "checkpoint/overlapped": seconds.get("overlapped", 0.0),
        }
        if "durable_s" in seconds:
            costs["checkpoint/durable_s"] = seconds["durable_s"]
        problems, self._problems = self._problems, []
        return costs, "; ".join(problems) or None

    def finish_copy(self) -> None:
        """Block until the save in flight has copied everything. Call it before weights are written outside a step.

        Effects: not collective; main thread; blocks for the rest of the copy, not for the disk.
        """
        self._fence.wait()

    def wait(self) -> None:
        """Wait until the save in flight is committed or has failed.

        Raises:
            CheckpointError: on this rank, if it has not ended after ``checkpoint.timeout_s`` and a minute.
        """
        if self._saving is None:
            return
        try:
            self._saving.result(timeout=self._config.timeout_s + 60)
        except FutureTimeoutError as error:
            save, _ = self._started[0]
            raise CheckpointError(
                f"{save.final}: this checkpoint is still {save.state.value} after {self._config.timeout_s:.0f} s; look "
                "at this node's disk"
            ) from error
        self._record_end()

    def close(self) -> None:
        """Wait for the save in flight.

        Raises:
            CheckpointError: on all ranks, if the last checkpoint could not be written.
        """
        try:
            self.resolve()
            self.wait()
            self._collectives.broadcast_from_rank_zero("finish the last checkpoint", self._require_success)
        finally:
            self._fence.remove()
            self._runner.end()
            self._drop_pipeline()

    def _require_success(self) -> None:
        if self.last_error is not None:
            raise CheckpointError(
                f"{self._checkpoints_dir}: the last checkpoint could not be written: {self.last_error}"
            ) from self.last_error

    def abandon(self, timeout_s: float) -> None:
        """Give the save in flight at most `timeout_s` to finish, after a failure. Not collective."""
        deadline_s = time.monotonic() + timeout_s
        if self._saving is not None:
            # Half of the time for the other ranks' parts: these ranks may be gone.
            timer = threading.Timer(timeout_s / 2, self._commit_store.stop)
            timer.daemon = True
            timer.start()
            try:
                self._saving.result(timeout=max(0.0, deadline_s - time.monotonic()))
            except FutureTimeoutError:
                self._status = "the last checkpoint was not finished"
            timer.cancel()
        self._commit_store.stop()
        self._runner.end()
        self._fence.remove()
        if self._saving is None or self._saving.done():
            self._record_end()
            self._drop_pipeline()
