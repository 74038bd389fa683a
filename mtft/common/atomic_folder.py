"""Folders that are there as a whole or not at all, and that replace nothing but their own kind.

A folder is written aside (`.NAME.part-HOST-PROCESS-x`) under the lock of its place, and swapped with what is there.
Where names can't be swapped, the old folder first moves aside (`.NAME.old-...`); whoever next reads or writes the place
puts it back if the writer was killed before the new one stood there. `.mtft_files.json` lists what was written: only a
folder that holds just that, unchanged, is ever replaced.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mtft.common.errors import UserError
from mtft.common.exchange import exchange
from mtft.common.fingerprint import blake2b
from mtft.common.folder_lock import FolderBusyError, sole_writer
from mtft.common.output_paths import check_output_folder
from mtft.common.own_files import read_own, write_own

CONTENTS = ".mtft_files.json"
SAMPLE = 1 << 20  # bytes at a file's start, middle and end that tell whether it was changed
LONG = 100  # bytes of a name that stand in the names aside, which hold a host and a number too
DAY = 86_400.0
REMEDY = "give another folder, or remove this one if nothing in it is needed"


@contextmanager
def atomic_folder(out: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A scratch folder beside `out` that takes its place when the block ends well, and vanishes when it does not.

    Nobody else writes `out` while the block runs. Raises UserError if nothing can be written there, another run does,
    something is there (with `overwrite`: something that was not written so, or was changed since), or `out` is, holds
    or lies in one of the `inputs`.
    """
    made = [folder for folder in out.absolute().parents if not os.path.lexists(folder)]  # nearest first
    try:
        _check_place(out, inputs)  # before the lock, which writes beside it
        target = _real(out)
        with sole_writer(target):
            check_replaceable(out, overwrite=overwrite, inputs=inputs)
            _clear_left_over(target)
            scratch = _make_scratch(target)
            try:
                yield scratch
                list_contents(scratch)
                mask = os.umask(0)
                os.umask(mask)
                scratch.chmod(0o755 & ~mask)
                _check_content(target, out, overwrite)  # it took a while
                _put_in_place(scratch, target)
            finally:
                _remove(scratch)
    except BaseException:
        with suppress(OSError):  # the first that isn't empty
            for folder in made:
                folder.rmdir()
        raise


def check_replaceable(out: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Raises UserError as atomic_folder does at its start: for what looks at its output before a long work."""
    _check_place(out, inputs)
    restore_replaced(out)
    _check_content(_real(out), out, overwrite)


def list_contents(folder: Path) -> None:
    """Writes the list of a folder's files, by which it is known to hold nothing else."""
    write_own(folder / CONTENTS, {"files": _marks(folder)})


def unlisted(folder: Path, *, besides: Sequence[str] = ()) -> list[str]:
    """Files of a folder that its list doesn't name, nor `besides`; all of them, if there is no sound list."""
    try:
        listed = read_own(folder / CONTENTS, {"files": dict}, do="")["files"]
    except UserError:
        listed = {}
    return [name for name in _files(folder) if name not in listed and name not in besides]


def restore_replaced(folder: Path) -> None:
    """Puts back a folder that was moved aside to be replaced, if the writer was killed before the new one stood there.

    Nothing happens where `folder` is there or was never moved. UserError if it can't be put back: says how.
    """
    target = _real(folder)
    if os.path.lexists(target) or not (moved := _moved_aside(target)):
        return
    try:
        with sole_writer(target, wait=1.0):
            if not os.path.lexists(target):
                moved[-1].rename(target)
    except FolderBusyError:
        raise
    except (OSError, UserError):
        raise UserError(
            f"a broken-off overwrite has left this folder as {moved[-1]}",
            where=str(folder),
            do=f"move it back: mv {moved[-1]} {target}",
        ) from None


def _moved_aside(target: Path) -> list[Path]:
    """What killed writers moved aside, oldest first."""
    name = re.compile(rf"{re.escape(f'.{_short(target)}.old-')}.+-\d+-[^-]+")
    try:
        found = [path for path in target.parent.iterdir() if name.fullmatch(path.name) and path.is_dir()]
    except OSError:
        return []
    return sorted(found, key=lambda path: path.stat().st_ctime_ns)


def _real(path: Path) -> Path:
    """Behind all links; of a link that leads to itself, the link (Path.resolve raises)."""
    return Path(os.path.realpath(path))


def _check_place(out: Path, inputs: Sequence[Path]) -> None:
    if os.path.islink(out):
        raise UserError("the output folder is a link", where=str(out), do=f"give what it points at: {_real(out)}")
    check_output_folder(out, inputs=inputs)
    for given in inputs:
        if _real(given) in _real(out).parents:
            raise UserError(f"the output folder lies in an input ({given})", where=str(out), do="give another folder")


def _make_scratch(target: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=f"{_aside(target, 'part')}{os.getpid()}-", dir=target.parent))
    except OSError as error:
        what = f"no folder can be made in {target.parent}: {error.strerror}"
        raise UserError(what, where=str(target), do="give another folder, or mend the permissions") from None


def _check_content(target: Path, out: Path, overwrite: bool) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError("there is something already", where=str(out), do="give another folder, or --overwrite")
    if (other := _foreign(target)) is not None:
        raise UserError(f"{other}; the folder is not replaced", where=str(out), do=REMEDY)


def _foreign(folder: Path) -> str | None:
    """What stands in a folder beside what atomic_folder wrote; None: nothing."""
    if not os.path.lexists(folder / CONTENTS):
        name = min(path.name for path in folder.iterdir())
        return f"mtft did not write this folder as a whole (it holds {name!r}, and no {CONTENTS})"
    try:
        listed = read_own(folder / CONTENTS, {"files": dict}, do="")["files"]
    except UserError as error:
        return f"{CONTENTS} is {error.what}"
    for name, mark in _marks(folder).items():
        if name not in listed:
            return f"the folder also holds {name!r}"
        if mark != listed[name]:
            return f"{name!r} was changed since it was written"
    return None


def _marks(folder: Path) -> dict[str, str]:
    """{path within the folder: what tells its content}; links and other things that are no files have none."""
    return {name: _mark(folder / name) for name in _files(folder)}


def _files(folder: Path) -> list[str]:
    """Paths within the folder of all that is no folder, but for the list itself."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return [name for path in found if (name := path.relative_to(folder).as_posix()) != CONTENTS]


def _mark(path: Path) -> str:
    """Size and hash of a file; of a large one, its start, middle and end."""
    if path.is_symlink() or not path.is_file():
        return "no file"
    size, whole = path.stat().st_size, blake2b(16)
    with path.open("rb") as file:
        for start in (0,) if size <= 3 * SAMPLE else (0, (size - SAMPLE) // 2, size - SAMPLE):
            file.seek(start)
            whole.update(file.read(3 * SAMPLE if size <= 3 * SAMPLE else SAMPLE))
    return f"{size} {whole.hexdigest()}"


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:  # a signal meanwhile: it ends the command, but leaves nothing
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _put_in_place(scratch: Path, target: Path) -> None:
    if not os.path.lexists(target):
        scratch.rename(target)
    elif not exchange(scratch, target):
        old = target.with_name(f"{_aside(target, 'old')}{os.getpid()}-{os.urandom(4).hex()}")
        target.rename(old)
        try:
            scratch.rename(target)
        except BaseException:
            old.rename(target)
            raise
        _remove(old)


def _short(target: Path) -> str:
    name = os.fsencode(target.name)
    return target.name if len(name) <= LONG else blake2b(16, name).hexdigest()


def _aside(target: Path, kind: str) -> str:
    return f".{_short(target)}.{kind}-{socket.gethostname()}-"


def _clear_left_over(target: Path) -> None:
    """Removes what killed writers of `target` left aside: this machine's dead processes, others' after a day.

    What was there before an overwrite is kept until something stands in its place.
    """
    kinds = ("part", "old") if target.exists() else ("part",)
    name = re.compile(rf"{re.escape(f'.{_short(target)}')}\.(?:{'|'.join(kinds)})-(.+)-(\d+)-[^-]+")
    for path in target.parent.iterdir():
        match = name.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        here = match[1] == socket.gethostname()
        if not _alive(int(match[2])) if here else time.time() - path.stat().st_mtime > DAY:
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
