"""What the house does in one place only: a second place is found by the name that it cannot do without."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# name of an import, an attribute or a text: the files that may use it
ONLY_IN = {
    "get_close_matches": {"data_mixers/common/suggest.py"},
    "hashlib": {
        "mtft/common/fingerprint.py",
        "data_mixers/plan/token_order.py",  # data_mixers stands alone: it may not import mtft
        "data_mixers/plan/permutation.py",
        "data_mixers/plan/replanned.py",
        "data_mixers/plan/mixture_plan.py",
        "data_mixers/sweep/trial.py",
    },
    "multinomial": {"mtft/common/bootstrap.py"},
    "TypeAdapter": {"mtft/recipe/method_options.py"},
    "WORLD_SIZE": {"mtft/distributed/launch.py"},
    "RANK": {"mtft/distributed/launch.py"},
    "LOCAL_RANK": set(),
    "RAY_ADDRESS": {"data_mixers/common/ray_session.py"},
    "ACCELERATE_USE_FSDP": {"mtft/distributed/launch.py"},
    "ACCELERATE_USE_DEEPSPEED": {"mtft/distributed/launch.py"},
    "BitsAndBytesConfig": {"mtft/models/quantization.py", "mtft/training/export/reload_check.py"},
    "AutoTokenizer": {"mtft/models/loading.py", "mtft/experimental/rerank.py"},  # of a reward model
    "AutoModelForCausalLM": {
        "mtft/models/loading.py",
        "mtft/training/memory/estimate.py",  # on the meta device, without weights
        "mtft/training/export/reload_check.py",  # what a user without mtft would write
    },
    # a file; a folder for another; a mixture (data_mixers stands alone)
    "replace of os": {
        "mtft/common/atomic_io.py",
        "mtft/adapters/adapter_writer.py",
        "data_mixers/mixture/mixture.py",
    },
    "trust_remote_code of section": set(),
}


def names_in(tree: ast.AST) -> set[str | None]:
    names: set[str | None] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
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
    ("name", "source"),
    [
        ("get_close_matches", "from difflib import get_close_matches"),
        ("get_close_matches", "import difflib as d\nd.get_close_matches('a', [])"),
        ("hashlib", "import hashlib as h\nh.sha256(b'')"),
        ("hashlib", "def f():\n    from hashlib import blake2b"),
    ],
)
def test_a_twin_would_be_seen(name, source):
    assert name in names_in(ast.parse(source))
