"""mtft merge: with a recipe, or with folders of adapters."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from mtft.cli.common import Overwrite, expand, load
from mtft.cli.numbers import NumberRange, number


def merge_command(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE [KEY=VALUE]... | ADAPTER...", help="A recipe, or folders of PEFT adapters."),
    ],
    method: Annotated[str | None, typer.Option(help="Merge method (docs/merging.md).")] = None,
    rank: Annotated[str | None, typer.Option(help="auto, lossless, or a number.")] = None,
    min_energy: Annotated[
        float | None, number("--min-energy", 0, 1, help="Refuse a rank that keeps less than this share (0 to 1).")
    ] = None,
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
    alone = any(value is not None for value in (method, rank, min_energy, weights, set_, base, experts, out))
    if alone or _is_folder(arguments[0]):
        settings = MergeFlags(
            method or "linear",
            _parse_rank(rank),
            min_energy,
            _parse_weights(weights),
            _parse_options(set_ or []),
            experts,
            overwrite,
        )
        text = _merge_folders([str(expand(name)) for name in arguments], base, out, settings)
    else:
        more = ["merge.overwrite=true"] if overwrite else []
        loaded = load(Path(arguments[0]), [*arguments[1:], *more], "merge", files=False)
        from mtft.pipeline.stages.merge import merge_recipe

        text = merge_recipe(loaded).text()
    typer.echo(text)


@dataclass(frozen=True)
class MergeFlags:
    """The options of `mtft merge` without a recipe."""

    method: str
    rank: int | str | None
    min_energy: float | None
    weights: list[float] | None
    options: dict[str, object]
    experts: str | None
    overwrite: bool

    def refuse(self, *names: str, because: str) -> None:
        """UserError if one of these flags was given, where it would be ignored."""
        from mtft.common.errors import UserError

        given = [name for name in names if getattr(self, name) not in (None, {}, "linear")]
        if given:
            flags = {"min_energy": "--min-energy", "options": "--set"}
            shown = ", ".join(flags.get(name, f"--{name}") for name in given)
            raise UserError(because, where=f"command line, {shown}", do=f"leave {shown} out")


def _merge_folders(folders: list[str], base: Path | None, out: Path | None, flags: MergeFlags) -> str:
    """`mtft merge` without a recipe; returns what to print."""
    from mtft.common.errors import UserError
    from mtft.common.run_folders import refuse_run_as_adapter

    if out is None:
        raise UserError("no folder for the merged adapter", where="command line", do="add --out DIR")
    if recipes := [name for name in folders if name.endswith((".yaml", ".yml"))]:
        raise UserError(
            f"{recipes[0]} is no folder of an adapter; with a recipe, settings are overrides",
            where="command line",
            do=f"mtft merge {recipes[0]} merge.method={flags.method} merge.out={out}",
        )
    out, size = expand(out), "auto" if flags.rank is None else flags.rank
    if base is not None:
        return _merge_models(expand(base), folders, out, flags)
    for name in folders:
        refuse_run_as_adapter(Path(name))
    how = {"rank": size, "min_energy": flags.min_energy, "overwrite": flags.overwrite}
    if flags.experts == "arrow":
        from mtft.merge.experts.build_experts import export_arrow

        what = "--experts arrow keeps the adapters as they are: nothing is merged"
        flags.refuse("method", "rank", "min_energy", "weights", "options", because=what)
        export_arrow(folders, out, overwrite=flags.overwrite)
        return f"wrote {len(folders)} experts and the router of their prototypes to {out}"
    if flags.experts == "twin":
        from mtft.merge.experts.build_experts import build_twin

        report = build_twin(
            folders, out, flags.method, options=flags.options, weights=flags.weights, average=False, **how
        )
        hint = "without a router, which needs rows: a recipe with merge.experts fits one"
        return f"{report.text()}\n{len(folders)} experts beside it, {hint}"
    from mtft.merge.engine.merge import merge_adapters

    return merge_adapters(folders, out, flags.method, flags.options, flags.weights, **how).text()


def _merge_models(base: Path, models: list[str], out: Path, flags: MergeFlags) -> str:
    """Whole models: merged, or merged with a LoRA each (twin), or the LoRA of one."""
    from mtft.common.errors import UserError

    rank = flags.rank
    flags.refuse("min_energy", because="--min-energy is for merges of adapters")
    if flags.experts == "arrow" or (flags.experts is None and rank is not None and len(models) > 1):
        what = "with --base, --rank is for one model (its LoRA is written) or for --experts twin"
        raise UserError(what, where="command line", do="leave --rank out, or extract the models one by one")
    if isinstance(rank, str):
        raise UserError(f"--rank {rank} with --base", where="command line", do="a number: --rank 16")
    how = {"options": flags.options, "weights": flags.weights, "overwrite": flags.overwrite}
    if flags.experts == "twin":
        from mtft.merge.full_models.extract_lora import twin_models

        twins = twin_models(base, models, out, flags.method, rank or 16, **how)
        lines = [f"merged {len(models)} models by {flags.method} into {out / 'shared'}"]
        return "\n".join([*lines, *(f"{name}: {held.text()}" for name, held in twins.items())])
    if rank is not None:
        from mtft.merge.full_models.extract_lora import extract_adapter

        flags.refuse("method", "weights", "options", because="--base with --rank writes the LoRA of one model")
        return extract_adapter(base, models[0], out, rank, overwrite=flags.overwrite).text()
    from mtft.merge.full_models.merge_checkpoints import merge_checkpoints

    merge_checkpoints(base, models, out, flags.method, **how)
    return f"merged {len(models)} models by {flags.method} into {out}"


def _is_folder(name: str) -> bool:
    from mtft.common.atomic_folder import restore_replaced

    restore_replaced(expand(name))
    return os.path.isdir(expand(name))


def _parse_rank(rank: str | None) -> int | str | None:
    return None if rank is None else NumberRange("--rank", 1, 2**16, words=("auto", "lossless"))(rank)


def _parse_weights(weights: str | None) -> list[float] | None:
    each = NumberRange("--weights", -1e9, 1e9, whole=False)  # as merge.weights of a recipe
    return None if weights is None else [each(weight) for weight in weights.split(",")]


def _parse_options(options: list[str]) -> dict[str, object]:
    from mtft.common.errors import UserError
    from mtft.recipe.yaml_source import plain_value

    settings: dict[str, object] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--set {option} is not KEY=VALUE", where="command line", do="--set density=0.5")
        if key in settings:
            raise UserError(f"--set {key} twice", where="command line", do="give each option once")
        settings[key] = plain_value(value, where=f"command line, --set {option}")
    return settings
