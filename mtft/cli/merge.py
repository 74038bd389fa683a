"""mtft merge: with a recipe, or with folders of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mtft.cli.common import Overwrite, load


def merge_command(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE [KEY=VALUE]... | ADAPTER...", help="A recipe, or folders of PEFT adapters."),
    ],
    method: Annotated[str | None, typer.Option(help="Merge method (docs/merging.md).")] = None,
    rank: Annotated[str | None, typer.Option(help="auto, lossless, or a number.")] = None,
    weights: Annotated[str | None, typer.Option(help="w1,w2,...: one for each adapter.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Option of the method.")] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a base model: merge whole models fine-tuned from it. With --rank, one model: its LoRA."
        ),
    ] = None,
    experts: Annotated[
        Literal["twin", "arrow"] | None, typer.Option(help="Keep the adapters apart, for a server that routes.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the merged adapter.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge LoRA adapters into one, without the base model.

    mtft merge RECIPE, or: mtft merge --method ties --set density=0.5 --out merged runs/a/adapter runs/b/adapter
    """
    alone = any(value is not None for value in (method, rank, weights, set_, base, experts, out))
    if alone or Path(arguments[0]).is_dir():
        settings = (method or "linear", rank, weights, set_ or [])
        text = _merge_folders(arguments, *settings, base=base, experts=experts, out=out, overwrite=overwrite)
    else:
        from mtft.pipeline.stages.merge import merge_recipe

        more = ["merge.overwrite=true"] if overwrite else []
        text = merge_recipe(load(Path(arguments[0]), [*arguments[1:], *more], "merge", files=False)).text()
    typer.echo(text)


def _merge_folders(
    folders: list[str],
    method: str,
    rank: str | None,
    weights: str | None,
    options: list[str],
    *,
    base: Path | None,
    experts: str | None,
    out: Path | None,
    overwrite: bool,
) -> str:
    """`mtft merge` without a recipe; returns what to print."""
    from mtft.common.errors import UserError
    from mtft.common.run_folders import refuse_run_as_adapter

    if out is None:
        raise UserError("no folder for the merged adapter", where="command line", do="add --out DIR")
    if recipes := [name for name in folders if name.endswith((".yaml", ".yml"))]:
        raise UserError(
            f"{recipes[0]} is no folder of an adapter; with a recipe, settings are overrides",
            where="command line",
            do=f"mtft merge {recipes[0]} merge.method={method} merge.out={out}",
        )
    if base is None:
        for name in folders:
            refuse_run_as_adapter(Path(name))
    numbers, settings = _parse_weights(weights), _parse_options(options)
    size = "auto" if rank is None else int(rank) if rank.isdecimal() else rank
    if base is not None:
        return _merge_models(
            base, folders, method, size, numbers, settings, experts=experts, out=out, overwrite=overwrite
        )
    if experts == "arrow":
        from mtft.merge.experts.build_experts import export_arrow

        if method != "linear" or numbers or settings:
            what = "--experts arrow keeps the adapters as they are: nothing is merged"
            raise UserError(
                what, where="command line", do="leave --method, --weights and --set out, or: --experts twin"
            )
        export_arrow(folders, out, overwrite=overwrite)
        return f"wrote {len(folders)} experts and the router of their prototypes to {out}"
    if experts == "twin":
        from mtft.merge.experts.build_experts import build_twin

        report = build_twin(
            folders, out, method, options=settings, weights=numbers, average=False, rank=size, overwrite=overwrite
        )
        hint = "without a router, which needs rows: a recipe with merge.experts fits one"
        return f"{report.text()}\n{len(folders)} experts beside it, {hint}"
    from mtft.merge.engine.merge import merge_adapters

    return merge_adapters(folders, out, method, settings, numbers, rank=size, overwrite=overwrite).text()


def _merge_models(
    base: Path,
    models: list[str],
    method: str,
    rank: int | str,
    weights: list[float] | None,
    options: dict[str, object],
    *,
    experts: str | None,
    out: Path,
    overwrite: bool,
) -> str:
    """Whole models: merged, or merged with a LoRA each (twin), or the LoRA of one."""
    from mtft.common.errors import UserError

    if experts == "arrow" or (experts is None and rank != "auto" and len(models) > 1):
        what = "with --base, --rank is for one model (its LoRA is written) or for --experts twin"
        raise UserError(what, where="command line", do="leave --rank out, or extract the models one by one")
    if experts == "twin":
        from mtft.merge.full_models.extract_lora import twin_models

        width = rank if isinstance(rank, int) else 16
        twins = twin_models(base, models, out, method, width, options=options, weights=weights, overwrite=overwrite)
        lines = [f"merged {len(models)} models by {method} into {out / 'shared'}"]
        return "\n".join([*lines, *(f"{name}: {held.text()}" for name, held in twins.items())])
    if rank != "auto":
        from mtft.merge.full_models.extract_lora import extract_adapter

        return extract_adapter(base, models[0], out, rank, overwrite=overwrite).text()  # type: ignore[arg-type]
    from mtft.merge.full_models.merge_checkpoints import merge_checkpoints

    merge_checkpoints(base, models, out, method, options, weights, overwrite=overwrite)
    return f"merged {len(models)} models by {method} into {out}"


def _parse_weights(weights: str | None) -> list[float] | None:
    from mtft.common.errors import UserError

    try:
        return None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise UserError(
            f"--weights {weights} is no list of numbers", where="command line", do="--weights 1,0.5"
        ) from None


def _parse_options(options: list[str]) -> dict[str, object]:
    from mtft.common.errors import UserError
    from mtft.recipe.yaml_source import plain_value

    settings = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--set {option} is not KEY=VALUE", where="command line", do="--set density=0.5")
        settings[key] = plain_value(value, where=f"command line, --set {option}")
    return settings
