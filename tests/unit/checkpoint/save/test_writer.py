from __future__ import annotations

import errno
import itertools
import mmap
import os
import resource
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoint.save.writer import MIN_DIRECT_BYTES, PAGE_BYTES, RangeFile

SIZE = 2 * MIN_DIRECT_BYTES + 3 * PAGE_BYTES


def random_pages(size_bytes: int) -> memoryview:
    """Memory that begins at a page."""
    pages = mmap.mmap(-1, size_bytes)
    pages[:] = os.urandom(size_bytes)
    return memoryview(pages)


MEMORY = random_pages(SIZE)
# Around what matters: pages, and the least that is written directly.
PLACES = st.one_of(
    st.integers(0, SIZE),
    st.builds(lambda page, more: page * PAGE_BYTES + more, st.integers(0, SIZE // PAGE_BYTES), st.integers(-2, 2)),
    st.builds(lambda more: MIN_DIRECT_BYTES + more, st.integers(-2, 2)),
).map(lambda place: min(max(place, 0), SIZE))


def directories() -> list[str]:
    return [tempfile.gettempdir(), *(path for path in ("/dev/shm",) if os.access(path, os.W_OK))]


@pytest.mark.parametrize("directory", directories())
@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(PLACES, max_size=4), shift=st.sampled_from([0, 1, 16, PAGE_BYTES - 1]), backwards=st.booleans())
def test_file_is_the_memory_when_ranges_are_written(
    directory: str, cuts: list[int], shift: int, backwards: bool
) -> None:
    bounds = sorted({0, *cuts, SIZE})
    parts = list(itertools.pairwise(bounds))
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        path = Path(folder) / "file"
        # Neighbours, each with a part of a page that the other has a part of.
        files = [RangeFile(path), RangeFile(path)]
        for number, (start, end) in enumerate(reversed(parts) if backwards else parts):
            files[number % 2].write(MEMORY, start, end, start + shift)
        for file in files:
            file.sync()
            file.close()
        assert path.read_bytes() == b"\0" * shift + bytes(MEMORY)


def test_processor_does_not_copy_when_pages_are_whole(tmp_path: Path) -> None:
    file = RangeFile(tmp_path / "file")
    file.write(MEMORY, 10, SIZE, 10)
    file.close()
    assert (tmp_path / "file").read_bytes()[10:] == bytes(MEMORY[10:])
    if file_system_takes_direct_writes(tmp_path):
        assert file.cached_bytes == PAGE_BYTES - 10


def file_system_takes_direct_writes(directory: Path) -> bool:
    try:
        descriptor = os.open(directory / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    except OSError as error:
        assert error.errno == errno.EINVAL
        return False
    os.close(descriptor)
    return True


def test_error_is_the_systems_when_the_file_may_not_grow(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = RangeFile(tmp_path / "file")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIN_DIRECT_BYTES + 5, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            file.write(MEMORY, 0, SIZE, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.close()


def test_error_is_the_systems_when_the_directory_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RangeFile(tmp_path / "missing" / "file")
