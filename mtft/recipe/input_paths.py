"""The files and folders that a recipe reads: none of them may be where a command writes."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtft.common.output_paths import check_output_file
from mtft.recipe.metric_files import command_of
from mtft.recipe.schema.loss import BalancerSection
from mtft.recipe.schema.metric import NamedMetricSection
from mtft.recipe.schema.section import BALANCER_OPTIONS, INPUT, PathKind, RecipeSection


def check_output(out: Path, recipe: RecipeSection, *more: Path | None, overwrite: bool) -> None:
    """check_output_file for a command that reads what a loaded recipe names and `more`, and what its folders hold.

    Raises UserError.
    """
    inputs = [path for path in (*input_paths(recipe), *more) if path is not None]
    real = Path(os.path.realpath(out))
    within = [out for path in inputs if os.path.isdir(path) and Path(os.path.realpath(path)) in real.parents]
    check_output_file(out, inputs=[*inputs, *within], overwrite=overwrite)


def input_paths(node: Any, kind: PathKind | None = None) -> Iterator[Path]:
    """What stands under the keys of a loaded recipe that hold paths of inputs; globs as what they find."""
    if isinstance(node, tuple | list):
        for item in node:
            yield from input_paths(item, kind)
    elif isinstance(node, str) and kind is not None:
        if not kind.output and not node.startswith(kind.schemes or ("\0",)):
            file = node.rpartition(":")[0] if kind.member else node
            yield from map(Path, [file, *glob.glob(file, recursive=True)])
    elif isinstance(node, dict) and kind is not None:
        yield from input_paths(tuple(node[key] for key in kind.options if key in node), INPUT)
    elif isinstance(node, RecipeSection):
        for name, field in type(node).model_fields.items():
            own = next((item for item in field.metadata if isinstance(item, PathKind)), None)
            yield from input_paths(getattr(node, name), own)
        if isinstance(node, BalancerSection):
            yield from input_paths(node.model_extra, BALANCER_OPTIONS)
        if isinstance(node, NamedMetricSection):
            yield from map(Path, filter(os.path.isabs, command_of(node)))
