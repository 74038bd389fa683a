"""The benchmark of merges runs on tiny shapes and judges every bar; the figures mean nothing there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_merge.py"


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "bars"), [((), 8), (("--seven-b",), 7)])
def test_smoke(arguments, bars, tmp_path):
    command = [sys.executable, SCRIPT, "--smoke", *arguments, "--json", tmp_path / "figures.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    judged = [line for line in done.stdout.splitlines() if line.startswith(("PASS", "MISS"))]
    assert len(judged) == bars
    assert all("(bar: " in line for line in judged)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(row["cpu_s"] > 0 for row in figures.values())
