"""The table of merge methods: scales are found downhill, every method of the room has a row, the page is written."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from mtft.merge.learned.gates import GATE_KINDS
from mtft.merge.methods import METHODS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare_merges", ROOT / "scripts" / "compare_merges.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_merges"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["compare_merges"]


def test_every_method_and_gate_has_a_row(compare):
    entries = compare.ENTRIES.values()
    assert {entry.method for entry in entries} >= METHODS.keys() - {"cat"}  # cat is linear at its own rank
    assert {entry.section["kind"] for entry in entries if entry.kind == "gates"} == GATE_KINDS.keys()
    assert len({compare.slug(name) for name in compare.ENTRIES}) == len(compare.ENTRIES)


@pytest.mark.parametrize("best", [0.125, 0.5, 1.0, 11.314, 32.0])
@pytest.mark.parametrize("start", [0.01, 0.6, 100.0])
def test_scales_are_found_downhill(compare, best, start):
    found, tried = compare.best_scale(start, lambda scale: math.log(scale / best) ** 2)
    assert found == pytest.approx(best, rel=1e-3)
    assert len(tried) <= 2 + abs(compare.SCALES.index(found) - nearest(compare.SCALES, start)) + 1


def nearest(scales, start):
    return min(range(len(scales)), key=lambda i: abs(math.log(scales[i] / start)))


def row(loss, accuracy):
    def metric(value):
        return {"mean": {"value": value}, "min": value}

    summary = {"loss": metric(loss), "accuracy": metric(accuracy), "exact_match": metric(None)}
    joint = {"t": {name: {"retained": {"value": 1.1}} for name in summary}}
    return {"summary": summary, "joint": joint, "scale": 0.5, "cpu_s": 0.2, "memory_mb": 3.0}


def test_table_goes_between_the_marks_of_the_page(compare, tmp_path, monkeypatch, capsys):
    for seed in (1, 2):
        for name, kept in (("linear", 0.7 + 0.1 * seed), ("ties", 0.5)):
            folder = tmp_path / f"seed-{seed}" / "merges" / name
            folder.mkdir(parents=True)
            (folder / "row.json").write_text(json.dumps(row(kept, 0.4)))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{compare.BEGIN}\nold\n{compare.END}\nafter\n")
    arguments = ["x", "--out", tmp_path, "--seeds", 1, 2, "--table", "--docs", page]
    monkeypatch.setattr(sys, "argv", ["compare_merges.py", *map(str, arguments)])
    compare.main()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "retained" not in line]
    assert [line.split(" | ")[0] for line in rows] == ["| joint training", "| `linear`", "| `ties`"]
    assert "| 2 | 85% ± 7% |" in rows[1]
