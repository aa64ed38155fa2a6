"""What holds for all tests: in CI, what a test needs is there; none leaves its MLflow address to the next."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where CI is set, a test of a service that is skipped has failed: `.ci/run` installs what it needs.

    So a service that cannot be had is told on a developer's machine, and is never left out unseen.
    """
    report = yield
    if (
        report.skipped
        and not hasattr(report, "wasxfail")
        and os.environ.get("CI")
        and item.get_closest_marker("services")
    ):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: must run where CI is set: {reason}"
    return report


@pytest.fixture(autouse=True)
def no_address_is_left() -> Iterator[None]:
    """Take back what a test has told MLflow for the whole process: it would come before the next one's variables."""
    yield
    mlflow = sys.modules.get("mlflow")
    if mlflow is not None and hasattr(mlflow, "set_tracking_uri"):
        mlflow.set_tracking_uri(None)
