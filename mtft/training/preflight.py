"""What a run would refuse before its first step, asked before anything is loaded: by `check`, and by `train` itself.

    refuse_settings   needs the recipe and the model's config: attention, precision, packages, trackers, output folder
    refuse_rows       needs the token stores: examples longer than the model's positions
    folder_refusal    needs both: a run folder that holds another run, or one on other data

Whatever a run can refuse early belongs here (or in mtft/recipe/rules, if the recipe alone tells), so that both say it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from data_mixers.common.suggest import closest_match
from mtft.common.errors import UserError
from mtft.common.output_paths import check_output_folder
from mtft.distributed.extensions import extension_notes
from mtft.losses.moe_router_loss import check_router_loss
from mtft.losses.token_nll import resolve_path
from mtft.models.loading import compute_dtype, read_config, refuse_precision, without_data
from mtft.models.lora import read_start
from mtft.models.quantization import bitsandbytes_config
from mtft.models.segment_attention import NAME as SEGMENTS
from mtft.models.segment_attention import auto_attention, register, segments_refusal
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.recipe import Recipe
from mtft.training.checkpoint.checkpoint_files import latest_checkpoint
from mtft.training.run_files.run_dir import check_recipe, read_result_file

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", "flash_attention_2", "segments")


def refuse_settings(recipe: Recipe, *, loaded: bool = False) -> None:
    """UserError for the first setting that a run can't begin with. loaded: the model is there already, as it is."""
    extension_notes()
    refuse_trackers(recipe.output.trackers)
    refuse_precision(recipe.model)
    check_output_folder(Path(recipe.output.dir), key="output.dir")
    resolve_path(recipe.loss.path)
    if recipe.lora is not None and recipe.lora.start is not None:
        read_start(recipe.lora)
    if not loaded:
        if recipe.model.quantise != "none":
            bitsandbytes_config(recipe.model.quantise, compute_dtype(recipe.model))
        check_router_loss(read_config(recipe.model))
        refuse_attention(recipe.model)


def refuse_attention(section: ModelSection, key: str = "model") -> None:
    """UserError, naming the implementations that the model has, where it lacks the one that is asked for."""
    if section.attention == "auto":
        return
    config = read_config(section)
    try:
        attention_of(config, section.attention)
    except (ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        what = f"the model can't be made with attention {section.attention}: {reason}"
        others = [name for name in IMPLEMENTATIONS if name != section.attention and _has(config, name)]
        do = f"set {key}.attention to one of: {', '.join(['auto', *others])}"
        raise UserError(what, where=f"{key}.attention", do=do) from error


def attention_of(config: Any, asked: str) -> str:
    """The implementation that a model takes, asked on one without weights. Raises what transformers raises."""
    if asked == "flash_attention_2" and not torch.cuda.is_available():
        raise ImportError("flash_attention_2 needs a GPU")
    if asked == SEGMENTS:
        if (refusal := segments_refusal(config)) is not None:
            raise ValueError(refusal)
        register()
    if asked == "auto":
        return auto_attention(without_data(config).config)
    return str(without_data(config, attn_implementation=asked).config._attn_implementation)


def _has(config: Any, name: str) -> bool:
    try:
        return attention_of(config, name) == name
    except (ValueError, ImportError):
        return False


def refuse_trackers(trackers: Sequence[str]) -> None:
    """UserError for a tracker that transformers does not know, or whose package is not installed."""
    if set(trackers) <= {"all", "none"}:
        return
    from transformers.integrations import integration_utils

    known = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
    installed = set(integration_utils.get_available_reporting_integrations())
    installed |= {"flyte"} if find_spec("flytekit") else set()
    for name in trackers:
        if name in ("all", "none"):
            continue
        if name not in known:
            near = closest_match(name, known)
            do = f"did you mean {near}?" if near else f"one of: {', '.join(known)}"
            raise UserError(f"there is no tracker {name!r}", where="output.trackers", do=do)
        if name not in installed:
            do = f"install its package, for example `pip install {name.replace('_', '-')}`, or take it out"
            raise UserError(f"the tracker {name} is not installed", where="output.trackers", do=do)


def refuse_rows(config: Any, stores: Sequence[Any | None]) -> None:
    """UserError for examples that are longer than the model has positions for."""
    positions = _positions(config)
    for store in stores:
        if store is None or not store.num_examples or positions is None:
            continue
        longest = int(store.lengths.max())
        if longest > positions:
            what = f"task {store.task} has examples of {longest} tokens, and the model has {positions} positions"
            do = f"set train.max_length: {positions}, or take a model (or RoPE scaling in its config) for longer texts"
            raise UserError(what, where="train.max_length", do=do)


def position_warning(recipe: Recipe, config: Any) -> str | None:
    """Where max_length is beyond the model's positions, but no example is."""
    positions = _positions(config)
    if positions is None or recipe.train.max_length <= positions:
        return None
    what = f"train.max_length is {recipe.train.max_length}, and the model has {positions} positions"
    return f"{what}: no example is so long now, longer ones will be refused (set train.max_length: {positions})"


def _positions(config: Any) -> int | None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def folder_refusal(recipe: Recipe, identity: Mapping[str, str], basis: Mapping[str, Any]) -> str | None:
    """Why `train` would not begin or go on in the run folder as it is (without --fresh); None: it would.

    identity, basis: of the run that would begin.
    """
    run_dir = Path(recipe.output.dir)
    try:
        check_recipe(run_dir, recipe)
        if read_result_file(run_dir) is not None:
            from mtft.training.finished_run import check_finished

            check_finished(recipe)
        elif (checkpoint := latest_checkpoint(run_dir, say=lambda _: None, tidy=False)) is not None:
            from mtft.training.checkpoint.checkpoint import check_identity

            check_identity(checkpoint, dict(identity), basis)
    except UserError as error:
        return f"`mtft train` will refuse: {error.what} ({error.where}); {error.do}"
    return None
