"""Collect a run's provenance on rank 0: command, code, versions, machine and data."""

from __future__ import annotations

import getpass
import importlib.metadata
import inspect
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from harness.data.memory_layout import contiguous_copy
from harness.distributed import slurm_env
from harness.io.redact import is_secret_name, redact, redact_words
from harness.metrics.values import as_text

_PACKAGES = ("harness", "torch", "accelerate", "deepspeed", "safetensors", "mlflow")
# Limits the digest of a batch, which blocks training.
_MAX_DIGEST_BYTES = 1024 * 1024


def tags(accelerator_facts: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """Return the run's tags: ``mlflow.*`` where MLflow defines a name, else ``harness.*``.

    Effects: blocks on up to three git commands, a few milliseconds, at most 5 s each.
    """
    entry_file, job = sys.argv[0], slurm_env.read_job()
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
    """Return the facts to record for each attempt, because the run's tags only describe the newest one."""
    job = slurm_env.read_job()
    return {**run_facts, "host": socket.gethostname(), **({} if job is None else {"slurm_job_id": job.job_id})}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without an entry in passwd
        return str(os.getuid())


def versions() -> dict[str, str]:
    """Return package -> version for the installed packages."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_facts(directory: Path) -> dict[str, str]:
    """Return tags with commit, branch and dirtiness of the work tree at `directory`; empty if there is none."""
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


def flatten_params(config: Any, prefix: str | None = None) -> dict[str, str]:
    """Flatten a nested configuration to dotted names, ``trainer.max_epochs`` -> ``20``, and redact secrets."""
    if is_dataclass(config) and not isinstance(config, type):
        config = asdict(config)
    if isinstance(config, Mapping) and config:
        flat: dict[str, str] = {}
        for key, value in config.items():
            flat |= flatten_params(value, as_text(key) if prefix is None else f"{prefix}.{as_text(key)}")
        return flat
    if prefix is None:
        return {}
    return {prefix: "***" if is_secret_name(prefix) else redact(as_text(config))}


def model_summary(model: nn.Module, wrapped: nn.Module | None = None) -> str:
    """Return a text table of the modules down to the third level with their numbers of parameters.

    Sizes of sharded parameters are read from `wrapped`, the prepared model, if given.
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
    # `ds_numel` is the size of a parameter that DeepSpeed ZeRO-3 has emptied.
    return sum(sizes.get(id(p)) or int(getattr(p, "ds_numel", p.numel())) for p in parameters)


def _fsdp1_sizes(model: nn.Module) -> dict[int, int]:
    """Return id -> number of elements of FSDP1's parameters without sharding, and of its flat ones without padding."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        flat = getattr(getattr(module, "_handle", None), "flat_param", None)
        if flat is not None:
            sizes[id(flat)] = sum(flat._numels)
            sizes |= {id(p): numel for p, numel in zip(flat._params or (), flat._numels, strict=False)}
    return sizes


@dataclass(frozen=True)
class BatchDigest:
    """The digest of a batch, for `dataset_record`."""

    text: str


def batch_digest(batch: Any) -> BatchDigest:
    """Digest the first MiB of a batch's tensors, arrays, numbers and strings, and of other objects' attributes.

    Effects: copies each digested tensor to the CPU, which synchronizes with its device.
    """
    state = _Digest()
    # Some tensors have no bytes. An incomplete digest must not stop training.
    with suppress(Exception):
        state.add(batch)
    return BatchDigest(state.text)


class _Digest:
    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()
        self._bytes_left = _MAX_DIGEST_BYTES

    @property
    def text(self) -> str:
        return self._state.hexdigest()

    def add(self, value: Any) -> None:
        if self._bytes_left <= 0:
            return
        if isinstance(value, torch.Tensor):
            self._add_tensor(value.detach())
        elif isinstance(value, (str, bytes, bool, int, float, complex, type(None))):
            self._add_bytes(repr(value[:_MAX_DIGEST_BYTES] if isinstance(value, (str, bytes)) else value).encode())
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.add(str(key))
                self.add(item)
        elif isinstance(value, Sequence):
            for item in value:
                self.add(item)
        elif hasattr(value, "__array_interface__"):
            self._add_tensor(torch.as_tensor(value))
        else:
            # Not `repr`, which may contain a memory address.
            self.add(type(value).__qualname__)
            self.add(getattr(value, "__dict__", None))

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        self.add(f"{tensor.dtype} {list(tensor.shape[1:])}")
        size_bytes = tensor.numel() * tensor.element_size()
        if tensor.ndim and size_bytes > self._bytes_left:
            # Slice first, so that only digested rows are copied from the device.
            tensor = tensor[: max(1, self._bytes_left * tensor.shape[0] // size_bytes)]
        data = contiguous_copy(tensor.cpu()).view(torch.uint8).numpy()
        self._add_bytes(data[: self._bytes_left].tobytes())

    def _add_bytes(self, data: bytes) -> None:
        self._state.update(data)
        # 64 is a fixed cost for each value.
        self._bytes_left -= len(data) + 64


def dataset_record(dataset: Any, context: str, batch: BatchDigest | None = None) -> dict[str, Any]:
    """Return the record of a data set in a context (``train`` or ``eval``) for `Tracker.log_dataset`. Reads no sample.

    The digest is the data set's own (`own_digest`), else it covers the class, the length and the first batch, if given.
    """
    name = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
    try:
        length = len(dataset)
    except Exception:  # an iterable data set may raise any error
        length = None
    content = "" if batch is None else batch.text
    own = own_digest(dataset)
    return {
        "name": str(_attribute(dataset, "name") or type(dataset).__qualname__),
        "digest": (xxhash.xxh3_64(f"{name}:{length}:{content}".encode()).hexdigest() if own is None else own)[:36],
        "source_type": "code",
        "source": f'{{"class": "{name}"}}',
        "profile": f'{{"num_rows": {"null" if length is None else length}}}',
        "context": context,
    }


def own_digest(dataset: Any) -> str | None:
    """Return the attribute ``digest``, or ``_fingerprint`` of a `datasets.Dataset`; None if it has neither."""
    found = _attribute(dataset, "digest") or _attribute(dataset, "_fingerprint")
    return str(found) if isinstance(found, (str, int)) else None


def _attribute(dataset: Any, name: str) -> Any:
    """Return an attribute, or None. Does not call `__getattr__`, which may open a file that a worker opens later."""
    try:
        inspect.getattr_static(dataset, name)
        return getattr(dataset, name, None)
    except Exception:
        return None
