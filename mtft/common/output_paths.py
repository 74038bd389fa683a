"""Whether a command can write its output: asked at its start, not after the work."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mtft.common.errors import UserError
from mtft.common.own_files import irregular

LONGEST_NAME = 255 - 40  # bytes: side files of the same name with a suffix lie beside it


def check_output_file(path: Path, *, inputs: Iterable[Path | None] = (), overwrite: bool = False) -> None:
    """Raises UserError if no file can be written at `path`, one is there (without `overwrite`), or it is an input.

    Folders, links, devices, pipes and sockets are never replaced. The folders above are made.
    """
    _check_name(path)
    refuse_input_as_output(path, inputs)
    if path.is_symlink():
        target = os.path.realpath(path)
        raise UserError("the output is a link", where=str(path), do=f"give what it points at: {target}")
    if (kind := irregular(path)) is not None:
        raise UserError(f"the output is {kind}", where=str(path), do="give the path of a file")
    if path.exists() and not overwrite:
        raise UserError("the output is there already", where=str(path), do="give another path, or --overwrite")
    _try_to_write(path.parent, path)


def check_output_folder(path: Path, *, inputs: Iterable[Path | None] = ()) -> None:
    """Raises UserError if `path` is no folder and can't become one, can't be written, or is (or holds) an input."""
    _check_name(path)
    for given in inputs:
        if given is not None and (real := given.resolve()) and (path.resolve() in (real, *real.parents)):
            raise UserError("the output folder is, or holds, an input", where=str(path), do="give another folder")
    if not path.is_dir():
        if (kind := "a file" if path.is_file() else irregular(path)) is not None or path.is_symlink():
            raise UserError(f"the output folder is {kind or 'a broken link'}", where=str(path), do="give a folder")
        _try_to_write(path.parent, path)
    else:
        _try_to_write(path, path)


def refuse_input_as_output(path: Path, inputs: Iterable[Path | None]) -> None:
    """Raises UserError if `path` is one of the inputs, under whatever name."""
    for given in inputs:
        if given is not None and _same(path, given):
            raise UserError(f"the output is an input ({given})", where=str(path), do="give another output")


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return one.resolve() == other.resolve()


def _check_name(path: Path) -> None:
    try:
        name = os.fsencode(path.name)
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("the output's name is not UTF-8", where=ascii(str(path)), do="give a path in UTF-8") from None
    if "\0" in str(path):
        raise UserError("the output's name holds a zero byte", where=ascii(str(path)), do="give another path")
    if len(name) > LONGEST_NAME:
        raise UserError(
            f"the output's name is too long: {len(name)} bytes", where=str(path), do=f"{LONGEST_NAME} bytes or less"
        )


def _try_to_write(folder: Path, path: Path) -> None:
    """A small file is written and removed: permissions, read-only disks, quotas and full disks show at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        blocked = next((above for above in (folder, *folder.parents) if above.exists() and not above.is_dir()), None)
        if blocked is not None:
            raise UserError(f"{blocked} is no folder", where=str(path), do="give another place") from error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        do = "free some space, or give another place" if full else "give another place, or mend the permissions"
        raise UserError(f"nothing can be written there: {error.strerror or error}", where=str(path), do=do) from error
