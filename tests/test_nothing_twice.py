"""What the house does in one place only: a second place is found by the name that it cannot do without."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# name of an import, an attribute or a text: the files that may use it
ONLY_IN = {
    "get_close_matches": {"data_mixers/common/suggest.py"},
    "WORLD_SIZE": {"mtft/distributed/launch.py"},
    "RANK": {"mtft/distributed/launch.py"},
    "LOCAL_RANK": set(),
    "ACCELERATE_USE_FSDP": {"mtft/distributed/launch.py"},
    "ACCELERATE_USE_DEEPSPEED": {"mtft/distributed/launch.py"},
    "BitsAndBytesConfig": {"mtft/models/quantization.py", "mtft/training/export/reload_check.py"},
    "AutoTokenizer": {"mtft/models/loading.py", "mtft/experimental/rerank.py"},  # of a reward model
    "AutoModelForCausalLM": {
        "mtft/models/loading.py",
        "mtft/training/memory/estimate.py",  # on the meta device, without weights
        "mtft/training/export/reload_check.py",  # what a user without mtft would write
    },
    "replace of os": {"mtft/common/atomic_io.py", "mtft/adapters/adapter_writer.py"},  # a file; a folder for another
    "trust_remote_code of section": set(),
}


def names_in(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.name)
        elif isinstance(node, ast.Attribute):
            names |= {node.attr, f"{node.attr} of {getattr(node.value, 'id', '')}"}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names


@pytest.fixture(scope="module")
def names_by_file():
    files = [file for room in ("mtft", "data_mixers") for file in (ROOT / room).rglob("*.py")]
    return {str(file.relative_to(ROOT)): names_in(ast.parse(file.read_text("utf-8"))) for file in files}


@pytest.mark.parametrize("name", ONLY_IN)
def test_one_place(names_by_file, name):
    assert {file for file, names in names_by_file.items() if name in names} <= ONLY_IN[name]


@pytest.mark.parametrize(
    "source", ["from difflib import get_close_matches", "import difflib as d\nd.get_close_matches('a', [])"]
)
def test_a_twin_would_be_seen(source):
    assert "get_close_matches" in names_in(ast.parse(source))
