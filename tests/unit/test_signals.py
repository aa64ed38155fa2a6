from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from harness.errors import Stopped
from harness.signals import StopSignals


@pytest.fixture
def stop_signals() -> Iterator[StopSignals]:
    installed = StopSignals()
    yield installed
    installed.restore()


def test_nothing_is_raised_when_no_signal_came(stop_signals: StopSignals) -> None:
    stop_signals.check()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_check_raises_with_the_name_when_a_signal_came(stop_signals: StopSignals, number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    with pytest.raises(Stopped, match=number.name) as caught:
        stop_signals.check()
    assert caught.value.signal_name == number.name
    assert caught.value.exit_code == 1


def test_user_is_told_when_interrupted_once(stop_signals: StopSignals, capsys: pytest.CaptureFixture[str]) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    assert "once more to stop at once" in capsys.readouterr().err


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_main_thread_is_interrupted_when_a_further_sigint_comes(
    stop_signals: StopSignals, first: signal.Signals
) -> None:
    os.kill(os.getpid(), first)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_run_still_stops_in_good_order_when_sigterm_comes_twice(stop_signals: StopSignals) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        stop_signals.check()


def test_earlier_handlers_are_back_when_restored() -> None:
    def own_handler(number: int, frame: object) -> None:
        pass

    before = signal.signal(signal.SIGTERM, own_handler)
    try:
        interrupt_before = signal.getsignal(signal.SIGINT)
        installed = StopSignals()
        assert signal.getsignal(signal.SIGTERM) is not own_handler
        installed.restore()
        assert signal.getsignal(signal.SIGTERM) is own_handler
        assert signal.getsignal(signal.SIGINT) is interrupt_before
        installed.restore()  # once more does no harm
        assert signal.getsignal(signal.SIGTERM) is own_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handlers_stay_when_made_in_another_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def make() -> None:
        StopSignals().restore()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
