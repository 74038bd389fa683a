"""The memory estimate of `mtft check` beside the measured peak of a real training run, recipe by recipe.

    python scripts/check_memory.py                    all recipes, each in a process of its own (about 2 minutes)
    python scripts/check_memory.py --only "LoRA fp32"

On a CPU the peak is the resident memory at its highest, less what the process held before the model was loaded (after
a tiny run, so that libraries and threads are there). glibc is told to give freed blocks back at once; else the figure
would be that of its cache. On a GPU it is torch.cuda.max_memory_allocated. Bar: within 15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BAR = 0.15
SHAPE = {"width": 384, "layers": 6, "mlp": 1024, "vocabulary": 8192, "max_length": 256}
# name -> (changes of the shape, changes of the recipe by section)
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA fp32": ({}, {}),
    "LoRA fp32, 4 micro-batches": ({}, {"train": {"batch_tokens": 8192}}),
    "full fp32": ({}, {"lora": None}),
    "full bf16, adamw_8bit": ({}, {"lora": None, "model": {"dtype": "bf16"}, "train": {"optimizer": "adamw_8bit"}}),
    "LoRA bf16": ({}, {"model": {"dtype": "bf16"}}),
    "QLoRA nf4": ({}, {"model": {"quantise": "nf4"}}),
    "LoRA, checkpointing": ({}, {"train": {"gradient_checkpointing": True}}),
    "LoRA, vocabulary 64k": ({"vocabulary": 65_536}, {}),
    "LoRA, MeZO": ({}, {"train": {"mezo": 1e-3, "optimizer": "sgd"}}),
    "LoRA, unpacked": ({}, {"train": {"packing": False}}),
}


def measure(name: str) -> dict[str, Any]:
    """In a process of its own: estimate and measured peak of one recipe, in bytes."""
    import torch

    torch.set_num_threads(1)
    changes, sections = RECIPES[name]
    tiny = {**SHAPE, "width": 64, "layers": 1, "mlp": 64, "vocabulary": 512, "max_length": 64}
    train(tiny, sections, batch_tokens=512)  # libraries and threads are there now
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        estimate = train(SHAPE | changes, sections)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is held now
        before = resident("VmRSS")
        estimate = train(SHAPE | changes, sections)
        peak = resident("VmHWM") - before
    return {"estimate": estimate.total, "peak": peak, "parts": estimate.as_dict()}


def train(shape: dict[str, Any], sections: dict[str, Any], **settings: Any) -> Any:
    """Three steps of an ordinary run on random ids; returns the estimate, which is made after it."""
    import torch

    from mtft.training.memory.estimate import estimate_memory

    with tempfile.TemporaryDirectory() as folder:
        write_model(shape, folder)
        recipe, stores = asked(shape, sections, folder, **settings), make_stores(shape)
        trainer = make_trainer(recipe, shape, stores)
        trainer.train()
        with torch.no_grad():
            del trainer
        return estimate_memory(recipe, **of_data(stores))


def write_model(shape: dict[str, Any], folder: str | Path) -> None:
    """Random weights, as a model folder."""
    import bench_train as bench

    bench.make_model(bench.Shape(**shape, heads=4, median=96)).save_pretrained(folder)


def make_stores(shape: dict[str, Any]) -> list[Any]:
    """Random ids, a store a task."""
    import bench_train as bench

    return bench.make_stores(bench.Shape(**shape, heads=4, median=96), 300)


def of_data(stores: list[Any]) -> dict[str, Any]:
    """What the estimate wants to know of the data."""
    learnt = sum(int(store.supervised.sum()) for store in stores) / sum(int(s.lengths.sum()) for s in stores)
    return {"learnt_share": learnt, "longest": max(int(store.lengths.max()) for store in stores)}


def asked(shape: dict[str, Any], sections: dict[str, Any], folder: str | Path, **settings: Any) -> Any:
    """The recipe on the model in `folder`."""
    import bench_train as bench

    from mtft.recipe.schema.recipe import Recipe

    given = {
        "name": "memory",
        "model": {"path": str(folder), "dtype": "fp32"},
        "tasks": [{"name": task, "data": "none"} for task in bench.TASKS],
        "mixture": {"shares": "uniform", "unit": "tokens"},
        "lora": {"r": 8},
        "train": {"steps": 3, "batch_tokens": 2048, "micro_batch_tokens": 2048, "max_length": shape["max_length"]},
        "output": {"dir": str(folder)},
    }
    given["train"] |= settings
    for key, section in sections.items():
        given[key] = None if section is None else {**given[key], **section}
    return Recipe.model_validate(given)


def make_trainer(recipe: Any, shape: dict[str, Any], stores: list[Any]) -> Any:
    """An ordinary run, ready for `train()`."""
    import bench_train as bench

    from mtft.data.planning import make_plan
    from mtft.training.build_model import load_for_training
    from mtft.training.run_files.metrics_log import MetricsLog
    from mtft.training.trainer import build_trainer
    from mtft.training.training_arguments import training_arguments
    from mtft.training.training_inputs import TrainingInputs

    plan = make_plan(recipe, stores)
    args = training_arguments(recipe, Path(recipe.output.dir), steps=plan.steps, evaluates=False, saves=False)
    tokenizer = bench.make_tokenizer(bench.Shape(**shape, heads=4, median=96))
    inputs = TrainingInputs(tokenizer, stores, [None] * len(stores))
    log = MetricsLog(None, steps=plan.steps, quiet=True)
    return build_trainer(recipe, inputs, plan, load_for_training(recipe), args, log=log)


def resident(field: str) -> int:
    """Bytes of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def compare(name: str) -> dict[str, Any]:
    """`measure` in a fresh process."""
    # Fixed thresholds: every large block is mapped on its own, and given back when it is freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    # oneDNN's AMX kernels hold repacked copies of weights for as long as they are cached, some MiB whatever the model.
    environment |= {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    command = [sys.executable, __file__, "--measure", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", choices=list(RECIPES))
    options.add_argument("--measure", choices=list(RECIPES), help=argparse.SUPPRESS)
    options.add_argument("--json", type=Path, help="write the figures here too")
    asked = options.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked.measure)))
        return 0
    rows, missed = {}, 0
    print(f"{'recipe':28s} {'estimate':>9s} {'measured':>9s}  difference   (MiB)")
    for name in [asked.only] if asked.only else RECIPES:
        found = rows[name] = compare(name)
        off = found["estimate"] / found["peak"] - 1
        missed += abs(off) > BAR
        sizes = f"{found['estimate'] / 2**20:9.1f} {found['peak'] / 2**20:9.1f}"
        print(f"{name:28s} {sizes}  {off:+8.1%}     {'PASS' if abs(off) <= BAR else 'MISS'}", flush=True)
    print(f"{'PASS' if not missed else 'MISS'}  {len(rows) - missed} of {len(rows)} recipes within {BAR:.0%}")
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
