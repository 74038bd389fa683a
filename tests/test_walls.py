"""The walls between the rooms (CONTRIBUTING.md), read from the import statements of every file.

    cli -> pipeline -> {report, training, merge, fuse, evaluation}
        -> {models, losses -> gradients -> data, adapters} -> recipe -> {distributed, data_mixers} -> common

Imports inside functions and imports for the type checker count too. What an `__init__` exports lazily (its
`__getattr__`, and what it imports for the type checker beside it) makes no edge. Every check takes a mapping of
`module: source`, where the `__init__` of a package is called `package.__init__`; a test plants a violation for each.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 350

# Rooms by layer, from the top: a room may import every room of a lower layer.
LAYERS = [
    {"cli"},
    {"pipeline"},
    {"report", "training", "merge", "fuse"},
    {"evaluation"},  # training evaluates between its steps
    {"models", "losses"},
    {"gradients"},
    {"data", "adapters"},
    {"recipe"},
    {"distributed", "data_mixers"},
    {"quickstart"},  # gives rows and models, and reads no other room
    {"common"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# Arrows within the layers `{report, training, ...}` and `{models, losses -> ..., adapters}` that the list cannot show.
FORBIDDEN = {
    ("report", "evaluation"),
    ("merge", "evaluation"),
    ("models", "gradients"),
    ("models", "data"),
    ("losses", "adapters"),
    ("gradients", "adapters"),
    ("data_mixers", "quickstart"),
    ("data_mixers", "common"),  # data_mixers stands alone and has a `common` of its own
}
# Each experimental file counts as the room that it extends.
EXPERIMENTAL = {
    "core_elementwise": "merge",
    "flat_minima": "training",
    "mezo": "training",
    "refresh_adapter": "training",
    "rerank": "fuse",
    "sharpness_aware": "training",
    "skills_export": "merge",
}
MODEL_LOADERS = {"AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "PeftModel", "AutoPeftModelForCausalLM"}

parse = cache(ast.parse)

Sources = dict[str, str]
Edges = set[tuple[str, str]]


@cache
def sources() -> Sources:
    """Every file of mtft and data_mixers: `module: source`."""
    files = [file for package in ("data_mixers", "mtft") for file in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file.read_text("utf-8") for file in files}


def is_lazy_part(node: ast.AST) -> bool:
    """Part of a lazy `__init__`: its `__getattr__`, or imports that only a type checker reads."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef) and node.name == "__getattr__"


def import_nodes(module: str, source: str) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements of a file, without those of the lazy part of an `__init__`."""
    lazy = module.endswith(".__init__") and "__getattr__" in source

    def visit(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
        for child in ast.iter_child_nodes(node):
            if lazy and is_lazy_part(child):
                continue
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child
            yield from visit(child)

    return visit(parse(source))


def imported_names(module: str, node: ast.Import | ast.ImportFrom) -> list[str]:
    """`from a import b` -> `a.b`; relative imports made absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = module.split(".")[: -node.level] if node.level else []
    base = ".".join([*package, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def file_of(name: str, files: Sources) -> str | None:
    """The file that an imported name is read from: the module itself, the `__init__` of a package, or the parent."""
    for candidate in (name, name.rpartition(".")[0]):
        for file in (candidate, f"{candidate}.__init__"):
            if file in files:
                return file
    return None


def import_edges(files: Sources) -> Edges:
    """(importing file, imported file) for all imports among the files."""
    edges = set()
    for module, source in files.items():
        for node in import_nodes(module, source):
            targets = {file_of(name, files) for name in imported_names(module, node)} - {None, module}
            edges |= {(module, target) for target in targets}
    return edges


def room_of(module: str) -> str | None:
    """`mtft.data.store.token_store` -> data; None for the top of mtft and for what is not ours."""
    package, *parts = module.split(".")
    if package == "data_mixers":
        return package
    if package != "mtft" or parts[:1] in ([], ["__init__"], ["__version__"]):
        return None
    if parts[0] == "experimental":
        return None if parts[1:] in ([], ["__init__"]) else EXPERIMENTAL[parts[1]]
    return "cli" if parts[0] == "__main__" else parts[0]


def upward_arrows(files: Sources) -> Edges:
    """Imports from a room to one that is not below it."""
    broken = set()
    for module, target in import_edges(files):
        rooms = room_of(module), room_of(target)
        if None in rooms or rooms[0] == rooms[1]:
            continue
        if LEVEL[rooms[1]] <= LEVEL[rooms[0]] or rooms in FORBIDDEN:
            broken.add((module, target))
    return broken


def circles(files: Sources) -> list[list[str]]:
    """Groups of files that import one another: the strongly connected components (Tarjan 1972) of two and more."""
    graph: dict[str, list[str]] = {module: [] for module in files}
    for module, target in sorted(import_edges(files)):
        graph[module].append(target)
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components = []

    def connect(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for target in graph[module]:
            if target not in order:
                connect(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], order[target])
        if lowest[module] == order[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                components.append(sorted(component))

    for module in graph:
        if module not in order:
            connect(module)
    return components


def twins(pairs: list[tuple[str, str]]) -> list[str]:
    """Names that stand at two places: `name: place, place`."""
    places: dict[str, list[str]] = {}
    for name, place in pairs:
        places.setdefault(name, []).append(place)
    return [f"{name}: {', '.join(found)}" for name, found in sorted(places.items()) if len(found) > 1]


def file_twins(files: Sources) -> list[str]:
    """File names that one top-level room (mtft/<room>, data_mixers) has twice."""
    pairs = []
    for module in files:
        parts = module.split(".")
        room = parts[0] if parts[0] == "data_mixers" else ".".join(parts[:2])
        pairs += [(f"{room}/{parts[-1]}.py", module)] if parts[-1] != "__init__" else []
    return twins(pairs)


def class_twins(files: Sources) -> list[str]:
    """Class names that stand twice anywhere."""
    trees = [(module, parse(source)) for module, source in files.items()]
    return twins([(n.name, module) for module, tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)])


def long_files(files: Sources) -> list[str]:
    counts = {module: len(source.splitlines()) for module, source in files.items()}
    return [f"{module}: {lines} lines" for module, lines in counts.items() if lines > MAX_LINES]


def shadowed_modules(files: Sources) -> list[str]:
    """Names that an `__init__` exports although a submodule is called the same."""
    broken = []
    for module, source in files.items():
        package, _, last = module.rpartition(".")
        if last != "__init__":
            continue
        submodules = {m.removeprefix(f"{package}.").split(".")[0] for m in files if m.startswith(f"{package}.")}
        tree = parse(source)
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                modules = {f"{package}.{name}" for name in submodules}
                full = dict(zip((a.asname or a.name for a in node.names), imported_names(module, node), strict=True))
                names |= {name for name, origin in full.items() if origin not in modules}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
                names |= {constant.value for constant in ast.walk(node.value) if isinstance(constant, ast.Constant)}
        broken += [f"{package}.{name}" for name in sorted(names & submodules)]
    return broken


def foreign_imports(files: Sources) -> list[str]:
    """Imports of torch or mtft in data_mixers."""
    broken = []
    for module, source in files.items():
        if room_of(module) == "data_mixers":
            names = [name for node in import_nodes(module, source) for name in imported_names(module, node)]
            broken += [f"{module}: {name}" for name in names if name.split(".")[0] in ("torch", "mtft")]
    return broken


def model_loaders(files: Sources) -> list[str]:
    """Uses of a class that loads a base model, in mtft.merge."""
    broken = []
    for module, source in files.items():
        if room_of(module) == "merge":
            names = (getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(parse(source)))
            broken += [f"{module}: {name}" for name in names if name in MODEL_LOADERS]
    return broken


def test_the_reader_of_imports_sees_them():
    edges = import_edges(sources())
    assert ("mtft.recipe.load", "mtft.common.errors") in edges
    assert ("mtft.cli.main", "mtft.training.run_training") in edges  # inside a function


def test_arrows_run_down():
    assert {room_of(module) for module in sources()} - {None} <= LEVEL.keys(), "a new room needs a layer"
    assert upward_arrows(sources()) == set()


def test_no_circles():
    assert circles(sources()) == []


CHECKS = [shadowed_modules, foreign_imports, model_loaders, file_twins, class_twins, long_files]


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_found(check):
    assert check(sources()) == []


def test_half_of_the_files_are_short():
    assert median(len(source.splitlines()) for source in sources().values()) <= 110


PLANTED = {
    "mtft.__init__": "",
    "mtft.common.errors": "class UserError(Exception): ...",
    "mtft.recipe.load": "from mtft.common.errors import UserError",
    "mtft.data.__init__": "",
    "mtft.data.batch": "from mtft.recipe import load",
    "mtft.merge.__init__": "def __getattr__(name):\n    from mtft.merge.engine import merge_adapters",
    "mtft.merge.engine": "from mtft import merge\nfrom mtft.data.batch import Batch",
    "data_mixers.__init__": "",
}


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (upward_arrows, "mtft.recipe.schema", "def f():\n    from mtft.data.batch import Batch"),
        (upward_arrows, "mtft.fuse.spec", "import mtft.merge.engine"),
        (upward_arrows, "mtft.experimental.rerank", "from mtft.merge.engine import merge_adapters"),
        (circles, "mtft.recipe.load", "if TYPE_CHECKING:\n    from mtft.data.batch import Batch"),
        (circles, "mtft.common.errors", "def f():\n    from mtft.recipe.load import load"),
        (circles, "mtft.common.errors", "import mtft.recipe\nfrom ..recipe import load"),
        (circles, "mtft.merge.__init__", "def merge_adapters():\n    from mtft.merge.engine import merge_adapters"),
        (file_twins, "mtft.data.store.batch", ""),
        (class_twins, "data_mixers.errors", "class UserError: ..."),
        (long_files, "mtft.data.store", "\n" * (MAX_LINES + 1)),
        (shadowed_modules, "mtft.data.__init__", "from mtft.data.batch import batch"),
        (shadowed_modules, "mtft.merge.__init__", "__all__ = ['engine']"),
        (foreign_imports, "data_mixers.mixture", "def f():\n    import torch"),
        (model_loaders, "mtft.merge.engine", "from transformers import AutoModel\nAutoModel.from_pretrained('x')"),
    ],
)
def test_a_planted_violation_is_found(check, module, source):
    assert not check(PLANTED)
    assert check({**PLANTED, module: source})


HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "sklearn", "lightgbm", "matplotlib", "pandas")
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
    code = START.format(statement=statement, arguments=arguments, forbidden=HEAVY)
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
    """Nothing heavy imported, and at most six times the CPU of pydantic and typer alone (3.2 when measured: schema).

    The best of up to five pairs, side by side: the first may compile bytecode, and another process may be in the way.
    """
    ours, usual = [], []
    for _ in range(5):
        seconds, heavy = started(statement, *arguments)
        assert heavy == []
        ours.append(seconds)
        usual.append(started("import pydantic, typer")[0])
        if min(ours) < 6 * min(usual):
            return
    raise AssertionError(f"{min(ours):.2f} s of CPU, where `import pydantic, typer` takes {min(usual):.2f}")
