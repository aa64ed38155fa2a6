"""The attempts at a run, each with its span: what the tags ``harness.attempt.<n>.*`` and ``attempts.json`` say.

The publisher alone writes them, as it comes to each attempt's entries in the journal: in that order an
attempt whose end nobody wrote is seen as the next one begins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from harness.io.durable_files import read_record, replace_file

FILE = "attempts.json"
_TAG = "harness.attempt."
KILLED_REASON = "the trainer ended without saying how (killed, or out of memory?)"

# Attempt number -> fact -> text.
Records = Mapping[int, Mapping[str, str]]


def read_attempts(run_dir: Path) -> Records | None:
    """What is known of each attempt; None where that is not known: there is no file, or it is damaged."""
    record = read_record(run_dir / FILE)
    try:
        return None if record is None else {int(number): dict(facts) for number, facts in record.items()}
    except (TypeError, ValueError):
        return None


def write_attempts(run_dir: Path, records: Records) -> None:
    """Replace the record in one step.

    Effects: not collective, the publisher's; blocks on fsync; leaves ``<run_dir>/attempts.json``.
    """
    # Why an attempt has failed may name hosts.
    replace_file(run_dir / FILE, as_text(records), is_private=True)


def as_text(records: Records) -> str:
    """The records as the artifact has them."""
    return json.dumps(records, indent=1) + "\n"


def begun(
    records: Records, number: int, facts: Mapping[str, str], time_ms: int, last_time_ms: int, last_step: int
) -> Records:
    """The records once an attempt has begun, or has said more about itself.

    Args:
        records: as they were.
        number: of the attempt.
        facts: what it says.
        time_ms: when, in milliseconds since the epoch.
        last_time_ms: when the last thing before happened.
        last_step: the last step that the attempt before is known to have reached.
    """
    found = dict(records)
    if number not in found:
        for earlier, record in records.items():
            if "ended" not in record:
                found[earlier] = {**record, **_end("FAILED", KILLED_REASON, last_time_ms, last_step)}
        found[number] = {"started": _utc(time_ms)}
    found[number] = {**found[number], **facts}
    return found


def ended(records: Records, status: str, reason: str, time_ms: int, step: int, number: int | None = None) -> Records:
    """The records once an attempt has ended, None: the newest; as they were where that one is not known."""
    number = max(records, default=None) if number is None else number
    if number is None or number not in records:
        return records
    return {**records, number: {**records[number], **_end(status, reason, time_ms, step)}}


def changed_tags(before: Records, after: Records) -> dict[str, str]:
    """What has changed, as tags."""
    return {
        f"{_TAG}{number}.{name}": value
        for number, facts in after.items()
        for name, value in facts.items()
        if before.get(number, {}).get(name) != value
    }


def from_tags(tags: Mapping[str, str]) -> Records:
    """The records by the tags that tell of them, see `changed_tags`."""
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
