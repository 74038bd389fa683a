"""Whether a command can write its output: asked at its start, not after the work."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mtft.common.errors import UserError
from mtft.common.own_files import irregular

LONGEST_PATH = 3800  # bytes, of 4095: names of files lie below
LONGEST_NAME = 255 - 40  # bytes: side files of the same name with a suffix lie beside it


def check_output_file(path: Path, *, inputs: Iterable[Path | None] = (), overwrite: bool = False) -> None:
    """Raises UserError if no file can be written at `path`, one is there (without `overwrite`), or it is an input.

    Folders, links, devices, pipes and sockets are never replaced. Nothing is made or changed.
    """
    where = check_output_name(path, None)
    refuse_input_as_output(path, inputs)
    if path.is_symlink():
        target = os.path.realpath(path)
        raise UserError("the output is a link", where=where, do=f"give what it points at: {target}")
    if (kind := irregular(path)) is not None:
        raise UserError(f"the output is {kind}", where=where, do="give the path of a file")
    if path.exists() and not overwrite:
        raise UserError("the output is there already", where=where, do="give another path, or --overwrite")
    _try_to_write(path.parent, where)


def check_output_folder(path: Path, *, inputs: Iterable[Path | None] = (), key: str | None = None) -> None:
    """Raises UserError if `path` is no folder and can't become one, can't be written, or is (or holds) an input.

    key: where the user gave it (`output.dir`), for the error. Nothing is made or changed.
    """
    where = check_output_name(path, key)
    for given in inputs:
        if given is not None and Path(os.path.realpath(given)).is_relative_to(os.path.realpath(path)):
            raise UserError("the output folder is, or holds, an input", where=where, do="give another folder")
    if path.is_symlink() and not path.exists():
        raise UserError("the output folder is a broken link", where=where, do="give another folder")
    _try_to_write(path, where)


def refuse_input_as_output(path: Path, inputs: Iterable[Path | None]) -> None:
    """Raises UserError if `path` is one of the inputs, under whatever name."""
    for given in inputs:
        if given is not None and _same(path, given):
            raise UserError(f"the output is an input ({given})", where=str(path), do="give another output")


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def check_output_name(path: Path, key: str | None = None) -> str:
    """What an error calls the output; UserError if no file system of ours could."""
    where = f"{key}: {ascii(str(path))[1:-1]}" if key else ascii(str(path))[1:-1]
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("the output's name is not UTF-8", where=where, do="give a path in UTF-8") from None
    if "\0" in str(path):
        raise UserError("the output's name holds a zero byte", where=where, do="give another path")
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    whole = len(os.fsencode(os.path.abspath(path)))
    if whole > LONGEST_PATH:
        do = f"give a path of {LONGEST_PATH} bytes or less"
        raise UserError(f"the output's path is too long: {whole} bytes", where=f"{where[:200]}...", do=do)
    if longest > LONGEST_NAME:
        raise UserError(
            f"the output's name is too long: {longest} bytes",
            where=where,
            do=f"give names of {LONGEST_NAME} bytes or less",
        )
    where = f"{key}: {path}" if key else str(path)
    if os.path.realpath(path) == os.path.realpath("/"):
        raise UserError("the output is the root of all folders", where=where, do="give another path")
    for number, part in enumerate(path.parts):
        if part == ".." and not (above := Path(*path.parts[:number])).is_dir():
            raise UserError(f"there is no folder {above} to go up from", where=where, do="give a path without ..")
    return where


def _try_to_write(folder: Path, where: str) -> None:
    """A file without a name is written in the folder, or in the first one above it that is there: permissions,
    read-only disks, quotas and full disks show at once."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{place} is no folder", where=where, do="give another place")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        do = "free some space, or give another place" if full else "give another place, or mend the permissions"
        why = error.strerror or str(error)
        raise UserError(f"nothing can be written in {place}: {why}", where=where, do=do) from error
