"""How many files of ours one optimizer step crosses, and what `mtft fuse generate` imports of merging.

    python scripts/trace_step.py            ->    {"files": ..., "switches": ..., "merge_methods": ...}
    python scripts/trace_step.py --list     also the files

A tiny run (quickstart's weak model, LoRA, four tasks, two micro-batches a step, on the CPU) is profiled from the end of
one optimizer step to the end of the next one, in the middle of the run:

    files           files of mtft and data_mixers in which a function is called
    switches        consecutive calls, in the order of time, that are in different files
    merge_methods   modules of mtft.merge.methods in a fresh interpreter after the imports of `mtft fuse generate`
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
OURS = (str(ROOT / "mtft") + os.sep, str(ROOT / "data_mixers") + os.sep)
TASKS = ("a", "b", "c", "d")
FUSE_GENERATE = """
import sys
import mtft.cli, mtft.recipe.load, mtft.fuse.from_recipe, mtft.fuse.batch.jsonl_commands
print(sum(name.startswith("mtft.merge.methods.") for name in sys.modules))
"""


def step_calls() -> list[str]:
    """The file of each call into our code during step 4 of a run of 6, in order."""
    from transformers.trainer_callback import TrainerCallback

    from mtft.recipe.schema.recipe import Recipe
    from mtft.training import MultiTaskTrainer

    calls: list[str] = []

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and (name := frame.f_code.co_filename).startswith(OURS):
            calls.append(name)

    class ProfileFourthStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step in (3, 4):
                sys.setprofile(profile if state.global_step == 3 else None)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MTFT_CACHE"] = str(Path(folder) / "cache")
        recipe = Recipe.model_validate(tiny_recipe(Path(folder)))
        trainer = MultiTaskTrainer.from_recipe(recipe)
        trainer.add_callback(ProfileFourthStep())
        trainer.train()
    return calls


def tiny_recipe(folder: Path) -> dict[str, Any]:
    """Four tasks of 24 short rows each."""
    tasks = []
    for task in TASKS:
        file = folder / f"{task}.jsonl"
        rows = [{"prompt": f"{task} {index}", "response": f"yes {index}"} for index in range(24)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tasks.append({"name": task, "data": str(file), "eval_data": str(file)})
    return {
        "name": "trace",
        "model": {"path": "quickstart:weak", "dtype": "fp32"},
        "tasks": tasks,
        "train": {
            "steps": 6,
            "batch_tokens": 256,
            "micro_batch_tokens": 128,
            "max_length": 64,
            "learning_rate": 1e-3,
        },
        "output": {"dir": str(folder / "run")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="also the files, in order of their first call")
    arguments = parser.parse_args()
    imported = subprocess.run(
        [sys.executable, "-c", FUSE_GENERATE], cwd=ROOT, check=True, capture_output=True, text=True
    )
    calls = step_calls()
    if arguments.list:
        print(*(name.removeprefix(str(ROOT) + os.sep) for name in dict.fromkeys(calls)), sep="\n")
    switches = sum(before != after for before, after in pairwise(calls))
    counts = {"files": len(set(calls)), "switches": switches, "merge_methods": int(imported.stdout)}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
