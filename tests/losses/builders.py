"""Small batches by hand, and a tiny random model: shared by the tests of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mtft.data.batching.batch import IGNORE, PADDING, Batch


@dataclass(frozen=True)
class Sample:
    """One example: its tokens, and how many of the last ones are supervised."""

    task: int
    ids: tuple[int, ...]
    supervised: int

    @property
    def labels(self) -> list[int]:
        first = len(self.ids) - self.supervised
        return [self.ids[t + 1] if t + 1 >= first else IGNORE for t in range(len(self.ids) - 1)] + [IGNORE]


def random_samples(shape: Sequence[tuple[int, int, int]], vocabulary: int, seed: int = 0) -> list[Sample]:
    """Samples of (task, tokens, supervised tokens) with random ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = [tuple(torch.randint(1, vocabulary, (length,), generator=generator).tolist()) for _, length, _ in shape]
    return [Sample(task, ids, supervised) for (task, _, supervised), ids in zip(shape, ids, strict=True)]


def lay_out(rows: Sequence[Sequence[Sample]], width: int | None = None) -> Batch:
    """A Batch whose row b holds the samples rows[b] one after the other, padded to `width` (None = the longest row)."""
    width = width or max((sum(len(sample.ids) for sample in row) for row in rows), default=1)
    fields = {"input": 0, "position": 0, "segment": PADDING, "task": PADDING, "labels": IGNORE}
    table = {name: torch.full((len(rows), width), fill, dtype=torch.int64) for name, fill in fields.items()}
    for b, row in enumerate(rows):
        at = 0
        for segment, sample in enumerate(row):
            span = slice(at, at + len(sample.ids))
            table["input"][b, span] = torch.tensor(sample.ids)
            table["position"][b, span] = torch.arange(len(sample.ids))
            table["segment"][b, span], table["task"][b, span] = segment, sample.task
            table["labels"][b, span] = torch.tensor(sample.labels)
            at = span.stop
    return Batch(table["input"], table["position"], table["segment"].int(), table["task"].int(), table["labels"])


@cache
def tiny_llama(vocabulary: int = 61):
    """A random fp32 Llama, shared between tests: don't change it."""
    return new_llama(vocabulary)


def new_llama(vocabulary: int = 61, seed: int = 0):
    """A random fp32 Llama: 2 layers, width 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attn_implementation="eager",
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def isolated_inputs(batch: Batch) -> dict[str, Tensor]:
    """The oracle for isolation: every position, and a dense mask that lets a token see its own example's past only."""
    segment_BT = batch.segment_ids_BT
    T = segment_BT.shape[1]
    same_BTT = (segment_BT[:, :, None] == segment_BT[:, None, :]) & (segment_BT[:, :, None] >= 0)
    seen_BTT = (same_BTT & torch.ones(T, T, dtype=torch.bool).tril()) | torch.eye(T, dtype=torch.bool)
    mask_B1TT = torch.zeros(seen_BTT.shape).masked_fill(~seen_BTT, torch.finfo(torch.float32).min)[:, None]
    return {
        "input_ids": batch.input_ids_BT,
        "position_ids": batch.position_ids_BT,
        "attention_mask": mask_B1TT,
        "use_cache": False,
    }


def gradient(model, loss: Tensor) -> Tensor:
    """Flat gradient of `loss` in all parameters; a parameter that got none is an error."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
