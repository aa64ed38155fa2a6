"""Where a run came from: command, code, versions, machine, data. Rank zero calls it once, at the start."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from torch.utils.data import IterableDataset

from harness import random_state, slurm
from harness.memory_layout import copied_in_order
from harness.redact import is_secret_name, redact, redact_words

_PACKAGES = ("harness", "torch", "accelerate", "deepspeed", "safetensors", "mlflow")
_NUM_DIGEST_SAMPLES = 256


def tags(accelerator_facts: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """The run's tags: MLflow's own ``mlflow.*`` names where there is one, else ``harness.*``.

    Effects: runs git (a few milliseconds, 5 s at most); reads only.
    """
    entry_file, job = sys.argv[0], slurm.read_job()
    record = {
        "mlflow.source.name": entry_file,
        "mlflow.source.type": "LOCAL" if job is None else "JOB",
        "mlflow.user": _user(),
        "harness.command": shlex.join(redact_words([Path(sys.executable).name, *sys.orig_argv[1:]])),
        "harness.entry_file": entry_file,
        "harness.host": socket.gethostname(),
        "harness.python": platform.python_version(),
        **git_facts(Path.cwd()),
        **{f"harness.version.{name}": version for name, version in versions().items()},
        **{f"harness.{name}": value for name, value in accelerator_facts.items()},
    }
    if job is not None:
        record["harness.slurm_job_id"] = job.job_id
    return {**record, **flatten_params(extra)}


def attempt_facts(run_facts: Mapping[str, str]) -> dict[str, str]:
    """What is kept of each attempt at a run: the newest one's tags take the place of those before."""
    job = slurm.read_job()
    return {**run_facts, "host": socket.gethostname(), **({} if job is None else {"slurm_job_id": job.job_id})}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without an entry in passwd
        return str(os.getuid())


def versions() -> dict[str, str]:
    """Package -> installed version, for those that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_facts(directory: Path) -> dict[str, str]:
    """Commit, branch and dirtiness of the work tree at `directory`; empty where there is none."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return {}
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    branch = _git(directory, "rev-parse", "--abbrev-ref", "HEAD")
    return {
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": branch or "",
        "harness.git_dirty": str(bool(changed)).lower(),
    }


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def flatten_params(config: Any, prefix: str = "") -> dict[str, str]:
    """A nested configuration as dotted names: ``trainer.max_epochs`` -> ``20``, secrets replaced."""
    if is_dataclass(config) and not isinstance(config, type):
        config = asdict(config)
    if isinstance(config, Mapping) and config:
        flat: dict[str, str] = {}
        for key, value in config.items():
            flat |= flatten_params(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    if not prefix:
        return {}
    return {prefix: "***" if is_secret_name(prefix) else redact(str(config))}


def model_summary(model: nn.Module, wrapped: nn.Module | None = None) -> str:
    """The modules down to the third level, each with its number of parameters, as a table of text.

    Args:
        model: the user's own.
        wrapped: as it is trained, which knows how large sharded parameters are; None: it is not wrapped.
    """
    sizes = _fsdp1_sizes(model if wrapped is None else wrapped)
    rows = [("module", "class", "parameters", "trainable")]
    for name, module in model.named_modules():
        if name.count(".") < 2:
            rows.append(
                (
                    name or "(model)",
                    type(module).__name__,
                    f"{_num_elements(module.parameters(), sizes):,}",
                    f"{_num_elements((p for p in module.parameters() if p.requires_grad), sizes):,}",
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row in rows:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True))
        right = "  ".join(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))
        lines.append(f"{left}  {right}")
    return "\n".join(lines) + "\n"


def _num_elements(parameters: Iterable[nn.Parameter], sizes: Mapping[int, int]) -> int:
    # `ds_numel` is what DeepSpeed ZeRO-3 keeps the size under, once the parameter itself is empty.
    return sum(sizes.get(id(p)) or int(getattr(p, "ds_numel", p.numel())) for p in parameters)


def _fsdp1_sizes(model: nn.Module) -> dict[int, int]:
    """Of FSDP1's parameters, which are slices, and of the flat ones, which have padding: id -> whole size."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        flat = getattr(getattr(module, "_handle", None), "flat_param", None)
        if flat is not None:
            sizes[id(flat)] = sum(flat._numels)
            sizes |= {id(p): numel for p, numel in zip(flat._params or (), flat._numels, strict=False)}
    return sizes


def dataset_record(dataset: Any, context: str) -> dict[str, Any]:
    """Name, digest and size of a data set, as `Tracker.dataset` takes it.

    The digest is the data set's own attribute ``digest`` where it has one; else XXH3 over its length
    and 256 samples spread evenly over it, which tells other data from the same data but is not
    proof against a change between them.
    """
    name = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
    try:
        length = len(dataset)
    except TypeError:
        length = None
    digest = getattr(dataset, "digest", None) or _sample_digest(dataset, length, name)
    return {
        "name": str(getattr(dataset, "name", type(dataset).__qualname__)),
        "digest": str(digest)[:36],
        "source_type": "code",
        "source": f'{{"class": "{name}"}}',
        "profile": f'{{"num_rows": {"null" if length is None else length}}}',
        "context": context,
    }


def _sample_digest(dataset: Any, length: int | None, name: str) -> str:
    state = xxhash.xxh3_64(f"{name}:{length}".encode())
    if length and not isinstance(dataset, IterableDataset):
        # Reading samples draws from the random state where a data set augments: put it back after.
        before = random_state.capture(torch.device("cpu"))
        try:
            for position in range(min(length, _NUM_DIGEST_SAMPLES)):
                _update_digest(state, dataset[position * length // min(length, _NUM_DIGEST_SAMPLES)])
        except Exception:  # a data set that cannot be indexed, or not now: no reason to end a training
            state = xxhash.xxh3_64(f"{name}:{length}".encode())
        finally:
            random_state.restore(before, torch.device("cpu"))
    return state.hexdigest()


def _update_digest(state: xxhash.xxh3_64, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        state.update(copied_in_order(value.cpu()).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            state.update(str(key).encode())
            _update_digest(state, item)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for item in value:
            _update_digest(state, item)
    else:
        state.update(repr(value).encode())
