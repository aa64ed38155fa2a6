from __future__ import annotations

import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from harness.checkpoint.format.all_ranges import pack_ranges
from harness.checkpoint.format.layout import TensorSpec
from harness.checkpoint.format.tensor_shard import ElementRange
from harness.checkpoint.save.plan import Plan, plan_of, with_all_ranges
from harness.checkpoint.save.transport import (
    CHUNK_BYTES,
    COHERENT_BETWEEN_NODES,
    Gatherer,
    View,
    choose_transport,
    decide,
    file_system_of,
    look,
)
from harness.checkpoint.save.writer import make_files
from harness.checkpoint.save.writer_client import output_files
from harness.checkpoint.sharding.shard_catalog import ShardCatalog
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError

DIRECTORY = Path("/runs/mine/checkpoints")
MOUNTS = """\
/dev/sda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
scratch /home/me/fast lustre rw 0 0
fuse /with\\040space fuse.sshfs rw 0 0
old /over ext4 rw 0 0
new /over gpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        ([View("a", True, "ext4")], "direct"),
        ([View("a", True, "nfs4")] * 4, "direct"),  # one node: one page cache
        ([View("a", True, "lustre"), View("b", True, "lustre")], "direct"),
        ([View("a", True, "gpfs"), View("b", True, "beegfs")], "direct"),
        ([View("a", True, "nfs4"), View("b", True, "nfs4")], "gather"),
        ([View("a", True, "lustre"), View("b", True, "nfs")], "gather"),
        ([View("a", True, "ext4"), View("b", True, "ext4")], "gather"),
        ([View("a", True, "unknown"), View("b", True, "unknown")], "gather"),
        ([View("a", True, "lustre"), View("b", False, "lustre")], "gather"),
        ([View("a", True, "ext4"), View("a", False, "ext4")], "gather"),  # containers
    ],
)
def test_ranks_write_themselves_when_their_writes_add_up(views: list[View], expected: str) -> None:
    assert decide("auto", views, DIRECTORY) == expected


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        ([View("a", True, "lustre"), View("b", False, "lustre")], "rank 1 does not see what rank 0 writes there"),
        ([View("a", True, "nfs"), View("b", True, "nfs")], "2 nodes share it by nfs, which may lose writes"),
    ],
)
def test_error_has_the_reason_when_direct_is_asked_for_and_wrong(views: list[View], expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        decide("direct", views, DIRECTORY)
    assert f"checkpoint.transport: `direct` cannot be used in {DIRECTORY}: {expected}" in str(caught.value)
    assert "use auto or gather" in str(caught.value)
    # A user may know better than the table; a rank cannot write what it does not see.
    if all(view.sees for view in views):
        assert "or force_direct if you know that it does not" in str(caught.value)
        assert decide("force_direct", views, DIRECTORY) == "direct"
    else:
        with pytest.raises(CheckpointError, match="`force_direct` cannot be used"):
            decide("force_direct", views, DIRECTORY)


def test_documentation_has_the_table_of_file_systems() -> None:
    text = (Path(__file__).parents[4] / "docs" / "guides" / "cluster.md").read_text()
    for kind, reason in COHERENT_BETWEEN_NODES.items():
        assert f"| `{kind}` | {reason} |" in text


def test_direct_is_kept_when_it_is_asked_for_and_right() -> None:
    assert decide("direct", [View("a", True, "lustre"), View("b", True, "lustre")], DIRECTORY) == "direct"


@pytest.mark.parametrize("asked", ["auto", "direct", "gather", "force_direct"])
def test_nothing_is_tried_when_there_is_one_process(tmp_path: Path, asked: str) -> None:
    expected = "gather" if asked == "gather" else "direct"
    assert choose_transport(asked, tmp_path / "not there", Collectives(0, 1)) == expected  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("directory", "expected"),
    [
        ("/", "ext4"),
        ("/data/runs", "ext4"),
        ("/home", "nfs4"),
        ("/home/me/runs", "nfs4"),
        ("/home/me/fast/runs", "lustre"),
        ("/home/me/faster", "nfs4"),
        ("/homes", "ext4"),
        ("/with space/runs", "fuse.sshfs"),
        ("/over/runs", "gpfs"),
    ],
)
def test_type_is_of_the_innermost_mount_when_several_hold_the_directory(directory: str, expected: str) -> None:
    assert file_system_of(Path(directory), MOUNTS) == expected


def test_type_is_of_the_target_when_the_directory_is_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "lustre").mkdir()
    (tmp_path / "nfs" / "runs").mkdir(parents=True)
    (tmp_path / "lustre" / "runs").symlink_to(tmp_path / "nfs" / "runs")
    mounts = f"a {tmp_path}/lustre lustre rw 0 0\nb {tmp_path}/nfs nfs4 rw 0 0\n"
    assert file_system_of(tmp_path / "lustre" / "runs" / "checkpoints", mounts) == "nfs4"


def test_type_is_unknown_when_no_mount_holds_the_directory(tmp_path: Path) -> None:
    assert file_system_of(tmp_path, "") == "unknown"


def test_type_is_of_the_kernels_own_table_when_none_is_given() -> None:
    assert file_system_of(Path("/proc/self")) == "proc"


def test_probe_is_seen_when_rank_zero_has_written_it(tmp_path: Path) -> None:
    probe = tmp_path / ".probe-abc"
    probe.write_text(probe.name)
    view = look(probe)
    assert view.sees
    assert view.node == look(probe).node != ""
    assert view.file_system == file_system_of(tmp_path)


@pytest.mark.parametrize("content", [None, "", ".probe-of another"])
def test_probe_is_not_seen_when_it_is_not_what_rank_zero_wrote(tmp_path: Path, content: str | None) -> None:
    probe = tmp_path / "runs" / ".probe-abc"
    if content is not None:
        probe.parent.mkdir()
        probe.write_text(content)
    assert not look(probe).sees


@pytest.fixture
def groups() -> Iterator[list[dist.ProcessGroup]]:
    """Two real gloo endpoints in two threads."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        made = [
            threads.submit(dist.ProcessGroupGloo, store, rank, 2, timedelta(seconds=30))  # type: ignore[attr-defined]
            for rank in range(2)
        ]
        yield [group.result(timeout=60) for group in made]


def plans_for(sizes: list[int]) -> tuple[Plan, Plan]:
    """Rank zero's and rank one's, of tensors of bytes: even ones are on rank zero, odd ones on rank one."""
    specs = [TensorSpec("model", f"t{number:03}", "U8", (size,)) for number, size in enumerate(sizes)]
    catalogs = [
        ShardCatalog.of(
            0, [(ElementRange(0, 0, size),) if number % 2 == rank else () for number, size in enumerate(sizes)]
        )
        for rank in range(2)
    ]
    first, second = (plan_of(specs, {}, catalogs, rank, None) for rank in range(2))
    return with_all_ranges(first, [pack_ranges(plan.staging_bytes, plan.ranges) for plan in (first, second)]), second


def memory_for(plan: Plan) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (plan.staging_bytes,), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    "sizes",
    [
        [3, 5],
        [3, 0],  # rank one has nothing
        [7, 100, 1, 200, 3, 300],
        [5, CHUNK_BYTES],
        [5, CHUNK_BYTES - 3, 6, 2 * CHUNK_BYTES, 1, 11],  # chunks end inside ranges
    ],
)
def test_ranges_are_where_they_belong_when_received(
    tmp_path: Path, groups: list[dist.ProcessGroup], sizes: list[int]
) -> None:
    plan, sender = plans_for(sizes)
    memory = memory_for(sender)
    make_files(tmp_path, output_files(plan.layout, with_headers=True))
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(Gatherer(groups[1], 1, 30.0).send, memory, sender.staging_bytes)
        Gatherer(groups[0], 0, 30.0).receive(plan, tmp_path)
        sending.result(timeout=30)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert len(content) == plan.layout.size_bytes
    expected = bytearray(plan.layout.files[0].header.ljust(len(content), b"\0"))
    for _, offset, staging, size in sender.ranges:
        expected[offset : offset + size] = memory[staging : staging + size].numpy().tobytes()
    assert content == expected  # and nothing where rank zero's writer writes


def test_sender_is_let_go_when_the_disk_of_rank_zero_is_full(tmp_path: Path, groups: list[dist.ProcessGroup]) -> None:
    plan, sender = plans_for([1, 4 * CHUNK_BYTES])
    make_files(tmp_path, output_files(plan.layout, with_headers=True))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(Gatherer(groups[1], 1, 30.0).send, memory_for(sender), sender.staging_bytes)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK_BYTES // 2, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                Gatherer(groups[0], 0, 30.0).receive(plan, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sending.result(timeout=30)


def test_error_names_the_rank_when_it_does_not_send(tmp_path: Path, groups: list[dist.ProcessGroup]) -> None:
    plan, _ = plans_for([1, 10])
    make_files(tmp_path, output_files(plan.layout, with_headers=True))
    with pytest.raises(CheckpointError, match="waited for rank 1 to send its part of the checkpoint"):
        Gatherer(groups[0], 0, 0.1).receive(plan, tmp_path)


def test_error_names_rank_zero_when_it_does_not_take(groups: list[dist.ProcessGroup]) -> None:
    with pytest.raises(CheckpointError, match="waited for rank 0 to receive a part of the checkpoint"):
        Gatherer(groups[1], 1, 0.1).send(torch.zeros(10, dtype=torch.uint8), 10)
