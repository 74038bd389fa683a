"""scripts/setup.sh: what it refuses, which versions it asks for, when it has nothing to do, and that it never installs
into an interpreter that is not the project's own. And the constraints file that it reads.

Nothing is installed here: pip has no index, and no interpreter to make an environment with, or it is a script that
writes down how it was called.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts import make_constraints

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path):
    """A folder with what setup.sh looks at."""
    (tmp_path / "scripts").mkdir()
    for name in ("setup.sh", "test.sh", "constraints.txt"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
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
    assert done.returncode == 2
    assert done.stderr == "error: scripts/setup.sh takes 'core' or 'dev', and --newest, not 'everything'\n"


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


@pytest.fixture
def calls(clone):
    """Gives the clone an environment whose interpreter only notes calls of pip; returns a reader of what was noted."""
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "pyvenv.cfg").touch()
    note = clone / "calls"
    fake = clone / ".venv" / "bin" / "python"
    fake.write_text(f"""#!/bin/sh
case "$*" in
  "-m pip install"*) echo "$*" >> {note}; test ! -f {clone}/broken ;;
  "-m pytest"*) echo "$*" >> {note} ;;
  -V) echo Python 3.11.9 ;;
esac
""")
    fake.chmod(0o755)

    def read() -> list[str]:
        lines = note.read_text().splitlines() if note.exists() else []
        note.unlink(missing_ok=True)
        return lines

    return read


def test_the_tested_set_unless_the_newest_is_asked_for(clone, calls):
    assert setup(clone, "dev").returncode == 0
    (tested,) = calls()
    assert tested.endswith("--constraint scripts/constraints.txt -e .[dev]")
    assert "--upgrade" not in tested
    assert setup(clone, "--newest").returncode == 0
    (newest,) = calls()
    assert newest.endswith("--upgrade --upgrade-strategy eager -e .")
    assert "constraint" not in newest


def test_done_once_until_something_changes(clone, calls):
    def installs(*arguments: str) -> int:
        assert setup(clone, *arguments).returncode == 0
        return len(calls())

    assert [installs("dev"), installs("dev"), installs("core"), installs()] == [1, 0, 0, 0]  # dev holds all of core
    with (clone / "scripts" / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    assert [installs("core"), installs("core"), installs("dev"), installs("dev")] == [1, 0, 1, 0]
    assert [installs("dev", "--newest"), installs("dev", "--newest")] == [1, 1]  # there may be newer ones by now
    assert [installs("core"), installs("core"), installs("dev")] == [1, 0, 1]  # back to the tested set
    assert [installs("--newest", "core"), installs("dev")] == [1, 1]  # and what was dev's is no longer


def test_what_could_not_be_installed_is_not_taken_for_done(clone, calls):
    assert setup(clone, "dev").returncode == 0
    (clone / "broken").touch()
    done = setup(clone, "dev", "--newest")
    assert done.returncode == 1
    assert "leave --newest away" in done.stderr
    done = setup(clone, "dev")
    assert done.returncode == 1
    assert "add --newest" in done.stderr
    (clone / "broken").unlink()
    calls()
    assert setup(clone, "dev").returncode == 0
    assert len(calls()) == 1


@pytest.mark.parametrize("arguments", [["--newest", "--slow"], ["--slow", "--newest"]])
def test_the_tests_can_be_run_with_the_newest(clone, calls, arguments):
    command = ["bash", str(clone / "scripts" / "test.sh"), *arguments, "-k", "merge"]
    subprocess.run(command, cwd="/", check=True, capture_output=True)
    install, tests = calls()
    assert "--upgrade-strategy eager -e .[dev]" in install
    assert tests.endswith("-k merge")
    assert "--newest" not in tests


@pytest.fixture
def model_calls(clone, calls):
    """`calls` with an interpreter that reads pyproject.toml; what pip was asked for without dependencies."""
    fake = clone / ".venv" / "bin" / "python"
    lines = fake.read_text().splitlines()
    lines.insert(1, f'if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi')
    lines.insert(2, f'case "$*" in *--no-deps*) test ! -f {clone}/no-models || exit 1 ;; esac')
    fake.write_text("\n".join(lines) + "\n")
    return lambda: [call for call in calls() if "--no-deps" in call]


def test_the_models_of_the_tests_are_installed_as_files_alone(clone, model_calls):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert setup(clone, "core").returncode == 0
    assert model_calls() == []
    assert setup(clone, "dev").returncode == 0
    (call,) = model_calls()
    assert call.endswith(f"--constraint scripts/constraints.txt {' '.join(project['optional-dependencies']['real'])}")
    assert setup(clone, "dev").returncode == 0
    assert model_calls() == []


def test_an_index_without_the_models_is_no_failure(clone, model_calls):
    (clone / "no-models").touch()
    for _ in range(2):  # the second has nothing to do but to try them again
        done = setup(clone, "dev")
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("could not be installed (pip says why above): those tests are skipped\n")
    (clone / "no-models").unlink()
    assert setup(clone, "dev").returncode == 0
    assert len(model_calls()) == 1


class Installed:
    def __init__(self, name: str, version: str, direct: str | None = None) -> None:
        self.metadata, self.version, self.direct = {"Name": name}, version, direct

    def read_text(self, name: str) -> str | None:
        return self.direct if name == "direct_url.json" else None


def test_constraints_are_for_any_machine():
    here = [Installed("torch", "2.13.0+cpu"), Installed("Jinja2", "3.1.6"), Installed("ruamel.yaml", "0.19.1")]
    here += [
        Installed("mtft", "0.1.0"),
        Installed("pip", "26.1"),
        Installed("setuptools", "80"),
        Installed("triton", "3"),
    ]
    here += [Installed("nvidia-nccl-cu13", "2.28"), Installed("mine", "1", '{"url": "file:///home"}')]
    assert make_constraints.pins(here) == {"jinja2": "3.1.6", "ruamel-yaml": "0.19.1", "torch": "2.13.0"}


def test_the_constraints_file_holds_what_we_depend_on():
    text = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8")
    tested = make_constraints.read(text)
    assert list(tested) == sorted(tested)
    assert not any("+" in version for version in tested.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]:
        asked = Requirement(line)
        name = make_constraints.normal(asked.name)
        assert name == "mtft" or asked.specifier.contains(tested[name], prereleases=True), line


def test_differences_from_the_tested_set_are_listed():
    here = make_constraints.pins(make_constraints.distributions())
    text = f"# a comment\npytest==0.1\nnumpy=={here['numpy']}\nnot-here==1.0\n"
    assert make_constraints.differences(text) == [f"pytest {here['pytest']} (tested with 0.1)"]
