from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harness.config.parsing import check_yaml, config_files, config_files_first, parse_run_config
from harness.config.schema import ClassSpec, RunConfig
from harness.errors import ConfigError

YAML = """\
seed: 5
task:
  class_path: my.Task
  init_args: {width: 8, depth: 2}
"""

words = st.one_of(
    st.sampled_from(["--seed", "3", "--trainer.max_epochs=2", "--configs", "x", "-c", ""]),
    st.text(max_size=8).filter(lambda word: word != "--config" and not word.startswith("--config=")),
)
file_names = st.text(min_size=1, max_size=8).filter(lambda name: not name.startswith("--config"))
options = st.one_of(
    words.map(lambda word: ("word", word)),
    file_names.map(lambda name: ("pair", name)),
    file_names.map(lambda name: ("equals", name)),
)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    return path


def parse(path: Path, content: str, *argv: str) -> RunConfig:
    path.write_text(content)
    return parse_run_config(["--config", str(path), *argv])


def error_of(path: Path, content: str, *argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(path, content, *argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------- the order of words


@given(st.lists(options, max_size=12))
def test_files_precede_options_when_reordered(given_options: list[tuple[str, str]]) -> None:
    argv: list[str] = []
    for kind, text in given_options:
        argv += {"word": [text], "pair": ["--config", text], "equals": [f"--config={text}"]}[kind]
    files = [text for kind, text in given_options if kind != "word"]
    rest = tuple(text for kind, text in given_options if kind == "word")

    ordered = config_files_first(argv)

    assert ordered[2 * len(files) :] == rest
    assert ordered[: 2 * len(files)] == tuple(word for name in files for word in ("--config", name))
    assert config_files(ordered) == tuple(Path(name) for name in files)
    assert config_files_first(ordered) == ordered


def test_error_when_config_option_has_no_value() -> None:
    with pytest.raises(ConfigError, match="--config: needs a YAML file"):
        config_files_first(["--seed", "1", "--config"])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("with_equals", [True, False])
@pytest.mark.parametrize(
    "override", [["--seed", "9", "--task.init_args.width", "3"], ["--seed=9", "--task.init_args.width=3"]]
)
def test_option_overrides_the_file_when_before_or_after_it(
    config_file: Path, before: bool, with_equals: bool, override: list[str]
) -> None:
    file = [f"--config={config_file}"] if with_equals else ["--config", str(config_file)]
    config = parse_run_config([*override, *file] if before else [*file, *override])
    assert config.seed == 9
    assert config.task == ClassSpec("my.Task", {"width": 3, "depth": 2})


def test_later_file_overrides_when_config_is_repeated(tmp_path: Path, config_file: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("seed: 6\n")
    config = parse_run_config(["--config", str(config_file), "--config", str(second)])
    assert config.seed == 6
    assert config.task.class_path == "my.Task"


# ------------------------------------------------------------------------- classes


def test_init_args_are_added_when_the_file_lacks_them(config_file: Path) -> None:
    config = parse_run_config(["--config", str(config_file), "--task.init_args.dropout", "0.5"])
    assert config.task.init_args == {"width": 8, "depth": 2, "dropout": 0.5}


def test_optimizer_is_adamw_when_none_is_configured(config_file: Path) -> None:
    config = parse_run_config(["--config", str(config_file)])
    assert config.optimizer == ClassSpec("torch.optim.AdamW", {"lr": 1e-3})
    assert config.scheduler is None


def test_default_lr_stays_when_another_argument_is_set(config_file: Path) -> None:
    config = parse_run_config(["--config", str(config_file), "--optimizer.init_args.weight_decay", "0.1"])
    assert config.optimizer.init_args == {"lr": 1e-3, "weight_decay": 0.1}


def test_default_lr_is_dropped_when_the_class_changes(config_file: Path) -> None:
    config = parse_run_config(["--config", str(config_file), "--optimizer.class_path", "torch.optim.SGD"])
    assert config.optimizer == ClassSpec("torch.optim.SGD", {})


@pytest.mark.parametrize("form", ["--optimizer.class_path {}", "--optimizer.class_path={}"])
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("torch.optim.AdamW", {"lr": 1e-3, "eps": 1}),
        ("torch.optim.Adam", {"eps": 1}),
        ("torch.optim.SGD", {"lr": 0.5, "momentum": 0.9, "eps": 1}),
    ],
)
def test_file_init_args_are_dropped_when_the_class_changes(
    tmp_path: Path, form: str, typed: str, expected: dict[str, object]
) -> None:
    content = YAML + "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5, momentum: 0.9}}\n"
    argv = [*form.format(typed).split(), "--optimizer.init_args.eps", "1"]
    assert parse(tmp_path / "c.yaml", content, *argv).optimizer == ClassSpec(typed, expected)


def test_scheduler_is_configured_when_only_options_name_it(config_file: Path) -> None:
    argv = ["--scheduler.class_path", "a.B", "--scheduler.init_args.T_max", "5", "--config", str(config_file)]
    assert parse_run_config(argv).scheduler == ClassSpec("a.B", {"T_max": 5})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["--reset_scheduler"], True),
        (["--reset_scheduler", "--seed", "3"], True),
        (["--reset_scheduler", "false"], False),
        (["--reset_scheduler=true"], True),
    ],
)
def test_scheduler_is_reset_when_the_switch_is_set(config_file: Path, words: list[str], expected: bool) -> None:
    assert parse_run_config(["--config", str(config_file), *words]).reset_scheduler is expected
    assert parse(config_file, f"{YAML}reset_scheduler: true\n", *words).reset_scheduler is (expected or not words)


def test_error_when_init_args_have_no_class(tmp_path: Path) -> None:
    message = error_of(tmp_path / "c.yaml", YAML + "scheduler: {init_args: {T_max: 5}}\n")
    assert message.startswith("scheduler.class_path: is missing, but scheduler.init_args is given")


def test_error_names_the_task_when_there_is_none(tmp_path: Path) -> None:
    assert error_of(tmp_path / "c.yaml", "seed: 5\n").startswith("task.class_path: is missing")


@pytest.mark.parametrize("key", ["task", "optimizer"])
def test_error_names_the_key_when_a_class_is_a_bare_string(tmp_path: Path, key: str) -> None:
    content = yaml.safe_dump({**yaml.safe_load(YAML), key: "my.Thing"})
    assert error_of(tmp_path / "c.yaml", content).startswith(f"{key}: must hold class_path and init_args")


# ------------------------------------------------------------------------- what is refused


def test_error_has_file_and_line_when_a_key_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    message = error_of(path, YAML + "trainer: {max_epochs: 3}\nseed: 6\n")
    assert message == f"{path}:6: the key 'seed' is repeated in one mapping; keep one"


def test_error_has_line_when_a_nested_key_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    message = error_of(path, YAML + "trainer:\n  max_epochs: 3\n  max_steps: 3\n  max_epochs: 4\n")
    assert message.startswith(f"{path}:8: the key 'max_epochs'")


def test_same_key_is_accepted_when_in_two_mappings(tmp_path: Path) -> None:
    config = parse(
        tmp_path / "c.yaml", YAML + "optimizer: {class_path: a.B, init_args: {lr: 1}}\nscheduler: {class_path: a.C}\n"
    )
    assert config.optimizer.class_path == "a.B"


def test_merge_key_is_accepted_when_a_mapping_is_reused(tmp_path: Path) -> None:
    content = "task:\n  class_path: my.Task\n  init_args:\n    a: &a {x: 1, y: 2}\n    b: {<<: *a, y: 3}\n"
    assert parse(tmp_path / "c.yaml", content).task.init_args["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_error_names_the_file_when_it_is_missing(tmp_path: Path, form: str) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(ConfigError, match=f"^--config: there is no file {missing}"):
        parse_run_config(form.format(missing).split())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("? [1, 2]\n: 3\n", "is not YAML"),
        ("", "must hold keys and values"),
        ("- 1\n- 2\n", "must hold keys and values"),
        ("only words", "must hold keys and values"),
    ],
)
def test_error_names_the_file_when_it_is_not_a_mapping(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "c.yaml"
    message = error_of(path, content)
    assert message.startswith("--config: ")
    assert str(path) in message
    assert expected in message


def test_error_names_the_file_when_it_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=f"--config: cannot read {path}"):
        check_yaml(path)


def test_error_names_the_path_when_it_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--config: cannot read {tmp_path}"):
        check_yaml(tmp_path)


@pytest.mark.parametrize(
    ("extra", "argv", "expected"),
    [
        ("trainer: {max_epoch: 3}", [], "max_epoch"),
        ("chekpoint: {every_n_epochs: 3}", [], "chekpoint"),
        ("", ["--checkpoint.every_n_epoch", "3"], "checkpoint.every_n_epoch"),
        ("", ["stray"], "stray"),
        ("trainer: {max_epochs: many}", [], "trainer.max_epochs"),
        ("", ["--trainer.max_epochs", "1.5"], "trainer.max_epochs"),
        ("trainer: {progress_bar: 3}", [], "trainer.progress_bar"),
        ("tracking: {tags: {a: [1]}}", [], "tracking.tags"),
        ("trainer: {early_stopping: {monitor: a, patience: 0}}", [], "trainer.early_stopping.patience"),
        ("trainer: null", [], "trainer: must hold keys and values"),
        ("checkpoint: null", [], "checkpoint: must hold keys and values"),
    ],
)
def test_error_names_the_key_when_unknown_or_of_a_wrong_type(
    tmp_path: Path, extra: str, argv: list[str], expected: str
) -> None:
    assert expected in error_of(tmp_path / "c.yaml", f"{YAML}{extra}\n", *argv)


@pytest.mark.parametrize("by_file", [True, False])
def test_error_names_the_key_when_a_rule_is_broken(tmp_path: Path, by_file: bool) -> None:
    content = YAML + ("checkpoint: {every_n_epochs: 0}\n" if by_file else "")
    message = error_of(tmp_path / "c.yaml", content, *([] if by_file else ["--checkpoint.every_n_epochs", "0"]))
    assert message.startswith("checkpoint.every_n_epochs: must be at least 1, got 0")


def test_error_names_the_choices_when_precision_is_no(tmp_path: Path) -> None:
    message = error_of(tmp_path / "c.yaml", YAML + "trainer: {mixed_precision: no}\n")
    assert "trainer.mixed_precision" in message
    assert "'fp32', 'bf16', 'fp16'" in message


# ------------------------------------------------------------------------- what is printed


def test_printed_configuration_is_equal_when_parsed(
    tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        *("--config", str(config_file), "--trainer.early_stopping.monitor", "eval/loss"),
        *("--optimizer.init_args.betas", "[0.9, 0.95]", "--checkpoint.max_shard_size", "5GB"),
        *("--tracking.tags.team", "vision", "--scheduler.class_path", "a.B", "--run_name", "2024"),
    ]
    expected = parse_run_config(argv)
    with pytest.raises(SystemExit) as ended:
        parse_run_config([*argv, "--print_config"])
    assert ended.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)

    assert parse_run_config(["--config", str(printed)]) == expected
    assert expected.trainer.early_stopping is not None
    assert expected.optimizer.init_args == {"lr": 1e-3, "betas": [0.9, 0.95]}


def test_help_names_every_field_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_run_config(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for section in ("trainer", "checkpoint", "tracking"):
        (made_by,) = (f.default_factory for f in dataclasses.fields(RunConfig) if f.name == section)
        for field in dataclasses.fields(made_by):  # type: ignore[arg-type]
            assert f"--{section}.{field.name}" in text


@pytest.mark.parametrize("name", ["digits.yaml", "byte_lm.yaml"])
def test_shipped_configuration_is_valid_when_parsed(name: str) -> None:
    path = Path(__file__).resolve().parents[3] / "configs" / name
    assert parse_run_config(["--config", str(path)]).task.class_path.startswith("harness.tasks.")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tracking.offline"], True),
        (["--tracking.offline", "--seed", "3"], True),
        (["--tracking.offline", "true"], True),
        (["--tracking.offline", "false", "--seed", "3"], False),
        (["--tracking.offline=false"], False),
        ([], False),
    ],
)
def test_switch_is_on_when_it_has_no_value(config_file: Path, words: list[str], expected: bool) -> None:
    assert parse_run_config(["--config", str(config_file), *words]).tracking.offline is expected


# ------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "uri", ["http://me:hunter2@host:5000", "https://hf_hunter2@host", "postgresql://h/d?password=hunter2"]
)
@pytest.mark.parametrize("form", ["--tracking.tracking_uri={}", '--tracking={{"tracking_uri": "{}"}}'])
def test_password_is_refused_when_on_the_command_line(config_file: Path, uri: str, form: str) -> None:
    message = error_of(config_file, YAML, form.format(uri))
    assert message.startswith("tracking.tracking_uri: has a password in it")
    assert "hunter2" not in message


def test_password_is_accepted_when_in_a_file(config_file: Path) -> None:
    uri = "http://me:hunter2@host:5000"
    config = parse(config_file, YAML + f"tracking: {{tracking_uri: '{uri}'}}\n", "--seed", "3")
    assert config.tracking.tracking_uri == uri
    assert parse(config_file, YAML, "--tracking.tracking_uri=http://host").tracking.tracking_uri == "http://host"
