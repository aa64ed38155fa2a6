"""Delivering what MLflow has not had, without a trainer: what `harness sync` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness.errors import HarnessError, TrackingError
from harness.run.directory import read_run_record
from harness.run.lock import is_held
from harness.tracking.journal.delivery_state import DAMAGED_ENTRIES, Delivered, has_more, read_delivered
from harness.tracking.journal.segments import journal_end, segments
from harness.tracking.journal.settings import read_settings
from harness.tracking.publisher.launcher import LOG, read_answer, start_publisher

# The trainer's own publisher may still be at it, waiting for the store.
_LOCK_TIMEOUT_S = 60.0
# Where a file system has no locks, a trainer is taken for alive for so long after its last word.
_QUIET_S = 60.0


def deliver_rest(run_dir: Path, tracking_uri: str | None) -> str:
    """Deliver what is left in a run's outbox, in the foreground; returns a line for the user.

    A run whose trainer is at work is left running; one whose trainer has died without a word is marked FAILED.

    Effects: not collective; any host that sees the directory; blocks until all is delivered or the store has been
    away for a while; leaves what the publisher leaves.

    Args:
        run_dir: the run's directory.
        tracking_uri: where to; None: where the run was to go.

    Raises:
        TrackingError: if not everything could be delivered.
    """
    outbox_dir = run_dir / "outbox"
    settings = read_settings(outbox_dir)
    if settings is None:
        raise TrackingError(
            f"{run_dir}: was run without tracking (tracking.enabled false); there is nothing to deliver"
        )
    uri = tracking_uri or settings["tracking_uri"]
    # A password is never written down, so an address with one must be given again.
    settings["tracking_uri"] = None if uri is not None and "***" in uri else uri
    settings["lock_timeout_s"] = _LOCK_TIMEOUT_S
    settings["is_awaited"] = True
    settings["leaves_open"] = _is_at_work(run_dir)
    # The last one's settings may be an earlier attempt's: the last publisher may have been killed before it wrote any.
    settings["attempt"] = read_run_record(run_dir).get("attempt", 1)
    publisher = start_publisher(run_dir, settings)
    run_id, notes = read_answer(publisher, run_dir, settings["start_timeout_s"] + _LOCK_TIMEOUT_S)
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
    so_far = ", so far: it is being trained" if settings["leaves_open"] else ""
    if delivered.num_damaged:
        return "\n".join([*notes, damaged_line(run_dir, delivered), f"all else is in MLflow run {run_id}{so_far}"])
    return "\n".join([*notes, f"all of {run_dir} is in MLflow run {run_id}{so_far}"])


def damaged_line(run_dir: Path, delivered: Delivered) -> str:
    """What to say where entries of the journal were damaged on disk."""
    return (
        f"{run_dir}: damaged entries of the journal, not in MLflow: {delivered.num_damaged}; their bytes are in "
        f"{run_dir / 'outbox' / DAMAGED_ENTRIES}"
    )


def refused_line(run_dir: Path, delivered: Delivered) -> str:
    """What to say where the store has said no to something for good."""
    return (
        f"{run_dir}: MLflow refused {delivered.num_refused} entries for good, the first: {delivered.refused[0]}; "
        f"see {run_dir / 'outbox' / LOG}"
    )


def undelivered_line(run_dir: Path, delivered: Delivered) -> str:
    """What to say at the end of a run of which MLflow has not had everything."""
    if not delivered.files_trouble:
        return f"MLflow has not had everything yet; deliver it with `harness sync {run_dir}`"
    return (
        f"{run_dir}: metrics and the end are in MLflow, and models and other files are not, since its artifact store "
        f"takes none ({delivered.files_trouble}); once it does, deliver them with `harness sync {run_dir}`"
    )


def runs_in(runs_dir: Path) -> list[Path]:
    """The runs in a directory of runs that were tracked, the oldest name first."""
    return sorted(path.parent.parent for path in runs_dir.glob("*/outbox/settings.json"))


def is_online(run_dir: Path) -> bool:
    """Whether there is a run that was to reach MLflow from where it trained."""
    try:
        settings = read_settings(run_dir / "outbox")
    except TrackingError:
        return True  # the delivery says why it cannot be made
    return settings is not None and not settings.get("offline", False)


def has_news(run_dir: Path) -> bool:
    """Whether there is something that MLflow has not had."""
    outbox_dir = run_dir / "outbox"
    return has_more(outbox_dir, read_delivered(outbox_dir))


def deliver_all(
    run_dirs: Sequence[Path], tracking_uri: str | None, say: Callable[[str], None]
) -> Iterator[tuple[Path, HarnessError]]:
    """Deliver what is left of several runs; yields those that it did not work for, and goes on behind them."""
    for run_dir in run_dirs:
        if not has_news(run_dir):
            continue
        try:
            say(deliver_rest(run_dir, tracking_uri))
        except HarnessError as error:
            yield run_dir, error


def _is_at_work(run_dir: Path) -> bool:
    held = is_held(run_dir)
    if held is not None:
        return held
    return time.time() - segments(run_dir / "outbox")[-1].path.stat().st_mtime < _QUIET_S
