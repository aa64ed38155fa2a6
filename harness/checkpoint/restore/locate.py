"""From what a user gives as a checkpoint to directories: a path, a run's directory, or an address in MLflow."""

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
# Of what can be read of an address in a directory's name.
_NAME_LIMIT = 100


def longest_wait_s(*where: str | None) -> float:
    """How long rank zero may be at it, where the others wait for it to locate what a user has given."""
    # What was downloaded is read again for its digests, which takes no longer.
    return 2 * _DOWNLOAD_TIMEOUT_S if any(each is not None and is_in_mlflow(each) for each in where) else 0.0


def is_in_mlflow(where: str) -> bool:
    """Whether it is an address in MLflow and not a path."""
    return where.startswith(_MLFLOW_SCHEMES)


@dataclass(frozen=True)
class Found:
    """What a run has to go on from.

    Args:
        checkpoints_dir: of the run itself; what stands elsewhere is not its own, and left as it is.
        usable: committed checkpoints that training can go on from, the one to try first first.
        damaged: its own whose manifest cannot be taken, with the reason.
        weights_alone: its own that lack what training needs, the newest first.
    """

    checkpoints_dir: Path
    usable: Sequence[Path] = ()
    damaged: Sequence[tuple[Path, str]] = ()
    weights_alone: Sequence[Path] = ()

    @property
    def is_empty(self) -> bool:
        """Whether the run has no checkpoint at all: it begins. What a save that was cut off has left is none."""
        return not (self.usable or self.damaged or self.weights_alone)


def find_checkpoints(checkpoints_dir: Path) -> Found:
    """The committed checkpoints that training can go on from, newest first, and what is wrong with others.

    Effects: not collective; any thread; blocks for reading every manifest; nothing on disk.

    Raises:
        CheckpointError: if the disk does not give a manifest: it may be that of the newest.
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
    return Found(
        checkpoints_dir,
        [path for path, manifest in newest_first if manifest.can_be_resumed],
        [(checkpoints_dir / name, reason) for name, reason in found.bad],
        [path for path, manifest in newest_first if not manifest.can_be_resumed],
    )


def locate(key: str, where: str, download_dir: Path, tracking_uri: str | None) -> Sequence[Path]:
    """The checkpoints that a user means, the one to try first first.

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
    """The directory of the weights that a user means: a checkpoint's, one as Hugging Face has it, or of MLflow's.

    Effects, Args, Raises: as `locate`.
    """
    if is_in_mlflow(where):
        return _there_already(where, download_dir, weights_only=True) or _download(
            key, where, download_dir, tracking_uri
        )
    if not Path(where).is_dir():
        raise ConfigError(key, f"{where} is no directory; give one with safetensors in it")
    return Path(where)


def download(key: str, where: str, download_dir: Path, tracking_uri: str | None) -> Path:
    """Fetch a checkpoint from MLflow into a directory of its own, unless it is there already, and verify it.

    Effects, Args, Raises: as `locate`.
    """
    if (there := _there_already(where, download_dir)) is not None:
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
    """Remove what was downloaded: once the run has a checkpoint of its own, it goes on from that.

    Effects: not collective, rank zero only; any thread; blocks until the files are gone, as far as that is possible.
    """
    if download_dir.is_dir():
        shutil.rmtree(download_dir, ignore_errors=True)


def _target(where: str, download_dir: Path) -> Path:
    """Of an address alone, and as a person reads it: a run that is started again finds what it has fetched."""
    cleaned = re.sub(r"[^\w.-]+", "-", without_password(where))[:_NAME_LIMIT]
    return download_dir / f"{cleaned}-{xxhash.xxh3_64_hexdigest(where.encode())}"


def _there_already(where: str, download_dir: Path, *, weights_only: bool = False) -> Path | None:
    """What an earlier attempt has downloaded from an address, if every byte of it is what was written."""
    # MLflow puts the files into a directory in the one that it is given, or not, by the kind of address.
    for manifest in sorted(_target(where, download_dir).rglob(MANIFEST)):
        with suppress(CheckpointError):
            if not verify(manifest.parent, weights_only=weights_only).problems:
                return manifest.parent
    return None


def _download(key: str, where: str, download_dir: Path, tracking_uri: str | None) -> Path:
    # The trainer never imports mlflow.
    target = _target(where, download_dir)
    # What is left there is not whole.
    shutil.rmtree(target, ignore_errors=True)
    command = child_command("harness.tracking.mlflow.artifacts", str(target))
    environment = {**os.environ, **({} if tracking_uri is None else {"MLFLOW_TRACKING_URI": tracking_uri})}
    try:
        # By pipe, not by command line: an address may hold a password.
        done = subprocess.run(
            command, env=environment, input=where, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{where}: was not downloaded within {_DOWNLOAD_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason was given"]
        raise ConfigError(key, f"{where} cannot be downloaded: {redact(lines[-1])}")
    return Path(done.stdout.strip().splitlines()[-1])
