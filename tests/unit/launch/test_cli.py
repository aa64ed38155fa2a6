from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness import __version__
from harness.checkpoint.format.commit import FileRecord, Manifest, commit, temporary_of
from harness.checkpoint.format.ranges import Range, Ranges
from launch.cli import main

ROOT = Path(__file__).resolve().parents[3]
DIGITS = str(ROOT / "configs" / "digits.yaml")


def harness(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    final = tmp_path / "runs" / "mine" / "checkpoints" / "epoch-0001"
    files = (FileRecord("model.safetensors", 5, Ranges.of([Range(0, 5, 0, "ab" * 16)])),)
    temporary = temporary_of(final, "test")
    temporary.mkdir(parents=True)
    commit(temporary, final, Manifest("key", 1, 10, 1, {"eval/loss": 0.5}, files, {}, {}))
    path = tmp_path / "runs" / "mine"
    (path / "run.json").write_text(json.dumps({"run_name": "mine"}))
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--config", "missing.yaml"], "--config: there is no file missing.yaml"),
        (["train", "--config"], "--config: needs a YAML file"),
        (["train", "--config", DIGITS, "--trainer.max_epoch", "3"], "trainer.max_epoch"),
        (["train", "--config", DIGITS, "--checkpoint.every_n_epochs", "0"], "checkpoint.every_n_epochs: must be"),
        (["train"], "task.class_path: is missing"),
        (["launch", "--config", "missing.yaml"], "--config: there is no file missing.yaml"),
        (["launch", "--config", DIGITS, "--strategy", "hsdp", "--num_processes", "3"], "--num_processes: hsdp needs"),
        (["debug", "--config", DIGITS, "--trainr.max_epochs", "3"], "trainr.max_epochs"),
        (["checkpoints", "."], "is not the directory of a run"),
        (["sync", "nowhere"], "nowhere: is not the directory of a run"),
        (["sync", "nowhere", "--tracking_uri", "http://me:hunter2@h"], "--tracking_uri: has a password in it"),
    ],
)
def test_error_is_one_line_with_code_2_when_usage_is_wrong(tmp_path: Path, words: list[str], expected: str) -> None:
    done = harness(tmp_path, *words)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.startswith("harness: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []  # an invalid command leaves no file


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "COMMAND"),
        (["fly"], "'fly'"),
        (["checkpoints"], "RUN_DIR"),
        (["launch", "--num_processes", "many"], "--num_processes"),
        (["launch", "--strategy", "fsdp1"], "'fsdp1'"),
        (["verify"], "CHECKPOINT"),
        (["verify", "a", "b"], "b"),
        (["inspect"], "CHECKPOINT"),
        (["inspect", "a", "--jsn"], "--jsn"),
        (["export", "a"], "--output"),
        (["export", "a", "--output", "b", "--dtype", "int8"], "'int8'"),
        (["export", "a", "--output", "b", "--max_shard_size", "5 apples"], "--max_shard_size: "),
        (["verify", "nowhere"], "nowhere: is not a directory"),
        (["inspect", "nowhere"], "nowhere: is not a directory"),
        (["export", "nowhere", "--output", "b"], "nowhere: is not a directory"),
    ],
)
def test_error_names_the_word_when_it_is_wrong(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("harness: error: ")
    assert expected in line


def test_version_is_printed_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"harness {__version__}\n"


@pytest.mark.parametrize("command", ["train", "debug"])
def test_configuration_options_are_listed_when_help_is_asked(tmp_path: Path, command: str) -> None:
    done = harness(tmp_path, command, "--help")
    assert done.returncode == 0
    assert f"harness {command}" in done.stdout
    assert "--trainer.max_epochs" in done.stdout


def test_table_is_printed_when_there_are_checkpoints(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run_dir)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert "eval/loss" in header
    assert row.split() == ["1", "10", "5", "0.5000", "epoch-0001", "not", "yet"]


def test_json_is_printed_when_asked(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run_dir), "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["name"], record["step"], record["metrics"]) == ("epoch-0001", 10, {"eval/loss": 0.5})


def test_exit_code_is_1_when_a_checkpoint_is_damaged(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = run_dir / "checkpoints" / "epoch-0001" / "manifest.json"
    manifest.write_text("{")
    assert main(["checkpoints", str(run_dir)]) == 1
    assert f"{manifest}: is damaged" in capsys.readouterr().out


def test_sync_fails_when_the_run_has_no_tracking(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "outbox").mkdir()
    assert main(["sync", str(run_dir)]) == 1
    assert "was run without tracking" in capsys.readouterr().err


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    model = {"fc.weight": torch.arange(12.0).reshape(3, 4), "fc.bias": torch.zeros(3)}
    return make_checkpoint(model, {"exp_avg.fc.bias": torch.ones(3)}, num_ranks=2)


def damage(checkpoint: Path, name: str = "model.safetensors") -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[-1] ^= 1
    (checkpoint / name).write_bytes(content)


def test_exit_code_is_0_when_a_checkpoint_is_whole(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(checkpoint)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{checkpoint}: ")
    assert "every byte is what was written" in shown.out
    assert shown.err == ""


def test_damaged_file_is_named_when_a_byte_is_flipped(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(checkpoint)
    assert main(["verify", str(checkpoint)]) == 1
    head, problem = capsys.readouterr().out.splitlines()
    assert head == f"{checkpoint}: is damaged:"
    assert problem.startswith("  model.safetensors: bytes ")
    assert "written by rank" in problem


@pytest.mark.parametrize("words", [["verify"], ["inspect"], ["inspect", "--json"], ["export", "--output", "out"]])
def test_exit_code_is_1_when_a_checkpoint_was_not_committed(
    checkpoint: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "manifest.json").unlink()
    assert main([words[0], str(checkpoint), *words[1:]]) == 1
    shown = capsys.readouterr()
    assert shown.err == f"harness: error: {checkpoint}: has no manifest.json, so it is not a whole checkpoint\n"
    assert shown.out == ""


def test_tensors_are_listed_when_a_checkpoint_is_inspected(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("fc.weight", "fc.bias", "exp_avg.fc.bias"):
        assert sum(line.split()[:2] == [name, "F32"] for line in lines) == 1
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {tensor["name"]: tensor["shape"] for tensor in record["tensors"]} == {
        "fc.weight": [3, 4],
        "fc.bias": [3],
        "exp_avg.fc.bias": [3],
    }


def test_weights_are_cast_and_split_when_exported(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = ["export", str(checkpoint), "--output", str(output), "--dtype", "bfloat16", "--max_shard_size", "24B"]
    assert main(words) == 0
    files = sorted(output.glob("*.safetensors"))
    assert [path.name for path in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    written = sum(path.stat().st_size for path in files)
    assert capsys.readouterr().out == f"{written:,} bytes in {output}\n"
    loaded = load_file(files[0]) | load_file(files[1])
    assert torch.equal(loaded["fc.weight"], torch.arange(12.0).reshape(3, 4).bfloat16())


def test_export_writes_nothing_when_weights_are_damaged(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(checkpoint)
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"harness: error: {checkpoint}: is damaged: model.safetensors")
    assert not (tmp_path / "out").exists()


def test_torch_is_not_imported_when_a_checkpoint_is_read(checkpoint: Path) -> None:
    for command in ("verify", "inspect"):
        code = (
            f"import sys; from launch.cli import main; assert main([{command!r}, {str(checkpoint)!r}]) == 0; "
            "sys.exit(3 if 'torch' in sys.modules else 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
