from __future__ import annotations

import mmap

import pytest
import torch

from harness.checkpoint.save.staging import StagingMemory


@pytest.mark.parametrize("size", [0, 1, 4096, 100_000])
def test_memory_is_zeros_of_at_least_the_size_when_made(size: int) -> None:
    staging = StagingMemory(size, pinned=False)
    assert staging.size_bytes == staging.bytes.numel() >= size
    assert staging.bytes.dtype == torch.uint8
    assert not staging.bytes.any()
    staging.close()


def test_memory_is_seen_by_others_when_they_map_its_descriptor() -> None:
    staging = StagingMemory(5000, pinned=False)
    with mmap.mmap(staging.descriptor, staging.size_bytes, prot=mmap.PROT_READ) as other:
        staging.bytes[4999] = 7
        assert other[4999] == 7
    staging.close()
    staging.bytes[0] = 1  # whoever has mapped it keeps it
