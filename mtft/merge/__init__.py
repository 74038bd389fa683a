"""Merge: several LoRA adapters into one plain PEFT adapter, exactly, in seconds, without the base model.

factors.py reads adapters as D_k = s_k B_k A_k; core.py turns one module of all of them into small matrices; a method
(methods/, one a file) merges those; export.py writes what PEFT and vLLM load. retention.py says what each task kept.
"""

from mtft.adapters.lora_factors import LoraAdapter, LoraFactors, read_adapter
from mtft.common.errors import MergeError
from mtft.merge.engine.merge import merge_adapters, merge_delta
from mtft.merge.engine.report import MergeReport
from mtft.merge.linalg.core_space import CoreSpace, to_core
from mtft.merge.methods import METHODS

__all__ = [
    "METHODS",
    "CoreSpace",
    "LoraAdapter",
    "LoraFactors",
    "MergeError",
    "MergeReport",
    "merge_adapters",
    "merge_delta",
    "read_adapter",
    "to_core",
]
