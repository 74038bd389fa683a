"""Kill a training run with SIGKILL at random instants, go on after each, and compare the end with an unbroken run.

    python scripts/crash_test.py --kills 50

Every other kill falls at a random time after the start of the process, which is anywhere: before the first step, in a
step, at the export. The others are aimed at the writing of a checkpoint: its unfinished folder is awaited, then a few
random milliseconds. A killed run is started again, and killed again, until it comes to its end. Weights, metrics,
held-out scores and evaluations have to be equal bit for bit; the last lines say how many times they were, and where the
kills fell. A tiny model and three tasks are made in a temporary folder; each run is a process of its own, forked from
one that has everything imported, so that a kill costs a second or two.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: OpenMP's threads don't survive a fork, and the runs would hang
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def small_recipe(folder: Path, out: Path):
    """A recipe with dropout, a balancer with state, and a checkpoint every other step."""
    from mtft.recipe.schema.recipe import Recipe
    from tests.training.conftest import write_model, write_tasks

    if not (folder / "model").exists():
        write_model(folder / "model")
    files = write_tasks(folder)
    tasks = [
        {"name": task, "data": rows, "eval_data": held_out, "limit": 20} for task, (rows, held_out) in files.items()
    ]
    return Recipe.model_validate(
        {
            "name": "crash-test",
            "model": {"path": str(folder / "model"), "dtype": "fp32"},
            "tasks": tasks,
            "mixture": {"shares": {"copy": 0.5, "twice": 0.3, "shout": 0.2}},
            "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
            "loss": {"balancer": {"name": "dwa", "window": 3}},
            "train": {
                "steps": 20,
                "batch_tokens": 320,
                "micro_batch_tokens": 128,
                "max_length": 64,
                "learning_rate": 5e-3,
                "eval_every": 10,
            },
            "output": {"dir": str(out), "save_every": 2, "keep": 2},
        }
    )


def start(recipe) -> multiprocessing.Process:
    """A forked process that trains the recipe, silently."""
    from mtft.training.run_training import train

    def work() -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        train(recipe, quiet=True, prove=False)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def picture(out: Path) -> dict[str, object]:
    """Everything of a finished run that must not depend on how often it was killed."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in metrics:
        del line["seconds"], line["tokens_per_second"]
    return {
        "adapter": (out / "adapter" / "adapter_model.safetensors").read_bytes(),
        "metrics": metrics,
        "eval": (out / "eval.jsonl").read_text(encoding="utf-8"),
        "scores": {path.name: path.read_bytes() for path in sorted((out / "scores").iterdir())},
    }


def unfinished(out: Path) -> set[str]:
    """Checkpoints that are being written."""
    return {path.name for path in out.glob("checkpoint-*.part")} if out.is_dir() else set()


def wait_for_write(process: multiprocessing.Process, out: Path, draw: random.Random) -> None:
    """Returns at a random point of one of the next checkpoints' writing; at once when the process ends before that."""
    left_over = unfinished(out)  # by the kill before; the run removes it when it starts
    for _ in range(draw.randint(1, 4)):
        while process.is_alive() and not unfinished(out) - left_over:
            left_over &= unfinished(out)
            time.sleep(0.002)
        seen = unfinished(out)
        if process.is_alive():
            left_over |= seen
    time.sleep(draw.uniform(0, 0.01))


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=50, help="how many processes to kill (default 50)")
    options.add_argument("--seed", type=int, default=0, help="of the instants")
    asked = options.parse_args()
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="mtft-crash-") as scratch:
        folder = Path(scratch)
        os.environ["MTFT_CACHE"] = str(folder / "cache")
        unbroken = small_recipe(folder, folder / "unbroken")
        from mtft.training.run_training import train

        begin = time.perf_counter()
        train(unbroken, quiet=True, prove=False)
        begin = time.perf_counter()
        shutil.rmtree(unbroken.output.dir)
        train(unbroken, quiet=True, prove=False)
        length = time.perf_counter() - begin
        expected = picture(Path(unbroken.output.dir))
        print(f"unbroken: {length:.2f} s; killing at random instants of 0 to {length:.2f} s", flush=True)
        kills = runs = equal = writing = 0
        while kills < asked.kills or runs == 0:
            out = folder / f"broken-{runs}"
            recipe = small_recipe(folder, out)
            while True:
                process = start(recipe)
                if kills >= asked.kills:
                    process.join(600)
                    if process.is_alive():
                        process.kill()
                        print(f"run {runs}: hangs after {kills} kills")
                        return 1
                elif kills % 2:
                    wait_for_write(process, out, draw)
                else:
                    process.join(draw.uniform(0, length))
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                    process.join()
                    kills += 1
                    writing += bool(unfinished(out))
                    if kills % 10 == 0:
                        print(f"{kills} kills so far, {writing} while a checkpoint was being written", flush=True)
                    continue
                process.join()
                if process.exitcode != 0:
                    print(f"run {runs}: exit code {process.exitcode} after {kills} kills")
                    return 1
                break
            runs += 1
            found = picture(out)
            other = [name for name, value in expected.items() if found[name] != value]
            equal += not other
            if other:
                print(f"run {runs} after {kills} kills: DIFFERENT: {', '.join(other)}", flush=True)
            shutil.rmtree(out)
    print(f"{kills} kills, {writing} of them while a checkpoint was being written, each followed by a resume")
    print(f"{equal} of {runs} runs ended bit-equal to the unbroken run, {runs - equal} did not")
    return 0 if equal == runs else 1


if __name__ == "__main__":
    sys.exit(main())
