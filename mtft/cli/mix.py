"""mtft mix design, sweep, propose, fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mtft.cli.common import Overrides, Overwrite, RecipeArgument, expand, load, refuse_flags, say
from mtft.cli.numbers import LARGEST, NumberRange, number, seed_option, whole

if TYPE_CHECKING:
    from data_mixers.sweep.trial import Trial, TrialOutcome

mix_app = typer.Typer(help="Predict the best mixture from a few cheap trials.", no_args_is_help=True)

Goal = Literal["min", "max"]
Bounds = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[TARGET=]LOW,HIGH",
        help="Lowest and highest score there can be, as 0,1: for every target, or one. Predictions stay inside.",
    ),
]
Link = Annotated[
    Literal["auto", "none", "logit"],
    typer.Option(help="Fit bounded scores by their logit, as they are, or as predicts better (auto)."),
]
INDEX_HELP = "Column that joins the files. Default: index, id or trial, else the first."
SURROGATE_HELP = "auto (a stack), or one: linear, ridge, lightgbm, mlp, exp, power, bimix, transfer, gp, warped."


@mix_app.command("design")
def mix_design(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    design: Annotated[
        Literal["dirichlet", "space_filling", "cocktail"] | None,
        typer.Option(help="Design of the trials. Default: the recipe's sweep.design.", show_default=False),
    ] = None,
) -> None:
    """Print the trial mixtures (CSV).

    Also written to <output.dir>/mix/design.csv, unless that describes trials that were run.
    --design cocktail: single tasks, pairs, all, all but one.
    """
    from mtft.pipeline.stages.mix import DESIGN, mix_design, mix_dir

    changes = [*(overrides or []), *([] if design is None else [f"sweep.design={design}"])]
    loaded = load(recipe, changes, "mix")
    text = mix_design(loaded)
    typer.echo(text, nl=False)
    written = mix_dir(loaded) / DESIGN
    if written.read_text(encoding="utf-8") != text:
        say(f"{written} is kept: it describes the trials that were run")


@mix_app.command("sweep")
def mix_sweep(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Run the trials that the ledger does not hold yet."""
    from data_mixers.sweep.runner import first_line
    from mtft.pipeline.stages.mix import mix_dir, mix_sweep, too_few

    loaded = load(recipe, overrides, "mix")
    seen: dict[str | None, str] = {}

    def tell(trial: Trial, outcome: TrialOutcome) -> None:
        """A cause that several trials have is told at the first one."""
        if outcome.error is not None and (first := seen.setdefault(first_line(outcome.error), trial.id)) != trial.id:
            say(f"trial {trial.id}: failed as {first} did")
        else:
            say(f"trial {trial.id}: {outcome.error or 'done'}")

    done = mix_sweep(loaded, on_done=tell)
    say(done.text())
    if (why := too_few(loaded)) is not None:
        say(f"warning: {why}")
    typer.echo(mix_dir(loaded) / "ledger.jsonl")
    raise typer.Exit(done.exit_code)


@mix_app.command("propose")
def mix_propose(
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
    prior: Annotated[Path | None, typer.Option(help="Shares to stay near (CSV, YAML). Default: uniform.")] = None,
    current: Annotated[Path | None, typer.Option(help="Shares to beat (CSV, YAML). Default: the prior.")] = None,
    cap: Annotated[list[str] | None, typer.Option(metavar="NAME=SHARE", help="Largest share of a task.")] = None,
    floor: Annotated[list[str] | None, typer.Option(metavar="NAME=SHARE", help="Smallest share of a task.")] = None,
    max_epochs: Annotated[
        float | None, number("--max-epochs", 0, LARGEST, help="Passes over any task (with --sizes, --total).")
    ] = None,
    sizes: Annotated[Path | None, typer.Option(help="Rows of each task (CSV, YAML).")] = None,
    total: Annotated[float | None, number("--total", 1, LARGEST, help="Rows of the whole run.")] = None,
    kl: Annotated[float, number("--kl", 0, LARGEST, help="Pull towards the prior.")] = 0.05,
    min_gain: Annotated[
        float, number("--min-gain", 0, LARGEST, help="Gain below which a change is not worth it (sd of the scores).")
    ] = 0,
    other_scale: Annotated[
        bool, typer.Option("--other-scale", help="The mixture is for a larger model or run.")
    ] = False,
    limit: Annotated[int | None, whole("--limit", 3, 10**9, help="Use only the first N trials.")] = None,
    seed: Annotated[int, seed_option("Makes fit and proposal reproducible.")] = 0,
    cv: Annotated[int, whole("--cv", 2, 1000, help="Folds of the cross-validation.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Where the mixture goes (YAML).")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Propose a mixture, with the verdict: is it better than the current one, beyond the noise?

    mtft mix propose RECIPE reads the recipe's ledger and writes mixture.yaml beside it; with trials of your own:
    mtft mix propose --mixtures x.csv --scores y.csv --prior natural.csv --cap news=0.05 --out mixture.yaml
    """
    from mtft.common.errors import UserError

    if arguments and mixtures is None and scores is None:
        from mtft.pipeline.stages.mix import mix_dir, mix_propose, mix_synergy

        what = "with a recipe its own keys say how (mixture.caps, sweep.kl, ...), and the result goes to its output.dir"
        refuse_flags(context, but=("arguments",), because=what)

        loaded = load(Path(arguments[0]), arguments[1:], "mix")
        typer.echo(mix_propose(loaded).table())
        if loaded.sweep is not None and loaded.sweep.design == "cocktail":
            typer.echo(mix_synergy(loaded))
        typer.echo(mix_dir(loaded) / "mixture.yaml")
        return
    if arguments or mixtures is None or scores is None:
        raise UserError(
            "either a recipe, or both --mixtures and --scores",
            where="command line",
            do="mtft mix propose RECIPE, or: mtft mix propose --mixtures x.csv --scores y.csv --out mixture.yaml",
        )
    out = _checked_output(out, [mixtures, scores, prior, current, sizes], overwrite)
    from data_mixers.propose.from_csv import (
        ShareLimits,
        fit_csv,
        parse_limits,
        propose_from,
        read_sizes,
        warn_few_trials,
    )

    with _warnings_said():
        targets = "all" if not target or target == ["all"] else target
        fits = fit_csv(
            mixtures, scores, targets, index=index, surrogate=surrogate, goal=goal, limit=limit, seed=seed, cv=cv,
            bounds=bounds or (), link=link, other_scale=other_scale,
        )  # fmt: skip
        warn_few_trials(fits)
        limits = ShareLimits(
            parse_limits(cap or [], "--cap"),
            parse_limits(floor or [], "--floor"),
            max_epochs,
            None if sizes is None else read_sizes(sizes, fits.names),
            total,
        )
        weights = _weights(weight)
        proposal = propose_from(
            fits, objective=weights or objective, limits=limits, prior=prior, current=current, kl=kl,
            min_gain=min_gain, seed=seed,
        )  # fmt: skip
    typer.echo(fits.text())
    typer.echo("")
    typer.echo(proposal.table())
    if out is not None:
        proposal.to_yaml(out)
        say(f"{proposal.kept_as}{'' if proposal.verdict == 'better' else ','} in {out}")


@mix_app.command("fit")
def mix_fit(
    mixtures: Annotated[Path, typer.Option(help="CSV: one trial a row, one column a task with its share.")],
    scores: Annotated[Path, typer.Option(help="CSV: one trial a row, one column a target.")],
    target: Annotated[list[str], typer.Option(help="Column of the scores; repeat it, or `all`.")],
    index: Annotated[str | None, typer.Option(help=INDEX_HELP)] = None,
    surrogate: Annotated[str, typer.Option(help=SURROGATE_HELP)] = "auto",
    goal: Annotated[Goal, typer.Option(help="min (losses) or max (accuracies).")] = "min",
    bounds: Bounds = None,
    link: Link = "auto",
    predict: Annotated[Path | None, typer.Option(help="CSV of mixtures to predict.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the predictions go (CSV).")] = None,
    overwrite: Overwrite = False,
    large_mixtures: Annotated[
        Path | None, typer.Option(help="CSV of large runs (4 or more): predictions are then of their scale.")
    ] = None,
    large_scores: Annotated[Path | None, typer.Option(help="CSV: the large runs' scores.")] = None,
    other_scale: Annotated[
        bool | None,
        typer.Option(
            "--other-scale/--same-scale",
            help="Predictions are for larger runs, or for runs like the trials. Default: larger, if the mixtures are "
            "drawn unlike the trials.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, whole("--limit", 3, 10**9, help="Use only the first N trials.")] = None,
    seed: Annotated[int, seed_option("Makes the whole fit reproducible.")] = 0,
    cv: Annotated[int, whole("--cv", 2, 1000, help="Folds of the cross-validation.")] = 5,
) -> None:
    """Fit trials of your own, from CSV files.

    Which mixture gives which score, how sure that is (Spearman, R2 and coverage of each surrogate by cross-validation),
    and predictions for other mixtures.
    """
    from data_mixers.common.csv_tables import read_table
    from data_mixers.propose.from_csv import fit_csv, large_runs, mixtures_to_predict, predict_csv, warn_few_trials
    from mtft.common.errors import UserError

    if (predict is None) != (out is None):
        raise UserError("--predict and --out belong together", where="command line", do="give both files, or neither")
    if (large_mixtures is None) != (large_scores is None):
        raise UserError(
            "--large-mixtures and --large-scores belong together", where="command line", do="give both, or neither"
        )
    out = _checked_output(out, [mixtures, scores, predict, large_mixtures, large_scores], overwrite)
    if predict is not None:  # before the fit, which takes a while
        mixtures_to_predict(predict, read_table(mixtures, index).columns, index=index)
    with _warnings_said():
        targets = "all" if target == ["all"] else target
        fits = fit_csv(
            mixtures, scores, targets, index=index, surrogate=surrogate, goal=goal, limit=limit, seed=seed, cv=cv,
            bounds=bounds or (), link=link, other_scale=bool(other_scale) and large_mixtures is None,
        )  # fmt: skip
        warn_few_trials(fits)
        if large_mixtures is not None and large_scores is not None:
            fits = large_runs(fits, large_mixtures, large_scores, index=index, goal=goal)
        typer.echo(fits.text())
        if predict is not None and out is not None:
            unsaid = other_scale is None and large_mixtures is None
            rows = predict_csv(fits, predict, out, index=index, scale="auto" if unsaid else "as_fitted")
            say(f"{rows} predictions in {out}")


@mix_app.command("relevance")
def mix_relevance(
    sketches: Annotated[Path, typer.Option(help="CSV: one column a task (its head, or a sketch of its gradient).")],
    target: Annotated[str, typer.Option(help="Column of the task that the others are to help.")],
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
) -> None:
    """Which tasks matter for a target: the Lasso of its sketch on the others' (advice beside the trials' answer)."""
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


def _checked_output(out: Path | None, inputs: list[Path | None], overwrite: bool) -> Path | None:
    """The output's path; UserError if it can't be written, is an input, or is there (without --overwrite)."""
    from mtft.common.output_paths import check_output_file

    if out is None:
        return None
    check_output_file(expand(out), inputs=inputs, overwrite=overwrite)
    return expand(out)


def _weights(entries: list[str] | None) -> dict[str, float]:
    """{target: weight} of TARGET=W entries."""
    from mtft.common.errors import UserError
    from mtft.common.listing import clipped

    weights: dict[str, float] = {}
    for entry in entries or []:
        name, _, text = entry.rpartition("=")
        if name in weights:
            raise UserError(f"--weight {name} twice", where="command line", do="give each target one weight")
        weights[name] = NumberRange(f"--weight {clipped(name, 60)}", 0, LARGEST, whole=False)(text)
    return weights


@contextmanager
def _warnings_said() -> Iterator[None]:
    """What the mixing room warns of, each once, as lines for people."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for text in dict.fromkeys(str(item.message) for item in caught):
                say(f"warning: {text}")
