"""Files that we wrote are read by mtft.common.own_files: read from the source of all files, so that the next place that
parses JSON by itself is found.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# file -> (calls of json.load and json.loads, why it isn't own_files that reads)
ALLOWED = {
    "mtft/common/own_files.py": (1, "the reader"),
    "mtft/common/folder_lock.py": (1, "who holds a lock: nobody is hindered where it can't be read"),
    "mtft/adapters/base_identity.py": (1, "PEFT's adapter_config.json"),
    "mtft/common/foreign_json.py": (1, "JSON of others: configs of models and adapters; names file, line and key"),
    "mtft/adapters/mlp_router.py": (1, "a text in the header of a safetensors file"),
    "mtft/adapters/routers.py": (2, "a text in the header of a safetensors file"),
    "mtft/adapters/safetensors_io.py": (2, "headers and indices of safetensors files"),
    "mtft/data/formats/formats.py": (1, "a cell of a user's row"),
    "mtft/data/formats/messages.py": (1, "a cell of a user's row"),
    "mtft/data/readers/arrow_rows.py": (1, "a cell of a user's row"),
    "mtft/data/readers/row_files.py": (1, "a user's row"),
    "mtft/data/store/token_store.py": (1, "a tokenizer as its library writes it"),
    "mtft/evaluation/metrics/json_answers.py": (1, "what a model answered"),
    "mtft/evaluation/metrics/python_metric.py": (1, "what a process of ours has said"),
    "mtft/evaluation/metrics/python_worker.py": (2, "what the process that started it says; free of mtft on purpose"),
    "mtft/fuse/batch/request_rows.py": (1, "a user's row"),
    "mtft/fuse/server/app.py": (1, "the body of a request"),
    "mtft/fuse/tokenizers/token_map.py": (1, "a tokenizer as its library writes it"),
    "mtft/pipeline/stages/stage_cache.py": (1, "no file: inputs as JSON would give them back"),
    "mtft/training/export/proof.py": (1, "what a process of ours has printed"),
    "mtft/training/export/reload_check.py": (
        2,
        "a script, free of mtft on purpose; its parent has read the file",
    ),
    "data_mixers/sweep/ledger.py": (1, "data_mixers stands alone; its reader names file, line and key as well"),
}


def sources():
    files = [path for room in ("mtft", "data_mixers") for path in sorted((ROOT / room).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in files}


def parses(text):
    """Lines that call json.load or json.loads, under whatever name they were imported."""
    tree = ast.parse(text)
    modules, functions = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name == "json"}
        elif isinstance(node, ast.ImportFrom) and node.module == "json":
            functions |= {alias.asname or alias.name for alias in node.names if alias.name in ("load", "loads")}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            by_module = isinstance(called, ast.Attribute) and called.attr in ("load", "loads")
            by_module = by_module and isinstance(called.value, ast.Name) and called.value.id in modules
            if by_module or (isinstance(called, ast.Name) and called.id in functions):
                found.append(node.lineno)
    return found


def strangers(files):
    """Files that parse JSON more often than the list allows, with the lines."""
    found = {name: parses(text) for name, text in files.items()}
    return {name: at for name, at in found.items() if len(at) > ALLOWED.get(name, (0, ""))[0]}


def test_our_files_are_read_by_the_one_reader():
    assert strangers(sources()) == {}


def test_the_list_holds_nothing_that_is_gone():
    files = sources()
    assert {name: len(parses(files[name])) for name in ALLOWED} == {name: count for name, (count, _) in ALLOWED.items()}


@pytest.mark.parametrize(
    "text",
    [
        "import json\njson.loads(path.read_text())",
        "import json as j\nj.load(file)",
        "from json import loads as parse\nparse(path.read_bytes())",
        "def f():\n    import json\n    text = path.read_text()\n    return json.loads(text)",
    ],
)
def test_a_new_place_is_found(text):
    assert len(strangers({"mtft/report/new.py": text})) == 1
