"""A recipe's `fuse` section -> the fused model."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mtft.common.fingerprint import content_hash, file_hash, json_hash
from mtft.fuse.alpha.spec import FusionError, FusionSpec
from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.fusion_plan import FusionPlan, plan_fusion
from mtft.models.loading import expand_quickstart
from mtft.recipe.schema.fuse import FuseSection
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.recipe import Recipe

_PROBE_BYTES = 1 << 16
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "*.arrow", "*.parquet")


def fuse_section(recipe: Recipe) -> FuseSection:
    if recipe.fuse is None:
        raise FusionError("the recipe has no fuse section", do="add fuse: {strong: {path: ...}, adapters: [...]}")
    return recipe.fuse


def fusion_spec(section: FuseSection) -> FusionSpec:
    return FusionSpec(**section.model_dump(include={field.name for field in fields(FusionSpec)}))


def adapter_paths(recipe: Recipe, adapters: Sequence[str | Path] | None = None) -> list[str]:
    """`adapters` as given, else those of the recipe, else the joint adapter that its training left behind."""
    section = fuse_section(recipe)
    paths = list(map(str, adapters or section.adapters or ()))
    if not paths:
        candidates = [Path(recipe.output.dir) / "train" / "joint" / "adapter", Path(recipe.output.dir) / "adapter"]
        paths = [str(place) for place in candidates if place.is_dir()][:1]
    if not paths:
        raise FusionError(
            "no expert: fuse.adapters is not given, and there is no trained adapter",
            where=recipe.output.dir,
            do="train first, or set fuse.adapters",
        )
    return paths


def input_files(recipe: Recipe) -> list[Path]:
    """Files that a recipe names, and those of its models: what no output may replace."""
    places: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            with suppress(ValueError):  # `quickstart:` data is no file of anybody's
                value = expand_quickstart(value)
            places.extend([value] if os.path.isabs(value) else ())  # as load_recipe makes every path
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                collect(inner)

    section = fuse_section(recipe)
    collect(recipe.model_dump(mode="json", exclude={"output"}))
    with suppress(FusionError):  # no adapter: said where they are needed
        places += adapter_paths(recipe)
    places += [section.router] if section.router else []
    files: list[Path] = []
    for text in dict.fromkeys(places):
        place = Path(text)
        if os.path.isdir(place):
            files += [file for pattern in _MODEL_FILES for file in place.glob(pattern)]
        elif os.path.isfile(place):
            files.append(place)
        elif glob.has_magic(text):
            files += map(Path, glob.iglob(text, recursive=True))
    return files


def plan_recipe(recipe: Recipe, *, trained: bool = True) -> FusionPlan:
    """What is known of a recipe's fusion before any weight is read, checked. trained: its own adapter is there."""
    section = fuse_section(recipe)
    strong, base = section.strong, section.base or recipe.model
    return plan_fusion(
        strong.path,
        base.path,
        adapter_paths(recipe) if trained else section.adapters,
        fusion_spec(section),
        routed=section.router is not None,
        revision=strong.revision,
        base_revision=base.revision,
    )


def load_fusion(
    recipe: Recipe, adapters: Sequence[str | Path] | None = None, *, plan: FusionPlan | None = None
) -> FusedCausalLM:
    """Load the fused model of a recipe. `adapters`: in place of the recipe's own. plan: of plan_recipe."""
    section = fuse_section(recipe)
    strong, base = section.strong, section.base or recipe.model
    return FusedCausalLM.load(
        strong.path,
        base.path,
        adapter_paths(recipe, adapters),
        fusion_spec(section),
        dtype=strong.dtype,
        quantization=strong.quantise,
        base_dtype=base.dtype,
        base_quantization=base.quantise,
        router=section.router,
        attention=strong.attention,
        base_attention=base.attention,
        revision=strong.revision,
        base_revision=base.revision,
        plan=plan,
    )


def fingerprint(recipe: Recipe) -> str:
    """sha256 of all that decides a fused answer: the fuse section, the seed and the weights."""
    section = fuse_section(recipe)
    parts: dict[str, Any] = {
        "fuse": section.model_dump(mode="json", exclude={"adapters"}),
        "spec": asdict(fusion_spec(section)),
        "seed": recipe.seed,
        "weights": [_model_identity(section.strong), _model_identity(section.base or recipe.model)],
    }
    if section.router is not None:
        if not Path(section.router).is_file():
            raise FusionError("no router there", where=section.router, do="give a router.safetensors of `mtft merge`")
        parts["router"] = file_hash(Path(section.router))
    parts["adapters"] = [_folder_identity(Path(adapter)) for adapter in adapter_paths(recipe)]
    return json_hash(parts)


def _model_identity(section: ModelSection) -> Any:
    folder = Path(expand_quickstart(section.path))
    return _folder_identity(folder) if folder.is_dir() else [section.path, section.revision]


def _folder_identity(folder: Path) -> list[Any]:
    """Name, size and a hash of both ends of every file that makes the model: hashing 7B whole takes a minute."""
    parts: list[Any] = []
    patterns = ("*.safetensors", "*config.json", "tokenizer.json", "chat_template.jinja")
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        with path.open("rb") as file:
            size = path.stat().st_size
            head = file.read(_PROBE_BYTES)
            file.seek(max(0, size - _PROBE_BYTES))
            parts.append([path.name, size, content_hash(head + file.read())])
    return parts
