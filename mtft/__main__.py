"""`mtft ...` and `python -m mtft ...`: run a command, turn what goes wrong into one block on stderr and an exit code.

    0  done
    1  failed (a broken disk, out of memory, a bug): `--debug` shows where
    2  the user's to mend: what is wrong, where, what to do
    130  interrupted (129, 143: by SIGHUP, SIGTERM; training saves then, and ends with 0)

Under torchrun or accelerate every rank runs this, and only the first one speaks.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

PLACES = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR}
LONGEST_BLOCK = 50  # lines of an error; what names a file's problems stops long before


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    from mtft.cli import app
    from mtft.common.errors import UserError

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments  # wherever it stands
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not debug:
        _hush_libraries()
    for stream in (sys.stdout, sys.stderr):  # LANG=C, LATIN-1: a sign that can't be written is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not _has_working_directory():
        _say("error: the working directory is gone\n  do:    cd to a folder that is there")
        return 2
    try:
        with _unwind_on_signals():
            app(arguments, prog_name="mtft")
    except SystemExit as stop:
        if _was_interrupt(stop):
            _say("interrupted")
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except UserError as error:
        return _report(error, str(error), 2, debug)
    except UnicodeEncodeError as error:
        if error.encoding == sys.getfilesystemencoding() and isinstance(error.object, str):
            what = f"error: a path can't be written in {error.encoding}\n  where: {error.object!a}"
            return _report(
                error, f"{what}\n  do:    set LC_ALL=C.UTF-8 (or PYTHONUTF8=1), or use other names", 2, debug
            )
        return _report(error, _failure(error), 1, debug)
    except ValueError as error:
        from data_mixers.common.errors import MixError

        if isinstance(error, MixError):
            return _report(error, f"error: {error}", 2, debug)
        return _report(error, _failure(error), 1, debug)
    except OSError as error:
        if error.errno in PLACES and isinstance(error.filename, str | bytes):
            what = f"error: {error.strerror}\n  where: {os.fsdecode(error.filename)}"
            return _report(error, f"{what}\n  do:    mend the path or its permissions, or give another", 2, debug)
        return _report(error, _failure(error), 1, debug)
    except Exception as error:  # noqa: BLE001  the last line of defence: people get a block, not a trace
        return _report(error, _failure(error), 1, debug)
    return 0


@contextmanager
def _unwind_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does, through its `finally` blocks: nothing is left half-written.

    The second signal ends it at once. A signal that is ignored (nohup) stays ignored.
    """

    def unwind(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # no SIGHUP on Windows
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _hush_libraries() -> None:
    """Deprecations inside libraries are for their developers; users can do nothing about them (PYTHONWARNINGS wins).
    Other warnings are lines for people.
    """
    import logging
    import warnings

    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # not where in the source it was said
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says on import which kernels a CPU lacks


def _was_interrupt(stop: SystemExit) -> bool:
    """True if typer made this exit from a KeyboardInterrupt; commands that end themselves on Ctrl-C have spoken."""
    return isinstance(getattr(stop.__context__, "__cause__", None), KeyboardInterrupt)


def _failure(error: Exception) -> str:
    """What a failure that nobody foresaw looks like."""
    lines = str(error).strip().splitlines()
    text = f"failed: {type(error).__name__}{': ' + lines[0] if lines else ''}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{text}\n  do:    free some space; the same command continues"
    from mtft.common.out_of_memory import is_out_of_memory

    if is_out_of_memory(error):
        return f"{text}\n  do:    lower train.micro_batch_tokens, or set train.gradient_checkpointing=true"
    return f"{text}\n  do:    the same command with --debug shows where; if it looks like our mistake, please report it"


def _report(error: Exception, block: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    from mtft.common.listing import first_lines

    lines = block.splitlines()
    _say("\n".join([*first_lines(lines[:-2], LONGEST_BLOCK, 2000), *first_lines(lines[-2:], 2, 2000)]))
    return code


def _say(text: str) -> None:
    from mtft.distributed.launch import is_main_process

    if is_main_process():
        with suppress(OSError):  # the terminal is gone: the exit code still says it
            print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
