"""The commands that scripts/crash_test.py kills: how each one is set up, what it does, and what of it must be equal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOLATILE = {"seconds", "tokens_per_second", "since", "time", "command"}  # of the clock and of the process
MEASURED = {"cpu_precision.json", "verified.json", ".mtft_files.json"}  # of the clock, or hashes of such files
TOKENS = 320
STEPS = 10


@dataclass(frozen=True)
class Case:
    """A command that writes.

    prepare   makes its inputs in the present folder, once
    work      does it in the present folder, as the command does
    ranks     processes that work together
    standing  what is there before and must be there, whole, at any moment: the old output or the new one
    share     kills of this case among all
    once      what it has written it refuses to write again
    """

    name: str
    prepare: Callable[[], None]
    work: Callable[[], None]
    ranks: int = 1
    standing: str | None = None
    share: int = 4
    once: bool = False


def recipe(**changes: Any) -> Any:
    """A run with dropout, a balancer with state, and a checkpoint every other step, in the present folder."""
    from mtft.recipe.schema.recipe import Recipe

    here = Path.cwd()
    tasks = [
        {"name": name, "data": str(here / f"{name}.train.jsonl"), "eval_data": str(here / f"{name}.eval.jsonl")}
        for name in ("copy", "twice", "shout")
    ]
    content: dict[str, Any] = {
        "name": "crash-test",
        "model": {"path": str(here / "model"), "dtype": "fp32"},
        "tasks": [{**task, "limit": 20} for task in tasks],
        "mixture": {"shares": {"copy": 0.5, "twice": 0.3, "shout": 0.2}},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "loss": {"balancer": {"name": "dwa", "window": 3}},
        "train": {
            "steps": STEPS,
            "batch_tokens": TOKENS,
            "micro_batch_tokens": 128,
            "max_length": 64,
            "learning_rate": 5e-3,
            "eval_every": 5,
        },
        "output": {"dir": str(here / "run"), "save_every": 2, "keep": 2},
    }
    return Recipe.model_validate({**content, **changes})


def inputs() -> None:
    from tests.training.conftest import write_model, write_tasks

    write_model(Path.cwd() / "model")
    write_tasks(Path.cwd())


def train(**changes: Any) -> None:
    from mtft.training.run_training import train as run

    run(recipe(**changes), quiet=True, prove=False)


def trained() -> None:
    """A finished run; `export` then does its end again."""
    inputs()
    train()


def export() -> None:
    from mtft.training.export import proof
    from mtft.training.export.export_run import export_run

    proof.ReloadResult.result = lambda self: 0.0  # type: ignore[method-assign]  a process of its own, seconds
    export_run(Path("run"), quiet=True)


def tokenise() -> None:
    from mtft.data.store.token_store import open_stores
    from mtft.models.loading import load_tokenizer

    asked = recipe()
    tokenizer = load_tokenizer(asked.model)
    for which in ("train", "eval"):
        for store in open_stores(asked, tokenizer, which):
            assert store is not None
            store.example(0)


def swept() -> Any:
    train = recipe().train.model_dump() | {"steps": 6}
    return recipe(sweep={"trials": 12, "steps": 2, "eval_limit": 4}, train=train)


def sweep() -> None:
    from data_mixers.sweep import runner
    from mtft.pipeline.stages.mix import mix_propose, mix_sweep

    runner.BACKENDS["process"] = runner.BACKENDS["inline"]  # a worker would import torch anew
    mix_sweep(swept())
    mix_propose(swept())


def whole() -> None:
    """`mtft run`: trials, training, a merge, a report."""
    from data_mixers.sweep import runner
    from mtft.pipeline.run_stages import run_recipe
    from mtft.training import finalize

    runner.BACKENDS["process"] = runner.BACKENDS["inline"]
    finalize.Proof.ask = lambda self, model: None  # type: ignore[method-assign]  a process of its own, seconds
    asked = swept().model_dump()
    run_recipe(recipe(**{key: asked[key] for key in ("sweep", "train")}, merge={"method": "linear"}))


def adapters() -> None:
    from tests.fuse import tiny

    here = Path.cwd()
    tiny.base(here / "base")
    for number, name in enumerate(("one", "two", "three")):
        tiny.adapter(here / name, here / "base", 11 + number)


def merge(method: str = "ties", overwrite: bool = False) -> None:
    from mtft.merge import merge_adapters

    merge_adapters(["one", "two", "three"], "out", method, overwrite=overwrite)


def merged() -> None:
    adapters()
    merge("linear")


def report() -> None:
    from mtft.report import write_report

    write_report(["run"])


def prompts() -> None:
    from tests.fuse import tiny

    tiny.folders_with_text(Path.cwd())
    words = ("the quick", "brown fox", "jumps over", "the lazy dog")
    rows = [{"prompt": words[number % 4], "max_tokens": 2 + number % 5, "seed": number} for number in range(24)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def generate() -> None:
    from mtft.common.errors import UserError
    from mtft.fuse.batch.jsonl_commands import generate as run
    from mtft.recipe.schema.recipe import Recipe

    here = Path.cwd()
    section = {"strong": {"path": str(here / "strong"), "dtype": "fp32"}, "adapters": [str(here / "expert")]}
    section |= {"max_new_tokens": 6, "temperature": 1.0, "batch_size": 2}
    asked = {
        "name": "t",
        "model": {"path": str(here / "small"), "dtype": "fp32"},
        "tasks": [{"name": "x", "data": "x.jsonl"}],
        "train": {"steps": 1},
        "output": {"dir": str(here / "run")},
        "fuse": section,
    }
    try:
        run(Recipe.model_validate(asked), here / "prompts.jsonl", here / "answers.jsonl")
    except UserError as error:  # killed after the last answer stood: as a command that is given twice
        if "there already" not in error.what:
            raise


CASES = {
    case.name: case
    for case in (
        Case("train", inputs, train, share=8),
        Case("train-2", inputs, train, ranks=2),
        Case("tokenise", inputs, tokenise, share=6),
        Case("export", trained, export),
        Case("sweep", inputs, sweep),
        Case("run", inputs, whole, share=2),
        Case("merge", adapters, merge, share=6, once=True),
        Case("merge-overwrite", merged, lambda: merge(overwrite=True), standing="out", share=8),
        Case("report", trained, report),
        Case("fuse", prompts, generate),
    )
}


def picture(folder: Path) -> dict[str, object]:
    """{path: content} of everything below a folder, without what hangs on the clock. Locks and side files count."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = _content(path)
        elif not any(path.iterdir()):
            found[f"{path.relative_to(folder)}/"] = "empty folder"
    return found


def _content(path: Path) -> object:
    if path.name in MEASURED:
        return None
    if path.suffix == ".json":
        return _still(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".jsonl":
        return [_still(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".html":  # draws tokens/s
        return path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    if path.suffix == ".md":
        return re.sub(r"[\d.,]+ ?(s|ms|min|tokens/s)\b", "TIME", path.read_text(encoding="utf-8"))
    return path.read_bytes()


def _still(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _still(value) for key, value in node.items() if key not in VOLATILE}
    return [_still(value) for value in node] if isinstance(node, list) else node


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    """What is missing, left over or different, by path."""
    said = [f"missing {name}" for name in expected if name not in found]
    said += [f"left over {name}" for name in found if name not in expected]
    return said + [f"different {name}" for name in found if name in expected and found[name] != expected[name]]


def inside(path: object, folder: str) -> bool:
    """Whether a path that a file operation was given lies in the folder (relative ones do: it is the present one)."""
    if isinstance(path, int) or path is None:
        return False
    text = os.fsdecode(path)  # type: ignore[arg-type]
    return not os.path.isabs(text) or text.startswith(folder)
