"""Worker processes and the script that started them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = """
from concurrent.futures import ProcessPoolExecutor
from math import factorial
from data_mixers.common.spawn_context import spawn_context

print("the script runs", flush=True)
with ProcessPoolExecutor(2, spawn_context(factorial)) as pool:
    print(list(pool.map(factorial, range(4))))
"""
OWN = """
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from data_mixers.common.spawn_context import spawn_context

class Adder:
    def __call__(self, number):
        return number + 1

print(__name__, flush=True)
if __name__ == "__main__":
    with ProcessPoolExecutor(1, spawn_context([{"a": Adder()}])) as pool:
        print(list(pool.map(Adder(), range(3))))
    print(__spec__, __file__.rpartition("/")[2])
"""
TOKENISE = """
from pathlib import Path
from transformers import AutoTokenizer
from mtft.data.store import build_store, token_store
from mtft.quickstart import model_path
from mtft.recipe.schema.task import TaskSection

print("the script runs", flush=True)
build_store.num_processes = lambda rows: 2
tokenizer = AutoTokenizer.from_pretrained(model_path("weak"))
task = TaskSection(name="t", data="rows.jsonl")
print(token_store.open_store(task, "train", tokenizer, max_length=64, cache_dir=Path("cache")).num_examples, "examples")
"""


def run(folder: Path, script: str) -> list[str]:
    """What a script prints that lies in a folder."""
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_script_without_a_guard_runs_once(tmp_path):
    assert run(tmp_path, PACKAGES) == ["the script runs", "[1, 1, 2, 6]"]


def test_what_the_script_defines_is_found(tmp_path):
    assert run(tmp_path, OWN) == ["__main__", "__mp_main__", "[1, 2, 3]", "None script.py"]


@pytest.mark.slow
def test_a_script_without_a_guard_tokenises_in_many_processes(tmp_path):
    """Its workers ran it again, and waited for the lock of the store; their parent waited for them."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 50)
    assert run(tmp_path, TOKENISE) == ["the script runs", "50 examples"]


def test_processes_are_made_by_this_context_alone():
    plain = re.compile(r"get_context\(|multiprocessing\.Process\(|ProcessPoolExecutor\((?!.*spawn_context)")
    files = [path for package in ("mtft", "data_mixers") for path in (ROOT / package).rglob("*.py")]
    assert [path.name for path in files if plain.search(path.read_text(encoding="utf-8"))] == ["spawn_context.py"]
