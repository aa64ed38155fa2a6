"""Implement `harness debug`: print the model and the first batches, then train a few batches in one process."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from harness.config.parsing import config_files, config_files_first, parse_run_config
from harness.errors import EXIT_DONE, LaunchError

# Placed between the configuration files and the command line, so that the command line has precedence.
DEBUG_OPTIONS = (
    *("--trainer.max_epochs", "1"),
    *("--trainer.limit_train_batches", "3"),
    *("--trainer.limit_eval_batches", "2"),
    *("--trainer.detect_anomaly", "true"),
    *("--trainer.progress_bar", "false"),
    *("--checkpoint.every_n_epochs", "null"),
    *("--checkpoint.save_last", "false"),
    *("--tracking.enabled", "false"),
    *("--tracking.log_every_n_steps", "1"),
)


def debug(words: Sequence[str]) -> int:
    """Print the model and the first batches, then train a few batches in this process.

    Breakpoints in the task work, because standard input is the terminal and there is no progress bar.

    Raises:
        HarnessError: if a launcher started this process, or the configuration is wrong.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LaunchError("harness debug runs in one process; start it without a launcher")
    ordered = config_files_first(words)
    num_file_words = 2 * len(config_files(ordered))
    temporary = tempfile.mkdtemp(prefix="harness-debug-")
    try:
        options = [*ordered[:num_file_words], "--run_dir", temporary, *DEBUG_OPTIONS, *ordered[num_file_words:]]
        config = parse_run_config(options, prog="harness debug")
        from harness.__main__ import report_error
        from harness.config.instantiate import build_task

        try:
            _show(build_task(config.task))
            from harness.training.app import train

            train(config)
        except (Exception, KeyboardInterrupt) as error:
            if not isinstance(error, KeyboardInterrupt):
                import traceback

                traceback.print_exc()
            return report_error(error)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return EXIT_DONE


def _show(task: Any) -> None:
    from harness.tracking.provenance import model_summary

    out = sys.stdout
    out.write(model_summary(task.model()))
    for name, loader in (("training", task.train_data()), ("evaluation", task.eval_data())):
        if loader is not None:
            out.write(f"first {name} batch: {describe(next(iter(loader)))}\n")
    out.flush()


def describe(value: Any) -> str:
    """Return types, shapes and value ranges of the tensors in a batch."""
    import torch

    if isinstance(value, torch.Tensor):
        spread = f" {value.min().item():.4g}..{value.max().item():.4g}" if value.numel() else ""
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{spread}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return "[" + ", ".join(describe(item) for item in value) + "]"
    return type(value).__name__
