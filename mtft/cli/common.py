"""What commands share: the recipe argument, overrides, loading, and a word to the user."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mtft.recipe.rules.rule import Stage
    from mtft.recipe.schema.recipe import Recipe

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Change keys: train.steps=100 lora=null.", show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]


def expand(path: str | Path) -> Path:
    """With the home folder for `~`, which shells leave as it is in --out=~/x."""
    return Path(os.path.expanduser(path))


def refuse_flags(context: typer.Context, *, but: tuple[str, ...], because: str) -> None:
    """UserError if options other than `but` were given, where they would be ignored."""
    from mtft.common.errors import UserError

    named = {parameter.name: parameter.opts[0] for parameter in context.command.params if parameter.name is not None}
    sources = {flag: context.get_parameter_source(name) for name, flag in named.items() if name not in but}
    given = [flag for flag, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        raise UserError(because, where=f"command line, {', '.join(given)}", do=f"leave {', '.join(given)} out")


def load(path: Path, overrides: list[str] | None, stage: Stage, *, files: bool = True) -> Recipe:
    """The recipe, checked for this stage; warnings go to stderr."""
    from mtft.recipe.compatibility import check_compatibility
    from mtft.recipe.load import load_recipe

    recipe = load_recipe(path, overrides or [], files=files)
    for warning in check_compatibility(recipe, stage=stage):
        say(f"warning: {warning}")
    return recipe


def say(text: str) -> None:
    """One line for people, from the first rank only."""
    from mtft.distributed.launch import is_main_process

    if is_main_process():
        typer.echo(text, err=True)
