"""The benchmark of task gradients runs on tiny shapes and judges every bar; the figures mean nothing there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_gradients.py"


@pytest.mark.slow
def test_smoke(tmp_path):
    command = [sys.executable, SCRIPT, "--smoke", "--tasks", "2", "8", "--rounds", "1"]
    command += ["--json", tmp_path / "figures.json", "--figure", tmp_path / "curve.svg"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    judged = [line for line in done.stdout.splitlines() if line.startswith(("PASS", "MISS"))]
    assert len(judged) == 5
    assert all("(bar " in line for line in judged)
    assert set(json.loads((tmp_path / "figures.json").read_text())["ratios"]) == {"2", "8"}
    assert (tmp_path / "curve.svg").stat().st_size > 0
