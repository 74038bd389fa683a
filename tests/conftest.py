"""For all tests: a deprecation that a library logs is a failure, and a failing run says which versions moved."""

import functools
import logging
import os
import re
import signal
from pathlib import Path

import pytest
import typer.main

from scripts.make_constraints import differences
from tests.warm_python.fixture import warm_python  # noqa: F401  (a fixture)

# As scripts/test.sh has it, for a plain `pytest` too: tests fork, and a child of a process with OpenMP threads hangs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CONSTRAINTS = Path(__file__).parents[1] / "scripts" / "constraints.txt"
LIBRARIES = ("transformers", "peft", "accelerate", "datasets", "trl")


class Deprecations(logging.Handler):
    """What the libraries log (not warn) about names that will go. pyproject.toml turns the warnings into errors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if re.search(r"deprecat|will be removed", text, re.IGNORECASE):
            self.seen.append(f"{record.name} ({record.pathname}:{record.lineno}): {text}")


LOGGED = Deprecations()


LONG = ("test_devices.py", "distributed/test_engines.py", "tests/real/test_models.py", "hostile/test_hostile.py")


REAL = Path(__file__).parent / "real"


def pytest_ignore_collect(collection_path, config):
    """`pytest -m real` reads tests/real alone: 20 s less. (No other file has the marker: test_real_models.py.)"""
    if config.getoption("markexpr").strip() != "real" or collection_path.parent != REAL.parent:
        return None
    tests = collection_path.is_dir() or collection_path.name.startswith("test_")
    return True if tests and collection_path != REAL else None


def pytest_collection_modifyitems(items) -> None:
    """Files with tests of minutes come first: at the end one worker would wait for the other."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))


def pytest_configure() -> None:
    # Ignored where a shell starts the tests in the background, and programs that tests signal would inherit that.
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)
    for name in LIBRARIES:  # they don't propagate
        logging.getLogger(name).addHandler(LOGGED)


@pytest.fixture(scope="session", autouse=True)
def commands_are_built_once():
    """Typer builds every command anew in each call of a program: 80 ms, where a test makes dozens of calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fails a test during which, or during whose fixtures, a library called something deprecated."""
    result = yield
    seen, LOGGED.seen = LOGGED.seen, []
    if seen:
        pytest.fail("a library logged that something is deprecated:\n" + "\n".join(seen), pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter, exitstatus) -> None:
    """After failures: the libraries that are not those of the last passing run. A new release is the first suspect."""
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return
    moved = differences(CONSTRAINTS.read_text(encoding="utf-8"))
    if moved:
        terminalreporter.section("installed versions that differ from scripts/constraints.txt")
        for line in moved:
            terminalreporter.write_line(line)
