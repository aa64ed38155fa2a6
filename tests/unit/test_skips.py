"""The rule of `tests/conftest.py`, in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, environment

TESTS = """
import pytest

@pytest.fixture
def service():
    pytest.skip("there is no such program")

@pytest.mark.services
def test_by_fixture(service):
    pass

@pytest.mark.services
@pytest.mark.skipif(True, reason="there is no such host")
def test_by_mark():
    pass

@pytest.mark.services
@pytest.mark.xfail(reason="is known")
def test_that_fails():
    assert False

def test_of_something_else():
    pytest.skip("there is no GPU")
"""


@pytest.mark.parametrize(("ci", "outcome"), [("", "3 skipped, 1 xfailed"), ("true", "1 skipped, 1 xfailed")])
def test_skipped_test_of_a_service_has_failed_when_ci_is_set(tmp_path: Path, ci: str, outcome: str) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = services\n")
    words = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-rfE", tmp_path]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=environment({"CI": ci, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert outcome in done.stdout, done.stdout + done.stderr
    assert ("must run where CI is set: Skipped: there is no such program" in done.stdout) == bool(ci), done.stdout
    assert ("must run where CI is set: Skipped: there is no such host" in done.stdout) == bool(ci)
