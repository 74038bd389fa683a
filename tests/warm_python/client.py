"""Stands in for `python`: hands a program over to the server, passes on signals, and ends as the program does.

What the server does not do (options of the interpreter itself) is left to a real one.
"""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main():
    python, (executable, *arguments) = os.environ["MTFT_TESTS_PYTHON"], sys.argv[1:]
    while arguments[:1] == ["-u"]:
        del arguments[0]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-c", "-m")):
        os.execv(python, [python, *arguments])
    kind, *rest = arguments if arguments[0].startswith("-") else ("file", *arguments)
    request = {
        "kind": kind,
        "program": rest[0],
        "arguments": rest,
        "executable": executable,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["MTFT_WARM_PYTHON"])
    text = json.dumps(request).encode() + b"\n"
    sent = socket.send_fds(connection, [text], [0, 1, 2])
    connection.sendall(text[sent:])
    answers = connection.makefile("r")
    process = int(answers.readline())
    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: os.kill(process, number))
    status = int(answers.readline() or -signal.SIGKILL)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


main()
