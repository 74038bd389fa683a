"""Where what can be made again is kept between runs, and the user's own folder."""

from __future__ import annotations

import os
from pathlib import Path

from mtft.common.errors import UserError
from mtft.common.output_paths import check_output_folder


def default_cache() -> Path:
    """$MTFT_CACHE, else ~/.cache/mtft. Raises UserError if the user has no folder and MTFT_CACHE isn't set."""
    return Path(os.environ.get("MTFT_CACHE") or expand_home("~") / ".cache" / "mtft")


def writable_cache() -> Path:
    """The same, made if it isn't there. Raises UserError if nothing can be written in it."""
    folder = default_cache()
    try:
        check_output_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        do = "set MTFT_CACHE to a folder that can be written"
        raise UserError(f"the cache: {error.what}", where=str(folder), do=do) from error
    return folder


def expand_home(text: str) -> Path:
    """The path with ~ and ~name replaced. Raises UserError if there is no such user, or it has no folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        do = "write the path out, or set HOME (for the cache: MTFT_CACHE)"
        raise UserError("there is no home folder for ~", where=text, do=do) from None
