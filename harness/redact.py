"""Taking secrets out of what is written down: URIs with passwords, options named like secrets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit, urlunsplit

# Up to the last @ before the path: a password may hold one.
_URI_PASSWORD = re.compile(r"(://[^\s/:@]*):[^\s/]+@")
# A user alone is often a token: https://TOKEN@host.
_URI_TOKEN = re.compile(r"(://)[^\s/:@]+@")
# `token` only where a name ends with it: `max_tokens` and `tokenizer` are no secrets.
_SECRET = r"(?:(?:password|passwd|secret|api[-_]?key)[\w.-]*|token)"
_SECRET_NAME = re.compile(_SECRET + r"\Z", re.IGNORECASE)
_SECRET_OPTION = re.compile(rf"({_SECRET}[\"']?(?:\s*[=:]\s*|\s+))(?:'[^']*'|\"[^\"]*\"|\S+)", re.IGNORECASE)


def redact(text: str) -> str:
    """The text with passwords in URIs, and the values of options named like secrets, replaced."""
    without = _URI_TOKEN.sub(r"\1***@", _URI_PASSWORD.sub(r"\1:***@", text))
    return _SECRET_OPTION.sub(r"\1***", without)


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
    parts = urlsplit(uri)
    if parts.username is None and parts.password is None:
        return uri
    host = parts.netloc.rpartition("@")[2]
    user = "***" if parts.password is None else f"{parts.username}:***"
    return urlunsplit(parts._replace(netloc=f"{user}@{host}"))
