"""Before the first step: everything that a run does at its end, with the fresh weights, as far as it is cheap.

What can fail there for a reason that is known now must fail now, and not after hours of training: writing into the
output folder, saving the adapter, its tensors, reading it back by name and shape, the probe of the proof, the card.

Not tried: the proof itself. It loads the base a second time, which costs as much memory and time as loading it; and if
it fails after the training nothing is lost, since the adapter stands and `mtft export RUN` tries again.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from mtft.common.errors import UserError
from mtft.common.state_tree import random_state, restore_random_state
from mtft.distributed.collectives import from_first_rank
from mtft.distributed.launch import engine, is_main_process
from mtft.models.adapters import reload_own
from mtft.recipe.schema.recipe import Recipe
from mtft.training.export.chat_files import save_chat_files
from mtft.training.export.export import INITIAL, write_card, write_weights
from mtft.training.export.proof import probe_settings, write_probe

SCRATCH = ".rehearsal-"
WHOLE_MODEL = 1 << 30  # bytes up to which a whole model is written to see whether it can be


def rehearse_export(model: Any, recipe: Recipe, plan: Any, *, tokenizer: Any) -> None:
    """Raises UserError when this model's export would fail. `model` is as it was. A collective call."""
    trouble: UserError | None = None
    before = random_state()
    if is_main_process():
        try:
            _rehearse(model, recipe, plan, tokenizer)
        except UserError as error:
            trouble = error
        except Exception as error:  # noqa: BLE001  whatever it is, it would end the run after its last step
            lines = str(error).strip().splitlines()
            trouble = UserError(
                f"what this run would write at its end can't be written: {type(error).__name__}"
                + (f": {lines[0]}" if lines else ""),
                where=recipe.output.dir,
                do="nothing was trained; the same command with --debug shows where it fails",
            )
            trouble.__cause__ = error
    restore_random_state(before)
    trouble = from_first_rank(trouble)
    if trouble is not None:
        raise trouble


def clear_rehearsals(run_dir: Path) -> None:
    """Removes what a run that was killed in its rehearsal has left in its folder."""
    for left_over in run_dir.glob(f"{SCRATCH}*"):
        shutil.rmtree(left_over, ignore_errors=True)


def _rehearse(model: Any, recipe: Recipe, plan: Any, tokenizer: Any) -> None:
    run_dir = Path(recipe.output.dir)
    try:
        scratch = tempfile.TemporaryDirectory(prefix=SCRATCH, dir=run_dir)
    except OSError as error:
        what = f"nothing can be written into the output folder: {error.strerror}"
        raise UserError(what, where=str(run_dir), do="give another output.dir") from error
    with scratch as name:
        folder = Path(name)
        if engine() == "ddp":  # a sharded model is not gathered here
            _write(model, folder, run_dir / INITIAL, tokenizer)
        settings = probe_settings(model, recipe)
        write_probe(model, torch.zeros(1, 1, 1), recipe, folder / settings["dtype"])
        write_card(folder, recipe, plan, {}, tokenizer=tokenizer, proof=0.0)


def _write(model: Any, folder: Path, initial: Path, tokenizer: Any) -> None:
    if isinstance(model, PeftModel):
        write_weights(model, folder, initial=initial, tokenizer=tokenizer)
        if not initial.is_dir():  # else it was converted for another base
            reload_own(model, folder)
    elif sum(p.numel() * p.itemsize for p in model.parameters()) <= WHOLE_MODEL:
        write_weights(model, folder, initial=initial, tokenizer=tokenizer)
    else:
        model.config.save_pretrained(folder)
        save_chat_files(folder, tokenizer, model.generation_config)
