"""From the command line and YAML files to a `RunConfig`. Importing this never imports torch.

jsonargparse does the parsing; what is ours is what it would let pass or lose: an override that
stands before ``--config``, a key that stands twice in a YAML file, an error that shows a traceback.
The classes that are named (`task`, `optimizer`, `scheduler`) are looked at later, in `harness.config.instantiate`,
since that imports torch.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from harness.config.schema import CheckpointConfig, ClassSpec, RunConfig, TrackingConfig, TrainerConfig
from harness.errors import ConfigError
from harness.io.redact import without_password

_CLASS_KEYS = {
    "task": "the task: a class that is a harness.Task",
    "optimizer": "the optimizer; it is given the model's parameters",
    "scheduler": "the learning rate scheduler, stepped with the optimizer",
}
_DEFAULT_OPTIMIZER = ClassSpec("torch.optim.AdamW", {"lr": 1e-3})


def make_parser(prog: str) -> ArgumentParser:
    """The parser of everything in a `RunConfig`."""
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a task. Values come from --config, then from the options, wherever they stand.",
    )
    parser.add_argument("--config", action="config", help="YAML file; given twice, the later one overrides")
    parser.add_argument("--seed", type=int, default=17, help="of all that is random")
    parser.add_argument("--run_dir", type=str, default="runs", help="each run gets a directory in here")
    parser.add_argument("--run_name", type=str | None, default=None, help="name of the run; null: made up")
    parser.add_argument(
        "--resume_from_checkpoint", type=str, default="auto", help="auto, never, a path, or an address in MLflow"
    )
    parser.add_argument(
        "--initial_weights", type=str | None, default=None, help="directory of safetensors, or an address in MLflow"
    )
    parser.add_argument(
        "--reset_scheduler",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="resumed: the scheduler as it is configured now",
    )
    for key, what in _CLASS_KEYS.items():
        default = _DEFAULT_OPTIMIZER.class_path if key == "optimizer" else None
        parser.add_argument(f"--{key}.class_path", type=str | None, default=default, help=what)
        # init_args of the default optimizer are filled in below: here they would outlive a change of class.
        parser.add_argument(f"--{key}.init_args", type=dict[str, Any], default={}, help="its keyword arguments")
    parser.add_class_arguments(TrainerConfig, "trainer")
    parser.add_class_arguments(CheckpointConfig, "checkpoint")
    parser.add_class_arguments(TrackingConfig, "tracking")
    return parser


def parse_run_config(argv: Sequence[str], *, prog: str = "harness train") -> RunConfig:
    """Parse arguments into a valid configuration.

    Args:
        argv: the arguments, without the program's name.
        prog: the program's name, for ``--help``.

    Raises:
        ConfigError: one line with the place, the rule, what was given and the remedy.
        SystemExit: after ``--help`` and ``--print_config``.
    """
    ordered = config_files_first(with_switch_values(argv))
    contents = [check_yaml(path) for path in config_files(ordered)]
    ordered = without_stale_arguments(ordered, contents)
    parser = make_parser(prog)
    try:
        parsed = parser.parse_args(list(ordered))
        for key in ("trainer", "checkpoint", "tracking"):
            if parsed.get(key) is None:
                raise ConfigError(key, "must hold keys and values, got null; leave it out for the defaults")
        config = _to_run_config(parser.instantiate(parsed))
    except ConfigError:
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError("", _with_nearest(readable(error), parser)) from error
    refuse_typed_password("tracking.tracking_uri", config.tracking.tracking_uri, argv)
    return config


def refuse_typed_password(key: str, uri: str | None, argv: Sequence[str]) -> None:
    """Refuse an address with a password, or a token, that was typed.

    Raises:
        ConfigError: without the address.
    """
    if uri is not None and without_password(uri) != uri and any(uri in word for word in argv):
        raise ConfigError(
            key,
            "has a password in it, and every user of a machine can read its command lines; set MLFLOW_TRACKING_URI to "
            "it, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD beside an address without",
        )


_SWITCHES = frozenset(
    f"--{group}.{each.name}"
    for group, kind in (("trainer", TrainerConfig), ("checkpoint", CheckpointConfig), ("tracking", TrackingConfig))
    for each in fields(kind)
    if each.type == "bool"
)


def with_switch_values(argv: Sequence[str]) -> tuple[str, ...]:
    """Let ``--tracking.offline`` alone, as one types a switch, mean ``--tracking.offline true``."""
    words: list[str] = []
    for word, following in itertools.zip_longest(argv, argv[1:]):
        words.append(word)
        if word in _SWITCHES and (following is None or following.startswith("--")):
            words.append("true")
    return tuple(words)


def config_files_first(argv: Sequence[str]) -> tuple[str, ...]:
    """Move each ``--config FILE`` to the front: jsonargparse drops overrides that stand before it."""
    files: list[str] = []
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            value = next(arguments, None)
            if value is None:
                raise ConfigError("--config", "needs a YAML file, such as --config configs/digits.yaml")
            files += ["--config", value]
        elif argument.startswith("--config="):
            files += ["--config", argument.removeprefix("--config=")]
        else:
            rest.append(argument)
    return (*files, *rest)


def config_files(ordered: Sequence[str]) -> tuple[Path, ...]:
    """The files named by ``--config FILE`` pairs."""
    pairs = itertools.pairwise(ordered)
    return tuple(Path(value) for key, value in pairs if key == "--config")


def without_stale_arguments(ordered: Sequence[str], contents: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Drop a file's `init_args` where the command line names another class: they are not that class's.

    Args:
        ordered: arguments, ``--config`` pairs first.
        contents: what those files hold.
    """
    num_file_words = 2 * len(contents)
    files, rest = tuple(ordered[:num_file_words]), tuple(ordered[num_file_words:])
    dropped: list[str] = []
    for key in _CLASS_KEYS:
        in_files = [c[key].get("class_path") for c in contents if isinstance(c.get(key), Mapping)]
        typed = _last_value(rest, f"--{key}.class_path")
        named = [class_path for class_path in in_files if class_path is not None]
        if named and typed is not None and typed != named[-1]:
            dropped += [f"--{key}.init_args", "{}"]
    return (*files, *dropped, *rest)


def _last_value(words: Sequence[str], option: str) -> str | None:
    found = None
    for position, word in enumerate(words):
        if word.startswith(f"{option}="):
            found = word.partition("=")[2]
        elif word == option and position + 1 < len(words):
            found = words[position + 1]
    return found


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # PyYAML refuses it below, with its place
            if key in seen:
                mark = key_node.start_mark
                raise ConfigError(
                    f"{mark.name}:{mark.line + 1}", f"the key {key!r} stands twice in one mapping; keep one"
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def check_yaml(path: Path) -> Mapping[str, Any]:
    """What a file holds; refuses one that is missing, is not a YAML mapping, or has a key twice.

    Raises:
        ConfigError: with the file and, where there is one, the line.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            content = yaml.load(stream, Loader=_UniqueKeyLoader)  # a SafeLoader
    except FileNotFoundError as error:
        raise ConfigError("--config", f"there is no file {path} (looked in {os.getcwd()})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--config", f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError("--config", f"{path} is not YAML: {readable(error)}") from error
    if not isinstance(content, Mapping):
        raise ConfigError("--config", f"{path} must hold keys and values, such as `seed: 17`")
    return content


def _to_run_config(values: Namespace) -> RunConfig:
    specs = {key: _to_class_spec(key, values.get(key)) for key in _CLASS_KEYS}
    if specs["task"] is None:
        raise ConfigError(
            "task.class_path", "is missing; name a class, such as `task: {class_path: harness.tasks.Digits}`"
        )
    optimizer = specs["optimizer"] or _DEFAULT_OPTIMIZER
    if optimizer.class_path == _DEFAULT_OPTIMIZER.class_path:
        optimizer = ClassSpec(optimizer.class_path, {**_DEFAULT_OPTIMIZER.init_args, **optimizer.init_args})
    return RunConfig(
        task=specs["task"],
        optimizer=optimizer,
        scheduler=specs["scheduler"],
        seed=values.seed,
        run_dir=values.run_dir,
        run_name=values.run_name,
        resume_from_checkpoint=values.resume_from_checkpoint,
        initial_weights=values.initial_weights,
        reset_scheduler=values.reset_scheduler,
        trainer=values.trainer,
        checkpoint=values.checkpoint,
        tracking=values.tracking,
    )


def _to_class_spec(key: str, value: Any) -> ClassSpec | None:
    if value is None:
        return None
    if not isinstance(value, Namespace):
        raise ConfigError(key, f"must hold class_path and init_args, got {value!r}; write {key}: {{class_path: ...}}")
    class_path, init_args = value.get("class_path"), value.get("init_args") or {}
    if class_path is None:
        if init_args:
            raise ConfigError(f"{key}.class_path", f"is missing, but {key}.init_args is given; name the class")
        return None
    return ClassSpec(class_path, dict(init_args))


_JSONARGPARSE_WORDS = (
    (re.compile(r'Parser key "([^"]+)":\s*'), r"\1: "),
    (re.compile(r"Expected a <class '(?:\w+\.)*(\w+)'>"), r"must be of type \1"),
    (re.compile(r"Expected a typing\.Literal\[([^]]+)\]"), r"must be one of \1"),
    (re.compile(r"\. Got value: (.*)$"), r", got \1"),
)


def readable(error: BaseException) -> str:
    """The message of a parser's error as one line, in the words of this project."""
    text = " ".join(part.strip() for part in str(error).splitlines() if part.strip())
    for pattern, words in _JSONARGPARSE_WORDS:
        text = pattern.sub(words, text)
    return text


_UNKNOWN = re.compile(
    r"unrecognized arguments: --([\w.]+)"
    r"|Group '([\w.]+)' does not accept option '([\w.]+)'"
    r"|Option '([\w.]+)' is not accepted"
)


def _with_nearest(message: str, parser: ArgumentParser) -> str:
    """The message, and for an unknown key the name that was probably meant."""
    match = _UNKNOWN.search(message)
    if match is None:
        return message
    unknown = match[1] or match[4] or f"{match[2]}.{match[3]}"
    known = [action.dest for action in parser._actions]
    near = difflib.get_close_matches(unknown, known, 1)
    hint = f"did you mean {near[0]}?" if near else "`harness train --help` lists the keys"
    return f"{unknown}: there is no such key; {hint}"
