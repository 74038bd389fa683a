"""`mtft export RUN`: the end of a run once more, where it failed: the proof, or all that follows the last step."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mtft.common.atomic_io import write_text
from mtft.common.errors import UserError
from mtft.common.folder_lock import sole_writer
from mtft.common.output_paths import check_output_folder
from mtft.common.own_files import write_own
from mtft.recipe.load import load_recipe
from mtft.training.checkpoint.checkpoint_files import checkpoint_step, ended_at, latest_checkpoint
from mtft.training.export.export import CARD, told_in_card
from mtft.training.export.proof import PROBE, PROOF
from mtft.training.finalize import Proof
from mtft.training.run_files.run_dir import PROVED, RECIPE, RESULT, read_plan, read_result_file
from mtft.training.run_training import TrainResult, read_result, train


def export_run(run_dir: Path, *, quiet: bool = False) -> TrainResult:
    """Exports and proves what a run has trained, if that is not done; nothing is trained again.

    The proof is made again from what the trained model said, so that only one model is in memory. Where there is no
    export, or nothing to prove it with, the end of the run is done again from the checkpoint of its last step.
    Raises UserError for a folder without a run, or a run that has not come to its last step.
    """
    if not (run_dir / RECIPE).is_file():
        raise UserError(f"the folder holds no {RECIPE}", where=str(run_dir), do="give the output.dir of a run")
    check_output_folder(run_dir)
    with sole_writer(run_dir):
        return _export(run_dir, quiet=quiet)


def _export(run_dir: Path, *, quiet: bool) -> TrainResult:
    content = read_result_file(run_dir)
    exported = content is not None and (run_dir / content["export"]).is_dir()
    if content is None or not exported or content.get("state") != PROVED:
        if content is not None and exported and (run_dir / PROOF / PROBE).is_file():
            _prove(run_dir, content)
        else:
            _end_again(run_dir, quiet=quiet)
    result = read_result(run_dir)
    assert result is not None
    return result


def _prove(run_dir: Path, content: dict[str, Any]) -> None:
    """The proof alone; result.json and the card say what came of it."""
    with ExitStack() as cleanup:
        proof = Proof(run_dir, "cuda:0" if torch.cuda.is_available() else "cpu")
        proof.go_on(run_dir / content["export"], cleanup)
        equal = proof.result()
    card = run_dir / content["export"] / CARD
    before, now = (told_in_card(*said) for said in ((None, content.get("not_proved")), (equal, proof.trouble)))
    if card.is_file() and before:
        write_text(card, card.read_text(encoding="utf-8").replace(before, now))
    content |= {"state": proof.state, "proof": equal, "not_proved": proof.trouble}
    if "unquantised_base" in content:
        content["unquantised_base"] = proof.unquantised
    write_own(run_dir / RESULT, content)
    if proof.skipped is not None:  # a note at the end of a run; here the proof was asked for
        raise UserError(proof.skipped, where=str(run_dir), do="run it on a machine that has, or free some")


def _end_again(run_dir: Path, *, quiet: bool) -> None:
    """Everything after the last step, from its checkpoint."""
    checkpoint = latest_checkpoint(run_dir)
    steps = (read_plan(run_dir) or {}).get("steps")
    there = checkpoint is not None and (checkpoint_step(checkpoint) == steps or ended_at(checkpoint))
    if not there:
        what = "no checkpoint" if checkpoint is None else f"{checkpoint.name} of {steps} steps"
        raise UserError(
            f"the run has not come to its end: {what}",
            where=str(run_dir),
            do=f"mtft train {run_dir / RECIPE} goes on with it",
        )
    recipe = load_recipe(run_dir / RECIPE, [f"output.dir={run_dir.resolve()}"], files=False)
    result, aside = run_dir / RESULT, run_dir / f"{RESULT}.before"
    if result.is_file():
        result.rename(aside)
    try:
        train(recipe, quiet=quiet)
    except BaseException:
        if aside.is_file() and not result.is_file():
            aside.rename(result)
        raise
    aside.unlink(missing_ok=True)
