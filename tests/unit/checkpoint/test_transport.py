from __future__ import annotations

from pathlib import Path

import pytest

from harness.checkpoint.save.transport import COHERENT_BETWEEN_NODES, View, choose, decide, file_system_of, look
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
        ([View("a", True, "nfs"), View("b", True, "nfs")], "2 nodes share it by nfs, which does not promise"),
    ],
)
def test_error_has_the_reason_when_direct_is_asked_for_and_wrong(views: list[View], expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        decide("direct", views, DIRECTORY)
    assert f"checkpoint.transport: `direct` cannot be used in {DIRECTORY}: {expected}" in str(caught.value)
    assert "use auto or gather" in str(caught.value)
    # Whoever knows better than the table says so; what is not there cannot be written by anybody.
    if all(view.sees for view in views):
        assert "or force_direct where you know that it does" in str(caught.value)
        assert decide("force_direct", views, DIRECTORY) == "direct"
    else:
        with pytest.raises(CheckpointError, match="`force_direct` cannot be used"):
            decide("force_direct", views, DIRECTORY)


def test_documentation_has_the_table_of_file_systems() -> None:
    text = (Path(__file__).parents[3] / "docs" / "guides" / "cluster.md").read_text()
    for kind, reason in COHERENT_BETWEEN_NODES.items():
        assert f"| `{kind}` | {reason} |" in text


def test_direct_is_kept_when_it_is_asked_for_and_right() -> None:
    assert decide("direct", [View("a", True, "lustre"), View("b", True, "lustre")], DIRECTORY) == "direct"


@pytest.mark.parametrize("asked", ["auto", "direct", "gather", "force_direct"])
def test_nothing_is_tried_when_there_is_one_process(tmp_path: Path, asked: str) -> None:
    expected = "gather" if asked == "gather" else "direct"
    assert choose(asked, tmp_path / "not there", Collectives(0, 1)) == expected  # type: ignore[arg-type]
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
