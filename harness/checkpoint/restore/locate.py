"""Locate the checkpoint that a user names: by its path, a run's directory, or an address in MLflow."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from harness.checkpoint.format.commit import MANIFEST, Manifest, read_manifest, scan_checkpoints
from harness.checkpoint.format.verify import verify
from harness.errors import CheckpointError, ConfigError, DamagedError
from harness.io.child_process import child_command
from harness.io.redact import redact, without_password

_MLFLOW_SCHEMES = ("runs:/", "models:/", "mlflow-artifacts:/")
_DOWNLOAD_TIMEOUT_S = 3600.0
# Limit of the readable part of a download directory's name.
_NAME_LIMIT = 100


def longest_wait_s(*where: str | None) -> float:
    """Return how many seconds the other ranks have to wait while rank 0 locates what a user has named."""
    # A download is read again for its digests, which takes no longer than the download.
    return 2 * _DOWNLOAD_TIMEOUT_S if any(each is not None and is_in_mlflow(each) for each in where) else 0.0


def is_in_mlflow(where: str) -> bool:
    """Return whether it is an address in MLflow, not a path."""
    return where.startswith(_MLFLOW_SCHEMES)


@dataclass(frozen=True)
class FoundCheckpoints:
    """The checkpoints that a run can resume from.

    Args:
        checkpoints_dir: of the run itself. Checkpoints elsewhere are not its own, and are never changed.
        usable: committed checkpoints that training can resume from, in the order to try them.
        damaged: checkpoints of the run whose manifest is damaged, each with the reason.
        weights_only: checkpoints of the run that lack what training needs, the newest first.
    """

    checkpoints_dir: Path
    usable: Sequence[Path] = ()
    damaged: Sequence[tuple[Path, str]] = ()
    weights_only: Sequence[Path] = ()

    @property
    def is_empty(self) -> bool:
        """Whether the run has no checkpoint, so that it starts anew. The files of an unfinished save do not count."""
        return not (self.usable or self.damaged or self.weights_only)


def find_checkpoints(checkpoints_dir: Path) -> FoundCheckpoints:
    """Find the checkpoints in a directory, the newest first.

    Effects: not collective; any thread; blocks for reading every manifest; nothing on disk.

    Raises:
        CheckpointError: if a manifest cannot be read, because it may be that of the newest.
    """
    failures: list[CheckpointError] = []

    def read(checkpoint: Path) -> Manifest:
        try:
            return read_manifest(checkpoint)
        except CheckpointError as error:
            if not isinstance(error, DamagedError):
                failures.append(error)
            raise

    found = scan_checkpoints(checkpoints_dir, read)
    if failures:
        raise failures[0]
    newest_first = [(checkpoints_dir / name, manifest) for name, manifest in reversed(found.good)]
    return FoundCheckpoints(
        checkpoints_dir,
        [path for path, manifest in newest_first if manifest.can_be_resumed],
        [(checkpoints_dir / name, reason) for name, reason in found.bad],
        [path for path, manifest in newest_first if not manifest.can_be_resumed],
    )


def locate(key: str, where: str, download_dir: Path, tracking_uri: str | None) -> Sequence[Path]:
    """Return the checkpoints that a user names, in the order to try them.

    Effects: not collective, rank zero only; any thread; an address in MLflow is downloaded, and all of it
    verified, which blocks; leaves it in `download_dir`.

    Args:
        key: of the configuration, for the message.
        where: a checkpoint's directory, a run's, or an address in MLflow.
        download_dir: for what is downloaded.
        tracking_uri: of MLflow; None: as MLflow finds it.

    Raises:
        ConfigError: if there is no checkpoint there.
        CheckpointError: if what was downloaded is not what was written, or lacks what training needs.
    """
    if is_in_mlflow(where):
        return [download(key, where, download_dir, tracking_uri)]
    path = Path(where)
    if (path / MANIFEST).exists():
        return [path]
    for checkpoints_dir in (path / "checkpoints", path):
        found = find_checkpoints(checkpoints_dir)
        if found.usable:
            return found.usable
        if found.damaged:
            raise CheckpointError(found.damaged[0][1])
    raise ConfigError(key, f"there is no checkpoint in {path}; give a checkpoint's directory, or a run's")


def locate_weights(key: str, where: str, download_dir: Path, tracking_uri: str | None) -> Path:
    """Return the directory of the weights that a user names: of a checkpoint, of Hugging Face, or in MLflow.

    Effects, Args, Raises: as `locate`.
    """
    if is_in_mlflow(where):
        return _existing_download(where, download_dir, weights_only=True) or _download(
            key, where, download_dir, tracking_uri
        )
    if not Path(where).is_dir():
        raise ConfigError(key, f"{where} is no directory; give one with safetensors in it")
    return Path(where)


def download(key: str, where: str, download_dir: Path, tracking_uri: str | None) -> Path:
    """Download a checkpoint from MLflow and verify it, unless an intact download exists.

    Effects, Args, Raises: as `locate`.
    """
    if (there := _existing_download(where, download_dir)) is not None:
        return there
    path = _download(key, where, download_dir, tracking_uri)
    if not (path / MANIFEST).exists():
        raise ConfigError(key, f"{where}: is no checkpoint of this program, as it has no {MANIFEST}")
    missing = {file.name for file in read_manifest(path).files if not (path / file.name).exists()}
    if missing and not any(name.startswith("model") for name in missing):
        raise CheckpointError(
            f"{where}: has the weights alone, as MLflow's copies do unless tracking.log_resume_state is set; begin "
            "with these weights by initial_weights, or resume from a run's directory"
        )
    if problems := verify(path).problems:
        raise CheckpointError(f"{where}: what was downloaded is not what was written: {problems[0]}")
    return path


def remove_downloads(download_dir: Path) -> None:
    """Remove all downloads. Once the run has a checkpoint of its own, it resumes from that.

    Effects: not collective, rank zero only; any thread; blocks until the files are gone, as far as that is possible.
    """
    if download_dir.is_dir():
        shutil.rmtree(download_dir, ignore_errors=True)


def _target(where: str, download_dir: Path) -> Path:
    """Return the download directory of an address. It depends on the address only, so a restart finds it."""
    cleaned = re.sub(r"[^\w.-]+", "-", without_password(where))[:_NAME_LIMIT]
    return download_dir / f"{cleaned}-{xxhash.xxh3_64_hexdigest(where.encode())}"


def _existing_download(where: str, download_dir: Path, *, weights_only: bool = False) -> Path | None:
    """Return what an earlier attempt downloaded from an address, if it is intact."""
    # By the kind of address, MLflow downloads into the target directory or into a directory in it.
    for manifest in sorted(_target(where, download_dir).rglob(MANIFEST)):
        with suppress(CheckpointError):
            if not verify(manifest.parent, weights_only=weights_only).problems:
                return manifest.parent
    return None


def _download(key: str, where: str, download_dir: Path, tracking_uri: str | None) -> Path:
    # The trainer never imports mlflow.
    target = _target(where, download_dir)
    # An earlier download here is not intact.
    shutil.rmtree(target, ignore_errors=True)
    command = child_command("harness.tracking.mlflow.artifacts", str(target))
    environment = {**os.environ, **({} if tracking_uri is None else {"MLFLOW_TRACKING_URI": tracking_uri})}
    try:
        # Not in the command line, which other users see: an address may contain a password.
        done = subprocess.run(
            command, env=environment, input=where, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{where}: was not downloaded within {_DOWNLOAD_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason was given"]
        raise ConfigError(key, f"{where} cannot be downloaded: {redact(lines[-1])}")
    return Path(done.stdout.strip().splitlines()[-1])
