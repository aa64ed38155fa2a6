"""The publisher: delivers the outbox to a tracking store, entry after entry.

Where the store is away it tries again, with growing pauses, as long as the trainer lives. Once the trainer
is gone, what is in the outbox is delivered if the store lets it, and an attempt whose end nobody wrote is
marked FAILED. `harness.tracking.publisher.process` is the process that this runs in.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from harness.io.durable_files import open_private, replace_file
from harness.io.redact import redact, without_password
from harness.run.directory import read_run_record
from harness.tracking.journal import delivery_state, pruning
from harness.tracking.journal.entries import POINTS, Entry, Kind, has_entries, read_entries
from harness.tracking.journal.heartbeat import Heartbeat
from harness.tracking.journal.segments import durable_end, segments
from harness.tracking.mlflow.halving import send_in_halves
from harness.tracking.mlflow.store_protocol import PublisherSettings, Store, WantedRun
from harness.tracking.publisher import attempts
from harness.tracking.publisher.artifact_worker import ArtifactWorker
from harness.tracking.publisher.retries import FIRST_PAUSE_S, Retries

POLL_S = 0.2
MAX_POINTS_PER_DELIVERY = 1000
_ENDS: Final[tuple[Kind, ...]] = ("end",)


class Publisher:
    """Delivers one run directory's outbox to one store.

    Args:
        run_dir: the run's directory.
        settings: see `PublisherSettings`.
        store: where to.
        is_permanent: whether an error of the store means no for good.
        trainer_is_gone: asked between deliveries.
        sleep: how to pause, in seconds.
        clock: seconds that never go back.
        heartbeat: the sign of life; None: one that this makes.

    Attributes:
        notes: lines for the user, on records on disk that are damaged.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: PublisherSettings,
        store: Store,
        is_permanent: Callable[[Exception], bool],
        trainer_is_gone: Callable[[], bool],
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.settings = settings
        self.store = store
        self._outbox_dir = run_dir / "outbox"
        self._is_permanent = is_permanent
        self._trainer_is_gone = trainer_is_gone
        self._sleep = sleep
        self._clock = clock
        self._beat = (heartbeat or Heartbeat(self._outbox_dir)).beat
        self._acknowledged = delivery_state.DeliveryState(self._outbox_dir)
        self._retries = Retries(is_permanent, trainer_is_gone, self._told, sleep, clock)
        self._models = ArtifactWorker(run_dir, settings, store, self._acknowledged, self._retries, log)
        self._attempts: attempts.Records | None = attempts.read_attempts(run_dir)
        # Of the entries that are delivered now; None: not known yet, and the newest is meant.
        self._attempt: int | None = None
        self._has_seen_trainer = False
        # Of the entries that are being delivered: what the store refuses for good, and why.
        self._refused: list[str] = []
        found = (delivery_state.problem_of(self._outbox_dir), pruning.problem_of(self._outbox_dir))
        self.notes = [problem for problem in found if problem is not None]
        for note in self.notes:
            log(note)

    def open_run(self) -> None:
        """Make or find the MLflow run and put its id on disk, trying for ``start_timeout_s``.

        Raises:
            Exception: the store's own, from the last try.
        """
        # The directory's name and a number drawn once name this run for good: after a crash between
        # making the run and writing its id, the next attempt finds it instead of making a second.
        record = read_run_record(self.run_dir)
        deadline_s = self._clock() + self.settings.start_timeout_s
        while True:
            try:
                self.store.open_run(
                    WantedRun(
                        record["run_key"],
                        self.settings.run_name,
                        self.settings.experiment_name,
                        record.get("run_id"),
                        record.get("created_ms"),
                        self.settings.parent_run,
                        self.settings.experiment_id,
                        self.settings.given_run_id,
                    )
                )
                break
            except Exception as error:
                if self._is_permanent(error) or self._clock() > deadline_s or self._trainer_is_gone():
                    raise
                log(f"cannot open the run yet: {error}")
                self._sleep(FIRST_PAUSE_S)
        # Read again: the next attempt may have written its number meanwhile.
        record = read_run_record(self.run_dir) | {
            "run_id": self.store.run_id,
            "experiment_id": self.store.experiment_id,
            "experiment_name": self.store.experiment_name or self.settings.experiment_name,
            "tracking_uri": without_password(self.settings.tracking_uri),
        }
        replace_file(self.run_dir / "run.json", json.dumps(record, indent=2) + "\n", is_private=True)

    @property
    def has_ended(self) -> bool:
        """Whether the run's end is delivered, and nothing of the journal is behind it."""
        return self._acknowledged.now.ended and self._delivered_end() is not None

    def run(self) -> bool:
        """Deliver until the run's end is delivered, at the latest when the trainer is gone.

        Returns:
            Whether all is delivered. The end may be though files are not: then `Delivered.files_trouble` says why.
        """
        self._models.start()
        try:
            if self.has_ended:
                return self._run_for_files()
            return self._run()
        finally:
            self._models.close()

    def _told(self, what: str, error: Exception) -> None:
        log(f"cannot deliver yet: {what}: {error}")
        self.store.failed(error)
        self._beat()

    def _run_for_files(self) -> bool:
        """The end is delivered, and files were left out: deliver them, and the end once more, as the run was opened."""
        are_there = self._models.wait_until_passed(self._acknowledged.now.offset, self._beat)
        end = self._delivered_end()
        return end is not None and self._deliver_with_retries([end]) and are_there

    def _delivered_end(self) -> Entry | None:
        """The end that was delivered last; None: there are entries behind it, or none is in the journal."""
        offset = self._acknowledged.now.offset
        if has_entries(self._outbox_dir, offset):
            return None
        ends = read_entries(self._outbox_dir, kinds=_ENDS)
        return next((end for end in ends if end.end_offset == offset), None)

    def _run(self) -> bool:
        are_files_there = True
        while True:
            ended = False
            for group in _grouped(self._durable_entries()):
                if group[0].kind == "attempt" and group[0].body["number"] > self.settings.attempt:
                    log(f"attempt {group[0].body['number']} has begun; the rest is its own publisher's")
                    return False
                ended = group[-1].kind == "end"
                if ended:
                    # An end says that all is there, but for files that the store does not take.
                    are_files_there = self._models.wait_until_passed(self._acknowledged.now.offset, self._beat)
                if not self._deliver_with_retries(group):
                    return False
            self._acknowledged.write()
            if ended:
                return are_files_there
            if self._trainer_is_gone():
                # The end is written before standard input closes; look once more before concluding.
                if not has_entries(self._outbox_dir, self._acknowledged.now.offset):
                    are_files_there = self._models.wait_until_passed(self._acknowledged.now.offset, self._beat)
                    has_ended = self.settings.leaves_open or self._mark_failed(attempts.KILLED_REASON)
                    return has_ended and are_files_there
                continue
            self._has_seen_trainer = True
            self._beat()
            self._prune()
            self._sleep(POLL_S)

    def _durable_entries(self) -> Iterator[Entry]:
        """What is to be delivered, once the disk itself has it.

        So what the store has is in the journal, and known to an attempt that repeats it, whatever crashes.
        """
        offset = self._acknowledged.now.offset
        if num_bytes := pruning.num_lost(self._outbox_dir, offset):
            reason = f"journal: {num_bytes} bytes were removed before they were delivered"
            log(reason)
            self._acknowledged.update(refused=reason, offset=segments(self._outbox_dir)[0].begin)
            offset = self._acknowledged.now.offset
        return read_entries(self._outbox_dir, offset, end=durable_end(self._outbox_dir, offset))

    def _prune(self) -> None:
        try:
            if num_gone := pruning.prune(self._outbox_dir, self._acknowledged.now, self.settings.max_outbox_bytes // 2):
                log(f"removed {num_gone} files of the journal that are delivered")
        except OSError as error:
            log(f"the journal was not pruned: {error}")

    def _mark_failed(self, reason: str) -> bool:
        # One that was never seen alive, as by `harness sync`, has been dead for any time.
        was_there = self._has_seen_trainer or not self._acknowledged.now.time_ms
        time_ms = time.time_ns() // 1_000_000 if was_there else self._acknowledged.now.time_ms
        body = {"status": "FAILED", "reason": reason}
        return self._deliver_with_retries([Entry("end", time_ms, body, self._acknowledged.now.offset)])

    def _deliver_with_retries(self, group: list[Entry]) -> bool:
        """Deliver entries as one, trying until it works; False if given up, with nothing forgotten."""
        try:
            if not self._retries.until_done(group[0].kind, lambda: self._deliver(group)):
                return False
        except Exception as error:
            if not self._retries.is_permanent(error):
                raise
            self._refused = [f"{group[0].kind}: {error}"]
        for reason in self._refused:
            log(f"refused for good: {reason}")
            self._acknowledged.update(refused=redact(reason))
        self._acknowledge(group)
        return True

    def _deliver(self, group: list[Entry]) -> None:
        self._beat()
        self._refused = []
        kind, body = group[0].kind, group[0].body
        if kind in POINTS:
            self._send(kind, [point for entry in group for point in _points(entry)], self.store.log_metrics)
        elif kind == "params":
            self._send(kind, list(body.items()), lambda items: self.store.log_params(dict(items)))
        elif kind == "tags":
            self._send(kind, list(body.items()), lambda items: self.store.set_tags(dict(items)))
        elif kind == "dataset":
            self.store.log_dataset(body)
        elif kind == "attempt":
            self._deliver_attempt(group[0])
        elif kind == "end":
            self._deliver_end(group[0])
        elif kind == "damaged":
            self._set_aside(body["line"], group[0].end_offset)
        # Texts, checkpoints and their retirements: the other lane's.

    def _send(self, kind: str, items: Sequence[Any], send: Callable[[Sequence[Any]], None]) -> None:
        """Send items that begin with their names, without those that the store refuses for good."""

        def refuse(item: Any, error: Exception) -> None:
            # A parameter that has another value in the run already: the rest of the message shows both values.
            reason = str(error).partition(". ")[0] if kind == "params" else error
            self._refused.append(f"{kind}: {reason} ({item[0]})")

        def send_some(some: Sequence[Any]) -> None:
            self._beat()
            send(some)

        send_in_halves(items, send_some, self._is_permanent, refuse)

    def _acknowledge(self, group: list[Entry]) -> None:
        self._acknowledged.update(
            is_points=group[-1].kind in POINTS,
            offset=group[-1].end_offset,
            ended=group[-1].kind == "end",
            time_ms=group[-1].time_ms or self._acknowledged.now.time_ms,
            step=_last_step(self._acknowledged.now.step, group),
            num_damaged=self._acknowledged.now.num_damaged + sum(entry.kind == "damaged" for entry in group),
        )

    def _deliver_attempt(self, entry: Entry) -> None:
        number, delivered, known = entry.body["number"], self._acknowledged.now, self._known_attempts()
        # Where all is delivered again, an end may have come before one that is known.
        if number > 1 and (number not in known or delivered.ended):
            self.store.reopen()
        self._attempt = number
        self._put_attempts(
            attempts.begun(known, number, entry.body["facts"], entry.time_ms, delivered.time_ms, delivered.step)
        )

    def _deliver_end(self, entry: Entry) -> None:
        status, reason = entry.body["status"], entry.body["reason"]
        self.store.set_tags({"harness.end_reason": reason})
        if entry.body.get("is_held"):
            self.store.end(status if self._trainer_is_gone() else None, entry.time_ms, is_users=True)
        else:
            self.store.end(status, entry.time_ms)
        step = entry.body.get("step", self._acknowledged.now.step)
        records = self._known_attempts()
        self._put_attempts(attempts.ended(records, status, reason, entry.time_ms, step, self._attempt))

    def _set_aside(self, line: bytes, end_offset: int) -> None:
        """Keep a damaged entry's bytes."""
        path = self._outbox_dir / delivery_state.DAMAGED_ENTRIES
        with suppress(OSError), open(path, "ab", opener=open_private) as stream:
            stream.write(line)
        log(f"the journal's entry that ends at byte {end_offset} is damaged (checksum); kept in {path}")

    def _known_attempts(self) -> attempts.Records:
        """The records; by the run's tags where they are not on disk and something was delivered before."""
        if self._attempts is None:
            has_begun = self.settings.attempt > 1 or self._acknowledged.now.offset > 0
            self._attempts = attempts.from_tags(self.store.tags()) if has_begun else {}
        return self._attempts

    def _put_attempts(self, records: attempts.Records) -> None:
        if not (tags := attempts.changed_tags(self._known_attempts(), records)):
            return
        self.store.set_tags(tags)
        attempts.write_attempts(self.run_dir, records)
        self._attempts = records
        try:
            self.store.log_text(attempts.FILE, attempts.as_text(records))
        except Exception as error:
            # The tags say the same: an artifact store that is away must not hold up the run's end.
            log(f"{attempts.FILE} not logged: {error}")


def log(message: str) -> None:
    """One line for ``outbox/publisher.log``."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    # On a full disk there is no log, and all else goes on.
    with suppress(OSError):
        sys.stderr.write(f"{stamp} {redact(' '.join(message.split()))}\n")
        sys.stderr.flush()


def _points(entry: Entry) -> Iterator[tuple[str, float, int, int]]:
    for key, value in entry.body["values"].items():
        yield key, value, entry.time_ms, entry.body["step"]


def _last_step(step: int, group: list[Entry]) -> int:
    """How far the running attempt is known to have come, after these entries."""
    for entry in group:
        if entry.kind == "attempt":
            step = int(entry.body["facts"].get("step_from", 0))
        elif entry.kind in ("metrics", "checkpoint"):
            step = max(step, entry.body.get("step", 0))
    return step


def _grouped(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Metrics that follow each other as one group, up to a request's limit; all else alone."""
    group: list[Entry] = []
    num_points = 0
    for entry in entries:
        is_metrics = entry.kind in POINTS
        size = len(entry.body["values"]) if is_metrics else 0
        if group and (not is_metrics or num_points + size > MAX_POINTS_PER_DELIVERY):
            yield group
            group, num_points = [], 0
        if is_metrics:
            group.append(entry)
            num_points += size
        else:
            yield [entry]
    if group:
        yield group
