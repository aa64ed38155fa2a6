"""Record the attempts at a run in the tags ``harness.attempt.<n>.*`` and in ``attempts.json``.

Only the publisher writes them, in the order of the journal. A killed attempt has no end entry; its record is completed
when the next attempt begins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.io.durable_files import parse_record, replace_file
from harness.tracking.journal.delivery_state import DeliveryState
from harness.tracking.journal.entries import Entry
from harness.tracking.mlflow.store_protocol import Store
from harness.tracking.publisher.progress import log

FILE = "attempts.json"
_TAG = "harness.attempt."
KILLED_REASON = "the trainer ended without saying how (killed, or out of memory?)"

# Attempt number -> fact -> text.
Records = Mapping[int, Mapping[str, str]]


class AttemptRecorder:
    """Writes the records of the attempts to the store and to disk.

    Effects: the publisher's main thread; blocks on the network and on fsync; leaves ``<run_dir>/attempts.json``.
    """

    def __init__(self, run_dir: Path, store: Store, state: DeliveryState, attempt: int) -> None:
        self._run_dir = run_dir
        self._store = store
        self._state = state
        self._has_predecessor = attempt > 1
        self._records: Records | None = parse_record(run_dir / FILE, _parse)
        # The attempt whose entries are being delivered; None until its first entry, then `end` assumes the newest.
        self._number: int | None = None

    def begin(self, entry: Entry) -> None:
        """Deliver an entry of kind `attempt`: reopen the run for a new attempt, and record its facts."""
        number, delivered, known = entry.body["number"], self._state.current, self._known()
        # If the whole journal is delivered again, an earlier attempt's end may precede a known attempt.
        if number > 1 and (number not in known or delivered.ended):
            self._store.reopen()
        self._number = number
        records = dict(known)
        if number not in records:
            for earlier, record in known.items():
                if "ended" not in record:
                    end = _end("FAILED", KILLED_REASON, delivered.time_ms, delivered.step)
                    records[earlier] = {**record, **end}
            records[number] = {"started": _utc(entry.time_ms)}
        records[number] = {**records[number], **entry.body["facts"]}
        self._publish(records)

    def end(self, entry: Entry) -> None:
        """Deliver the record of an entry of kind `end`; the caller ends the run."""
        known = self._known()
        number = max(known, default=None) if self._number is None else self._number
        if number is None or number not in known:
            return
        step = entry.body.get("step", self._state.current.step)
        end = _end(entry.body["status"], entry.body["reason"], entry.time_ms, step)
        self._publish({**known, number: {**known[number], **end}})

    def _known(self) -> Records:
        """Return the records, from the run's tags if ``attempts.json`` is missing or damaged."""
        if self._records is None:
            has_begun = self._has_predecessor or self._state.current.offset > 0
            self._records = _from_tags(self._store.tags()) if has_begun else {}
        return self._records

    def _publish(self, records: Records) -> None:
        if not (tags := _changed_tags(self._known(), records)):
            return
        self._store.set_tags(tags)
        write_attempts(self._run_dir, records)
        self._records = records
        try:
            self._store.log_text(FILE, _as_text(records))
        except Exception as error:
            # Not retried: the tags have the same content, and an unreachable artifact store must not delay the end.
            log(f"{FILE} not logged: {error}")


def write_attempts(run_dir: Path, records: Records) -> None:
    """Replace ``attempts.json`` atomically. The publisher only; blocks on fsync."""
    # Private, because errors may name hosts.
    replace_file(run_dir / FILE, _as_text(records), is_private=True)


def _parse(record: dict[str, Any]) -> Records:
    return {int(number): dict(facts) for number, facts in record.items()}


def _as_text(records: Records) -> str:
    return json.dumps(records, indent=1) + "\n"


def _changed_tags(before: Records, after: Records) -> dict[str, str]:
    return {
        f"{_TAG}{number}.{name}": value
        for number, facts in after.items()
        for name, value in facts.items()
        if before.get(number, {}).get(name) != value
    }


def _from_tags(tags: Mapping[str, str]) -> Records:
    records: dict[int, dict[str, str]] = {}
    for name, value in tags.items():
        number, _, fact = name.removeprefix(_TAG).partition(".")
        if name.startswith(_TAG) and number.isdecimal() and fact:
            records.setdefault(int(number), {})[fact] = value
    return records


def _end(status: str, reason: str, time_ms: int, step: int) -> dict[str, str]:
    return {"ended": _utc(time_ms), "status": status, "step_to": str(step), "reason": reason}


def _utc(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
