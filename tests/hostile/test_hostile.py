"""200 attacks of the table (`python -m tests.hostile.siege` makes all of them): each ends as the rule says."""

from __future__ import annotations

import pytest

import mtft.training.trainer  # noqa: F401
import tests.fuse.tiny  # noqa: F401  the forked processes have the libraries then
from tests.hostile.attacks import READS
from tests.hostile.judge import Outcome, faults
from tests.hostile.siege import Siege, draw
from tests.warm_python.fixture import warm_proofs  # noqa: F401  (a fixture)

COUNT = 200


@pytest.fixture(scope="module")
def siege(tmp_path_factory):
    return Siege(tmp_path_factory.mktemp("siege"))


@pytest.mark.slow
def test_attacks_end_well(siege):
    broken = {}
    for attack in draw(COUNT, seed=1):
        wrong, said = siege.strike(attack)
        if wrong:
            broken[str(attack)] = f"{'; '.join(wrong)}\n{said[-600:]}"
    assert not broken, "\n".join(f"{name}: {text}" for name, text in broken.items())


@pytest.mark.slow
@pytest.mark.parametrize("command", READS)
def test_what_is_undamaged_works(siege, command):
    siege.right(command)
    missing = [file for file in READS[command].split() if not list(siege.template.glob(file))]
    assert not missing, "the table is out of date"


def test_the_table_has_a_thousand():
    attacks = [str(attack) for attack in draw(None)]
    assert len(attacks) >= 1000
    assert len(set(attacks)) == len(attacks)


WORLD = {"rows.jsonl": b"{}", "out/old": b"1"}
BLOCK = "error: rows.jsonl is damaged\n  where: rows.jsonl:1\n"


@pytest.mark.parametrize(
    "outcome, words",
    [
        (Outcome(None, BLOCK, WORLD), "hangs"),
        (Outcome(1, "failed: OSError", WORLD), "exit code 1"),
        (Outcome(2, BLOCK + "Traceback", WORLD), "Traceback"),
        (Outcome(2, BLOCK * 2, WORLD), "2 blocks"),
        (Outcome(2, BLOCK * 50, WORLD), "lines"),
        (Outcome(2, "error: no\n", WORLD), "names none"),
        (Outcome(2, BLOCK, {"out/old": b"1"}), "loses rows.jsonl"),
        (Outcome(2, BLOCK, {**WORLD, "rows.jsonl": b""}), "changes rows.jsonl"),
        (Outcome(2, BLOCK, {**WORLD, "rows.jsonl.part": b""}), "leaves rows.jsonl.part"),
        (Outcome(0, "", {**WORLD, "out/adapter_model.safetensors": b"2"}), "another result"),
    ],
)
def test_the_rule_sees_each_fault(outcome, words):
    expected = {"out/adapter_model.safetensors": b"1"}
    assert any(words in wrong for wrong in faults("merge", outcome, WORLD, expected, ("rows.jsonl",)))


def test_the_rule_lets_good_ends_pass():
    expected = {"out/adapter_model.safetensors": b"1"}
    done = Outcome(0, "done", {**WORLD, **expected})
    assert faults("merge", done, WORLD, expected, ("rows.jsonl",)) == []
    assert faults("merge", Outcome(2, BLOCK, WORLD), WORLD, expected, ("rows.jsonl",)) == []
