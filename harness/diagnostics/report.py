"""Report a run's checkpoints and MLflow page as text and as JSON values, without importing torch or mlflow."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from harness.checkpoint.format.commit import list_checkpoints, names_set_aside, scan_checkpoints
from harness.checkpoint.tools.retention import best_of
from harness.run.directory import read_run_record
from harness.tracking.journal.delivery_state import read_delivered

_SHOWN_METRICS = 4


def checkpoint_records(run_dir: Path) -> list[dict[str, Any]]:
    """List a run's checkpoints: name, epoch, step, bytes, metrics, MLflow model id (or None), and the following.

    ``best``: whether it is the best by the newest checkpoint's ``checkpoint.monitor``. ``damaged``: None, or why it
    cannot be used. ``on_disk``: False for a pruned checkpoint whose MLflow model remains. Damaged and pruned ones are
    last, with None or empty values for the other fields.

    Raises:
        CheckpointError: if the directory of checkpoints cannot be read.
    """
    models = read_delivered(run_dir / "outbox").models
    found = scan_checkpoints(run_dir / "checkpoints")
    save = found.good[-1][1].save if found.good else {}
    best = best_of(found.good, save["monitor"], save["mode"]) if "monitor" in save else None
    good = [
        {
            "name": name,
            "epoch": manifest.epoch,
            "step": manifest.step,
            "bytes": manifest.size_bytes,
            "metrics": dict(manifest.metrics),
            "mlflow_model_id": models.get(name),
            "best": name == best,
            "damaged": None,
            "on_disk": True,
        }
        for name, manifest in found.good
    ]
    there = {name for name, _ in [*found.good, *found.bad]}
    others = [*((name, reason, True) for name, reason in found.bad)]
    others += [(name, "", False) for name in models if name not in there]
    unknown: dict[str, Any] = {"epoch": None, "step": None, "bytes": None, "metrics": {}, "best": False}
    return good + [
        {"name": n, **unknown, "mlflow_model_id": models.get(n), "damaged": reason or None, "on_disk": on_disk}
        for n, reason, on_disk in others
    ]


def checkpoint_table(run_dir: Path) -> str:
    """Format `checkpoint_records` as a text table, with the evaluation metrics."""
    records = checkpoint_records(run_dir)
    aside = [f"{name}: set aside, as it was found damaged" for name in names_set_aside(run_dir / "checkpoints")]
    if not records:
        return "\n".join([f"no checkpoints in {run_dir}", *aside])
    metrics = sorted({name for record in records for name in record["metrics"] if name.startswith("eval/")})
    metrics = (metrics or sorted({name for record in records for name in record["metrics"]}))[:_SHOWN_METRICS]
    rows = [["epoch", "step", "bytes", *metrics, "on disk", "MLflow model"]]
    for record in records:
        model = record["mlflow_model_id"] or "not yet"
        if record["step"] is None:
            name = f"{record['name']} ({'damaged' if record['on_disk'] else 'removed'})"
            rows.append([*"---", *"-" * len(metrics), name, model])
            continue
        name = f"{record['name']} (best)" if record["best"] else record["name"]
        shown = [f"{record['metrics'][key]:.4f}" if key in record["metrics"] else "-" for key in metrics]
        rows.append([str(record["epoch"]), str(record["step"]), f"{record['bytes']:,}", *shown, name, model])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text_columns = len(rows[0]) - 2
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column < text_columns else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines += [record["damaged"] for record in records if record["damaged"] is not None]
    return "\n".join(lines + aside)


def how_to_open(run_dir: Path) -> str:
    """Return the URL or the command that opens a run's MLflow page, or what to do instead.

    Raises:
        RunDirError: if the run's record cannot be read.
    """
    record = read_run_record(run_dir)
    if "run_id" not in record and (run_dir / "outbox" / "settings.json").exists():
        return f"not in MLflow yet; deliver it with:  harness sync {shlex.quote(str(run_dir))}"
    if "run_id" not in record:
        return f"no MLflow run (tracking.enabled is false); all is in {run_dir}"
    uri = record["tracking_uri"]
    if uri.startswith(("http://", "https://")):
        return f"MLflow: {uri}/#/experiments/{record['experiment_id']}/runs/{record['run_id']}"
    return f"open the MLflow page with:  {_mlflow_command()} ui --backend-store-uri {shlex.quote(uri)}"


def _mlflow_command() -> str:
    """Return the shell command for this environment's `mlflow`: its path, unless the shell finds the same one."""
    ours = Path(sys.executable).with_name("mlflow")
    found = shutil.which("mlflow")
    return "mlflow" if found is not None and Path(found).resolve() == ours.resolve() else shlex.quote(str(ours))


def what_there_is(run_dir: Path, *, goes_on_with: Path | None) -> str:
    """Return one line on a run's checkpoints and its MLflow run, read from the run's directory.

    Args:
        run_dir: the run's directory.
        goes_on_with: the run directory for ``--resume``, which the line then names; None if training is complete.
    """
    names = [name for name, _ in list_checkpoints(run_dir / "checkpoints")]
    at = f" in {run_dir / 'checkpoints'}, the newest is {names[-1]}" if names else ""
    parts = [f"{len(names) or 'no'} checkpoint{'' if len(names) == 1 else 's'}{at}"]
    record = read_run_record(run_dir)
    if record.get("run_id") is not None:
        parts.append(f"MLflow run {record['run_id']} at {record.get('tracking_uri')}")
    if goes_on_with is not None and (names or goes_on_with.name != run_dir.name):
        parts.append(f"it goes on with `harness run --resume {goes_on_with}` and the script")
    return "; ".join(parts)
