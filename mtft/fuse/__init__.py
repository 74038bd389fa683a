"""Fuse: a small base model and its tuned experts steer a strong model at every token, at decoding time.

    alpha/        how far each position moves: the fused log-probabilities, the root solver
    tokenizers/   do strong and small model share their tokens, and if not, which ones correspond
    decoding/     caches, multi-LoRA rows, one request, the decoding loop, scoring, traces
    speculative/  the expert drafts, the other models verify
    server/       OpenAI-compatible HTTP server          batch/   JSONL files in and out

Letters in names (`logits_BLV` is [B, L, V]): B rows of a batch, A rows still active, L new positions, C columns of a
cache, N positions of any rows, T experts, K router outputs, V ids of the strong model, M ids of the small models, G row
groups of the small model, D hidden width; in LoRA factors R rank (in A_TNR and B_TRM N is inputs, M outputs).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtft.fuse.alpha.fused_logits import fuse_logits
    from mtft.fuse.alpha.spec import FusionSpec
    from mtft.fuse.fused_model import FusedCausalLM

_MODULES = {
    "FusedCausalLM": "mtft.fuse.fused_model",
    "FusionSpec": "mtft.fuse.alpha.spec",
    "fuse_logits": "mtft.fuse.alpha.fused_logits",
}

__all__ = ["FusedCausalLM", "FusionSpec", "fuse_logits"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
