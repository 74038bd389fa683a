"""The run directory: whose it is, whether its run is done, and what is written beside the metrics.

recipe.yaml   resolved: every key written out, every path absolute; `mtft train recipe.yaml` repeats the run
env.json      versions, machine, git commit, seed, fingerprints of the data
plan.json     steps, examples in a step, asked and realised share of each task (again at the end, with mixture.online)
result.json   written last: the run is finished
proof/        what the trained model said to a probe, while no proof holds (mtft.training.export.proof)
scores/       held-out scores of each example after the last step, one file a task
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_mixers.mixture.mixture import Mixture
from data_mixers.plan.realized import realized_spans
from data_mixers.plan.replanned import ReplannedPlan
from mtft.common.atomic_io import write_text
from mtft.common.errors import UserError
from mtft.common.folder_lock import refuse_busy_below, sole_writer
from mtft.common.output_paths import check_output_folder
from mtft.common.own_files import defect, irregular, read_own, write_own
from mtft.distributed.launch import is_main_process, world_size
from mtft.recipe.load import dump_recipe, load_recipe
from mtft.recipe.schema.recipe import Recipe

RECIPE, RESULT, SCORES, ANSWERS = "recipe.yaml", "result.json", "scores", "answers"
ENV, PLAN = "env.json", "plan.json"
RESULT_KEYS = {"steps": int, "seconds": float, "export": str, "tasks": dict}  # that every version has written
# `state` in result.json: the export was loaded in a fresh process and is what was trained; that was asked for and could
# not be shown; or it was not asked for.
PROVED, NOT_PROVED, TRAINED = "trained and proved", "trained, not proved", "trained"
# What may differ when a run goes on: it changes what is written and shown, never the weights.
_FREE = ("name", "data", "output", "sweep", "merge", "fuse", "run", "eval")
_FREE += ("train.eval_every", "train.eval_on_start", "train.max_bad_steps")
_MEASURED = ("metrics", "generate")  # of a task: what is measured; free too, unless the run decides by a metric
_PACKAGES = ("mtft", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "numpy")
_PACKAGES += ("bitsandbytes", "deepspeed", "trl")


@contextmanager
def sole_run(recipe: Recipe, *, fresh: bool) -> Iterator[UserError | None]:
    """Nobody else writes the run's folder while the block runs. One lock for all ranks: the main process holds it.

    Raises UserError if another run has it, nothing can be written there, or what is there is none of ours. With
    several ranks, which would wait for ever for one that has ended, the error is yielded instead, to be told to all of
    them.
    """
    refused: UserError | None = None
    run_dir = Path(recipe.output.dir)
    with ExitStack() as held:
        if is_main_process():
            try:
                check_output_folder(run_dir, inputs=_inputs(recipe) if fresh else (), key="output.dir")
                refuse_foreign_folder(run_dir)
                held.enter_context(sole_writer(run_dir))
            except UserError as error:
                if world_size() == 1:
                    raise
                refused = error
        yield refused


def refuse_foreign_folder(run_dir: Path) -> None:
    """UserError if the folder holds files that a run would replace, and is no run's: somebody's own recipe.yaml; or if
    env.json, which says whose it is, is damaged.
    """
    if _is_env(run_dir / ENV) or any(run_dir.glob("checkpoint-*/manifest.json")):
        return
    names = (RECIPE, ENV, RESULT, PLAN, "metrics.jsonl", "eval.jsonl", "adapter", "model", "proof", SCORES, ANSWERS)
    theirs = [name for name in names if os.path.lexists(run_dir / name)]
    if ENV in theirs:  # somebody else's may be any object; everything else is damage
        read_own(run_dir / ENV, do="put it back whole if the folder is a run's, or give another output.dir")
    if theirs:
        raise UserError(
            f"the folder is no run's, and holds {', '.join(theirs)}, which a run would replace",
            where=f"output.dir: {run_dir}",
            do="give another output.dir",
        )


def _is_env(path: Path) -> bool:
    """Whether it is an env.json of ours, whole or in part; somebody else's may have the name."""
    if irregular(path) is not None or not path.exists():
        return False
    text = path.read_bytes()
    return b'"fingerprints"' in text or b'"versions"' in text


def _inputs(recipe: Recipe) -> list[Path]:
    """Models and data of a recipe that lie on this disk: a folder that holds one of them is not moved aside."""
    given = [recipe.model.path]
    for task in recipe.tasks:
        for files in (task.data, task.eval_data):
            given += [files] if isinstance(files, str) else list(files or ())
    return [Path(path) for path in given if Path(path).exists()]


def check_recipe(run_dir: Path, recipe: Recipe) -> None:
    """UserError, naming the keys, when the folder holds a run of another recipe: by its recipe.yaml, or by what a
    finished run was trained with. (What an unfinished one goes on from is asked by check_identity.)
    """
    path = run_dir / RECIPE
    if (kind := irregular(path)) is not None:
        raise UserError(f"{kind}, not a file", where=str(path), do="move it away")
    if path.exists():
        _compare(load_recipe(path, files=False), recipe, run_dir)
    if (content := read_result_file(run_dir)) is not None and isinstance(content.get("basis"), dict):
        check_same_recipe(content["basis"].get("recipe"), recipe, run_dir / RESULT)


def check_same_recipe(before: Any, recipe: Recipe, where: Path) -> None:
    """UserError, naming the keys with both values, when `before` (a dumped recipe in a file of ours) trains otherwise.

    where: the file, or the checkpoint.
    """
    try:
        was = Recipe.model_validate(before)
    except ValueError as error:
        what = "the recipe that it was trained with can't be read by this version of mtft"
        do = "continue it with the version that wrote it (versions: env.json), or start over with --fresh"
        raise UserError(f"{what}: {str(error).splitlines()[0]}", where=str(where), do=do) from error
    _compare(was, recipe, where.parent)


def _compare(was: Recipe, recipe: Recipe, run_dir: Path) -> None:
    before, now = training_keys(was), training_keys(recipe)
    other = [key for key in dict.fromkeys((*before, *now)) if before.get(key) != now.get(key)]
    if other:
        shown = [f"{key} was {_short(before.get(key))}, is {_short(now.get(key))}" for key in other[:8]]
        raise UserError(
            "the folder holds a run of another recipe: " + "; ".join(shown) + (" ..." if len(other) > 8 else ""),
            where=str(run_dir),
            do="use the old values to continue it, give another output.dir, or --fresh to start over "
            "(the old run is kept beside it; from Python: move the folder away)",
        )


def read_result_file(run_dir: Path) -> dict[str, Any] | None:
    """result.json of a finished run, else None."""
    path = run_dir / RESULT
    if not os.path.lexists(path):
        return None
    do = f"delete it, and `mtft export {run_dir}` (or the same `mtft train`) does the end again; nothing is trained "
    do += "twice as long as the last checkpoint stands"
    return read_own(path, RESULT_KEYS, do=do)


def finished_on_other_data(run_dir: Path, identity: Mapping[str, str]) -> None:
    """UserError, naming the tasks, when the finished run in the folder was trained on other rows than there are now."""
    content = read_result_file(run_dir) or {}
    before = content.get("fingerprints") or (read_env(run_dir) or {}).get("fingerprints") or {}
    other = [key for key, value in identity.items() if key != "plan" and before.get(key, value) != value]
    if other:
        scored = all(key.startswith("held-out") for key in other)
        scores = f"; `mtft eval {run_dir}` scores it on the rows of now" if scored else ""
        raise UserError(
            f"the folder holds a finished run on other rows: {', '.join(other)} changed since (or the tokenizer, or "
            "how rows are read)",
            where=str(run_dir),
            do=f"--fresh trains again (the old run is kept beside it), or give another output.dir{scores}",
        )


def move_aside(run_dir: Path) -> None:
    """Renames the folder to the first free <folder>.old-N. Nothing is deleted."""
    real = Path(os.path.realpath(run_dir))  # of a link, what it points at: the lock is on that
    if real.exists():
        refuse_busy_below(real)
        number = 1
        while (old := real.with_name(f"{real.name}.old-{number}")).exists():
            number += 1
        real.rename(old)
        if run_dir.is_symlink():
            real.mkdir()


def write_start(run_dir: Path, recipe: Recipe, plan: Any, identity: dict[str, Any]) -> None:
    """recipe.yaml, env.json and plan.json, before the first step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in (RECIPE, ENV, PLAN):
        if (kind := irregular(run_dir / name)) is not None:
            raise UserError(f"{kind}, not a file", where=str(run_dir / name), do="move it away")
    chosen = {"micro_batch_tokens": size} if (size := chosen_size(run_dir)) is not None else {}
    write_own(run_dir / ENV, {**environment(), "seed": recipe.seed, "fingerprints": identity, **chosen})
    write_text(run_dir / RECIPE, dump_recipe(recipe))  # after env.json, which says that the folder is a run's
    write_plan(run_dir, recipe, plan)


def write_plan(run_dir: Path, recipe: Recipe, plan: Any) -> None:
    """plan.json. `changes`: the shares that mixture.online has decided, each with the first step that has them."""
    tasks = {row.pop("task"): row for row in plan.table()}
    about = {"steps": plan.steps, "batch": plan.batch, "unit": plan.unit, "style": recipe.train.batch_style}
    about |= eval_schedule(recipe)
    about |= {"tasks": tasks, "spans": realized_spans(plan)}
    if isinstance(plan, ReplannedPlan):
        constant = ((change.first, change.shares) for change in plan.changes if isinstance(change.shares, Mixture))
        about["changes"] = [{"from": first + 1, "shares": shares.as_dict()} for first, shares in constant]
    write_own(run_dir / PLAN, about)


def eval_schedule(recipe: Recipe) -> dict[str, Any]:
    """{"eval_every", "eval_on_start"}: when the run evaluates, beside its last step; null, false: never."""
    evaluates = any(task.eval_data is not None for task in recipe.tasks)
    every = recipe.train.eval_every if evaluates else None
    return {"eval_every": every, "eval_on_start": evaluates and recipe.train.eval_on_start}


def chosen_size(run_dir: Path) -> int | None:
    """Tokens of a micro-batch that an earlier start of this run found (train.micro_batch_tokens: auto)."""
    return (read_env(run_dir) or {}).get("micro_batch_tokens")


def read_env(run_dir: Path) -> dict[str, Any] | None:
    """env.json; None if it isn't there."""
    path = run_dir / ENV
    if not os.path.lexists(path):
        return None
    env = read_own(path, do="delete it: it is written anew (train.micro_batch_tokens: auto is then measured again)")
    for key, types in {"micro_batch_tokens": int, "fingerprints": dict}.items():
        if key in env and (problem := defect(env, {key: types})) is not None:
            raise UserError(f"damaged: {problem}", where=str(path), do="delete it: it is written anew")
    return env


def read_plan(run_dir: Path) -> dict[str, Any] | None:
    """plan.json; None if it isn't there."""
    path = run_dir / PLAN
    if not os.path.lexists(path):
        return None
    return read_own(path, {"steps": int}, do="delete it: the same `mtft train` writes it anew")


def environment() -> dict[str, Any]:
    """What the numbers of a run depend on beside its recipe and data."""
    import torch

    return {
        "versions": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "git": _git(),
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that the numbers of a run depend on, where they are installed."""
    versions = {name: _version(name) for name in _PACKAGES}
    return {name: value for name, value in versions.items() if value is not None}


def training_keys(recipe: Recipe) -> dict[str, Any]:
    """{dotted key: value} of everything that training depends on; tasks by name."""
    out: dict[str, Any] = {}
    decides = recipe.train.patience is not None or recipe.train.task_patience is not None
    by_metric = "/" in recipe.train.watch and (decides or recipe.output.export == "best")

    def visit(node: Any, key: str) -> None:
        if key in _FREE and not (decides and key == "train.eval_every"):  # patience counts evaluations
            return
        if isinstance(node, dict) and node:
            for name, value in node.items():
                visit(value, f"{key}.{name}" if key else name)
        elif key == "tasks":
            out["tasks"] = [task["name"] for task in node]
            for task in node:
                kept = {name: value for name, value in task.items() if by_metric or name not in _MEASURED}
                visit(kept, f"tasks.{task['name']}")
        else:
            out[key] = node

    visit(recipe.model_dump(mode="json"), "")
    return out


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        if package == "mtft":
            from mtft import __version__

            return __version__
        return None


def _git() -> str | None:
    """Commit of the working directory, with + if there are changes; None outside of a repository."""
    command: Sequence[str] = ("git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
