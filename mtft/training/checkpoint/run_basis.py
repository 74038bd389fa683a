"""What a run is trained with, kept in its checkpoints and in result.json, and compared before it goes on.

    recipe         resolved; compared by the keys that decide about the weights (run_dir.training_keys)
    chat_template  digest of the tokenizer's chat template, or of the file in model.chat_template
    base           fingerprint of the base's weights, where an adapter is trained on a folder
    parameters     digest of the trained parameters' names and shapes; written with the weights
    held_out       fingerprints of the held-out rows: a difference is said; refused where the run decides by them
    versions       of the packages: a difference is said, not refused

Nothing of it is looked up in files beside the checkpoint, which may have been deleted or edited since. Checkpoints of
versions that did not write it are continued as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mtft.adapters.base_identity import fingerprint
from mtft.common.errors import UserError
from mtft.common.fingerprint import json_hash
from mtft.distributed.sharding import elements
from mtft.models.loading import expand_quickstart
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_files.run_dir import check_same_recipe, package_versions

MOST = 4  # parameters that a message names
OTHER_RUN = "use what the checkpoint was trained with, give another output.dir, or --fresh to start over "
OTHER_RUN += "(the old run is kept beside it; from Python: move the folder away)"


def run_basis(recipe: Recipe, tokenizer: Any, held_out: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a run of this recipe is trained with. held_out: fingerprints of the held-out rows."""
    base = Path(expand_quickstart(recipe.model.path))
    return {
        "recipe": recipe.model_dump(mode="json"),
        "chat_template": json_hash(tokenizer.chat_template),
        "base": fingerprint(base) if recipe.lora is not None and base.is_dir() else None,
        "held_out": dict(held_out or {}),
        "versions": package_versions(),
    }


def check_finished_base(recipe: Recipe, result: Mapping[str, Any], run_dir: Path) -> None:
    """UserError where the base of a finished run has other weights by now. result: of result.json."""
    basis, base = result.get("basis"), Path(expand_quickstart(recipe.model.path))
    was = basis.get("base") if isinstance(basis, Mapping) else None
    here = fingerprint(base) if was is not None and base.is_dir() else None
    if was is not None and here is not None and was != here:
        raise UserError(
            f"the folder holds a finished run on other weights of the base: {base} has changed since",
            where=str(run_dir),
            do="--fresh trains again (the old run is kept beside it), or give another output.dir",
        )


def check_basis(before: Any, now: Mapping[str, Any], folder: Path, *, say: Callable[[str], None]) -> None:
    """UserError, with both values of each key, where a checkpoint was trained with something else than the run now.

    before: as the checkpoint has it, None if it has none. say: told of packages that have other versions now.
    """
    if not isinstance(before, Mapping):
        return
    check_same_recipe(before.get("recipe"), Recipe.model_validate(now["recipe"]), folder)
    said = {
        "chat_template": "the chat template (model.chat_template, or the tokenizer's)",
        "base": "the base's weights (model.path: the same folder, with another content)",
    }
    for key, name in said.items():
        was, here = before.get(key), now.get(key)
        if was is not None and here is not None and was != here:
            what = f"{folder.name} was trained with another state of {name}: digest was {was[:12]}, is {here[:12]}"
            raise UserError(what, where=str(folder.parent), do=OTHER_RUN)
    _check_held_out(before.get("held_out"), now, folder, say)
    was, here = before.get("versions") or {}, now["versions"]
    other = [f"{name} {was[name]}, here {here.get(name)}" for name in was if was[name] != here.get(name)]
    if other:
        say(f"{folder.name} was written with {'; '.join(other)}: the last digits may differ from here on")


def _check_held_out(before: Any, now: Mapping[str, Any], folder: Path, say: Callable[[str], None]) -> None:
    """Other held-out rows change no weights, unless the run decides by them."""
    if not isinstance(before, Mapping) or not before or not now.get("held_out"):  # not known
        return
    other = [key for key in before if before[key] != now["held_out"].get(key)]
    if not other:
        return
    recipe = Recipe.model_validate(now["recipe"])
    train = recipe.train
    what = f"the {', '.join(other)} have changed since {folder.name}"
    if train.patience or train.task_patience or recipe.output.export == "best":
        decides = "and the run decides by them (patience, task_patience, export: best)"
        raise UserError(f"{what}, {decides}", where=str(folder.parent), do=OTHER_RUN)
    say(f"{what}: the evaluations of {folder.parent.name} are of other rows from here on")


def parameters_digest(parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """{"digest", "tensors", "numbers"} of names and shapes (whole ones, also where an engine shards them)."""
    shapes = {name: list(getattr(value, "ds_shape", value.shape)) for name, value in parameters.items()}
    numbers = sum(map(elements, parameters.values()))
    return {"digest": json_hash(shapes), "tensors": len(shapes), "numbers": numbers}


def check_digest(before: Any, parameters: Mapping[str, Tensor], folder: Path) -> None:
    """UserError where a checkpoint holds other parameters than are trained now. before: None if it doesn't say."""
    if not isinstance(before, Mapping):
        return
    now = parameters_digest(parameters)
    if before["digest"] != now["digest"]:
        was, here = (f"{side['tensors']:,} tensors with {side['numbers']:,} numbers" for side in (before, now))
        what = f"{folder.name} holds other parameters than are trained now: were {was}, are {here}"
        raise UserError(what, where=str(folder.parent), do=OTHER_RUN)


def check_parameters(saved: Mapping[str, Tensor], model: Mapping[str, Tensor], folder: Path) -> None:
    """UserError, with both shapes, where the weights of a checkpoint aren't those of the trained parameters."""
    was, here = ({name: list(value.shape) for name, value in side.items()} for side in (saved, model))
    other = [name for name in sorted(was.keys() | here.keys()) if was.get(name) != here.get(name)]
    if other:
        shown = [f"{name} was {was.get(name, 'absent')}, is {here.get(name, 'absent')}" for name in other[:MOST]]
        more = f"; and {len(other) - MOST:,} more" if len(other) > MOST else ""
        what = f"{folder.name} holds other parameters than are trained now: {'; '.join(shown)}{more}"
        raise UserError(what, where=str(folder.parent), do=OTHER_RUN)
