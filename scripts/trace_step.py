"""How many files of ours one optimizer step crosses, and what `mtft fuse generate` imports of merging.

    python scripts/trace_step.py            ->    {"files": 11, "switches": 40, "merge_methods": 0}

A tiny run (quickstart's weak model, LoRA, two tasks of a few rows each, on the CPU) is profiled from the end of one
optimizer step to the end of the next one, in the middle of the run:

    files     files of mtft and data_mixers that a call goes into
    switches  calls whose nearest caller among those files is another file; each pair of lines that call counts once
              a call

The second part asks a fresh interpreter, in which everything is imported that `mtft fuse generate` imports, for the
modules of mtft.merge.methods.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS = (str(ROOT / "mtft") + "/", str(ROOT / "data_mixers") + "/")
FUSE_GENERATE = """
import sys, mtft.fuse.__main__
"""


class CallTrace:
    """Counts calls between files of ours, as a profiler of the main thread."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.switches: Counter[tuple[str, str]] = Counter()
        self.sequence: list[str] = []

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(OURS):
            return
        self.files[name] += 1
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(OURS):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != name:
            self.switches[caller.f_code.co_filename, name] += 1
        self.sequence.append(name)


if __name__ == "__main__":
    pass
