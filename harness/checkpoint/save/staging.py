"""The host memory that a rank's part of a checkpoint is copied into, and written from by another process."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Any

import torch

from harness.errors import CheckpointError
from harness.io.standard_streams import occupy_descriptors


class StagingMemory:
    """Host memory for what one rank owns, that other processes can map by its file descriptor.

    Effects: not collective; blocks while the pages are made; leaves nothing on disk.

    Args:
        size_bytes: at least one page is taken.
        pinned: page-lock it, for copies from a CUDA device.
    """

    def __init__(self, size_bytes: int, *, pinned: bool) -> None:
        self.size_bytes = max(size_bytes, mmap.PAGESIZE)
        self.descriptor = _anonymous_file()
        os.ftruncate(self.descriptor, self.size_bytes)
        self._map = mmap.mmap(self.descriptor, self.size_bytes)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        # Every page is made now: the first save shall not pay for it.
        self.bytes.zero_()
        self._pinned = pinned
        if pinned:
            _cudart("cudaHostRegister", self.bytes.data_ptr(), self.size_bytes, 0)

    def close(self) -> None:
        """Give the memory back. Whoever has mapped it keeps it."""
        if self._pinned:
            _cudart("cudaHostUnregister", self.bytes.data_ptr())
            self._pinned = False
        os.close(self.descriptor)


def _anonymous_file() -> int:
    occupy_descriptors()  # the writer process is given this descriptor beside its own standard streams
    if hasattr(os, "memfd_create"):
        return os.memfd_create("harness-staging", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # elsewhere than on Linux
        return os.dup(file.fileno())


def _cudart(function: str, *arguments: int) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(getattr(runtime, function)(*arguments))
    if code != 0:
        raise CheckpointError(f"{function}: host memory for checkpoints cannot be page-locked (CUDA error {code})")
