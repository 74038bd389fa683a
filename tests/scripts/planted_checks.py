"""Checks that do on purpose what checks must not, and their worker: python planted_checks.py NAMES SCRATCH."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from check_gpu_worker import work
from gpu_checks import Check, at_most, holds, info

KNOWN = {"device": "cpu", "card": "a planted card", "card_gib": 80.0, "python": "3", "torch": "none", "cpus": 1}


def good(bench):
    print("a library that talks on the standard output")
    yield at_most("a small figure", 0.5, 1.0, "note of a figure")
    yield info("no bar")


def high(bench):
    yield at_most("a high figure", 2.0, 1.0)
    yield at_most("no number", float("nan"), 1.0)
    yield holds("goes on after a miss", True)


def raises(bench):
    yield holds("before it raised", True)
    raise RuntimeError("a planted error\nwith a second line")


def killed(bench):
    yield holds("before it was killed", True)
    os.kill(os.getpid(), signal.SIGKILL)


def leaves(bench):
    print("planted last words", file=sys.stderr, flush=True)
    os._exit(7)
    yield


def hangs(bench):
    yield holds("before it hung", True)
    time.sleep(600)


CHECKS = {
    check.name: check
    for check in (
        Check("good", "what is right", good, (0.1, 0.1)),
        Check("high", "what is too high", high, (0.1, 0.1)),
        Check("raises", "what raises", raises, (0.1, 0.1)),
        Check("killed", "what is killed", killed, (0.1, 0.1)),
        Check("leaves", "what leaves", leaves, (0.1, 0.1)),
        Check("hangs", "what hangs", hangs, (0.1, 0.1)),
        Check("long", "what takes an hour", good, (3600, 3600)),
        Check("two", "what needs two GPUs", good, (0.1, 0.1), gpus=2),
        Check("last", "what comes last", good, (0.1, 0.1)),
    )
}

if __name__ == "__main__":
    sys.exit(work(sys.argv[1].split(","), Path(sys.argv[2]), CHECKS, KNOWN))
