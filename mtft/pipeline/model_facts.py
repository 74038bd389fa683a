"""What `mtft check` finds out from the model without its weights: found once, then kept in the cache.

    attention   the implementation that transformers takes
    notes       what is worth knowing of the adapter and of the task gradients
    memory      the estimate

It takes seconds: transformers' models, PEFT and a step on tensors without data. Only what was found without a refusal,
and without a warning of a library, is kept: one file for each state of everything that it depends on (_state). So a
recipe that is refused is asked anew each time. A file that is damaged, or can't be written, costs these seconds again.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import mtft
from mtft.common.atomic_io import write_json
from mtft.common.cache_folder import default_cache
from mtft.common.errors import UserError
from mtft.common.fingerprint import file_hash, json_hash
from mtft.common.own_files import FORMAT, read_own
from mtft.distributed.launch import LaunchConfig, engine
from mtft.models.bitsandbytes_aside import import_peft
from mtft.models.loading import compute_dtype, expand_quickstart
from mtft.recipe.schema.recipe import Recipe
from mtft.training.memory.memory_estimate import MemoryEstimate
from mtft.training.run_files.run_dir import package_versions

FOLDER = "model_facts"
# Sections of which nothing is read here; of the tasks it is their names.
UNREAD = {"name", "tasks", "data", "mixture", "eval", "output", "sweep", "fuse", "run"}
NEEDS = {"key": str, "digest": str, "facts": dict}


@dataclass(frozen=True)
class ModelFacts:
    """What the model without weights tells of a recipe that is not refused."""

    attention: str
    notes: tuple[str, ...]
    memory: MemoryEstimate


def model_facts(recipe: Recipe, config: Any, *, learnt_share: float, longest: int | None) -> ModelFacts:
    """The facts of a recipe, from the cache where they stand there.

    config: of the model, as `read_config` gives it; learnt_share, longest: as for `estimate_memory`.

    Raises UserError for what training would refuse once the model is loaded, as far as models without weights tell.
    """
    launch = LaunchConfig.from_environment()
    key = json_hash(_state(recipe, config, launch) | {"learnt_share": learnt_share, "longest": longest})
    place = default_cache() / FOLDER / f"{key}.json"
    if (known := _read(place, key)) is not None:
        return known

    if recipe.model.quantise == "none":
        import_peft()
    from mtft.training.memory.estimate import estimate_memory, meta_model
    from mtft.training.preflight import attention_of

    with _recorded_warnings() as warned:
        attention = attention_of(config, recipe.model.attention)
        meta = meta_model(recipe)
        notes = adapter_notes(recipe, meta.model)
        memory = estimate_memory(recipe, meta=meta, learnt_share=learnt_share, longest=longest, launch=launch)
    found = ModelFacts(attention, tuple(notes), memory)
    with suppress(OSError):  # a full disk, or no right to write: found again next time
        if warned:  # by a library, for people: it has to be said each time
            return found
        content = asdict(found)
        write_json(place, {"format": FORMAT, "key": key, "digest": _digest(key, content), "facts": content})
    return found


@contextmanager
def _recorded_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """What is warned of inside the block, which is shown after it."""
    warned: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as warned:
            yield warned
    finally:
        for one in warned:
            warnings.showwarning(one.message, one.category, one.filename, one.lineno)


def adapter_notes(recipe: Recipe, adapted: Any) -> list[str]:
    """What is worth knowing of the adapter and of the task gradients that the recipe asks for.

    adapted: the model with its adapter, on the meta device. UserError for what training or merging would refuse.
    """
    from mtft.losses.balancers import balancer_class
    from mtft.recipe.method_options import options_of
    from mtft.training.memory.estimate import check_adapter
    from mtft.training.step.task_gradients import make_task_gradient_step

    said: list[str] = [] if recipe.lora is None else check_adapter(recipe, adapted)
    gram_every = 1 if "gram_every" in options_of(balancer_class(recipe.loss.balancer)) else None
    make_task_gradient_step(recipe, adapted, gram_every=gram_every, isolated=False, run_dir=None, say=said.append)
    return said


def _state(recipe: Recipe, config: Any, launch: LaunchConfig) -> dict[str, Any]:
    """All that the facts of a recipe depend on but its data, JSON-able."""
    start = (
        None if recipe.lora is None or recipe.lora.start is None else Path(recipe.lora.start) / "adapter_config.json"
    )
    return {
        "recipe": recipe.model_dump(mode="json", exclude=UNREAD),
        "tasks": recipe.task_names,
        "config": json_hash(config.to_dict(), default=str),
        "files": _stats(Path(expand_quickstart(recipe.model.path)), "*"),
        "start": None if start is None or not start.is_file() else file_hash(start),
        "launch": [asdict(launch), engine()],
        "device": [torch.cuda.is_available(), str(compute_dtype(recipe.model))],
        "versions": package_versions(),
        "source": _stats(Path(mtft.__file__).parent, "**/*.py"),  # which changes under one version where it is edited
    }


def _stats(folder: Path, pattern: str) -> list[list[Any]]:
    """Names, sizes and times of files: another header in a weight file is another size or time. A hub's name: none."""
    found = []
    for path in sorted(folder.glob(pattern)) if folder.is_dir() else ():
        with suppress(OSError):  # it has just gone, or is a link to nowhere
            about = os.stat(path)
            found.append([str(path.relative_to(folder)), about.st_size, about.st_mtime_ns, about.st_ctime_ns])
    return found


def _read(place: Path, key: str) -> ModelFacts | None:
    """What a file holds; None where it isn't there, is damaged or is another's."""
    if not os.path.lexists(place):
        return None
    try:
        content = read_own(place, NEEDS, do="delete it")
    except UserError:
        return None
    facts = content["facts"]
    if content["key"] != key or content["digest"] != _digest(key, facts):
        return None
    return ModelFacts(facts["attention"], tuple(facts["notes"]), MemoryEstimate(**facts["memory"]))


def _digest(key: str, facts: Mapping[str, Any]) -> str:
    """Of a file's content, so that a flipped bit in it is seen."""
    return json_hash([key, facts])
