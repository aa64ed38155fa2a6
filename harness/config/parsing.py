"""Parse the command line and YAML files into a `RunConfig`. Importing this never imports torch.

This module extends jsonargparse: options before ``--config`` apply, a switch needs no value, a repeated key in a YAML
file is an error, and an error is one line with a remedy. `harness.config.instantiate` checks the arguments of the named
classes later, because that imports torch.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from harness.config.schema import CheckpointConfig, ClassSpec, RunConfig, TrackingConfig, TrainerConfig
from harness.errors import ConfigError
from harness.io.redact import without_password

_CLASS_KEYS = {
    "task": "class of the task, a harness.Task",
    "optimizer": "class of the optimizer; it gets the model's parameters",
    "scheduler": "class of the learning rate scheduler, stepped with the optimizer",
}
_SECTIONS = {"trainer": TrainerConfig, "checkpoint": CheckpointConfig, "tracking": TrackingConfig}
_DEFAULT_OPTIMIZER = ClassSpec("torch.optim.AdamW", {"lr": 1e-3})


def make_parser(prog: str) -> ArgumentParser:
    """Return the parser of all keys of a `RunConfig`."""
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a task. Options override the values of --config, in any order on the command line.",
    )
    parser.add_argument("--config", action="config", help="YAML file; the last of several files has precedence")
    for key, what in _CLASS_KEYS.items():
        default = _DEFAULT_OPTIMIZER.class_path if key == "optimizer" else None
        parser.add_argument(f"--{key}.class_path", type=str | None, default=default, help=what)
        # `_to_run_config` adds the default optimizer's arguments, which as defaults would apply to another class too.
        parser.add_argument(f"--{key}.init_args", type=dict[str, Any], default={}, help="its keyword arguments")
    parser.add_class_arguments(RunConfig, skip=set(_CLASS_KEYS))
    return parser


def parse_run_config(argv: Sequence[str], *, prog: str = "harness train") -> RunConfig:
    """Parse command-line arguments into a valid configuration. `prog` is the program's name in ``--help``.

    Raises:
        ConfigError: if an argument or file is wrong; one line with the place, the rule, the value and the remedy.
        SystemExit: after ``--help`` and ``--print_config``.
    """
    ordered = config_files_first(with_switch_values(argv))
    contents = [check_yaml(path) for path in config_files(ordered)]
    parser = make_parser(prog)
    try:
        parsed = parser.parse_args(list(without_stale_arguments(ordered, contents)))
        for key in _SECTIONS:
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
    """Refuse an address with a password or a token on the command line.

    Raises:
        ConfigError: if it has one; the message omits the address.
    """
    if uri is not None and without_password(uri) != uri and any(uri in word for word in argv):
        raise ConfigError(
            key,
            "has a password in it, and every user of a machine can read its command lines; set MLFLOW_TRACKING_URI to "
            "it, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD beside an address without",
        )


# Options of type bool, which are true without a value.
_SWITCHES = frozenset(
    f"--{prefix}{each.name}"
    for prefix, config in (("", RunConfig), *((f"{key}.", each) for key, each in _SECTIONS.items()))
    for each in fields(config)
    if each.type == "bool"
)


def with_switch_values(argv: Sequence[str]) -> tuple[str, ...]:
    """Add ``true`` to each switch without a value, such as ``--tracking.offline``."""
    words: list[str] = []
    for word, following in itertools.zip_longest(argv, argv[1:]):
        words.append(word)
        if word in _SWITCHES and (following is None or following.startswith("--")):
            words.append("true")
    return tuple(words)


def config_files_first(argv: Sequence[str]) -> tuple[str, ...]:
    """Move each ``--config FILE`` to the front, because jsonargparse drops options before it.

    Raises:
        ConfigError: if the last ``--config`` has no value.
    """
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
    """Return the files of the leading ``--config FILE`` pairs."""
    return tuple(Path(value) for key, value in itertools.pairwise(ordered) if key == "--config")


def without_stale_arguments(ordered: Sequence[str], contents: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Drop a file's `init_args` if the command line names another class; ``--config`` pairs are first in `ordered`."""
    num_file_words = 2 * len(contents)
    files, rest = ordered[:num_file_words], ordered[num_file_words:]
    dropped: list[str] = []
    for key in _CLASS_KEYS:
        in_files = [each[key].get("class_path") for each in contents if isinstance(each.get(key), Mapping)]
        in_files = [class_path for class_path in in_files if class_path is not None]
        typed = list(_values_of(f"--{key}.class_path", rest))
        if in_files and typed and typed[-1] != in_files[-1]:
            dropped += [f"--{key}.init_args", "{}"]
    return (*files, *dropped, *rest)


def _values_of(option: str, words: Sequence[str]) -> Iterator[str]:
    for word, following in itertools.pairwise((*words, "")):
        if word == option:
            yield following
        elif word.startswith(f"{option}="):
            yield word.partition("=")[2]


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # PyYAML's method refuses it with its place
            if key in seen:
                mark = key_node.start_mark
                raise ConfigError(
                    f"{mark.name}:{mark.line + 1}", f"the key {key!r} is repeated in one mapping; keep one"
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def check_yaml(path: Path) -> Mapping[str, Any]:
    """Read a YAML file.

    Raises:
        ConfigError: if the file is missing, is not a YAML mapping, or repeats a key.
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
    others = {each.name: values[each.name] for each in fields(RunConfig) if each.name not in _CLASS_KEYS}
    return RunConfig(task=specs["task"], optimizer=optimizer, scheduler=specs["scheduler"], **others)


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
    """Return the message of a parser's error as one line."""
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
    """Replace a message about an unknown key by one with the most similar key."""
    match = _UNKNOWN.search(message)
    if match is None:
        return message
    unknown = match[1] or match[4] or f"{match[2]}.{match[3]}"
    known = [action.dest for action in parser._actions]
    near = difflib.get_close_matches(unknown, known, 1)
    hint = f"did you mean {near[0]}?" if near else "`harness train --help` lists the keys"
    return f"{unknown}: unknown key; {hint}"
