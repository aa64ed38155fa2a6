"""Taking secrets out of what is written down.

Those are: URIs with passwords, values of options and keys named like secrets, values of environment variables named so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

# Up to the last @ before the path: a password may hold one.
_URI_PASSWORD = re.compile(r"(://[^\s/:@]*):[^\s/]+@")
# A user alone is often a token: https://TOKEN@host.
_URI_TOKEN = re.compile(r"(://)[^\s/:@]+@")
# `token` only where a name ends with it: `max_tokens` and `tokenizer` are no secrets.
_SECRET = (
    r"(?:(?:password|passwd|passphrase|secret|api[-_]?key|private[-_]?key|connection[-_]?string)[\w.-]*"
    r"|token|access[-_]?key)"
)
_SECRET_NAME = re.compile(_SECRET + r"\Z", re.IGNORECASE)
_SECRET_OPTION = re.compile(rf"({_SECRET}[\"']?(?:\s*[=:]\s*|\s+))(?:'[^']*'|\"[^\"]*\"|\S+)", re.IGNORECASE)
# In text that may be prose: only what is assigned, as in `password=...` and `{"password": ...}`.
_ASSIGNED = re.compile(rf"({_SECRET}(?:[\"']\s*:\s*|\s*=\s*))(?:'[^']*'|\"[^\"]*\"|[^\s,;&)]+)", re.IGNORECASE)
# Of an address that is signed: who has it may use it, for a time.
_SIGNATURE = re.compile(r"([?&](?:[\w-]*signature|[\w-]*security-token|sig)=)[^&\s'\"]+", re.IGNORECASE)
# In the query of a database's address.
_QUERY_PASSWORD = re.compile(r"([?&;][\w-]*(?:password|passwd|pwd|secret|token)=)[^&;]+", re.IGNORECASE)
# A shorter one is found by chance in words that are none.
_MIN_KNOWN_CHARS = 6


# Passwords of addresses that this process was given, see `remember`.
_known: set[str] = set()


def remember(uri: str | None) -> None:
    """Keep the password of an address from what this process writes, wherever it turns up and however it is encoded."""
    if uri is not None:
        _known.update(_passwords_in(uri))


def redact(text: str) -> str:
    """A command line, or a setting, with passwords and the values of options named like secrets replaced."""
    return _SECRET_OPTION.sub(r"\1***", redact_message(text))


def redact_message(text: str) -> str:
    """What somebody else has written, such as an error: without secrets, but with the words "password" and "token"."""
    for secret in sorted({*_known, *_of_environment()}, key=len, reverse=True):
        if len(secret) >= _MIN_KNOWN_CHARS:
            text = text.replace(secret, "***")
    for pattern, shown in ((_URI_PASSWORD, r"\1:***@"), (_URI_TOKEN, r"\1***@")):
        text = pattern.sub(shown, text)
    return _ASSIGNED.sub(r"\1***", _SIGNATURE.sub(r"\1***", text))


def root_cause(error: BaseException) -> str:
    """The innermost message of a chain of errors, redacted and on one line, at most 300 characters.

    The outer layers of HTTP clients repeat it at length.
    """
    while (inner := error.__cause__ or error.__context__) is not None and str(inner):
        error = inner
    return redact(" ".join(str(error).split()))[:300]


def _of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if is_secret_name(name):
            yield value
        elif "://" in value:
            yield from _passwords_in(value)


def _passwords_in(uri: str) -> tuple[str, ...]:
    """The password of a URI, as it stands there and as it is meant."""
    try:
        password = urlsplit(uri).password
    except ValueError:
        return ()
    return () if not password else (password, unquote(password))


def redact_tree(value: Any, name: str = "") -> Any:
    """Mappings and lists of plain values, with what is named like a secret replaced, and what reads like one."""
    if name and is_secret_name(name):
        return "***"
    if isinstance(value, Mapping):
        return {str(key): redact_tree(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_tree(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def redact_named(values: Mapping[str, Any], *, only_text: bool = False) -> dict[str, Any]:
    """A script's values as another library is to get them: all but secrets are the same objects.

    Args:
        values: nested mappings; name -> value.
        only_text: whether a number under a name like a secret's stays, as in metrics (``loss_per_token``).
    """
    redacted: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            redacted[name] = redact_named(value, only_text=only_text)
        elif is_secret_name(str(name)) and value is not None and not (only_text and not isinstance(value, str)):
            redacted[name] = "***"
        else:
            redacted[name] = redact(value) if isinstance(value, str) else value
    return redacted


def redact_words(words: Sequence[str]) -> list[str]:
    """A command line with the values of options named like secrets replaced, however they are quoted."""
    redacted: list[str] = []
    for position, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if position and words[position - 1].startswith("--") and is_secret_name(words[position - 1].lstrip("-")):
            redacted.append("***")
        elif equals and is_secret_name(name.lstrip("-")):
            redacted.append(f"{name}=***")
        else:
            redacted.append(redact(word))
    return redacted


def is_secret_name(name: str) -> bool:
    """Whether a value of this name, such as ``database.password``, must not be written down."""
    return any(_SECRET_NAME.search(part) for part in name.split("."))


def without_password(uri: str) -> str:
    """The URI with a password in it replaced, fit to be written down."""
    uri = _QUERY_PASSWORD.sub(r"\1***", uri)
    parts = urlsplit(uri)
    if parts.username is None and parts.password is None:
        return uri
    host = parts.netloc.rpartition("@")[2]
    user = "***" if parts.password is None else f"{parts.username}:***"
    return urlunsplit(parts._replace(netloc=f"{user}@{host}"))
