"""One command at a time writes a folder or a file: a lock that the kernel takes back when its process dies.

The lock lies beside what it guards (`.NAME.lock`), so that renaming the folder doesn't move it; inside, where the
folder above can't be written (a mounted volume). It says who holds it, and goes away with the command. POSIX record
locks: no forked child inherits them, and NFS passes them on to other machines. Where a file system has none, a warning
says so.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mtft.common.errors import UserError
from mtft.common.fingerprint import blake2b

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

OURS = b'{"process": '
INSIDE = ".mtft.lock"
POLL = 0.1  # seconds between two tries of one who waits
LONG = 200  # bytes of a name; with dot and suffix it must stay below 255
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_TAKEN = (errno.EACCES, errno.EAGAIN)


class FolderBusyError(UserError):
    """Another command writes the folder."""


@dataclass
class _Held:
    """A lock of this process. `depth`: how many blocks of its thread are inside."""

    file: int
    thread: int
    process: int
    depth: int = 1


_held: dict[Path, _Held] = {}
_guard = threading.Lock()


@contextmanager
def sole_writer(target: str | Path, *, wait: float = 0.0) -> Iterator[None]:
    """Nobody else writes `target` (a folder or a file, there already or not) while the block runs.

    The same thread may take it again inside of the block. wait: seconds to wait for another writer's end.
    Raises FolderBusyError (process, host, since) if another one holds it, UserError if nothing can be written there.
    """
    real = Path(os.path.realpath(target))
    until = time.monotonic() + wait
    while not (taken := _take(real)):
        if time.monotonic() >= until:
            raise _busy(Path(target), real)
        time.sleep(POLL)
    try:
        yield
    finally:
        if taken == "locked":
            _release(real)


def refuse_busy_below(folder: Path) -> None:
    """FolderBusyError if another process writes a folder somewhere below: for who is about to move it."""
    if fcntl is None:
        return
    for lock in folder.rglob(".*.lock"):
        target = lock.parent if lock.name == INSIDE else lock.with_name(lock.name[1 : -len(".lock")])
        with _guard:
            held = _held.get(Path(os.path.realpath(target)))
            if held is not None and held.process == os.getpid():
                continue  # ours; opening and closing the file would give it back
            try:
                file = os.open(lock, os.O_RDWR)
            except OSError:
                continue
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _TAKEN:
                    raise _busy(target, Path(os.path.realpath(target))) from None
            finally:
                os.close(file)


def _take(real: Path) -> str:
    """Tries once. "locked", "unlocked" (there are no locks here), or "" if another writer holds it."""
    with _guard:
        held = _held.get(real)
        if held is not None and held.process == os.getpid():
            if held.thread != threading.get_ident():
                return ""
            held.depth += 1
            return "locked"
        if fcntl is None:
            return "unlocked"
        path, file = _open(real)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(file, path):  # its holder has removed it since we opened it
                os.close(file)
                return ""
        except OSError as error:
            os.close(file)
            if error.errno in _TAKEN:
                return ""
            if error.errno in _NO_LOCKS:
                path.unlink(missing_ok=True)
                warnings.warn(f"{real.parent} has no file locks: let no second command write {real.name}", stacklevel=4)
                return "unlocked"
            raise
        if (there := os.read(file, 1000)) and not there.startswith(OURS):
            os.close(file)
            raise UserError(
                "a file of somebody else stands where the lock would be",
                where=str(path),
                do="move it, or give another output",
            )
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(_about_this_process()).encode(), 0)
        _held[real] = _Held(file, threading.get_ident(), os.getpid())
        return "locked"


def _release(real: Path) -> None:
    with _guard:
        held = _held[real]
        held.depth -= 1
        if held.depth or held.process != os.getpid():  # a forked child has no lock to give back
            return
        del _held[real]
        for path in _places(real):
            if _is_at(held.file, path):  # removed while it is held: whoever has it open sees that it is gone
                path.unlink(missing_ok=True)
        os.close(held.file)


def _open(real: Path) -> tuple[Path, int]:
    beside, inside = _places(real)
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):  # another's file
            os.fchmod(file, 0o666)  # whatever the umask is: every user of a shared folder has to see it
        return beside, file
    except OSError as error:
        if beside.exists():
            raise UserError(
                f"the lock of the folder can't be opened: {error.strerror}",
                where=str(beside),
                do="another user's run may be at work; if none is, remove the file",
            ) from error
        try:
            return inside, os.open(inside, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            raise UserError(
                f"nothing can be written there: {error.strerror}", where=str(real), do="give another place"
            ) from error


def _places(real: Path) -> tuple[Path, Path]:
    name = real.name
    if len(os.fsencode(name)) > LONG:
        name = blake2b(16, os.fsencode(name)).hexdigest()
    return real.with_name(f".{name}.lock"), real / INSIDE


def _is_at(file: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except OSError:
        return False
    here = os.fstat(file)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _about_this_process() -> dict[str, object]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"process": os.getpid(), "host": socket.gethostname(), "since": since}


def _busy(target: Path, real: Path) -> FolderBusyError:
    who = ""
    held = _held.get(real)
    ours = held is not None and held.process == os.getpid()
    # A POSIX lock goes when its process closes any descriptor of the file: our own is never opened again.
    for path in () if ours else _places(real):
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            who = f" (process {about['process']} on {about['host']}, since {about['since']})"
            break
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if ours:
        who = f" (this process, {os.getpid()}, in another thread)"
    what = "folder" if real.is_dir() or not real.suffix else "file"
    return FolderBusyError(
        f"another run writes this {what}{who}",
        where=str(target),
        do="wait for it or stop it; or give another output",
    )
