"""Processes that run code of the user's own: each begins a group, and nothing of the group outlives what it was for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def start_group(
    command: Sequence[str], folder: Path, *, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """A process in a session of its own, started in `folder`; what it says on stderr is dropped."""
    return subprocess.Popen(
        command, cwd=folder, stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL, start_new_session=True
    )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a process with all that it started, but for what has left its session (setsid)."""
    if sys.platform == "win32":
        process.kill()
    else:
        with suppress(ProcessLookupError, PermissionError):  # nobody is left (macOS: the second where all have ended)
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
