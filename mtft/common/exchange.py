"""Two names swapped at once, where the system can: there is no moment at which one of them is not there."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

AT_FDCWD = -100  # <fcntl.h>: paths are meant as open() means them
RENAME_EXCHANGE = 2  # <linux/fs.h>


def exchange(one: Path, other: Path) -> bool:
    """Swaps two files or folders of one file system.

    False where it was not done: no Linux, or a file system without it (NFS). Then nothing has changed.
    """
    rename = _renameat2()
    return rename is not None and rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


@cache
def _renameat2() -> Callable[..., int] | None:
    try:
        found = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # no such call in this C library, or no such library (Windows)
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return found
