"""kill -9 at random instants and inside file operations: the same command again ends as if nothing had happened."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "crash_test.py"


def run(*arguments):
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_kills_leave_no_trace():
    """Training, tokenising, sweeps, merges, reports, fused answers. `run`, `export` and two processes: by hand."""
    cases = ("train", "tokenise", "sweep", "merge", "merge-overwrite", "report", "fuse")
    assert "0 faults" in run("--kills", "30", "--cases", *cases).splitlines()[-1]


@pytest.mark.slow
def test_pairs_of_runs_end_as_one():
    assert "0 did not end as one run" in run("--pairs", "6")
