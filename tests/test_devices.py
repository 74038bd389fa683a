"""tests/devices, in a process of their own.

torch knows the simulated device for as long as a process lives, and then computes no gradients in forked children,
which other tests need.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["not slow", "slow"])
def test_on_the_simulated_device(which):
    command = [sys.executable, "-m", "pytest", "tests/devices", "-q", "-m", which, "-p", "no:xdist"]
    environment = {**os.environ, "MTFT_SIMULATED_DEVICE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
