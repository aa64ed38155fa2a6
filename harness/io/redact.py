"""Remove secrets from text that is written.

Secrets are passwords in URIs, and values of options, keys and environment variables that are named like secrets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

# Up to the last @ before the path: a password may contain one.
_URI_PASSWORD = re.compile(r"(://[^\s/:@]*):[^\s/]+@")
# A user without a password is often a token: https://TOKEN@host.
_URI_TOKEN = re.compile(r"(://)[^\s/:@]+@")
# `token` only at the end of a name: `max_tokens` and `tokenizer` are not secrets.
_SECRET = (
    r"(?:(?:password|passwd|passphrase|secret|api[-_]?key|private[-_]?key|connection[-_]?string)[\w.-]*"
    r"|token|access[-_]?key)"
)
_SECRET_NAME = re.compile(_SECRET + r"\Z", re.IGNORECASE)
_SECRET_OPTION = re.compile(rf"({_SECRET}[\"']?(?:\s*[=:]\s*|\s+))(?:'[^']*'|\"[^\"]*\"|\S+)", re.IGNORECASE)
# In text that may be prose, only assigned values, as in `password=...` and `{"password": ...}`.
_ASSIGNED = re.compile(rf"({_SECRET}(?:[\"']\s*:\s*|\s*=\s*))(?:'[^']*'|\"[^\"]*\"|[^\s,;&)]+)", re.IGNORECASE)
# The signature of a signed address, which grants temporary access.
_SIGNATURE = re.compile(r"([?&](?:[\w-]*signature|[\w-]*security-token|sig)=)[^&\s'\"]+", re.IGNORECASE)
# The password in the query of a database address.
_QUERY_PASSWORD = re.compile(r"([?&;][\w-]*(?:password|passwd|pwd|secret|token)=)[^&;]+", re.IGNORECASE)
# A shorter secret may occur in other words by chance.
_MIN_KNOWN_CHARS = 6


# Passwords of the addresses passed to `remember`.
_known: set[str] = set()


def remember(uri: str | None) -> None:
    """Redact the password of this address, percent-encoded or not, in all later calls of this process."""
    if uri is not None:
        _known.update(_passwords_in(uri))


def redact(text: str) -> str:
    """Return a command line or setting with passwords and values of options named like secrets replaced."""
    return _SECRET_OPTION.sub(r"\1***", redact_message(text))


def redact_message(text: str) -> str:
    """Return another program's message without secrets. Unlike `redact`, keep prose such as "password required"."""
    for secret in sorted({*_known, *_of_environment()}, key=len, reverse=True):
        if len(secret) >= _MIN_KNOWN_CHARS:
            text = text.replace(secret, "***")
    for pattern, shown in ((_URI_PASSWORD, r"\1:***@"), (_URI_TOKEN, r"\1***@")):
        text = pattern.sub(shown, text)
    return _ASSIGNED.sub(r"\1***", _SIGNATURE.sub(r"\1***", text))


def root_cause(error: BaseException) -> str:
    """Return the innermost message of a chain of errors, which HTTP clients repeat in each outer error.

    The message is redacted and on one line, with at most 300 characters.
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
    """Return the password of a URI, percent-encoded and decoded."""
    try:
        password = urlsplit(uri).password
    except ValueError:
        return ()
    return () if not password else (password, unquote(password))


def redact_tree(value: Any, name: str = "") -> Any:
    """Replace secrets in nested mappings and lists, which it finds by their names and by their form."""
    if name and is_secret_name(name):
        return "***"
    if isinstance(value, Mapping):
        return {str(key): redact_tree(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_tree(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def redact_named(values: Mapping[str, Any], *, only_text: bool = False) -> dict[str, Any]:
    """Replace secrets in a script's nested mappings of name -> value; all other values are the same objects.

    With `only_text`, numbers that are named like secrets are kept, as in metrics (``loss_per_token``).
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
    """Replace the values of options named like secrets in a command line, in any quoting."""
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
    """Whether a value of this name, such as ``database.password``, is a secret."""
    return any(_SECRET_NAME.search(part) for part in name.split("."))


def without_password(uri: str) -> str:
    """Return the URI with its password replaced."""
    uri = _QUERY_PASSWORD.sub(r"\1***", uri)
    parts = urlsplit(uri)
    if parts.username is None and parts.password is None:
        return uri
    host = parts.netloc.rpartition("@")[2]
    user = "***" if parts.password is None else f"{parts.username}:***"
    return urlunsplit(parts._replace(netloc=f"{user}@{host}"))
