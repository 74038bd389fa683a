"""The walls between the rooms (CONTRIBUTING.md), read from the import statements of every file.

    cli -> {train, merge, fuse, evaluate, report, pipeline} -> losses -> gradients -> data -> recipe -> data_mixers

quickstart only provides files (rows and models) and imports no other room, so any room may read them.

Imports inside functions count too; imports for the type checker only do not.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Who may import whom. A room may always import itself, mtft.common.errors and the top of mtft.
MAY_IMPORT: dict[str, set[str]] = {
    "data_mixers": set(),
    "recipe": {"data_mixers"},
    "data": {"recipe", "data_mixers", "quickstart"},  # rows of `quickstart:TASK`
    "losses": {"gradients", "data", "recipe", "data_mixers"},  # balancers that read the Gram matrix
    "gradients": {"data", "recipe"},
    "quickstart": set(),
    "train": {"losses", "gradients", "data", "recipe", "data_mixers", "evaluate", "quickstart"},
    "evaluate": {"train", "fuse", "losses", "data", "recipe"},  # loads models as train does; lm-eval on fused ones
    "merge": {"recipe"},
    "fuse": {"merge", "losses", "data", "recipe", "quickstart"},
    "report": {"recipe", "data_mixers"},
    "pipeline": {
        "train",
        "merge",
        "fuse",
        "evaluate",
        "report",
        "quickstart",
        "losses",
        "gradients",  # an aggregator's name, before anything starts
        "data",
        "recipe",
        "data_mixers",
    },
}
MAY_IMPORT["cli"] = {*MAY_IMPORT} - {"cli"}

# Loading a base model: nothing in mtft.merge may.
MODEL_LOADERS = {"AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "PeftModel", "AutoPeftModelForCausalLM"}


def room_of(module: str) -> str | None:
    """The room of a module: `mtft.data.store.token_store` -> data. None for modules outside, and for what everyone
    may import.
    """
    package, _, rest = module.partition(".")
    if package == "data_mixers":
        return package
    room = rest.partition(".")[0]
    if package != "mtft" or room in ("", "errors", "__version__"):
        return None
    return "cli" if room == "__main__" else room


def is_for_type_checker(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node: ast.AST):
    """All nodes below, without what stands under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if not is_for_type_checker(child):
            yield child
            yield from walk(child)


@cache
def imports() -> list[tuple[str, str, str, int]]:
    """(file, its module, imported name, line) of every import in data_mixers and mtft, relative ones made absolute."""
    found = []
    for package in ("data_mixers", "mtft"):
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            module = ".".join(part for part in parts if part != "__init__")
            home = parts[:-1]  # the package that relative imports start from
            for node in walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found += [(str(file.relative_to(ROOT)), module, alias.name, node.lineno) for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    base = ".".join(home[: len(home) - node.level + 1]) if node.level else ""
                    full = ".".join(part for part in (base, node.module) if part)
                    names = [f"{full}.{alias.name}" for alias in node.names]
                    found += [(str(file.relative_to(ROOT)), module, name, node.lineno) for name in names]
    return found


def test_the_reader_of_imports_sees_them():
    seen = {(module, name) for _, module, name, _ in imports()}
    assert ("mtft.recipe.load", "mtft.common.errors.UserError") in seen
    assert ("mtft.cli.main", "mtft.training.run_training.train") in seen  # inside a function
    assert ("data_mixers.mixture.mixture", "data_mixers.common.errors.MixError") in seen  # relative
    assert not any(
        name == "mtft.merge.engine.report.MergeReport" for module, name in seen if module == "mtft.cli.merge"
    )


def test_every_room_has_its_row():
    rooms = {room_of(module) for _, module, _, _ in imports()} - {None}
    assert rooms <= MAY_IMPORT.keys(), "a new room needs a row in MAY_IMPORT"


def test_arrows_run_one_way():
    broken = []
    for file, module, name, line in imports():
        here, there = room_of(module), room_of(name)
        if here is not None and there is not None and there != here and there not in MAY_IMPORT[here]:
            broken.append(f"{file}:{line}: {here} imports {name}")
    assert broken == []


def test_data_mixers_stands_alone():
    mine = [(file, name, line) for file, module, name, line in imports() if room_of(module) == "data_mixers"]
    broken = [f"{file}:{line}: {name}" for file, name, line in mine if name.split(".")[0] in ("torch", "mtft")]
    assert broken == []


@pytest.mark.parametrize("room", ["merge", "fuse"])
def test_merge_and_fuse_do_not_import_train(room):
    assert "train" not in MAY_IMPORT[room]
    assert not [name for _, module, name, _ in imports() if room_of(module) == room and room_of(name) == "train"]


def test_merge_loads_no_base_model():
    broken = []
    for file in sorted((ROOT / "mtft" / "merge").rglob("*.py")):
        for node in walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            if name in MODEL_LOADERS:
                broken.append(f"{file.relative_to(ROOT)}:{node.lineno}: {name}")
    assert broken == []


FORBIDDEN = ("torch", "transformers", "peft", "accelerate", "datasets", "sklearn", "lightgbm", "matplotlib", "pandas")
START = """
import json, resource, runpy, sys
sys.argv = ["mtft", *{arguments!r}]
try:
    {statement}
except SystemExit as stop:
    assert not stop.code, stop.code
usage = resource.getrusage(resource.RUSAGE_SELF)
heavy = [name for name in {forbidden!r} if name in sys.modules]
print("\\nSTART " + json.dumps([usage.ru_utime + usage.ru_stime, heavy]))
"""


def started(statement: str, *arguments: str) -> tuple[float, list[str]]:
    """CPU seconds of a fresh process, and the heavy modules that it has imported."""
    code = START.format(statement=statement, arguments=arguments, forbidden=FORBIDDEN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.rpartition("START ")[2]))


@pytest.mark.parametrize(
    ("statement", "arguments"),
    [
        ("import mtft", []),
        ("import data_mixers", []),
        ("runpy.run_module('mtft', run_name='__main__')", ["--help"]),
        ("runpy.run_module('mtft', run_name='__main__')", ["mix", "fit", "--help"]),
        ("runpy.run_module('mtft', run_name='__main__')", ["schema"]),
    ],
)
def test_starts_at_once(statement, arguments):
    """Nothing heavy imported, and no more than three times the CPU of what it needs anyhow: pydantic and typer.

    The best of up to five pairs, side by side: the first may compile bytecode, and another process may be in the way.
    """
    ours, usual = [], []
    for _ in range(5):
        seconds, heavy = started(statement, *arguments)
        assert heavy == []
        ours.append(seconds)
        usual.append(started("import pydantic, typer")[0])
        if min(ours) < 3 * min(usual):
            return
    raise AssertionError(f"{min(ours):.2f} s of CPU, where `import pydantic, typer` takes {min(usual):.2f}")
