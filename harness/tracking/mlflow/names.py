"""Clean the names of metrics, parameters, tags, registered models and artifacts, so that MLflow accepts them.

MLflow refuses a whole request if one name is invalid, so names are cleaned before they enter the journal. The rules
repeat those of `mlflow.utils.validation`, because the trainer does not import mlflow; the tests compare the two.
Cleaning is idempotent, because the publisher repeats it for journals of earlier versions.

A changed name ends with a digest of the given name, so that `acc@1` and `acc_1` remain two metrics in every attempt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Final, Literal, TypeVar

import xxhash

MAX_KEY_CHARS: Final = 250
# The column's width in MLflow's database.
MAX_MODEL_NAME_CHARS: Final = 256
_MAX_FILE_NAME_BYTES: Final = 255

_KEY = re.compile(r"[\w\-. :/]+")
_NOT_IN_KEY = re.compile(r"[^\w\-. :/]")
_NOT_IN_MODEL_NAME = re.compile(r"[/:\x00-\x1f\x7f\ud800-\udfff]")
# The server decodes a path (%2e%2e) before it checks that the path stays in the directory, and removes leading spaces.
_NOT_IN_PATH = re.compile(r"^ +|[%#?:\\\x00-\x1f\x7f\ud800-\udfff]")

Kind = Literal["metric", "parameter", "tag", "registered model", "text"]
Value = TypeVar("Value")


@lru_cache(maxsize=65536)
def clean_key(name: str) -> str:
    """Clean the name of a metric, parameter or tag; a changed name ends with a digest."""
    if _KEY.fullmatch(name) and len(name) <= MAX_KEY_CHARS and not _is_not_normal(name):
        return name
    key = "/".join(_clean_part(part) for part in _NOT_IN_KEY.sub("_", name).split("/") if part)
    return _with_digest(key or "unnamed", name, MAX_KEY_CHARS)


@lru_cache(maxsize=64)
def clean_model_name(name: str) -> str:
    """Clean the name of a registered model; only a cut name ends with a digest, because a run has one such name."""
    cleaned = quotable(_NOT_IN_MODEL_NAME.sub("_", name))
    cleaned = _clean_part(cleaned) if cleaned.strip() else "unnamed"
    return cleaned if len(cleaned) <= MAX_MODEL_NAME_CHARS else _with_digest(cleaned, name, MAX_MODEL_NAME_CHARS)


def quotable(text: str) -> str:
    """Replace double quotes in a text that also has single quotes, so that `quoted` can quote it."""
    return text.replace('"', "_") if "'" in text else text


def quoted(text: str) -> str:
    """Quote a value for a filter of MLflow's search, which cannot escape quotes."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def clean_path(path: str) -> str:
    """Clean an artifact's path so that it is within the artifact directory; a changed one has a digest in its stem."""
    parts = [_cut_bytes(_clean_part(part)) for part in _NOT_IN_PATH.sub("_", path).split("/") if part] or ["unnamed"]
    if (cleaned := "/".join(parts)) == path:
        return path
    suffix = PurePosixPath(cleaned).suffix
    stem = parts[-1].removesuffix(suffix)
    return "/".join([*parts[:-1], _cut_bytes(f"{stem}-{_digest(path)}{suffix}")])


class NameCleaner:
    """Cleans the names of one run, and appends to `warnings` once for each changed name. One thread at a time."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self._cleaned: dict[tuple[Kind, str], str] = {}

    def clean(self, kind: Kind, given: str) -> str:
        """Return the name to use in MLflow."""
        cleaned = self._cleaned.get((kind, given))
        return self._add(kind, given) if cleaned is None else cleaned

    def clean_all(self, kind: Kind, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return the values under the names to use in MLflow."""
        return {self.clean(kind, str(name)): value for name, value in values.items()}

    def _add(self, kind: Kind, given: str) -> str:
        self._cleaned[kind, given] = cleaned = _CLEANERS[kind](given)
        if cleaned != given:
            self.warnings.append(f"{kind} {_shown(given)} is named {_shown(cleaned)} in MLflow: {_RULES[kind]}")
        return cleaned


_CLEANERS: Final[Mapping[Kind, Callable[[str], str]]] = {
    "metric": clean_key,
    "parameter": clean_key,
    "tag": clean_key,
    "registered model": clean_model_name,
    "text": clean_path,
}
_KEY_RULE = "names hold at most 250 letters, digits and characters of '_-. :/', as a path without '..', each once"
_RULES: Final[Mapping[Kind, str]] = {
    "metric": _KEY_RULE,
    "parameter": _KEY_RULE,
    "tag": _KEY_RULE,
    "registered model": "names hold no '/' and ':', and at most 256 characters",
    "text": "paths stay within the run's artifacts, and hold no '%', '#', '?', ':' and '\\'",
}


def _is_not_normal(name: str) -> bool:
    # MLflow refuses every name that begins with two dots, even "..a".
    return name.startswith("..") or any(part in ("", ".", "..") for part in name.split("/"))


def _clean_part(part: str) -> str:
    if part == ".":
        return "_"
    return f"__{part[2:]}" if part.startswith("..") else part


def _cut_bytes(part: str) -> str:
    data = part.encode()
    if len(data) <= _MAX_FILE_NAME_BYTES:
        return part
    begin, end = data[: _MAX_FILE_NAME_BYTES - 32].decode(errors="ignore"), data[-16:].decode(errors="ignore")
    return f"{begin}-{_digest(part)}{end}"


def _with_digest(text: str, given: str, max_chars: int) -> str:
    digest = _digest(given)
    return f"{text[: max_chars - len(digest) - 1]}-{digest}"


def _digest(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode(errors="surrogatepass"))[:8]


def _shown(text: str, max_chars: int = 100) -> str:
    shown = repr(text)
    return shown if len(shown) <= max_chars else f"{shown[:max_chars]}...'"
