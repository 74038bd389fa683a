"""MTFT: fine-tune one language model on many tasks, and know what to mix, how to weigh it, and what you got.

The public names stand in `__all__`; each is imported from its package when it is first used, so that `import mtft`
loads neither torch nor transformers (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtft.evaluation import evaluate
    from mtft.fuse import FusedCausalLM, FusionSpec, fuse_logits
    from mtft.gradients import TaskGradients
    from mtft.losses import make_balancer
    from mtft.merge import merge_adapters
    from mtft.recipe import Recipe, load_recipe
    from mtft.report import write_report
    from mtft.training import MultiTaskTrainer, train

__version__ = "0.1.0"

_PACKAGES = {
    "FusedCausalLM": "mtft.fuse",
    "FusionSpec": "mtft.fuse",
    "MultiTaskTrainer": "mtft.training",
    "Recipe": "mtft.recipe",
    "TaskGradients": "mtft.gradients",
    "evaluate": "mtft.evaluation",
    "fuse_logits": "mtft.fuse",
    "load_recipe": "mtft.recipe",
    "make_balancer": "mtft.losses",
    "merge_adapters": "mtft.merge",
    "train": "mtft.training",
    "write_report": "mtft.report",
}

__all__ = [
    "FusedCausalLM",
    "FusionSpec",
    "MultiTaskTrainer",
    "Recipe",
    "TaskGradients",
    "evaluate",
    "fuse_logits",
    "load_recipe",
    "make_balancer",
    "merge_adapters",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PACKAGES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
