"""How much memory a recipe needs, before any weight is loaded.

The model is made on torch's meta device, where tensors have shapes and no data:

    weights      bytes of every parameter as it is held (4-bit and 8-bit bases: their linears)
    training     gradients of the trained parameters (fp32), what the optimizer keeps for each of them, and the
                 gradients of the single tasks where they are measured (mtft.gradients.capture.task_gradients)
    activations  what a micro-batch adds at the highest point of a step, but for
    logits       the buffers of the loss over its supervised tokens

The last two come from playing the step on tensors without data (mtft.training.memory.activation_peak), with rows as
the batches have them.
Held against measured peaks by scripts/check_memory.py, for each engine by tests/distributed/test_memory.py.

With several processes it is what each of them holds (mtft.training.memory.engine_share); weights that the engine
gathers for a while are among the activations. The context of a GPU (about 0.5 GiB), fragmentation and work space of
kernels come on top; offloading is not counted. Quantised linears are counted with the largest one's dequantised copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from mtft.common.errors import UserError
from mtft.data.batching.batches import deal_micro_batches
from mtft.distributed.launch import LaunchConfig
from mtft.gradients.aggregators import make_aggregator
from mtft.losses.balancers import balancer_class
from mtft.losses.chunked_nll import chunk_rows
from mtft.losses.token_nll import takes_chunks
from mtft.models.loading import compute_dtype, load_without_weights
from mtft.models.lora import add_lora, lora_like_start
from mtft.models.lora_targets import check_init, describe_adapter, mergeable
from mtft.models.segment_attention import auto_attention
from mtft.recipe.method_options import options_of
from mtft.recipe.schema.recipe import Recipe
from mtft.training.memory.activation_peak import activation_peak
from mtft.training.memory.engine_share import engine_share
from mtft.training.memory.fsdp_play import NF4_BYTES, FsdpPlay
from mtft.training.memory.memory_estimate import MemoryEstimate
from mtft.training.memory.zero_play import BucketPlay, GatherPlay
from mtft.training.optim.optimizers import state_bytes

QUANTISED_BYTES = {"nf4": 0.516, "int8": 1.0}  # a linear's weight; nf4 with its doubly quantised scales is 4.127 bits
ONE_PROCESS = LaunchConfig()
FUSED_ROWS = 256  # supervised tokens whose logits the fused loss holds at a time


def estimate_memory(
    recipe: Recipe,
    *,
    learnt_share: float = 1.0,
    longest: int | None = None,
    launch: LaunchConfig = ONE_PROCESS,
    meta: MetaModel | None = None,
) -> MemoryEstimate:
    """Estimate for `mtft train` of a recipe.

    learnt_share  supervised tokens / tokens, as the plan plays them
    longest       tokens of the longest example, where it is known and below max_length
    launch        processes that share a step's tokens, and the engine that they share the weights by
    meta          of `meta_model(recipe)`, where it is there already; used up

    Raises UserError when the model's config can't be read, or `lora.targets` fits no module.
    """
    section, train = recipe.model, recipe.train
    dtype = compute_dtype(section)
    meta = meta_model(recipe) if meta is None else meta
    model = meta.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable, gradients = sum(p.numel() for p in trained), sum(p.numel() * p.itemsize for p in trained)
    ends = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    states = sum(
        state_bytes(train.optimizer, [tuple(parameter.shape)], embedding=id(parameter) in ends) for parameter in trained
    )
    rows, width, again = _layout(recipe, longest, launch.ranks)
    accumulates = train.mezo is None and again
    supervised = max(1, round(rows * width * learnt_share))
    attention = auto_attention(model.config) if section.attention == "auto" else section.attention
    peak = activation_peak(
        model,
        rows=rows,
        width=width,
        supervised=min(supervised, FUSED_ROWS) if recipe.loss.path == "fused" else supervised,
        packed=train.packing and attention in ("sdpa", "eager"),
        autocast=None if dtype == torch.float32 else dtype,
        checkpointing=train.gradient_checkpointing,
        accumulates=accumulates,
        plain_loss=bool(recipe.loss.label_smoothing or recipe.loss.z_loss),
        forward_only=train.mezo is not None,
        engine=_play(recipe, launch, dtype, accumulates),
        chunk=_chunk(recipe, model),
    )
    share = engine_share(
        launch,
        weights=meta.weights,
        uncut=meta.scales,
        gradients=gradients,
        states=states,
        accumulates=accumulates,
    )
    if peak is None:
        activations, logits = None, supervised * model.config.get_text_config().vocab_size * 4
    else:
        dequantised = 0 if section.quantise == "none" else meta.largest * dtype.itemsize
        backward = share.gradients if train.mezo is None else 0  # MeZO's come after its passes
        # what is there at the highest point beside the gradients
        above = max(0, peak.peak + dequantised - backward)
        logits = min(peak.logits, above)
        activations = above - logits
    return MemoryEstimate(
        parameters=meta.parameters,
        trainable=trainable,
        weights=share.weights,
        training=share.training + _captured(recipe, trainable),
        activations=activations,
        logits=logits,
    )


def _play(recipe: Recipe, launch: LaunchConfig, dtype: torch.dtype, accumulates: bool) -> Any:
    """What the engine does beside the step, for `activation_peak`."""
    if launch.fsdp:
        nf4 = recipe.model.quantise == "nf4"
        return partial(FsdpPlay, ranks=launch.ranks, dtype=dtype, nf4=nf4, accumulates=accumulates)
    if launch.zero == 3:
        return partial(GatherPlay, launch=launch)
    return BucketPlay if launch.zero else None


def _captured(recipe: Recipe, trainable: int) -> int:
    """Bytes of the task gradients, fp32, at a measured step; twice that if split or if the aggregator keeps as many."""
    measures = "gram_every" in options_of(balancer_class(recipe.loss.balancer))
    gradients = recipe.loss.gradients
    if gradients is None or gradients.aggregator is None:
        copies = int(measures or gradients is not None) * (2 if gradients is not None and gradients.split else 1)
    else:
        copies = 1 if make_aggregator(gradients.aggregator, gradients.options).from_gram else 2
    return copies * 4 * len(recipe.tasks) * trainable


@dataclass(frozen=True)
class MetaModel:
    """The model of a recipe with its adapter, on the meta device. largest: parameters of the largest linear; scales:
    bytes of its weights that no engine cuts."""

    model: Any
    parameters: int
    weights: int
    largest: int
    scales: int = 0


def meta_model(recipe: Recipe) -> MetaModel:
    """Raises UserError when the model can't be read or is not whole, or `lora.targets` fits no module."""
    section = recipe.model
    held = torch.float32 if recipe.lora is None else compute_dtype(section)
    with torch.device("meta"):
        model: Any = load_without_weights(section, dtype=held)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        weights = _held_bytes(model, section.quantise, held.itemsize)
        packed = sum(part.weight.numel() for part in _quantised(model)) if section.quantise == "nf4" else 0
        linears = [part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear)]
        if recipe.lora is not None:
            if recipe.lora.start is None:
                lora = recipe.lora.model_copy(update={"init": "default"})  # the others need data; the sizes are equal
                model = add_lora(model, lora, seed=recipe.seed)
                check_init(model, recipe.lora)
            else:
                model = lora_like_start(model, recipe.lora)
            adapter = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
            weights += 4 * adapter  # the adapter is held in fp32
            parameters += adapter
    return MetaModel(
        model, parameters, round(weights), max(linears, default=0), round((QUANTISED_BYTES["nf4"] - NF4_BYTES) * packed)
    )


def check_adapter(recipe: Recipe, adapted: Any) -> list[str]:
    """What is worth knowing of the recipe's adapter. UserError when the recipe merges such adapters, which can't be."""
    if recipe.merge is not None and recipe.merge.adapters is None and not mergeable(adapted):
        raise UserError(
            "the adapters of this recipe can't be merged: they adapt fused experts, which are no modules",
            where="merge",
            do="name lora.targets without the experts and routers, or leave `merge` out",
        )
    return describe_adapter(adapted)


def _chunk(recipe: Recipe, model: nn.Module) -> int | None:
    """Rows whose logits the loss has at a time; None: all."""
    if recipe.train.mezo is not None or not takes_chunks(model, recipe.loss.path):
        return None
    vocabulary = model.config.get_text_config().vocab_size  # pyright: ignore
    return chunk_rows(vocabulary, "cuda" if torch.cuda.is_available() else "cpu")


def _layout(recipe: Recipe, longest: int | None, ranks: int) -> tuple[int, int, bool]:
    """(rows, width) of the largest micro-batch, and whether a rank has a second one of that size."""
    train = recipe.train
    tokens = min(train.rows_at_once, train.batch_tokens)
    width = min(train.max_length, tokens)
    if longest is not None and not train.packing:
        width = min(width, longest)
    count = max(1, train.batch_tokens // width)
    if ranks == 1:
        rows = max(1, tokens // width)
        return rows, width, train.batch_tokens > rows * width
    count += train.packing  # rows are never quite full
    dealt = deal_micro_batches(np.full(count, width), [[row] for row in range(count)], tokens, ranks)
    rows = max(len(rows) for batches in dealt for rows in batches)
    return rows, width, any(len(rows_) == rows for batches in dealt for rows_ in batches[1:])  # the largest is first


def _quantised(model: nn.Module) -> list[nn.Linear]:
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    return [part for part in model.modules() if isinstance(part, nn.Linear) and part is not head]


def _held_bytes(model: nn.Module, quantise: str, width: int) -> float:
    """Bytes of all parameters: quantisation takes the weights of all linears but the head."""
    small = {id(part.weight) for part in _quantised(model)}
    return sum(
        parameter.numel() * (QUANTISED_BYTES.get(quantise, width) if id(parameter) in small else width)
        for parameter in model.parameters()
    )
