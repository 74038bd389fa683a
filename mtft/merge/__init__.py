"""Merge: several LoRA adapters into one plain PEFT adapter, exactly, in seconds, without the base model.

factors.py reads adapters as D_k = s_k B_k A_k; core.py turns one module of all of them into small matrices; a method
(methods/, one a file) merges those; export.py writes what PEFT and vLLM load. retention.py says what each task kept.
"""

from .api import merge, merge_delta
from .core import Core, to_core
from .errors import MergeError
from .factors import Adapter, Factors, read_adapter
from .methods import METHODS
from .report import MergeReport

__all__ = [
    "METHODS",
    "Adapter",
    "Core",
    "Factors",
    "MergeError",
    "MergeReport",
    "merge",
    "merge_delta",
    "read_adapter",
    "to_core",
]
