"""Ctrl-C, SIGTERM and SIGHUP end a command through its `finally` blocks, with the exit code that shells expect."""

import os
import signal
import subprocess
import sys
import time

import pytest

CODE = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs and nohup have them ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
import mtft.cli.main as commands
from mtft.__main__ import main

def slow_load(*arguments, **options):  # a command that is at work
    Path("begun").touch()
    try:
        time.sleep(60)
    finally:
        Path("tidy").touch()

commands.load = slow_load
sys.exit(main(["train", "r.yaml"]))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_unwinds_the_command(tmp_path, number, code):
    process = subprocess.Popen([sys.executable, "-c", CODE], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert (tmp_path / "tidy").exists()
    assert "Traceback" not in said


def test_handlers_are_put_back(capsys):
    from mtft.__main__ import main

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert main(["--version"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
