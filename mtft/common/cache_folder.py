"""Where what can be made again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """$MTFT_CACHE, else ~/.cache/mtft."""
    return Path(os.environ.get("MTFT_CACHE") or Path.home() / ".cache" / "mtft")
