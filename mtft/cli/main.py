"""check, train, export, eval, report, run, schema."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import mtft
from mtft.cli.common import Overrides, Overwrite, RecipeArgument, expand, load, say
from mtft.cli.numbers import number, whole

if TYPE_CHECKING:
    from mtft.training.run_training import TrainResult

app = typer.Typer(
    name="mtft",
    help=(mtft.__doc__ or "").split("\n\n")[0],
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Fresh = Annotated[bool, typer.Option("--fresh", help="Start over; what is there moves aside.")]


def _show_version(wanted: bool) -> None:
    if wanted:
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


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show every task and warning, however many.")] = False,
) -> None:
    """Say what a recipe would do, and what is wrong with it.

    Everything that can be found before any weight is loaded: asked and realised shares, epochs, tokens, steps, memory.
    """
    from mtft.common.collector import collector_paused, end_at_once
    from mtft.distributed.launch import is_main_process

    if not is_main_process():  # under a launcher, whose engine is a part of what is checked
        return
    end_at_once()
    with collector_paused():
        from mtft.recipe.load import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        from mtft.pipeline.check import check_recipe

    if not as_json and sys.stdout.isatty():
        from rich.console import Console

        from mtft.data.summary.render_console import render_summary

        console = Console()
        checked = check_recipe(loaded, lambda data: console.print(render_summary(data, everything=everything)))
        console.print(checked.render_rest(everything=everything))
        return
    checked = check_recipe(loaded)
    if as_json:
        typer.echo(json.dumps(checked.as_dict(), indent=2))
    else:
        typer.echo(checked.text(everything=everything))


@app.command()
def train(recipe: RecipeArgument, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """Train, or continue a run that was stopped.

    On several GPUs: accelerate launch --config_file recipes/accelerate/ddp.yaml -m mtft train RECIPE
    """
    from mtft.training.run_training import train as run_training

    result = run_training(load(recipe, overrides, "train"), fresh=fresh)
    say(f"adapter: {result.adapter_dir}")
    _say_proof(result)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a trained run.", show_default=False)],
) -> None:
    """Export and prove once more what a run has trained, after its end failed. Trains nothing.

    A run that is marked "trained, not proved" is proved again; one without an export is exported from the checkpoint
    of its last step.
    """
    from mtft.training.export.export_run import export_run

    result = export_run(run_dir)
    say(f"adapter: {result.adapter_dir}")
    _say_proof(result)


def _say_proof(result: TrainResult) -> None:
    """An error when the adapter could not be proved: it stands, but nobody has seen it load."""
    if result.not_proved is not None:
        from mtft.common.errors import UserError

        raise UserError(
            f"trained, not proved: {result.not_proved}",
            where=str(result.out_dir),
            do=f"the adapter and the scores stand; when it is mended: mtft export {result.out_dir}",
        )


@app.command("eval")
def evaluate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Folder of a PEFT adapter. Default: a run's own; the base model, where a recipe is given."),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model, also of a run.")] = False,
    against: Annotated[
        Path | None, typer.Option(help="Folder of an older adapter or run: what got better and what broke since.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file instead of stdout.")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Folder for what the model answered, a file a task (metrics that generate).")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Score a model per task on held-out rows (JSON).

    The tasks' `metrics`, each with its confidence interval (docs/tasks.md). RECIPE may be the folder of a run (or the
    recipe.yaml in it): its adapter is scored. With any other recipe it is the base model, unless --adapter is given.
    """
    from mtft.common.atomic_io import write_text
    from mtft.common.errors import UserError
    from mtft.common.run_folders import ADAPTER, RESULT, RUN_FILES, export_of_run
    from mtft.evaluation.answers_file import save_answers
    from mtft.evaluation.evaluate_recipe import as_json, evaluate_all, exported
    from mtft.evaluation.evaluate_recipe import evaluate as run_evaluation
    from mtft.recipe.input_paths import check_output

    folder = recipe if recipe.is_dir() else recipe.parent
    source = recipe / "recipe.yaml" if recipe.is_dir() else recipe
    loaded = load(source, overrides, "eval")
    own, model = Path(loaded.output.dir), None
    if out is not None:
        out = expand(out)
        check_output(out, loaded, source, adapter, against, overwrite=overwrite)
    if answers is not None:
        answers = expand(answers)
        for task in loaded.task_names:
            check_output(answers / f"{task}.jsonl", loaded, source, adapter, against, overwrite=overwrite)
    if base and adapter is not None:
        raise UserError("--base and --adapter", where="command line", do="give one of the two")
    is_run = recipe.is_dir() or own.resolve() == folder.resolve() or (folder / RESULT).is_file()
    if adapter is None and not base and is_run:
        adapter, model = exported(loaded, folder)
    say(f"scored: {loaded.model.path if model is None else model.path}{f' with {adapter}' if adapter else ''}")
    if adapter is None and model is None and not base and (export := export_of_run(own)) is not None:
        say(f"that is the base model; what the recipe's run made of it: --adapter {export}, or mtft eval {own}")
    old_scores = None
    if against is not None:
        against = expand(against)
        is_old_run = not (against / ADAPTER).is_file() and any((against / name).is_file() for name in RUN_FILES)
        old_adapter, old_model = exported(loaded, against) if is_old_run else (against, None)
        say(f"against: {old_adapter if old_model is None else old_model.path}")
        old_scores = run_evaluation(loaded, old_adapter, old_model)
    scores, harness = evaluate_all(loaded, adapter, model)
    if answers is not None:
        for task, of_task in scores.items():
            if of_task.answers:
                save_answers(of_task, answers / f"{task}.jsonl")
    content = as_json(scores, loaded, against=old_scores) | ({"lm_eval": harness} if harness else {})
    text = json.dumps(content, indent=2)
    if out is None:
        typer.echo(text)
    else:
        write_text(out, text + "\n")


@app.command()
def refresh(
    recipe: RecipeArgument,
    before: Annotated[Path, typer.Option(help="Adapter from before the tasks were added.")],
    after: Annotated[Path, typer.Option(help="Adapter trained on from it (lora.start).")],
    new: Annotated[list[str], typer.Option(help="A task that was added; repeat it for several.")],
    out: Annotated[Path, typer.Option(help="Folder for adapter/ and refresh.json.")],
    overrides: Overrides = None,
    rounds: Annotated[int, whole("--rounds", 1, 1000, help="How often to measure and tune.")] = 3,
    steps: Annotated[int, whole("--steps", 1, 10**7, help="Optimizer steps of a round.")] = 10,
    rows: Annotated[int, whole("--rows", 1, 10**9, help="Training rows of each task in the buffer.")] = 64,
    share: Annotated[float, number("--share", 0.01, 1, help="Part of the forgetting that is tuned away.")] = 0.5,
    overwrite: Overwrite = False,
) -> None:
    """After adding a task: tune again what forgot the old ones.

    Finds the modules of the adapter that forgot most and trains only those, for a few short rounds on a few rows of
    every task of the recipe.
    """
    loaded = load(recipe, overrides, "train")
    from mtft.experimental.refresh_adapter import refresh as run_refresh

    before, after, out = expand(before), expand(after), expand(out)
    refreshed = run_refresh(
        loaded, before, after, out, new=new, rounds=rounds, steps=steps, rows=rows, share=share, overwrite=overwrite,
        say=say,
    )  # fmt: skip
    for task, first in refreshed.losses["before"].items():
        then, now = refreshed.losses["after"][task], refreshed.losses["refreshed"][task]
        say(f"{task}: held-out loss {first:.4f} before, {then:.4f} after, {now:.4f} refreshed")
    say(f"adapter: {refreshed.adapter}")


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of finished or running runs.")],
    out: Annotated[Path | None, typer.Option(help="The page; by default report.html in the first folder.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write one offline HTML page about runs. An earlier page is replaced, another file only with --overwrite."""
    from mtft.report.page import write_report

    typer.echo(write_report(run_dirs, out, overwrite=overwrite))


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
    from mtft.distributed.launch import check_launch

    if launch is not None:
        check_launch(launch)
    loaded = load(recipe, overrides, "run")
    from mtft.pipeline.run_stages import run_recipe as run_pipeline

    run_pipeline(loaded, fresh=fresh, launch=launch)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from mtft.recipe.schema.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))
