"""A signal that comes twice, as launchers send it, still lets the run save; Ctrl-C after a while does not wait."""

import signal

import pytest
import torch

from mtft.distributed import stop_signal
from mtft.distributed.stop_signal import StopSignal

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_twice_is_once(number):
    with StopSignal() as stop:
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop.agreed(CPU)
        assert stop.seen == number


def test_the_first_counts():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed(CPU)
        assert stop.seen == signal.SIGINT


def test_ctrl_c_again_stops_at_once(monkeypatch):
    monkeypatch.setattr(stop_signal, "SAME", -1.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    try:
        with StopSignal():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
