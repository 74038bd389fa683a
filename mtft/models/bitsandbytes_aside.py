"""PEFT without bitsandbytes, as long as nothing in the process is quantised by it.

PEFT imports bitsandbytes wherever that is installed: when it is imported itself, and where it makes an adapter, to see
whether a layer is one of its own. That takes more than a second, and brings torch's compiler along. But there can be
no such layer before somebody has imported bitsandbytes, and then this does nothing.

Python's own sign for a module that can't be imported (None in sys.modules) stands while the block runs, and what PEFT
remembers of its search is forgotten after it, so quantised models of the same process are found as ever. One thing
remains: `peft.helpers`, which looks once, at its import, and whose search for LoRA targets by condition numbers
(KappaTune) reads quantised weights. `know_bitsandbytes` has it look again; mtft.models.quantization calls that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, reload
from typing import Any

NAME = "bitsandbytes"


@contextmanager
def bitsandbytes_aside() -> Iterator[None]:
    """Inside the block PEFT finds no bitsandbytes, unless it has been imported before."""
    if NAME in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    _forget_search()
    modules[NAME] = None
    try:
        yield
    finally:
        del modules[NAME]
        _forget_search()


def import_peft() -> None:
    """PEFT, and not bitsandbytes with it."""
    import transformers.modeling_utils  # noqa: F401  what PEFT needs of it looks for bitsandbytes in the open

    with bitsandbytes_aside():
        import_module("peft")


def know_bitsandbytes() -> None:
    """For a model that is to be quantised: what was imported without bitsandbytes looks for it again."""
    helpers: Any = sys.modules.get("peft.helpers")
    if helpers is not None and helpers.bnb is None:
        reload(helpers)


def _forget_search() -> None:
    found: Any = sys.modules.get("peft.import_utils")
    if found is not None:
        found.is_bnb_available.cache_clear()
        found.is_bnb_4bit_available.cache_clear()
