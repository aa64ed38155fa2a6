"""Deliver the journal's entries to a tracking store, in order.

The publisher retries while the store is unreachable, as long as the trainer is alive. After the trainer has exited, it
delivers the rest, and marks the run FAILED if the journal has no end entry.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from harness.io.durable_files import open_private, replace_file
from harness.io.redact import redact, without_password
from harness.run.directory import read_run_record
from harness.tracking.journal.delivery_state import DAMAGED_ENTRIES, DeliveryState, delivered_problem
from harness.tracking.journal.entries import (
    POINTS,
    Entry,
    Kind,
    has_entries,
    list_segments,
    read_entries,
    sync_segments,
)
from harness.tracking.journal.pruning import count_lost_bytes, prune, pruned_problem
from harness.tracking.mlflow.store_protocol import PublisherSettings, Store, WantedRun, send_in_halves
from harness.tracking.publisher.artifact_worker import ArtifactWorker
from harness.tracking.publisher.attempts import KILLED_REASON, AttemptRecorder
from harness.tracking.publisher.progress import Heartbeat, log
from harness.tracking.publisher.retries import FIRST_PAUSE_S, Clock, RetryPolicy, Trainer

POLL_S = 0.2
MAX_POINTS_PER_DELIVERY = 1000
_ENDS: Final[tuple[Kind, ...]] = ("end",)


class Publisher:
    """Delivers the outbox of one run directory to one store; `notes` has messages about damaged records on disk.

    Effects: the publisher's process; `run` starts a thread, and blocks until everything is delivered; leaves
    ``run.json``, ``attempts.json`` and ``outbox/delivered.json``.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: PublisherSettings,
        store: Store,
        trainer: Trainer,
        heartbeat: Heartbeat | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.settings = settings
        self.store = store
        self._outbox_dir = run_dir / "outbox"
        self._trainer = trainer
        self._heartbeat = heartbeat or Heartbeat(self._outbox_dir)
        self._clock = clock or Clock()
        self._state = DeliveryState(self._outbox_dir)
        self._retries = RetryPolicy(store, trainer, self._heartbeat, self._clock)
        self._artifacts = ArtifactWorker(run_dir, settings, store, self._state, self._retries)
        self._attempts = AttemptRecorder(run_dir, store, self._state, settings.attempt)
        self._has_seen_trainer = False
        # Permanent refusals in the current delivery.
        self._refused: list[str] = []
        problems = (delivered_problem(self._outbox_dir), pruned_problem(self._outbox_dir))
        self.notes = [problem for problem in problems if problem is not None]
        for note in self.notes:
            log(note)

    def open_run(self) -> None:
        """Create or find the MLflow run and write its id to ``run.json``, trying for ``start_timeout_s``.

        Raises:
            Exception: the store's error, from the last try.
        """
        # After a crash between creating the run and writing its id, the next attempt finds the run by its key.
        record = read_run_record(self.run_dir)
        wanted = WantedRun(
            record["run_key"],
            self.settings.run_name,
            self.settings.experiment_name,
            record.get("run_id"),
            record.get("created_ms"),
            self.settings.parent_run,
            self.settings.experiment_id,
            self.settings.given_run_id,
        )
        deadline_s = self._clock.now_s() + self.settings.start_timeout_s
        while True:
            try:
                self.store.open_run(wanted)
                break
            except Exception as error:
                is_late = self._clock.now_s() > deadline_s
                if self._retries.is_permanent(error) or is_late or self._trainer.has_exited():
                    raise
                log(f"cannot open the run yet: {error}")
                self._clock.sleep(FIRST_PAUSE_S)
        # Read again, because the next attempt may have written its number in between.
        record = read_run_record(self.run_dir) | {
            "run_id": self.store.run_id,
            "experiment_id": self.store.experiment_id,
            "experiment_name": self.store.experiment_name or self.settings.experiment_name,
            "tracking_uri": without_password(self.settings.tracking_uri),
        }
        replace_file(self.run_dir / "run.json", json.dumps(record, indent=2) + "\n", is_private=True)

    @property
    def has_ended(self) -> bool:
        """Whether the run's end is delivered and is the journal's last entry."""
        return self._state.current.ended and self._delivered_end() is not None

    def run(self) -> bool:
        """Deliver entries until the run's end, a newer attempt's first entry, or all of them after the trainer's exit.

        Returns:
            Whether everything is delivered. If only files are missing, `Delivered.files_trouble` has the reason.
        """
        self._artifacts.start()
        try:
            if self.has_ended:
                return self._deliver_remaining_files()
            return self._deliver_journal()
        finally:
            self._artifacts.close()

    def _deliver_remaining_files(self) -> bool:
        """Deliver the files of an ended run, and the end again, because `open_run` has reopened the run."""
        are_files_delivered = self._wait_for_files()
        end = self._delivered_end()
        return end is not None and self._deliver_with_retries([end]) and are_files_delivered

    def _delivered_end(self) -> Entry | None:
        """Return the end entry that was delivered last; None if entries follow it or the journal lacks it."""
        offset = self._state.current.offset
        if has_entries(self._outbox_dir, offset):
            return None
        ends = read_entries(self._outbox_dir, kinds=_ENDS)
        return next((end for end in ends if end.end_offset == offset), None)

    def _deliver_journal(self) -> bool:
        are_files_delivered = True
        while True:
            ended = False
            for group in _grouped(self._durable_entries()):
                if group[0].kind == "attempt" and group[0].body["number"] > self.settings.attempt:
                    log(f"attempt {group[0].body['number']} has begun; its own publisher delivers the rest")
                    return False
                ended = group[-1].kind == "end"
                if ended:
                    are_files_delivered = self._wait_for_files()
                if not self._deliver_with_retries(group):
                    return False
            self._state.flush()
            if ended:
                return are_files_delivered
            if self._trainer.has_exited():
                # The trainer writes its end entry before it closes the pipe, so check for entries once more.
                if not has_entries(self._outbox_dir, self._state.current.offset):
                    are_files_delivered = self._wait_for_files()
                    return (self.settings.leaves_open or self._mark_failed()) and are_files_delivered
                continue
            self._has_seen_trainer = True
            self._heartbeat.beat()
            self._prune()
            self._clock.sleep(POLL_S)

    def _wait_for_files(self) -> bool:
        return self._artifacts.wait_until_delivered(self._state.current.offset, self._heartbeat)

    def _durable_entries(self) -> Iterator[Entry]:
        """Flush the journal, then read the undelivered entries.

        Without the flush, a crash could lose entries that the store has, and the next attempt would log them again.
        """
        offset = self._state.current.offset
        segments = list_segments(self._outbox_dir)
        if num_bytes := count_lost_bytes(self._outbox_dir, segments, offset):
            reason = f"journal: {num_bytes} bytes were removed before they were delivered"
            log(reason)
            self._state.update(refused=reason, offset=segments[0].begin)
            offset = self._state.current.offset
        end = sync_segments(segments, offset)
        return iter(()) if end == offset else read_entries(self._outbox_dir, offset, end=end)

    def _prune(self) -> None:
        try:
            if num_removed := prune(self._outbox_dir, self._state.current, self.settings.max_outbox_bytes // 2):
                log(f"removed {num_removed} delivered files of the journal")
        except OSError as error:
            log(f"the journal was not pruned: {error}")

    def _mark_failed(self) -> bool:
        # A trainer that was never seen alive, as in `harness sync`, may have died long ago.
        use_now = self._has_seen_trainer or not self._state.current.time_ms
        time_ms = time.time_ns() // 1_000_000 if use_now else self._state.current.time_ms
        body = {"status": "FAILED", "reason": KILLED_REASON}
        return self._deliver_with_retries([Entry("end", time_ms, body, self._state.current.offset)])

    def _deliver_with_retries(self, group: list[Entry]) -> bool:
        """Deliver a group of entries; False if the retries are given up and the entries remain undelivered."""
        try:
            if not self._retries.run(group[0].kind, lambda: self._deliver(group)):
                return False
        except Exception as error:
            if not self._retries.is_permanent(error):
                raise
            self._refused = [f"{group[0].kind}: {error}"]
        for reason in self._refused:
            log(f"refused for good: {reason}")
            self._state.update(refused=redact(reason))
        self._state.update(
            is_points=group[-1].kind in POINTS,
            offset=group[-1].end_offset,
            ended=group[-1].kind == "end",
            time_ms=group[-1].time_ms or self._state.current.time_ms,
            step=_last_step(self._state.current.step, group),
            num_damaged=self._state.current.num_damaged + sum(entry.kind == "damaged" for entry in group),
        )
        return True

    def _deliver(self, group: list[Entry]) -> None:
        self._heartbeat.beat()
        self._refused = []
        kind, body = group[0].kind, group[0].body
        if kind in POINTS:
            self._send(kind, [point for entry in group for point in _points_of(entry)], self.store.log_metrics)
        elif kind == "params":
            self._send(kind, list(body.items()), lambda items: self.store.log_params(dict(items)))
        elif kind == "tags":
            self._send(kind, list(body.items()), lambda items: self.store.set_tags(dict(items)))
        elif kind == "dataset":
            self.store.log_dataset(body)
        elif kind == "attempt":
            self._attempts.begin(group[0])
        elif kind == "end":
            self._deliver_end(group[0])
        elif kind == "damaged":
            self._keep_damaged(body["line"], group[0].end_offset)
        # The artifact worker delivers the other kinds, `FILES`.

    def _send(self, kind: str, items: Sequence[Any], send: Callable[[Sequence[Any]], None]) -> None:
        """Send items, whose first element is their name, and collect refusals."""

        def send_some(some: Sequence[Any]) -> None:
            self._heartbeat.beat()
            send(some)

        for item, error in send_in_halves(items, send_some, self._retries.is_permanent):
            # The rest of MLflow's message about a changed parameter shows both values, which may be secret.
            reason = str(error).partition(". ")[0] if kind == "params" else error
            self._refused.append(f"{kind}: {reason} ({item[0]})")

    def _deliver_end(self, entry: Entry) -> None:
        status = entry.body["status"]
        self.store.set_tags({"harness.end_reason": entry.body["reason"]})
        if entry.body.get("is_held"):
            # The user's process ends its own run, unless it has exited.
            self.store.set_terminated(status if self._trainer.has_exited() else None, entry.time_ms, is_user_run=True)
        else:
            self.store.set_terminated(status, entry.time_ms)
        self._attempts.end(entry)

    def _keep_damaged(self, line: bytes, end_offset: int) -> None:
        path = self._outbox_dir / DAMAGED_ENTRIES
        with suppress(OSError), open(path, "ab", opener=open_private) as stream:
            stream.write(line)
        log(f"the journal entry that ends at byte {end_offset} is damaged (checksum); its bytes are in {path}")


def _points_of(entry: Entry) -> Iterator[tuple[str, float, int, int]]:
    for key, value in entry.body["values"].items():
        yield key, value, entry.time_ms, entry.body["step"]


def _last_step(step: int, group: list[Entry]) -> int:
    for entry in group:
        if entry.kind == "attempt":
            step = int(entry.body["facts"].get("step_from", 0))
        elif entry.kind in ("metrics", "checkpoint"):
            step = max(step, entry.body.get("step", 0))
    return step


def _grouped(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Group consecutive entries of `POINTS` up to the limit of a request; other entries form their own groups."""
    group: list[Entry] = []
    num_points = 0
    for entry in entries:
        is_points = entry.kind in POINTS
        size = len(entry.body["values"]) if is_points else 0
        if group and (not is_points or num_points + size > MAX_POINTS_PER_DELIVERY):
            yield group
            group, num_points = [], 0
        if is_points:
            group.append(entry)
            num_points += size
        else:
            yield [entry]
    if group:
        yield group
