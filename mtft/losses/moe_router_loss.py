"""The router's load-balancing loss of mixture-of-experts models: not a part of our objective, and that is said.

It is no sum over tokens: it multiplies, over a whole micro-batch, how often an expert is chosen by how likely it was.
So it can't be split over micro-batches and ranks without changing, it belongs to no task, and padding counts in it.
transformers adds it only where the config says `output_router_logits: true` (off by default) and only to its own loss,
which is not the one that is minimised here. Someone who switched it on is told; someone who trains a router without it
gets a warning. With LoRA on the linear layers the routers stay frozen, so nothing is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mtft.common.errors import UserError


def check_router_loss(config: Any) -> None:
    """UserError for a model whose config asks for the router loss."""
    config = config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", None)
    if getattr(config, "output_router_logits", False) and weight:
        raise UserError(
            f"the model's config asks for a router loss (output_router_logits, weight {weight:g}), which is no sum "
            "over tokens and is not a part of this objective: it would be left out silently",
            where="model.path: config.json",
            do="set output_router_logits to false there: routers stay frozen under LoRA, and need no balancing then",
        )


def router_warning(config: Any, trained: Iterable[str]) -> str | None:
    """What to tell someone who trains routers; None for anything else. `trained`: names of the trained parameters."""
    if not getattr(config.get_text_config(), "router_aux_loss_coef", None):
        return None
    # the two factors of an adapter are one router
    names = [name.partition(".lora_")[0] for name in trained if ".router." in name or ".gate." in name]
    routers = list(dict.fromkeys(names))
    if not routers:
        return None
    return (
        f"{len(routers)} routers of experts are trained without a load-balancing loss ({routers[0]}, ...): "
        "watch for experts that nobody uses, or leave the routers out of what is trained"
    )
