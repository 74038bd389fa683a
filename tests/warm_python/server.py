"""A Python that has imported torch and the libraries on it, and forks itself for each program that tests start.

    python -m tests.warm_python.server SOCKET

Imports are 6 CPU-seconds of a process, and the slow tests start some hundred. `warm-python` (beside this file) is the
other end: a stand-in for sys.executable that hands over its arguments, environment, folder and open files.

One program is one connection: a line of JSON with three files, answered by the program's process id and, at its end,
its exit status. A connection that closes kills its program, and the end of standard input ends everything.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

PRELOADED = (
    "accelerate.commands.launch",
    "datasets",
    "mtft.cli.main",
    "mtft.training.finalize",
    "mtft.training.run_training",
    "mtft.training.trainer",
    "peft",
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
)


def serve(path: str) -> tuple[dict[str, Any], list[int]]:
    """Forks a process for each request; returns in the forked one only, with what it has to run."""
    wake_in, wake_out = os.pipe()
    os.set_blocking(wake_out, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_out)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    selector = selectors.DefaultSelector()
    for file in (0, wake_in, server):
        selector.register(file, selectors.EVENT_READ)
    programs: dict[int, socket.socket] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:  # the tests are over
                for process in programs:
                    os.kill(process, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj == wake_in:
                os.read(wake_in, 4096)
                for process in list(programs):
                    ended, status = os.waitpid(process, os.WNOHANG)
                    if ended:
                        connection = programs.pop(process)
                        selector.unregister(connection)
                        with contextlib.suppress(OSError):  # the stand-in was killed just now
                            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                        connection.close()
            elif key.fileobj is server:
                connection, _ = server.accept()
                request, files = receive(connection)
                process = os.fork()
                if process == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    selector.close()
                    for other in (server, connection, *programs.values()):
                        other.close()
                    for file in (wake_in, wake_out):
                        os.close(file)
                    return request, files
                for file in files:
                    os.close(file)
                connection.sendall(f"{process}\n".encode())
                selector.register(connection, selectors.EVENT_READ, process)
                programs[process] = connection
            elif not key.fileobj.recv(1):  # the stand-in was killed
                selector.unregister(key.fileobj)
                programs.pop(key.data).close()
                os.kill(key.data, signal.SIGKILL)
                os.waitpid(key.data, 0)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    files = array.array("i")
    text, control, *_ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(3 * files.itemsize))
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(data)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 16)
    return json.loads(text), files.tolist()


def become(request: dict[str, Any], files: list[int]) -> None:
    """The program: its files, folder, environment, arguments and path."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # The objects of old hold what they found out of the server's own files.
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(stream(io.FileIO(number, mode, closefd=False)), "utf-8", errors, line_buffering=lines)
        for stream, number, mode, errors, lines in (
            (io.BufferedReader, 0, "rb", "strict", False),
            (io.BufferedWriter, 1, "wb", "strict", os.isatty(1)),
            (io.BufferedWriter, 2, "wb", "backslashreplace", True),
        )
    )
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable = request["executable"]
    sys.argv = request["arguments"]
    search = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = list(dict.fromkeys([*search, *sys.path]))


def run(kind: str, program: str) -> None:
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(program, None)  # runpy warns of what is there already
        runpy._run_module_as_main(program)
    elif kind == "-c":
        sys.path.insert(0, "")
        sys.argv[:1] = ["-c"]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(program, "<string>", "exec"), vars(main))
    else:
        sys.path.insert(0, str(Path(program).resolve().parent))
        runpy.run_path(program, run_name="__main__")


def status_of(kind: str, program: str) -> int:
    """Runs the program to what the interpreter makes of its end. SIGINT's number below 0 for a KeyboardInterrupt."""
    try:
        run(kind, program)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 255
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001  (as the interpreter itself)
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    for module in PRELOADED:
        __import__(module)
    gc.collect()
    gc.freeze()  # what is shared stays so
    job, handles = serve(sys.argv[1])
    become(job, handles)
    status = status_of(job["kind"], job["program"])
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)  # taking half a million objects down is two CPU-seconds
