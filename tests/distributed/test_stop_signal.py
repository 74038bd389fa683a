"""A signal that comes twice, as launchers send it, still lets the run save; a second one after a while ends it."""

import multiprocessing
import os
import signal

import pytest
import torch

from mtft.distributed import stop_signal
from mtft.distributed.stop_signal import StopSignal

CPU = torch.device("cpu")


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def number(request):
    """A signal in its default state: a job in the background has some of them ignored."""
    usual = signal.default_int_handler if request.param == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(request.param, usual)
    yield request.param
    signal.signal(request.param, before)


def exit_code_of(work):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


def test_twice_is_once(number):
    with StopSignal() as stop:
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop.agreed(CPU)
        assert stop.seen == number


def test_the_first_counts():
    """In a process of its own, which may have begun with SIGINT ignored: a job in the background has."""

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            os._exit(stop.seen if stop.agreed(CPU) else 0)

    assert exit_code_of(work) == signal.SIGINT


def test_a_second_one_after_a_while_stops_at_once(number):
    """In a process of its own: two of the three end it."""

    def work() -> None:
        stop_signal.SAME = -1.0
        with StopSignal():
            signal.raise_signal(number)
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt:
                os._exit(130)
        os._exit(1)

    assert exit_code_of(work) == (130 if number == signal.SIGINT else -number)


def test_a_signal_that_is_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)  # nohup does so
    with StopSignal() as stop:
        signal.raise_signal(number)
        assert not stop.agreed(CPU)


def test_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
