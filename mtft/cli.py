"""The commands of mtft: parse, call one room, print. Nothing heavy is imported before a command runs.

The rooms' results go to stdout, their progress to stderr, so that `mtft eval ... > scores.json` holds JSON only.
Errors become one block in mtft/__main__.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import mtft

if TYPE_CHECKING:
    from mtft.fuse.jsonl import Summary
    from mtft.merge.report import MergeReport
    from mtft.recipe.compat import Stage
    from mtft.recipe.schema import Recipe

app = typer.Typer(
    name="mtft", help=mtft.__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip
mix = typer.Typer(help="Predict the best mixture from a few cheap trials.", no_args_is_help=True)
fuse = typer.Typer(help="Steer a large model with a small tuned one.", no_args_is_help=True)
app.add_typer(mix, name="mix")
app.add_typer(fuse, name="fuse")

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Change keys: train.steps=100 lora=null.", show_default=False),
]
Goal = Literal["min", "max"]
Rows = Annotated[Path, typer.Option("--rows", help="JSONL file to read.")]
RowsOut = Annotated[Path, typer.Option("--out", help="JSONL file to write; the same command continues it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over; what is there moves aside.")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mtft {mtft.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Fine-tune one language model on many tasks, and know what to mix, how to weigh it, and what you got."""


def _load(path: Path, overrides: list[str] | None, stage: Stage, *, files: bool = True) -> Recipe:
    """The recipe, checked for this stage; warnings go to stderr."""
    from mtft.recipe.compat import check_compat
    from mtft.recipe.load import load_recipe

    recipe = load_recipe(path, overrides or [], files=files)
    for warning in check_compat(recipe, stage=stage):
        _say(f"warning: {warning}")
    return recipe


def _say(text: str) -> None:
    """One line for people, from the first rank only."""
    from mtft.__main__ import is_first_rank

    if is_first_rank():
        typer.echo(text, err=True)


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a recipe would do, and what is wrong with it.

    Everything that can be found before any weight is loaded: asked and realised shares, epochs, tokens, steps, memory.
    """
    import json

    from mtft.pipeline.check import examine
    from mtft.recipe.load import load_recipe

    found = examine(load_recipe(recipe, overrides or []))
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(found.render())
    else:
        typer.echo(found.text())


@app.command()
def train(recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """Train, or continue a run that was stopped.

    On several GPUs: accelerate launch --config_file recipes/accelerate/ddp.yaml -m mtft train RECIPE
    """
    from mtft.train.run import train as run_training

    result = run_training(_load(recipe, overrides, "train"), fresh=fresh)
    _say(f"adapter: {result.adapter_dir}")


@app.command("eval")
def evaluate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a PEFT adapter; without it, the base model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file instead of stdout.")] = None,
) -> None:
    """Score a model per task on held-out rows (JSON).

    Loss, token accuracy and exact match, each with its confidence interval.
    """
    import json

    from mtft.evaluate.run import as_json
    from mtft.evaluate.run import evaluate as run_evaluation

    loaded = _load(recipe, overrides, "eval")
    text = json.dumps(as_json(run_evaluation(loaded, adapter), loaded), indent=2)
    if out is None:
        typer.echo(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")


@app.command()
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
        found = merge_from_recipe(_load(Path(arguments[0]), [*arguments[1:], *more], "merge", files=False))
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


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of finished or running runs.")],
    out: Annotated[Path | None, typer.Option(help="The page; by default report.html in the first folder.")] = None,
) -> None:
    """Write one offline HTML page about runs."""
    from mtft.report.page import write_report

    typer.echo(write_report(run_dirs, out))


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fresh: Fresh = False,
    launch: Annotated[
        str | None, typer.Option(help="Start training with this: 'accelerate launch --config_file ddp.yaml'.")
    ] = None,
) -> None:
    """Everything: mix, train, merge, fuse, report.

    Finished stages are skipped, interrupted ones continue.
    """
    from mtft.pipeline.run import run as run_pipeline

    run_pipeline(_load(recipe, overrides, "run"), fresh=fresh, launch=launch)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    import json

    from mtft.recipe.schema import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@mix.command("design")
def mix_design(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print the trial mixtures (CSV).

    Also written to <output.dir>/mix/design.csv.
    """
    from mtft.pipeline.mix import mix_design

    typer.echo(mix_design(_load(recipe, overrides, "mix")), nl=False)


@mix.command("sweep")
def mix_sweep(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Run the trials that the ledger does not hold yet."""
    from mtft.pipeline.mix import mix_dir, mix_sweep

    loaded = _load(recipe, overrides, "mix")
    done = mix_sweep(loaded, on_done=lambda trial, outcome: _say(f"trial {trial.id}: {outcome.error or 'done'}"))
    _say(done.text())
    typer.echo(mix_dir(loaded) / "ledger.jsonl")
    raise typer.Exit(done.exit_code)


@mix.command("propose")
def mix_propose(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Fit the ledger and write mixture.yaml.

    With the verdict: is the proposal better than the current mixture, beyond the noise?
    """
    from mtft.pipeline.mix import mix_dir, mix_propose

    loaded = _load(recipe, overrides, "mix")
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
        _say(f"{rows} predictions in {out}")


@fuse.command("generate")
def fuse_generate(
    recipe: RecipeArgument, rows: Rows, out: RowsOut, overrides: Overrides = None, overwrite: Overwrite = False
) -> None:
    """Answer prompts with the fused model.

    A row is {"prompt": TEXT} or {"messages": [...]}, and may have id, max_tokens, alpha, alpha_rule, seed, trace.
    """
    from mtft.fuse.batch import generate

    _summarise(generate(_load(recipe, overrides, "fuse", files=False), rows, out, overwrite=overwrite), out)


@fuse.command("score")
def fuse_score(
    recipe: RecipeArgument, rows: Rows, out: RowsOut, overrides: Overrides = None, overwrite: Overwrite = False
) -> None:
    """Log-probability of given responses under the fused model.

    A row is {"prompt": TEXT, "response": TEXT} or {"messages": [...], "response": TEXT}.
    """
    from mtft.fuse.batch import score

    _summarise(score(_load(recipe, overrides, "fuse", files=False), rows, out, overwrite=overwrite), out)


def _summarise(done: Summary, out: Path) -> None:
    """Rows that failed stand in the output as {"error": ...}; the exit code says that there are some."""
    _say(f"{done.rows} rows in {out}, {done.failed} failed, {done.resumed} were there already")
    if done.failed:
        raise typer.Exit(1)
