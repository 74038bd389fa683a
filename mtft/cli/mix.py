"""mtft mix design, sweep, propose, fit; blame and relevance stand in mix_advice.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mtft.cli.common import Overrides, Overwrite, RecipeArgument, load, refuse_flags, say
from mtft.cli.mix_advice import mix_blame, mix_relevance
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
from mtft.cli.numbers import LARGEST, number, seed_option, whole

if TYPE_CHECKING:
    from data_mixers.sweep.trial import Trial, TrialOutcome

mix_app = typer.Typer(help="Predict the best mixture from a few cheap trials.", no_args_is_help=True)


@mix_app.command("design")
def mix_design(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    design: Annotated[
        Literal["dirichlet", "space_filling", "damo", "cocktail"] | None,
        typer.Option(help="Design of the trials. Default: the recipe's sweep.design.", show_default=False),
    ] = None,
) -> None:
    """Print the trial mixtures (CSV).

    Also written to <output.dir>/mix/design.csv, unless that describes trials that were run.
    --design cocktail: single tasks, pairs, all, all but one. --design damo: compositions of a trial's batch, drawn
    evenly.
    """
    changes = [*(overrides or []), *([] if design is None else [f"sweep.design={design}"])]
    loaded = load(recipe, changes, "mix")
    from mtft.pipeline.stages.mix import DESIGN, mix_design, mix_dir

    text = mix_design(loaded)
    typer.echo(text, nl=False)
    written = mix_dir(loaded) / DESIGN
    if written.read_text(encoding="utf-8") != text:
        say(f"{written} is kept: it describes the trials that were run")


@mix_app.command("sweep")
def mix_sweep(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Run the trials that the ledger does not hold yet."""
    loaded = load(recipe, overrides, "mix")
    from data_mixers.sweep.runner import first_line
    from mtft.pipeline.stages.mix import mix_dir, mix_sweep, too_few

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
        what = "with a recipe its own keys say how (mixture.caps, sweep.kl, ...), and the result goes to its output.dir"
        refuse_flags(context, but=("arguments",), because=what)
        loaded = load(Path(arguments[0]), arguments[1:], "mix")
        from mtft.pipeline.stages.mix import mix_dir, mix_propose, mix_synergy

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
    out = checked_output(out, [mixtures, scores, prior, current, sizes], overwrite)
    from data_mixers.propose.from_csv import (
        ShareLimits,
        fit_csv,
        parse_limits,
        propose_from,
        read_sizes,
        warn_few_trials,
    )

    with warnings_said():
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
        weights = parse_weights(weight)
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
    out = checked_output(out, [mixtures, scores, predict, large_mixtures, large_scores], overwrite)
    if predict is not None:  # before the fit, which takes a while
        mixtures_to_predict(predict, read_table(mixtures, index).columns, index=index)
    with warnings_said():
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


mix_app.command("blame")(mix_blame)
mix_app.command("relevance")(mix_relevance)
