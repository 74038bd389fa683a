"""docs/pitfalls.md names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_named_test_exists():
    rows = re.findall(r"^\| (R\d+) \|.*\| ([^|]*) \|$", (ROOT / "docs" / "pitfalls.md").read_text(), flags=re.M)
    numbers = [number for number, _ in rows]
    assert numbers == [f"R{n}" for n in range(1, 59)]
    for number, cell in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cell)
        assert named, number
        for path, name in named:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (path, name)
