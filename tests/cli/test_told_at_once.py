"""A misspelt key is told before torch and matplotlib are imported, by every command that takes a recipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mtft.cli import app
from tests.cli.test_numbers import commands

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, sys
import mtft.recipe.compatibility, mtft.recipe.load
from mtft.__main__ import main

for command in json.loads(sys.argv[1]):
    if not os.fork():
        status = main([*command, "recipe.yaml", "train.stps=3"])
        heavy = [name for name in ("torch", "matplotlib") if name in sys.modules]
        print(json.dumps([" ".join(command), status, heavy]), flush=True)
        os._exit(0)
    os.wait()
"""
RECIPE = """\
name: tiny
model: {path: org/tiny}
tasks: [{name: a, data: rows.jsonl}]
train: {steps: 1}
output: {dir: run}
"""
OTHERS = {"merge", "report", "export", "schema", "mix fit", "refresh", "fuse generate", "fuse score"}  # take more


def test_a_misspelt_key_is_told_before_heavy_imports(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    asked = [path for path, _ in commands(app) if path]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(asked)
    assert done.stderr.count("'stps' is not a key of train") >= len(asked) - len(OTHERS)
    assert {name: heavy for name, _, heavy in found if heavy and name != "report"} == {}  # which draws runs
    assert {status for *_, status, _ in found} == {2}
