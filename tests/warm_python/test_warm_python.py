"""What a program sees and how it ends is as under a Python of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

SEEN = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("MARK"), sys.stdin.read(), __name__]))
print("aside", file=sys.stderr)
"""
ENDS = {
    "the end": "pass",
    "a status": "import sys; sys.exit(3)",
    "a message": "import sys; sys.exit('told')",
    "an error": "1 / 0",
    "an interrupt": "raise KeyboardInterrupt",
    "a thread": "import threading; threading.Timer(0.3, print, ['last']).start()",
    "a signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "a kill": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "a handler at exit": "import atexit; atexit.register(print, 'last')",
}


@pytest.mark.parametrize("kind", ["file", "-c", "-m"])
def test_a_program_sees_what_it_is_given(warm_python, tmp_path, kind):
    (tmp_path / "program.py").write_text(SEEN)
    what = {"file": ["program.py"], "-c": ["-c", SEEN], "-m": ["-m", "program"]}[kind]
    found = []
    for python in (sys.executable, warm_python):
        done = subprocess.run(
            [python, *what, "a b", "--c"],
            cwd=tmp_path,
            env={**os.environ, "MARK": "é"},
            input="given",
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "aside\n")
        found.append(json.loads(done.stdout))
    assert found[0] == found[1] == [["a b", "--c"], str(tmp_path), "é", "given", "__main__"]


@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends_as_it_ends(warm_python, end):
    own, warm = (
        subprocess.run([python, "-c", ENDS[end]], capture_output=True, text=True)
        for python in (sys.executable, warm_python)
    )
    assert (warm.returncode, warm.stdout) == (own.returncode, own.stdout)
    assert warm.stderr.splitlines()[-1:] == own.stderr.splitlines()[-1:]


WAITS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_signals_arrive_and_a_kill_leaves_nobody(warm_python):
    asked, killed = (subprocess.Popen([warm_python, "-c", WAITS], stdout=subprocess.PIPE, text=True) for _ in range(2))
    numbers = [int(program.stdout.readline()) for program in (asked, killed)]
    asked.send_signal(signal.SIGTERM)
    assert asked.wait(timeout=20) == 7
    killed.kill()
    killed.wait()
    until = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{number}") for number in numbers):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_options_of_the_interpreter_are_for_a_real_one(warm_python):
    done = subprocess.run([warm_python, "-X", "utf8", "-c", "print(1)"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n")


def test_the_imports_are_done(warm_python):
    code = "import sys; print('mtft.training.trainer' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.run([warm_python, "-c", code], capture_output=True, text=True).stdout == "True True\n"
