"""Which worlds a command imports in a process of its own: only those that it needs.

`check` the second time is told from the cache what the model without weights told it the first time. `train` needs
transformers' models, and with them torch._dynamo and the front of torch._inductor, but no compiler. DeepSpeed is in it:
accelerate imports it, wherever it is installed, each time that a model is unwrapped.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from mtft.__main__ import main

status = main(sys.argv[2:])
print("\\nIMPORTED", json.dumps([name for name in sys.modules if sys.modules[name] is not None]))
sys.exit(status)
"""
RECIPE = """\
name: tiny
model: {path: quickstart:weak, dtype: fp32}
tasks:
  - {name: a, data: a.jsonl}
  - {name: b, data: b.jsonl}
lora: {r: 2, alpha: 4}
train: {steps: 1, batch_tokens: 128, max_length: 64}
output: {dir: run}
"""
QUANTISATION = ("bitsandbytes", "transformers.integrations.bitsandbytes")
TRAINER = ("transformers.trainer", "transformers.training_args", "peft")
COMPILER = ("torch._inductor", "torch._dynamo", "triton")
PLOTS = ("matplotlib", "pandas", "sklearn", "scipy.optimize", "datasets", "lightgbm")
MODELS = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "deepspeed")


def imported(folder: Path, *arguments: str) -> tuple[str, set[str]]:
    """What a command of a fresh process says, and all modules that it imports."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MTFT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "mtft", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, _, names = done.stdout.rpartition("\nIMPORTED ")
    return said, set(json.loads(names))


def among(names: set[str], forbidden: tuple[str, ...]) -> list[str]:
    return sorted(name for name in names if name.startswith(tuple(f"{one}." for one in forbidden)) or name in forbidden)


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        rows = [{"prompt": f"{name} {n}", "response": str(n)} for n in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_a_second_check_imports_no_model_code(folder):
    first, names = imported(folder, "check", "recipe.yaml")
    assert "peft" in names
    assert among(names, (*QUANTISATION, "deepspeed", "torch._inductor.compile_fx", "matplotlib")) == []
    second, names = imported(folder, "check", "recipe.yaml")
    assert second == first
    assert among(names, (*QUANTISATION, *TRAINER, *COMPILER, *PLOTS, "deepspeed")) == []


def test_training_imports_neither_quantisation_nor_a_compiler(folder):
    said, names = imported(folder, "train", "recipe.yaml")
    assert {"peft", "transformers.trainer"} <= names
    assert among(names, (*QUANTISATION, "torch._inductor.compile_fx", "torch._inductor.lowering", "triton")) == []
    assert among(names, ("matplotlib", "lightgbm", "lm_eval")) == []


@pytest.mark.parametrize("arguments", [("eval", "--help"), ("merge", "--help"), ("check", "--help")])
def test_help_imports_no_library_of_models(folder, arguments):
    assert among(imported(folder, *arguments)[1], (*MODELS, *PLOTS)) == []


def test_a_fit_of_mixtures_imports_no_library_of_models(folder):
    with (folder / "x.csv").open("w", newline="") as mixtures, (folder / "y.csv").open("w", newline="") as scores:
        csv.writer(mixtures).writerows([["index", "a", "b"], *([n, n / 20, 1 - n / 20] for n in range(1, 20))])
        csv.writer(scores).writerows([["index", "loss"], *([n, 2 + (n / 20 - 0.4) ** 2] for n in range(1, 20))])
    files = ("--mixtures", "x.csv", "--scores", "y.csv", "--index", "index", "--target", "loss")
    said, names = imported(folder, "mix", "fit", *files, "--surrogate", "ridge")
    assert "ridge" in said
    assert among(names, (*MODELS, "matplotlib", "sklearn", "lightgbm")) == []
