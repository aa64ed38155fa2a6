"""Deliver the outboxes of runs without their trainers, for `harness sync`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness.errors import HarnessError, TrackingError
from harness.run.directory import read_run_record
from harness.run.lock import is_held
from harness.tracking.journal.delivery_state import DAMAGED_ENTRIES, Delivered, has_undelivered, read_delivered
from harness.tracking.journal.entries import journal_end, list_segments
from harness.tracking.publisher.launcher import LOG, read_response, read_settings, start_publisher

# The trainer's own publisher may still be running.
_LOCK_TIMEOUT_S = 60.0
# On a file system without locks, a trainer counts as alive this long after its last journal entry.
_QUIET_S = 60.0


def deliver_rest(run_dir: Path, tracking_uri: str | None) -> str:
    """Deliver the rest of a run's outbox and return a message for the user.

    A run whose trainer is alive remains RUNNING. A run whose trainer was killed is marked FAILED. `tracking_uri` is the
    store's address; None for the run's own.

    Effects: any host with access to the directory; blocks until everything is delivered or the retries are given up.

    Raises:
        TrackingError: if not everything was delivered.
    """
    outbox_dir = run_dir / "outbox"
    settings = read_settings(outbox_dir)
    if settings is None:
        raise TrackingError(
            f"{run_dir}: was run without tracking (tracking.enabled false); there is nothing to deliver"
        )
    uri = tracking_uri or settings["tracking_uri"]
    # Passwords are never written to disk, so an address with a password must be passed again.
    settings["tracking_uri"] = None if uri is not None and "***" in uri else uri
    settings["lock_timeout_s"] = _LOCK_TIMEOUT_S
    settings["is_awaited"] = True
    settings["leaves_open"] = _is_training(run_dir)
    # If the last publisher was killed before it wrote its settings, these are from an earlier attempt.
    settings["attempt"] = read_run_record(run_dir).get("attempt", 1)
    publisher = start_publisher(run_dir, settings)
    run_id, notes = read_response(publisher, run_dir, settings["start_timeout_s"] + _LOCK_TIMEOUT_S)
    assert publisher.stdin is not None
    publisher.stdin.close()
    code = publisher.wait()
    assert publisher.stdout is not None
    publisher.stdout.close()
    delivered = read_delivered(outbox_dir)
    if code and delivered.files_trouble:
        raise TrackingError(undelivered_line(run_dir, delivered))
    if code:
        raise TrackingError(
            f"{run_dir}: {journal_end(outbox_dir) - delivered.offset} bytes of the outbox are not delivered; "
            f"see {outbox_dir / LOG}, and try again"
        )
    if delivered.refused:
        raise TrackingError(refused_line(run_dir, delivered))
    so_far = " so far; it is still training" if settings["leaves_open"] else ""
    if delivered.num_damaged:
        return "\n".join([*notes, damaged_line(run_dir, delivered), f"all else is in MLflow run {run_id}{so_far}"])
    return "\n".join([*notes, f"all of {run_dir} is in MLflow run {run_id}{so_far}"])


def damaged_line(run_dir: Path, delivered: Delivered) -> str:
    """Return the message about damaged journal entries."""
    return (
        f"{run_dir}: damaged entries of the journal, not in MLflow: {delivered.num_damaged}; their bytes are in "
        f"{run_dir / 'outbox' / DAMAGED_ENTRIES}"
    )


def refused_line(run_dir: Path, delivered: Delivered) -> str:
    """Return the message about entries that the store has refused permanently."""
    return (
        f"{run_dir}: MLflow refused {delivered.num_refused} entries for good, the first: {delivered.refused[0]}; "
        f"see {run_dir / 'outbox' / LOG}"
    )


def undelivered_line(run_dir: Path, delivered: Delivered) -> str:
    """Return the message about an incomplete delivery."""
    if not delivered.files_trouble:
        return f"MLflow does not have everything yet; deliver it with `harness sync {run_dir}`"
    return (
        f"{run_dir}: metrics and status are in MLflow, but not its models and other files, because the artifact store "
        f"is unreachable ({delivered.files_trouble}); deliver them later with `harness sync {run_dir}`"
    )


def runs_in(runs_dir: Path) -> list[Path]:
    """Return the tracked runs in a directory of runs, sorted by name."""
    return sorted(path.parent.parent for path in runs_dir.glob("*/outbox/settings.json"))


def is_online(run_dir: Path) -> bool:
    """Whether the run was tracked online."""
    try:
        settings = read_settings(run_dir / "outbox")
    except TrackingError:
        return True  # `deliver_rest` raises the error
    return settings is not None and not settings.get("offline", False)


def is_incomplete(run_dir: Path) -> bool:
    """Whether the run has entries that are not delivered."""
    outbox_dir = run_dir / "outbox"
    return has_undelivered(outbox_dir, read_delivered(outbox_dir))


def deliver_all(
    run_dirs: Sequence[Path], tracking_uri: str | None, say: Callable[[str], None]
) -> Iterator[tuple[Path, HarnessError]]:
    """Deliver several runs; yield each run whose delivery fails, with its error, and continue."""
    for run_dir in run_dirs:
        if not is_incomplete(run_dir):
            continue
        try:
            say(deliver_rest(run_dir, tracking_uri))
        except HarnessError as error:
            yield run_dir, error


def _is_training(run_dir: Path) -> bool:
    if (has_lock := is_held(run_dir)) is not None:
        return has_lock
    return time.time() - list_segments(run_dir / "outbox")[-1].path.stat().st_mtime < _QUIET_S
