"""Ctrl-C and SIGTERM at any moment, whatever the main thread is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imagerl.rl.run import signals
from imagerl.rl.run.signals import Stopping

ROOT = Path(__file__).parents[3]


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def until_asked(stopping: Stopping) -> None:
    while not stopping.asked:
        time.sleep(0.001)


def test_the_first_signal_only_asks(capfd: pytest.CaptureFixture[str]) -> None:
    asked: list[bool] = []
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stopping(60, lambda: asked.append(True)) as stopping:
        assert not stopping.asked
        send()
        until_asked(stopping)
    assert asked == [True] and not stopping.given_up
    assert capfd.readouterr().err.count("stopping after this step, in 60 s at the latest") == 1
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_step_that_does_not_end_is_given_up() -> None:
    stopping = Stopping(0.05, lambda: None)
    with pytest.raises(KeyboardInterrupt), stopping:  # noqa: PT012
        send()
        time.sleep(60)
    assert stopping.given_up


def test_a_second_signal_interrupts_unless_a_launcher_passes_the_first_one_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopping = Stopping(60, lambda: None)
    with pytest.raises(KeyboardInterrupt), stopping:  # noqa: PT012
        send()
        until_asked(stopping)
        send(signal.SIGINT)
        time.sleep(60)
    assert not stopping.given_up
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Stopping(60, lambda: None) as stopping:
        send()
        until_asked(stopping)
        send()
        time.sleep(0.05)
    monkeypatch.setattr(signals, "ECHO_S", 0.01)
    with pytest.raises(KeyboardInterrupt), Stopping(60, lambda: None) as stopping:  # noqa: PT012
        send()
        until_asked(stopping)
        time.sleep(0.02)
        send()
        time.sleep(60)


def test_a_main_thread_that_computes_in_c_is_left() -> None:
    """No Python runs in it, so no handler and no exception can: the collective whose other ranks are gone."""
    program = """
import hashlib, os, signal
from imagerl.rl.run import signals
signals.LEAVE_S = 0.1
say = lambda what: lambda: os.write(1, what)
with signals.Stopping(0.1, say(b"asked "), say(b"left")):
    os.kill(os.getpid(), signal.SIGTERM)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, b"asked left")


def test_a_signal_just_before_a_wait_ends_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first interruption is lost, as when the main thread has looked for signals and is about to sleep."""
    kill, sent = signal.pthread_kill, []

    def lossy(thread: int, number: int) -> None:
        sent.append(number)
        if len(sent) > 1:
            kill(thread, number)

    monkeypatch.setattr(signals.signal, "pthread_kill", lossy)
    with pytest.raises(KeyboardInterrupt), Stopping(60, lambda: None) as stopping:  # noqa: PT012
        send()
        until_asked(stopping)
        send()
        time.sleep(60)
    assert len(sent) >= 2
