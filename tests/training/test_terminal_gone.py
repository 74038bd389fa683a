"""The terminal of a run is closed: SIGHUP comes, and nothing can be written to it any more. The run saves and ends."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time

import pytest
import yaml

from tests.training.conftest import lines
from tests.training.test_run_training import recipe_in


@pytest.mark.slow
def test_a_closed_terminal_saves_the_run(recipe, tmp_path):
    one = recipe_in(recipe, tmp_path / "run", train={"steps": 4000, "eval_every": 4000})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(one.model_dump(mode="json")))

    def take_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "mtft", "train", str(tmp_path / "r.yaml")]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=take_terminal)
    os.close(theirs)
    os.set_blocking(ours, False)
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(lines(tmp_path / "run")) < 3:
        assert process.poll() is None
        assert time.monotonic() < until
        try:
            os.read(ours, 1 << 16)
        except BlockingIOError:
            time.sleep(0.02)
    os.close(ours)
    assert process.wait(120) == 0
    steps = [line["step"] for line in lines(tmp_path / "run")]
    assert (tmp_path / "run" / f"checkpoint-{steps[-1]}").is_dir()
