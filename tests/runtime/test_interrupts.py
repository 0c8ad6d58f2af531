"""Asking a run to stop: signals, a time budget, and how durations are written."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from advalign.errors import UserError
from advalign.runtime.interrupts import Interrupts, parse_duration, stoppable


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("45s", 45),
        ("9m", 540),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1h30m15s", 5415),
        ("1h30", 3630),
        ("1.5h", 5400),
        (".5m", 30),
        (" 9m ", 540),
        ("0h1m", 60),
    ],
)
def test_durations(text: str, seconds: float):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "0",
        "0s",
        "m",
        "h9",
        "-5",
        "-5m",
        "5d",
        "five",
        "1e3",
        "1 h",
        "1..5h",
        "9mm",
        ".",
        ".s",
        "²",
        "²s",
        "5.",
    ],
)
def test_what_is_no_duration(text: str):
    with pytest.raises(UserError, match="is no duration: write 90, 45s, 9m, 2h or 1h30m"):
        parse_duration(text)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_reason_and_the_handlers_come_back(number: signal.Signals):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with Interrupts() as interrupts:
        assert interrupts.reason == ""
        os.kill(os.getpid(), number)
        assert interrupts.reason == f"{number.name} arrived"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    inside: list[object] = []

    def fail() -> None:
        with Interrupts():
            inside.append(signal.getsignal(signal.SIGTERM))
            raise RuntimeError("loss")

    with pytest.raises(RuntimeError, match="loss"):
        fail()
    assert inside != [before]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.reason == "SIGINT arrived"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_sigterm_changes_nothing():
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.reason == "SIGTERM arrived"


def test_a_time_budget_runs_out(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Interrupts(time_budget=60) as interrupts, Interrupts() as unlimited:
        now = 159.9
        assert interrupts.reason == ""
        now = 160.0
        assert interrupts.reason == "the time budget is used up"
        os.kill(os.getpid(), signal.SIGTERM)
        assert unlimited.reason == "SIGTERM arrived"  # the inner one took the signal
        now = 1e9
        assert interrupts.reason == "the time budget is used up"


def test_a_signal_is_the_reason_even_if_the_budget_is_used_up_too():
    with Interrupts(time_budget=0) as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.reason == "SIGTERM arrived"


def test_off_the_main_thread_there_is_the_time_budget_only():
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with Interrupts(time_budget=0) as interrupts:
            seen.extend([interrupts.reason, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["the time budget is used up", before]


def test_stoppable_work_ends_at_once_with_the_reason():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)]
    with pytest.raises(KeyboardInterrupt, match="SIGTERM arrived"), stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="the time budget is used up"), stoppable(), stoppable(0.0):
        threading.Event().wait(10)
    with stoppable(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)] == before


def test_interrupts_within_stoppable_work_come_first():
    with stoppable(), Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.reason == "SIGTERM arrived"


def test_a_closed_terminal_stops_in_good_order_and_is_ignored_under_nohup():
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.reason == "SIGHUP arrived"
    with pytest.raises(KeyboardInterrupt, match="SIGHUP arrived"), stoppable():
        os.kill(os.getpid(), signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable(), Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.reason == ""
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("text", ["9" * 400 + "h", "100000000h"])
def test_a_duration_that_no_timer_takes_is_refused(text: str):
    with pytest.raises(UserError, match="is too long: at most 27778h"):
        parse_duration(text)
