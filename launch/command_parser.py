"""An argument parser whose errors are one line instead of a usage text."""

from __future__ import annotations

import argparse
from typing import NoReturn

from harness.errors import ConfigError


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that raises instead of printing its usage and ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise the error.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("", f"{message}; see `{self.prog} --help`")
