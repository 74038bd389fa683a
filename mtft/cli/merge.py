"""mtft merge: with a recipe, or with folders of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtft.cli.common import Overwrite, load

if TYPE_CHECKING:
    from mtft.merge.report import MergeReport


def merge(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE [KEY=VALUE]... | ADAPTER...", help="A recipe, or folders of PEFT adapters."),
    ],
    method: Annotated[str | None, typer.Option(help="Merge method (docs/papers.md).")] = None,
    rank: Annotated[str | None, typer.Option(help="auto, lossless, or a number.")] = None,
    weights: Annotated[str | None, typer.Option(help="w1,w2,...: one for each adapter.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Option of the method.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the merged adapter.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge LoRA adapters into one, without the base model.

    mtft merge RECIPE, or: mtft merge --method ties --set density=0.5 --out merged runs/a/adapter runs/b/adapter
    """
    alone = any(value is not None for value in (method, rank, weights, set_, out))
    if alone or Path(arguments[0]).is_dir():
        found = _merge_adapters(arguments, method or "linear", rank or "auto", weights, set_ or [], out, overwrite)
    else:
        from mtft.merge.run import merge_from_recipe

        more = ["merge.overwrite=true"] if overwrite else []
        found = merge_from_recipe(load(Path(arguments[0]), [*arguments[1:], *more], "merge", files=False))
    typer.echo(found.text())


def _merge_adapters(
    adapters: list[str],
    method: str,
    rank: str,
    weights: str | None,
    options: list[str],
    out: Path | None,
    overwrite: bool,
) -> MergeReport:
    """`mtft merge` without a recipe: options as text -> mtft.merge.api.merge."""
    from mtft.errors import UserError
    from mtft.merge.api import merge
    from mtft.recipe.source import plain_value

    if out is None:
        raise UserError("no folder for the merged adapter", where="command line", do="add --out DIR")
    if recipes := [name for name in adapters if name.endswith((".yaml", ".yml"))]:
        raise UserError(
            f"{recipes[0]} is no folder of an adapter; with a recipe, settings are overrides",
            where="command line",
            do=f"mtft merge {recipes[0]} merge.method={method} merge.out={out}",
        )
    try:
        numbers = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise UserError(
            f"--weights {weights} is no list of numbers", where="command line", do="--weights 1,0.5"
        ) from None
    settings = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--set {option} is not KEY=VALUE", where="command line", do="--set density=0.5")
        settings[key] = plain_value(value, where=f"command line, --set {option}")
    size = int(rank) if rank.isdecimal() else rank
    return merge(adapters, out, method=method, options=settings, weights=numbers, rank=size, overwrite=overwrite)
