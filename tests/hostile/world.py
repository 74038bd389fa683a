"""A small world of everything that the commands read: models, adapters, rows, recipes, tables, finished runs.

It is made once in a folder, moved aside as a template, and copied back to the same place for each attack, because
paths stand in some of its files.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import yaml

STEPS = 4
TASKS = ("copy", "twice", "shout")


def recipe(here: Path, out: str, **changes: object) -> dict:
    tasks = [
        {"name": name, "data": str(here / f"{name}.train.jsonl"), "eval_data": str(here / f"{name}.eval.jsonl")}
        for name in TASKS
    ]
    return {
        "name": "t",
        "model": {"path": str(here / "model"), "dtype": "fp32"},
        "tasks": tasks,
        "lora": {"r": 4, "alpha": 8},
        "train": {"steps": STEPS, "batch_tokens": 256, "max_length": 64, "eval_every": 2},
        "output": {"dir": str(here / out), "save_every": 2, "keep": 3},
        **changes,
    }


def build(here: Path) -> None:
    """Makes the world in the present folder, `here`; in a process of its own, which patches slow parts away."""
    from data_mixers.sweep import runner
    from mtft.merge import merge_adapters
    from mtft.pipeline.stages.mix import mix_propose, mix_sweep
    from mtft.recipe.load import load_recipe
    from mtft.training.run_training import train
    from tests.fuse import tiny
    from tests.training.conftest import write_model, write_tasks

    quick()
    write_model(here / "model")
    write_tasks(here, rows=30, held_out=6)
    fuse = {"strong": {"path": str(here / "strong"), "dtype": "fp32"}, "adapters": [str(here / "expert")]}
    fuse |= {"max_new_tokens": 4, "batch_size": 2}
    for name, content in {
        "r": recipe(here, "run"),
        "half": recipe(here, "half"),
        "ended": recipe(here, "ended"),
        "swept": recipe(here, "swept", sweep={"trials": 12, "steps": 2, "eval_limit": 4}),
        "fuse": recipe(here, "fused", model={"path": str(here / "small"), "dtype": "fp32"}, fuse=fuse),
    }.items():
        (here / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for name in ("r", "half", "ended"):
        train(load_recipe(here / f"{name}.yaml"), quiet=True, prove=False)
    for name in ("half", "ended"):  # as if they had been killed in the third step, and in the export
        shutil.rmtree(here / name / "adapter")
        (here / name / "result.json").unlink()
    shutil.rmtree(here / "half" / f"checkpoint-{STEPS}")
    runner.BACKENDS["process"] = runner.BACKENDS["inline"]
    mix_sweep(load_recipe(here / "swept.yaml"))
    mix_propose(load_recipe(here / "swept.yaml"))
    tiny.base(here / "base")
    for number, name in enumerate(("one", "two")):
        tiny.adapter(here / name, here / "base", 11 + number)
    merge_adapters(["one", "two"], "merged", "linear")
    tiny.folders_with_text(here)
    rows = [{"prompt": text, "seed": number} for number, text in enumerate(("the quick", "brown fox", "the dog"))]
    (here / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 24).round(4)
    shares[:, 2] = 1 - shares[:, 0] - shares[:, 1]
    loss = 2 + shares[:, 0] - 0.3 * shares[:, 1]
    table = [",".join([f"{number}", *(f"{share:.4f}" for share in row)]) for number, row in enumerate(shares)]
    (here / "x.csv").write_text("\n".join(["index,a,b,c", *table]) + "\n")
    (here / "y.csv").write_text("\n".join(["index,loss", *(f"{n},{value:.6f}" for n, value in enumerate(loss))]) + "\n")


def quick() -> None:
    """The parts of a command that take seconds and are no part of an attack: processes that import torch anew."""
    from data_mixers.sweep import runner
    from mtft.training import finalize

    runner.BACKENDS["process"] = runner.BACKENDS["inline"]
    finalize.Proof.ask = lambda self, model: None  # type: ignore[method-assign]


TABLES = ("--mixtures", "x.csv", "--scores", "y.csv", "--surrogate", "linear")
COMMANDS: dict[str, list[str]] = {
    "check": ["check", "r.yaml", "output.dir=new"],
    "train": ["train", "r.yaml", "output.dir=new"],
    "resume": ["train", "half.yaml"],
    "finished": ["train", "r.yaml"],
    "export": ["export", "ended"],
    "eval": ["eval", "run"],
    "report": ["report", "run", "swept", "--out", "page.html"],
    "sweep": ["mix", "sweep", "swept.yaml"],
    "propose": ["mix", "propose", "swept.yaml"],
    "fit": ["mix", "fit", *TABLES, "--target", "loss", "--predict", "x.csv", "--out", "predicted.csv"],
    "from-csv": ["mix", "propose", *TABLES, "--out", "proposed.yaml"],
    "merge": ["merge", "one", "two", "--out", "out", "--method", "ties"],
    "replace": ["merge", "one", "two", "--out", "merged", "--method", "ties", "--overwrite"],
    "generate": ["fuse", "generate", "fuse.yaml", "--in", "prompts.jsonl", "--out", "answers.jsonl"],
}
WRITES: dict[str, tuple[str, ...]] = {
    "train": ("new/",),
    "resume": ("half/",),
    "export": ("ended/",),
    "report": ("page.html",),
    "sweep": ("swept/",),
    "propose": ("swept/mix/",),
    "fit": ("predicted.csv",),
    "from-csv": ("proposed.yaml",),
    "merge": ("out/",),
    "replace": ("merged/",),
    "generate": ("answers.jsonl",),
}
"""Where a command may change what is there; the cache apart. Everything else has to stay as it was."""


def copy_back(template: Path, here: Path) -> None:
    """The world as it was made. Whatever an attack has left is gone, folders without permissions too."""
    if here.exists():
        for folder, _, _ in os.walk(here):
            os.chmod(folder, 0o700)
        shutil.rmtree(here)
    shutil.copytree(template, here, symlinks=True)
