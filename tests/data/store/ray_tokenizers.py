"""Tokenizers that say where they work, or die there. Ray's workers import this file."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tests.data.toy_examples import TEMPLATES, tokenizer


def _texts(arguments):
    return [arguments[0]] if isinstance(arguments[0], str) else list(arguments[0])


class SaysWhere(PreTrainedTokenizerFast):
    """Leaves a file NODE.PID in `folder` for each worker that encodes; takes some seconds longer there."""

    driver: int
    folder: Path
    seconds: float

    def __call__(self, *arguments, **options):
        if os.getpid() != self.driver:
            import ray

            (self.folder / f"{ray.get_runtime_context().get_node_id()}.{os.getpid()}").touch()
            time.sleep(self.seconds)
        return super().__call__(*arguments, **options)


class Dies(PreTrainedTokenizerFast):
    """Kills the process that encodes a text with FATAL in it, but not the driver; leaves a file of its PID."""

    driver: int
    folder: Path

    def __call__(self, *arguments, **options):
        if os.getpid() != self.driver and any("FATAL" in text for text in _texts(arguments)):
            (self.folder / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(*arguments, **options)


def made_as(kind, **attributes):
    """The toy tokenizer as a SaysWhere or Dies."""
    made = tokenizer(TEMPLATES["chatml"])
    made.__class__, made.driver = kind, os.getpid()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made
