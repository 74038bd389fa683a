"""The merge stage: the single-task adapters into one, and what that one keeps of each task.

<output.dir>/merge/adapter/          the merged PEFT adapter
<output.dir>/merge/scores/           its held-out scores
<output.dir>/merge/retention.json    retained share of each task, with intervals; how the adapters get on
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtft.merge.factors import read_adapter
from mtft.merge.retention import retention
from mtft.merge.run import merge_from_recipe
from mtft.pipeline import derive
from mtft.pipeline.scoring import Scores, kept
from mtft.pipeline.stages import once, read_json, write_json
from mtft.recipe.schema import MergeSection, Recipe


def merge_stage(
    recipe: Recipe,
    section: MergeSection,
    adapters: Mapping[str, Path],
    base: Scores,
    singles: Scores,
    *,
    fresh: bool,
    score: Callable[[Path], Scores],
    beside: Mapping[str, Scores],
) -> Scores:
    """Merges `adapters` ({name: folder}) and scores the result. Returns its scores.

    base, singles: held-out scores of the base model and of each task's own adapter; score(adapter folder) -> Scores;
    beside: scores of other adapters for all tasks (the joint one), to stand in the retention table.
    """
    folder = Path(recipe.output.dir) / "merge"
    inputs = {
        "merge": section.model_dump(mode="json", exclude={"out", "overwrite", "adapters"}),
        "adapters": {name: file_hash(path / "adapter_model.safetensors") for name, path in adapters.items()},
    }

    def work() -> None:
        report = read_json(folder / "report.json")
        if report is None:
            named = [read_adapter(path, name) for name, path in adapters.items()]
            again = derive.changed(recipe, merge=derive.changed(section, overwrite=True))  # a broken-off try
            report = merge_from_recipe(again, named, folder / "adapter").as_dict()
            write_json(folder / "report.json", report)
        found = kept(folder / "scores", tuple(base), lambda: score(folder / "adapter"))
        if singles:
            kept_share = retention(base, singles, found, others=beside, seed=recipe.seed)
            facts: dict[str, Any] = {key: report[key] for key in ("method", "rank", "energy", "diagnostics")}
            write_json(folder / "retention.json", kept_share.as_dict(**facts))

    once(folder, inputs, work, fresh=fresh)
    return kept(folder / "scores", tuple(base), lambda: score(folder / "adapter"))


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
