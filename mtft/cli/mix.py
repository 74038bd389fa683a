"""mtft mix design, sweep, propose, fit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mtft.cli.common import Overrides, RecipeArgument, load, say

mix = typer.Typer(help="Predict the best mixture from a few cheap trials.", no_args_is_help=True)

Goal = Literal["min", "max"]


@mix.command("design")
def mix_design(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print the trial mixtures (CSV).

    Also written to <output.dir>/mix/design.csv.
    """
    from mtft.pipeline.mix import mix_design

    typer.echo(mix_design(load(recipe, overrides, "mix")), nl=False)


@mix.command("sweep")
def mix_sweep(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Run the trials that the ledger does not hold yet."""
    from mtft.pipeline.mix import mix_dir, mix_sweep

    loaded = load(recipe, overrides, "mix")
    done = mix_sweep(loaded, on_done=lambda trial, outcome: say(f"trial {trial.id}: {outcome.error or 'done'}"))
    say(done.text())
    typer.echo(mix_dir(loaded) / "ledger.jsonl")
    raise typer.Exit(done.exit_code)


@mix.command("propose")
def mix_propose(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Fit the ledger and write mixture.yaml.

    With the verdict: is the proposal better than the current mixture, beyond the noise?
    """
    from mtft.pipeline.mix import mix_dir, mix_propose

    loaded = load(recipe, overrides, "mix")
    typer.echo(mix_propose(loaded).text)
    typer.echo(mix_dir(loaded) / "mixture.yaml")


@mix.command("fit")
def mix_fit(
    mixtures: Annotated[Path, typer.Option(help="CSV: one trial a row, one column a task with its share.")],
    scores: Annotated[Path, typer.Option(help="CSV: one trial a row, one column a target.")],
    target: Annotated[list[str], typer.Option(help="Column of the scores; repeat it, or `all`.")],
    index: Annotated[str | None, typer.Option(help="Column that joins the files; without it, row by row.")] = None,
    surrogate: Annotated[str, typer.Option(help="auto, linear, lightgbm, ...")] = "auto",
    goal: Annotated[Goal, typer.Option(help="min (losses) or max (accuracies).")] = "min",
    predict: Annotated[Path | None, typer.Option(help="CSV of mixtures to predict.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the predictions go (CSV).")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N trials.")] = None,
    seed: Annotated[int, typer.Option(help="Makes the whole fit reproducible.")] = 0,
    cv: Annotated[int, typer.Option(help="Folds of the cross-validation.")] = 5,
) -> None:
    """Fit trials of your own, from CSV files.

    Which mixture gives which score, how sure that is, and predictions for other mixtures.
    """
    from data_mixers.fit import fit_csv, predict_csv
    from mtft.errors import UserError

    if (predict is None) != (out is None):
        raise UserError("--predict and --out belong together", where="command line", do="give both files, or neither")
    targets = "all" if target == ["all"] else target
    found = fit_csv(
        mixtures, scores, targets, index=index, surrogate=surrogate, goal=goal, limit=limit, seed=seed, cv=cv
    )
    typer.echo(found.text())
    if predict is not None and out is not None:
        rows = predict_csv(found, predict, out, index=index)
        say(f"{rows} predictions in {out}")
