"""The files of the mix stage, and whether one that lies there is ours: a user's own is never replaced.

A file of ours is known by its content. It is written whole or not at all (the ledger: line by line), so a kill leaves
none that isn't known again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from data_mixers.sweep.ledger import TrialLedger
from mtft.common.errors import UserError
from mtft.common.output_paths import refuse_input_as_output
from mtft.common.own_files import irregular, read_own, read_own_text
from mtft.pipeline.stages.stage_cache import DONE
from mtft.recipe.input_paths import input_paths
from mtft.recipe.schema.recipe import Recipe

DESIGN, LEDGER, FIT, PROPOSAL, MIXTURE = "design.csv", "ledger.jsonl", "fit.json", "proposal.json", "mixture.yaml"
BLAME = "blame.json"
REMEDY = "move it away, or give another output.dir"
LOCKS = (f"{LEDGER}.lock", f"{LEDGER}.append.lock")  # emptied when they are taken
_ROW = re.compile(r"[0-9a-f]{12}(,[01]\.[0-9]{6})+")
# Of mixture.yaml, today and in earlier versions (which began with the verdict).
_COMMENTS = ("mixture proposed from trials\n", "the current mixture, kept\n", "the current mixture, moved inside ")
_COMMENTS += ("better: cross-fitted ", "worse: cross-fitted ", "not distinguishable from your current mixture: ")


def mix_dir(recipe: Recipe) -> Path:
    return Path(recipe.output.dir) / "mix"


def refuse_foreign_stage(recipe: Recipe) -> None:
    """refuse_foreign_files for all that `mtft run` writes; a stage that is done writes nothing."""
    if not os.path.lexists(mix_dir(recipe) / DONE):
        refuse_foreign_files(recipe, *(name for name in OURS if name != BLAME))


def refuse_foreign_files(recipe: Recipe, *names: str) -> None:
    """UserError if one of the files `names`, which are about to be written, is not ours or is an input of the recipe.

    MixError for a ledger that is none.
    """
    inputs = list(input_paths(recipe))
    for name in names:
        path = mix_dir(recipe) / name
        refuse_input_as_output(path, inputs)
        if path.is_symlink() and name != LEDGER:  # which is appended to
            raise UserError("the output is a link", where=str(path), do=REMEDY)
        if not path.exists():
            continue
        if (kind := irregular(path)) is not None:
            raise UserError(f"the output is {kind}", where=str(path), do=REMEDY)
        if not OURS[name](path):
            what = "a file that mtft did not write, or that was changed, stands where one would be written"
            raise UserError(what, where=str(path), do=REMEDY)
    for path in (mix_dir(recipe) / name for name in LOCKS if LEDGER in names):
        if os.path.lexists(path) and (irregular(path) is not None or path.is_symlink() or path.stat().st_size):
            raise UserError("a file that is no lock stands where the lock would be", where=str(path), do=REMEDY)


def _is_design(path: Path) -> bool:
    head, *rows = read_own_text(path, do=REMEDY).split("\n")
    return head.startswith("trial,") and len(rows) > 1 and rows.pop() == "" and all(map(_ROW.fullmatch, rows))


def _is_ledger(path: Path) -> bool:
    TrialLedger(path)  # MixError names the line
    return True


def _is_fit(path: Path) -> bool:
    content = read_own(path, {"names": list, "targets": dict}, do=REMEDY)
    reports = content["targets"].values()
    return content.keys() <= {"format", "names", "targets"} and all(
        isinstance(report, dict) and {"target", "n", "candidates", "trials"} <= report.keys() for report in reports
    )


def _is_proposal(path: Path) -> bool:
    read_own(path, {**dict.fromkeys(("mixture", "current", "prior"), dict), "verdict": str, "text": str}, do=REMEDY)
    return True


def _is_blame(path: Path) -> bool:
    read_own(path, {"mixture": dict, "level": float, "datasets": dict}, do=REMEDY)
    return True


def _is_mixture(path: Path) -> bool:
    text = read_own_text(path, do=REMEDY)
    return text.startswith(tuple(f"# {comment}" for comment in _COMMENTS)) and "\nshares:\n" in text


OURS: dict[str, Callable[[Path], bool]] = {
    DESIGN: _is_design,
    LEDGER: _is_ledger,
    FIT: _is_fit,
    PROPOSAL: _is_proposal,
    MIXTURE: _is_mixture,
    BLAME: _is_blame,
}
"""Each file, and whether the one at a path is ours; UserError or MixError where it can't be read at all."""
