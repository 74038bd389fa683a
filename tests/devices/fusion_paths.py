"""Every way through fusion: what tests/devices/test_fusion.py runs on the simulated device."""

from collections.abc import Callable
from typing import Any

import torch

from mtft.fuse.alpha.spec import RULES, WEIGHTS, FusionSpec
from mtft.fuse.fused_model import FusedCausalLM
from tests.fuse import tiny

IDS, MASK = tiny.prompts()
NEW = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
Path = Callable[[FusedCausalLM, torch.Tensor, torch.Tensor], Any]


def generate(**options: Any) -> Path:
    return lambda fused, ids, mask: fused.generate(input_ids=ids, attention_mask=mask, **NEW | options)


def one(**options: Any) -> Path:
    return lambda fused, ids, mask: fused.generate(input_ids=ids[:1, 2:], **NEW | options)


def forward(fused: FusedCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return fused(ids, mask).logits


def score(chunk: int | None) -> Path:
    return lambda fused, ids, mask: vars(fused.score(ids, mask, chunk=chunk))


PATHS: dict[str, Path] = {
    "one row": one(),
    "a batch": generate(),
    "a batch whose rows end": generate(eos_token_id=list(range(3, 40))),
    "sampled with a seed": generate(do_sample=True, seed=[3, 4, 5]),
    "sampled, temperature, top-p": generate(do_sample=True, seed=3, temperature=0.7, top_p=0.9),
    "a penalty on repetition": generate(repetition_penalty=1.3),
    "a rule and weights for each row": generate(
        alpha_rule=["jeffreys", "fixed", "forward"], expert_weights=[[0.2, 0.8], [1.0, 0.0], [0.5, 0.5]]
    ),
    "speculative": generate(speculative=3),
    "speculative, one row": one(speculative=3),
    "speculative, auto": generate(speculative="auto"),
    "speculative, sampled": generate(speculative=2, do_sample=True, seed=3),
    "a prompt of the experts' own": lambda fused, ids, mask: fused.generate(
        input_ids=ids, attention_mask=mask, expert_input_ids=ids[:, 2:], expert_attention_mask=mask[:, 2:], **NEW
    ),
    "forward": forward,
    "score": score(None),
    "score in chunks": score(3),
}
IN_THE_FAST_SUITE = (
    "one row",
    "a batch whose rows end",
    "sampled, temperature, top-p",
    "speculative",
    "score in chunks",
)
SPECS = {
    **{f"alpha by {rule}": FusionSpec(alpha_rule=rule) for rule in RULES},
    **{f"weights {name}": FusionSpec(weights=name) for name in WEIGHTS if name not in ("user", "router")},
    "weights user": FusionSpec(weights="user", user_weights=(0.25, 0.75)),
    "plausibility": FusionSpec(plausibility=0.1),
    "an alpha for each expert": FusionSpec(alpha_rule="fixed", alpha=(0.5, 0.7)),
}
