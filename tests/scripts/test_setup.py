"""scripts/setup.sh: what it refuses, and that it never installs into an interpreter that is not the project's own.

Nothing is installed here: pip has no index, and no interpreter to make an environment with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path):
    """A folder with what setup.sh looks at."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def setup(clone: Path, *arguments: str, python: str = "/nonexistent/python") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python, "PIP_NO_INDEX": "1", "PIP_REQUIRE_VIRTUALENV": "1"}
    command = ["bash", str(clone / "scripts" / "setup.sh"), *arguments]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)


def test_no_usable_python(clone):
    done = setup(clone)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python 3.11 or newer found (tried: /nonexistent/python)\n  do:")


def test_unknown_flavour(clone):
    done = setup(clone, "everything")
    assert (done.returncode, done.stderr) == (2, "error: scripts/setup.sh takes 'core' or 'dev', not 'everything'\n")


def test_half_made_environment_is_not_taken_for_one(clone):
    """bin/python without pyvenv.cfg is the system's interpreter: its pip must not be called."""
    (clone / ".venv" / "bin").mkdir(parents=True)
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    (clone / ".venv" / "bin" / "python").symlink_to(base)
    done = setup(clone)
    assert done.returncode == 2
    assert "no Python 3.11 or newer found" in done.stderr  # it wants to make the environment anew
    assert "installing" not in done.stdout
    # Even with a stamp that says that all is done.
    (clone / ".venv" / "mtft-core.stamp").write_text("")
    assert setup(clone).returncode == 2


def test_pip_is_told_to_stay_inside_an_environment():
    text = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    assert text.index("export PIP_REQUIRE_VIRTUALENV=1") < text.index("pip install")
