"""One optimizer step crosses few files, and fusing imports no merge method."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "trace_step.py"


@pytest.mark.slow
def test_a_step_crosses_few_files_and_fusing_imports_no_merge_method():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert 5 < counts["files"] <= 12  # 20 before
    assert 5 < counts["switches"] <= 45  # 91 before
    assert counts["merge_methods"] == 0
