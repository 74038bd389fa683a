"""mtft mix blame, relevance: what single datasets are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mtft.cli.common import Overwrite, expand, load, refuse_flags, say
from mtft.cli.mix_options import (
    INDEX_HELP,
    SURROGATE_HELP,
    Bounds,
    Goal,
    Link,
    checked_output,
    parse_weights,
    warnings_said,
)
from mtft.cli.numbers import seed_option, whole


def mix_blame(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE [KEY=VALUE]...]", help="A recipe, whose ledger is read.", show_default=False),
    ] = None,
    mixtures: Annotated[Path | None, typer.Option(help="CSV: one trial a row, one column a task.")] = None,
    scores: Annotated[Path | None, typer.Option(help="CSV: one trial a row, one column a target.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Column of the scores; repeat it. Default: all.")] = None,
    weight: Annotated[list[str] | None, typer.Option(metavar="TARGET=W", help="Weight of a target.")] = None,
    objective: Annotated[Literal["mean", "worst"], typer.Option(help="Over the targets, each standardised.")] = "mean",
    index: Annotated[str | None, typer.Option(help=INDEX_HELP)] = None,
    surrogate: Annotated[str, typer.Option(help=SURROGATE_HELP)] = "auto",
    goal: Annotated[Goal, typer.Option(help="min (losses) or max (accuracies).")] = "min",
    bounds: Bounds = None,
    link: Link = "auto",
    current: Annotated[Path | None, typer.Option(help="The mixture (CSV, YAML). Default: uniform.")] = None,
    limit: Annotated[int | None, whole("--limit", 3, 10**9, help="Use only the first N trials.")] = None,
    seed: Annotated[int, seed_option("Makes fit and draws reproducible.")] = 0,
    cv: Annotated[int, whole("--cv", 2, 1000, help="Folds of the cross-validation.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Where the numbers go (JSON).")] = None,
    overwrite: Overwrite = False,
) -> None:
    """What each dataset is worth: it helps, it hurts, or that can't be told.

    The predicted scores without a dataset, its share given to the others in proportion, against the mixture as it is.
    With a recipe also written to <output.dir>/mix/blame.json.
    """
    from mtft.common.errors import UserError

    if arguments and mixtures is None and scores is None:
        what = "a recipe says everything itself (sweep.surrogate, sweep.objective, ...), its output.dir included"
        refuse_flags(context, but=("arguments",), because=what)
        loaded = load(Path(arguments[0]), arguments[1:], "mix")
        from mtft.pipeline.stages.blame import mix_blame

        written, found = mix_blame(loaded)
        typer.echo(found.text())
        typer.echo(written)
        return
    if arguments or mixtures is None or scores is None:
        raise UserError(
            "either a recipe, or both --mixtures and --scores",
            where="command line",
            do="mtft mix blame RECIPE, or: mtft mix blame --mixtures x.csv --scores y.csv --current now.csv",
        )
    from data_mixers.mixture.mixture import uniform
    from data_mixers.propose.blame import blame
    from data_mixers.propose.from_csv import fit_csv, read_mixture, warn_few_trials
    from mtft.common.own_files import write_own

    out = checked_output(out, [mixtures, scores, current], overwrite)
    with warnings_said():
        fits = fit_csv(
            mixtures, scores, "all" if not target or target == ["all"] else target, index=index, surrogate=surrogate,
            goal=goal, limit=limit, seed=seed, cv=cv, bounds=bounds or (), link=link,
        )  # fmt: skip
        warn_few_trials(fits)
        playing = uniform(fits.names) if current is None else read_mixture(current, fits.names)
        found = blame(fits, parse_weights(weight) or objective, current=playing, seed=seed)
    typer.echo(found.text())
    if out is not None:
        write_own(out, found.as_dict())


def mix_relevance(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE [KEY=VALUE]...]", help="A recipe: its tasks' gradients are measured.", show_default=False
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Task that the others are to help; repeat it. Default with a recipe: every task."),
    ] = None,
    sketches: Annotated[
        Path | None, typer.Option(help="Instead of a recipe: CSV, one column a task (its head, or a sketch).")
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(
            help="Column that numbers the rows. Default: index, id or trial, or the first if it counts or names rows."
        ),
    ] = None,
    method: Annotated[Literal["l1", "l2"], typer.Option(help="l1: few tasks (A-MTRL); l2: the earlier rule.")] = "l1",
    noise: Annotated[bool, typer.Option("--noise", help="Lasso by cross-validation, for sketches with noise.")] = False,
    rows: Annotated[
        int | None, whole("--rows", 1, 10**12, help="Rows to draw in all: says how many from each task.")
    ] = None,
    seed: Annotated[int, seed_option("Of the folds of --noise.")] = 0,
    adapter: Annotated[
        Path | None, typer.Option(help="With a recipe: measure on this LoRA adapter. Default: on a fresh one.")
    ] = None,
    examples: Annotated[int, whole("--examples", 1, 10**6, help="With a recipe: rows of each task measured.")] = 64,
    size: Annotated[int, whole("--size", 64, 2**20, help="With a recipe: numbers in a sketch.")] = 4096,
) -> None:
    """Which tasks matter for a target (advice beside the trials' answer).

    The Lasso of the target's gradient, or of any sketch of it, on the other tasks'. With a recipe the gradients are
    measured: of a few training rows of each task, and of held-out rows of the target; weights are then 0 or more.
    """
    from mtft.common.errors import UserError

    if (sketches is None) == (not arguments):
        raise UserError(
            "either a recipe, or --sketches",
            where="command line",
            do="mtft mix relevance RECIPE, or: mtft mix relevance --sketches w.csv --target TASK",
        )
    if arguments:
        own = ("arguments", "target", "rows", "adapter", "examples", "size")
        refuse_flags(context, but=own, because="with a recipe the sketches are measured, noise and all")
        loaded, adapter = load(Path(arguments[0]), arguments[1:], "eval"), None if adapter is None else expand(adapter)
        from mtft.pipeline.stages.relevance import task_relevance

        found = task_relevance(loaded, target, adapter=adapter, examples=examples, size=size, say=say)
        typer.echo("\n\n".join(each.text(rows) for each in found))
        return
    refuse_flags(
        context, but=("sketches", "target", "index", "method", "noise", "rows", "seed"),
        because="--sketches has the sketches already",
    )  # fmt: skip
    if sketches is None or target is None or len(target) != 1:
        raise UserError("--sketches needs one --target", where="command line", do="name a column: --target TASK")
    _relevance_of_sketches(sketches, target[0], index, method, noise=noise, rows=rows, seed=seed)


def _relevance_of_sketches(
    sketches: Path, target: str, index: str | None, method: Literal["l1", "l2"], *, noise: bool, rows: int | None,
    seed: int,
) -> None:  # fmt: skip
    import numpy as np

    from data_mixers.common.csv_tables import LINE, read_table
    from data_mixers.design.task_relevance import relevance
    from data_mixers.mixture.mixture import check_names

    table = read_table(sketches, index, unnumbered=True)
    if table.index_name != LINE:
        say(f"column {table.index_name!r} numbers the rows; it is no task")
    if target not in table.columns:
        check_names([*table.columns, target], table.columns, where=f"{sketches}, --target")
    sources = [name for name in table.columns if name != target]
    columns = dict(zip(table.columns, table.values.T, strict=True))
    W = table.values[:, [table.columns.index(name) for name in sources]]
    solved = relevance(W, columns[target], method, noise=noise, seed=seed)
    counts = None if rows is None else solved.rows(rows)
    typer.echo(f"{'task':<24}{'weight':>10}{'share':>8}" + ("" if counts is None else f"{'rows':>10}"))
    weights = np.round(solved.nu, 4) + 0.0  # no -0.0000
    for place, name in enumerate(sources):
        tail = "" if counts is None else f"{int(counts[place]):10d}"
        typer.echo(f"{name:<24}{weights[place]:10.4f}{solved.shares[place]:8.4f}{tail}")
    typer.echo(f"residual {solved.residual:.3g} of the target's size")
