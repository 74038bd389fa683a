"""Answers to many prompts at once, by transformers' `generate`: prompts of similar length share a batch.

Greedy at temperature 0. Else a token is drawn as argmax(logits / temperature + g), g standard Gumbel noise (which is a
draw from the softmax: Maddison et al., 1611.00712, section 2), and the noise of an answer comes from the seed, its row
and its number alone: the same answers whatever batches and ranks the rows are on, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mtft.common.errors import UserError
from mtft.distributed.collectives import from_all_ranks, in_group
from mtft.distributed.launch import LaunchConfig
from mtft.evaluation.heldout_loss import Told
from mtft.losses.token_nll import bare_model
from mtft.models.preallocated_cache import preallocated_cache

# In transformers both take no notice of the attention mask, so padding is text to them, and RWKV's state mixes rows.
_ONE_BY_ONE = ("rwkv", "xlstm")


@dataclass(frozen=True)
class GenerateOptions:
    """How answers are made (tasks.*.generate).

    end_ids, pad_id  tokens that end an answer, and that fill up a batch
    tokens_at_once   prompts and answers of a batch together
    """

    max_new_tokens: int
    temperature: float
    stop: tuple[str, ...]
    end_ids: tuple[int, ...]
    pad_id: int
    tokens_at_once: int
    seed: int = 0


def generate_answers(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    options: GenerateOptions,
    tokenizer: Any,
    *,
    samples: int = 1,
    told: Told | None = None,
) -> list[list[list[int]]]:
    """Token ids of `samples` answers to each prompt, [N][samples][tokens], end token included where there is one.

    A collective call: each rank answers a part of the prompts, all get the whole. `model`: in evaluation mode.
    Raises UserError for a prompt that fills the model's window.
    """
    import torch.distributed as dist

    rank, world = (dist.get_rank(), dist.get_world_size()) if in_group() else (0, 1)
    bare: Any = bare_model(model)
    window = getattr(bare.config.get_text_config(), "max_position_embeddings", None) or math.inf
    wanted = [(row, sample) for row in range(len(prompts)) for sample in range(samples)]
    alone = bare.config.model_type in _ONE_BY_ONE
    batches = _batches(prompts, wanted, replace(options, tokens_at_once=0) if alone else options, window)
    mine = batches[rank::world]
    mine += batches[:1] * (-(-len(batches) // world) - len(mine))  # sharded weights: all ranks make as many passes
    found: dict[tuple[int, int], list[int]] = {}
    synced = world > 1 and LaunchConfig.from_environment().shards_weights
    with _plain_generation(model, synced=synced) as generate:
        for batch in mine:
            found |= dict(zip(batch, _answer_batch(generate, model, prompts, batch, options, tokenizer, window)))
            if told is not None:
                told(min(len(found) * world, len(wanted)), len(wanted))
    whole = {key: ids for part in from_all_ranks(found) for key, ids in part.items()}
    return [[whole[row, sample] for sample in range(samples)] for row in range(len(prompts))]


def _batches(
    prompts: Sequence[np.ndarray], wanted: Sequence[tuple[int, int]], options: GenerateOptions, window: float
) -> list[list[tuple[int, int]]]:
    """Longest first; as many in a batch as `tokens_at_once` allows, one at least."""
    batches: list[list[tuple[int, int]]] = []
    for key in sorted(wanted, key=lambda key: (-len(prompts[key[0]]), key)):
        if len(prompts[key[0]]) >= window:
            what = f"a prompt of {len(prompts[key[0]])} tokens leaves no room for an answer in the model's {window}"
            raise UserError(what, where="tasks.*.generate", do="lower train.max_length")
        longest = len(prompts[batches[-1][0][0]]) if batches else 0
        if batches and (len(batches[-1]) + 1) * (longest + options.max_new_tokens) <= options.tokens_at_once:
            batches[-1].append(key)
        else:
            batches.append([key])
    return batches


def _answer_batch(
    generate: Any,
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    batch: Sequence[tuple[int, int]],
    options: GenerateOptions,
    tokenizer: Any,
    window: float,
) -> list[list[int]]:
    device = next(model.parameters()).device
    width = max(len(prompts[row]) for row, _ in batch)
    ids_BP = np.full((len(batch), width), options.pad_id, dtype=np.int64)
    mask_BP = np.zeros_like(ids_BP)
    for b, (row, _) in enumerate(batch):
        ids_BP[b, width - len(prompts[row]) :] = prompts[row]
        mask_BP[b, width - len(prompts[row]) :] = 1
    config = GenerationConfig(
        max_new_tokens=int(min(options.max_new_tokens, window - width)),
        do_sample=False,
        eos_token_id=list(options.end_ids) or None,
        pad_token_id=options.pad_id,
        stop_strings=list(options.stop) or None,
    )
    processors = LogitsProcessorList()
    if options.temperature > 0:
        processors.append(_GumbelNoise(options, batch, width, device))
    with torch.no_grad():
        made = generate(
            input_ids=torch.from_numpy(ids_BP).to(device),
            attention_mask=torch.from_numpy(mask_BP).to(device),
            generation_config=config,
            logits_processor=processors,
            tokenizer=tokenizer if options.stop else None,
            **_cache_of(model),
        )
    return [_until_end(answer, options) for answer in made[:, width:].tolist()]


def _cache_of(model: nn.Module) -> dict[str, Any]:
    """A cache that is not copied for every token, where the family has caches of transformers' usual kind."""
    bare: Any = bare_model(model)
    takes = getattr(bare, "_supports_default_dynamic_cache", None)
    return {"cache": preallocated_cache(bare)} if takes is not None and takes() else {}


def _until_end(answer: list[int], options: GenerateOptions) -> list[int]:
    """Without what fills the batch up behind the end."""
    end = next((t + 1 for t, token in enumerate(answer) if token in options.end_ids), None)
    if end is None:  # a stop text, or the limit
        end = len(answer)
        while end and answer[end - 1] == options.pad_id and options.stop:
            end -= 1
    return answer[:end]


class _GumbelNoise(LogitsProcessor):
    """logits / temperature + Gumbel noise of each answer's own generator."""

    def __init__(
        self, options: GenerateOptions, batch: Sequence[tuple[int, int]], width: int, device: torch.device
    ) -> None:
        self.temperature, self.width = options.temperature, width
        states = [np.random.SeedSequence([options.seed, *key]).generate_state(1, np.uint64)[0] for key in batch]
        self.generators = [torch.Generator(device).manual_seed(int(state >> 1)) for state in states]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self.temperature - noise.log()


@contextmanager
def _plain_generation(model: Any, *, synced: bool) -> Iterator[Callable[..., Tensor]]:
    """`generate` of the model, without the penalties that a model's own generation_config may ask for.

    What is left out of a configuration is taken from the model's own otherwise: Qwen2.5 has a repetition penalty, and
    an answer would not be the greedy one. Weights that FSDP2 shards together with the root module stay gathered.
    """
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    bare: Any = bare_model(model)
    network = model  # keeps its type
    with ExitStack() as cleanup:
        for holder in {id(holder): holder for holder in (model, bare)}.values():
            if "generation_config" in vars(holder):
                cleanup.callback(setattr, holder, "generation_config", holder.generation_config)
                holder.generation_config = GenerationConfig()
        if isinstance(model, FSDPModule):
            register_fsdp_forward_method(cast(nn.Module, model), "generate")
        yield lambda **inputs: network.generate(synced_gpus=synced, **inputs)
