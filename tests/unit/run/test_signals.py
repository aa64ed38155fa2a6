from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from harness.run.signals import StopSignals


@pytest.fixture
def stop_signals() -> Iterator[StopSignals]:
    installed = StopSignals()
    yield installed
    installed.restore()


def test_nothing_is_received_when_no_signal_came(stop_signals: StopSignals) -> None:
    assert (stop_signals.received, stop_signals.is_set) == (0, False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_number_is_kept_when_a_signal_came(stop_signals: StopSignals, number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    assert (stop_signals.received, stop_signals.is_set) == (number, True)


def test_process_ends_to_be_requeued_when_nobody_catches_the_stop() -> None:
    script = "from harness.errors import Stopped; raise Stopped('SIGTERM')"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (75, "")


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
    assert stop_signals.received == signal.SIGTERM


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


@pytest.fixture
def called() -> Iterator[list[int]]:
    """Numbers of the signals that a handler of the script's, `signal.getsignal(SIGUSR1)` here, was called with."""
    numbers: list[int] = []
    own = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
    before = [signal.signal(number, lambda number, _: numbers.append(number)) for number in own]
    yield numbers
    for number, handler in zip(own, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_handler_of_the_script_is_called_too_when_it_was_there_before(called: list[int], number: int) -> None:
    installed = StopSignals()
    os.kill(os.getpid(), number)
    assert called == [number]
    assert (installed.received, installed.pop_save_request()) == (
        (0, True) if number == signal.SIGUSR2 else (number, False)
    )
    installed.restore()
    os.kill(os.getpid(), number)
    assert called == [number, number]


def test_handler_of_the_script_is_called_too_when_it_came_later(stop_signals: StopSignals) -> None:
    called: list[str] = []
    earlier = signal.signal(signal.SIGTERM, lambda *_: called.append("first"))
    stop_signals.chain()
    stop_signals.chain()
    os.kill(os.getpid(), signal.SIGTERM)
    assert (called, stop_signals.received) == (["first"], signal.SIGTERM)
    # What it puts back is ours, which no longer leads to it.
    signal.signal(signal.SIGTERM, earlier)
    stop_signals.chain()
    os.kill(os.getpid(), signal.SIGTERM)
    assert called == ["first"]


def test_one_interrupt_counts_once_when_the_scripts_handler_calls_ours(stop_signals: StopSignals) -> None:
    ours = signal.getsignal(signal.SIGINT)
    assert callable(ours)
    signal.signal(signal.SIGINT, lambda number, frame: ours(number, frame))
    stop_signals.chain()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop_signals.received == signal.SIGINT


def test_handler_of_the_script_stays_when_it_came_later_and_ours_are_taken_away(called: list[int]) -> None:
    handler = signal.getsignal(signal.SIGUSR1)
    installed = StopSignals()
    signal.signal(signal.SIGUSR1, handler)
    installed.restore()
    assert signal.getsignal(signal.SIGUSR1) is handler
