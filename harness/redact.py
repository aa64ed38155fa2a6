"""Taking secrets out of what is written down: URIs with passwords, options named like secrets."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

_URI_PASSWORD = re.compile(r"(://[^\s/:@]*):[^\s/@]+@")
_SECRET_OPTION = re.compile(r"((?:password|secret|token|api_?key)[\w.]*[=\s]+)\S+", re.IGNORECASE)


def redact(text: str) -> str:
    """The text with passwords in URIs, and the values of options named like secrets, replaced."""
    return _SECRET_OPTION.sub(r"\1***", _URI_PASSWORD.sub(r"\1:***@", text))


def without_password(uri: str) -> str:
    """The URI with a password in it replaced, fit to be written down."""
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{host}"))
