"""`micro_batch_tokens: auto`: how many tokens a rank takes at once, tried on the loaded model before the first step.

On a GPU: twice as many each time, until a forward and backward pass runs out of memory (or would, with the optimizer's
state beside it); the largest that fits. On a CPU: until the memory estimate is above what is free, or a pass is no
longer faster by the token; the smallest that is about as fast as the fastest.

The rows that are tried are the widest that can come, filled to the brim, with at least the tasks' share of supervised
tokens. The gradient of a step is the same for any size (mtft.losses.task_reduction), so this is a matter of speed
alone; with
dropout the size decides which numbers are drawn. It is written to env.json, and a run that goes on keeps it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from mtft.common.errors import UserError
from mtft.common.out_of_memory import free_unused, give_back, is_out_of_memory
from mtft.common.own_files import write_own
from mtft.common.state_tree import random_state, restore_random_state
from mtft.data.batching.batch import IGNORE, Batch
from mtft.distributed.collectives import from_all_ranks, from_first_rank
from mtft.distributed.launch import is_main_process, world_size
from mtft.distributed.sharding import trainable
from mtft.losses.token_nll import resolve_path, token_nll
from mtft.models.loading import compute_dtype
from mtft.recipe.schema.recipe import Recipe
from mtft.training.memory.estimate import estimate_memory
from mtft.training.optim.optimizers import state_bytes
from mtft.training.run_files.run_dir import ENV, read_env
from mtft.training.training_inputs import TrainingInputs

KEY = "micro_batch_tokens"
GPU_SHARE, CPU_SHARE = 0.9, 0.7  # of the memory that a step may take
PLATEAU = 1.05  # times the least time by the token that is still about as fast


def with_auto_micro_batch(
    recipe: Recipe, model: Any, inputs: TrainingInputs, *, before: int | None, say: Callable[[str], None]
) -> Recipe:
    """The recipe with a number for micro_batch_tokens: `before`, or found by trial; then noted in env.json.

    before  what an earlier start found (folder.chosen_size); that of the writing rank counts. A collective call: all
            ranks get the same number.

    Raises UserError, on all ranks, where a rank has no memory for a single row.
    """
    size = from_first_rank(before)
    if size is None:
        size = min(from_all_ranks(find_micro_batch(recipe, model, inputs)))  # every rank can hold the least
        if not size:
            raise UserError(
                "the device ran out of memory on a micro-batch of one row, the smallest that there is",
                where=f"train.{KEY}: auto",
                do="set train.gradient_checkpointing: true, lower train.max_length, quantise the base "
                "(model.quantise: nf4), or take a device with more memory",
            )
        say(f"{KEY}: {size} fits and is fast; written to env.json")
    if is_main_process():
        run_dir = Path(recipe.output.dir)
        write_own(run_dir / ENV, {**(read_env(run_dir) or {}), KEY: size})
    return _with_size(recipe, size)


def _with_size(recipe: Recipe, size: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={KEY: size})})


def find_micro_batch(recipe: Recipe, model: Any, inputs: TrainingInputs) -> int:
    """The best size for this rank's device; 0: not even one row.

    Gradients, random state and checkpointed activations are left as they were.
    """
    train, device = recipe.train, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stores = [store for store in inputs.stores if store.num_examples]
    longest = max(int(store.lengths.max()) for store in stores)
    share = max(float(store.supervised.sum() / store.lengths.sum()) for store in stores)
    width = train.max_length if train.packing else min(longest, train.max_length)
    most = max(width, -(-train.batch_tokens // world_size()))
    if not model.config.to_dict().get("quantization_config"):
        model.to(device)
    model.train()
    switches = train.gradient_checkpointing and not model.is_activation_checkpointing
    if switches:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    here, candidates = random_state(), sizes(width, most)

    def try_size(size: int) -> None:
        _pass(recipe, model, full_batch(size, width, share, model.config.get_text_config().vocab_size).to(device))

    try:
        if device.type == "cuda":
            states = state_bytes(train.optimizer, [tuple(parameter.shape) for parameter in trainable(model).values()])
            return largest_on_gpu(candidates, try_size, states, device)
        free = CPU_SHARE * psutil.virtual_memory().available

        def fits(size: int) -> bool:
            return estimate_memory(_with_size(recipe, size), learnt_share=share, longest=longest).total <= free

        return fastest(candidates, fits, lambda size: _seconds(try_size, size))
    finally:
        restore_random_state(here)
        if switches:
            model.activation_checkpointing_disable()


def sizes(width: int, most: int) -> list[int]:
    """Whole rows: 1, 2, 4, ... of `width` tokens, and the first count that holds `most`."""
    widths = [width]
    while widths[-1] < most:
        widths.append(min(2 * widths[-1], -(-most // width) * width))
    return widths


def largest(candidates: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The last of the rising candidates that fits, asked one after the other; the first if none does."""
    best = candidates[0]
    for size in candidates:
        if not fits(size):
            break
        best = size
    return best


def fastest(candidates: Sequence[int], fits: Callable[[int], bool], seconds: Callable[[int], float]) -> int:
    """The smallest candidate whose time by the token is about the least. Two in a row without a gain end the search."""
    by_token: dict[int, float] = {}
    for size in candidates:
        if by_token and not fits(size):
            break
        by_token[size] = seconds(size) / size
        if len(by_token) > 2 and min(by_token.values()) < min(list(by_token.values())[-2:]):
            break
    least = min(by_token.values())
    return next(size for size, value in by_token.items() if value <= PLATEAU * least)


def full_batch(tokens: int, width: int, share: float, vocabulary: int) -> Batch:
    """Rows of two examples without padding; the first `share` of each row's positions are supervised."""
    rows = max(1, tokens // width)
    place_T = torch.arange(width)
    half_T = (place_T >= width // 2).int()
    ids_BT = torch.randint(0, vocabulary, (rows, width), generator=torch.Generator().manual_seed(0))
    labels_BT = torch.where(place_T < share * width, ids_BT, IGNORE)
    positions_T = torch.where(half_T > 0, place_T - width // 2, place_T)
    segments_BT = half_T.expand(rows, width).contiguous()
    return Batch(ids_BT, positions_T.expand(rows, width).contiguous(), segments_BT, 0 * segments_BT, labels_BT)


def _pass(recipe: Recipe, model: Any, batch: Batch) -> None:
    """Forward and backward of one full micro-batch; the gradients are thrown away."""
    ids_BT = batch.input_ids_BT
    if not recipe.train.packing:
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT).contiguous()
        batch = replace(batch, position_ids_BT=positions_BT, segment_ids_BT=0 * batch.segment_ids_BT)
    dtype = compute_dtype(recipe.model)
    try:
        with torch.autocast(ids_BT.device.type, dtype=dtype, enabled=dtype != torch.float32):
            nll_BT = token_nll(
                model,
                batch,
                path=resolve_path(recipe.loss.path),
                label_smoothing=recipe.loss.label_smoothing,
                z_loss=recipe.loss.z_loss,
            )
        nll_BT.mean().backward()
    finally:
        model.zero_grad(set_to_none=True)


def largest_on_gpu(
    candidates: Sequence[int], try_size: Callable[[int], None], states: int, device: torch.device
) -> int:
    """The last size that leaves room for the optimizer's `states`; 0 where the first ran out of memory."""
    first_ran = True

    def fits(size: int) -> bool:
        nonlocal first_ran
        peak = _peak(try_size, size, device)
        if peak is None:
            first_ran = first_ran and size != candidates[0]
            return False
        _, total = torch.cuda.mem_get_info(device)
        return peak + states <= GPU_SHARE * total

    size = largest(candidates, fits)
    return size if first_ran else 0


def _peak(try_size: Callable[[int], None], size: int, device: torch.device) -> int | None:
    """Bytes that torch reserved at the highest point; None: out of memory. What the trial held is given back."""
    free_unused()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        try_size(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        give_back(error)
        return None
    peak = torch.cuda.max_memory_reserved(device)
    free_unused()
    return peak


def _seconds(try_size: Callable[[int], None], size: int) -> float:
    """CPU seconds of a pass, the less of two: other processes may be about."""
    seconds = []
    for _ in range(2):
        begin = time.process_time()
        try_size(size)
        seconds.append(time.process_time() - begin)
    return min(seconds)
