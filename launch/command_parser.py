"""Parse arguments with one-line errors instead of a usage text."""

from __future__ import annotations

import argparse
from typing import NoReturn

from harness.errors import ConfigError


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that raises instead of printing its usage and ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `ConfigError`."""
        raise ConfigError("", f"{message}; see `{self.prog} --help`")
