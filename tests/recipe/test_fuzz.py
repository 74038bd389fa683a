"""2,000 broken recipes: each is either valid or one UserError in our words. Never a traceback, never silence."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from mtft.common.errors import UserError
from mtft.recipe.load import dump_recipe, load_recipe
from mtft.recipe.yaml_source import read_yaml

CASES = 2000
ODD_VALUES = [
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    "",
    "x",
    "1e-4",
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
    {"name": "sum"},
    "../..",
    ":",
]
CURRICULUM = {
    "shares": {
        "schedule": [
            {"at": 0, "shares": "uniform"},
            {"at": 0.5, "shares": {"temperature": 0.5}},
            {"at": 1.0, "shares": {"sum": 0.25, "sql.v1": 0.75}},
        ]
    },
    "groups": {"both": {"tasks": ["sum", "sql.v1"], "floor": 0.1, "cap": 1.0}},
    "floors": {"sum": 0.1},
    "unit": "tokens",
}
ODD_CHARACTERS = ":{}[],#&*!|>'\"%@`\t\n -?~\u2028é\x00"
# What would show that another tool's message leaked through.
FOREIGN = re.compile(
    r"Input should|validation error|pydantic|\btype=|input_value|Traceback|object at 0x|NoneType|KeyError"
)
OPEN = {
    ("loss", "balancer"),
    ("merge", "options"),
    ("tasks", 0, "format"),
}  # any key is taken here, and judged by its room


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def misspell(rng: random.Random, word: str) -> str:
    index = rng.randrange(len(word))
    return rng.choice(
        [word[:index] + word[index + 1 :], word[:index] + rng.choice("abcxyz_") + word[index:], word.upper()]
    )


def break_one(rng: random.Random, tree: dict) -> tuple[str, bool]:
    """Break the tree in one place. Returns what was done, and whether it must be refused."""
    path = rng.choice([place for place in places(tree) if place])
    parent, key = at(tree, path[:-1]), path[-1]
    kind = rng.choice(["delete", "misspell", "retype", "add", "move"])
    if kind == "delete":
        del parent[key]
        return kind, path in {
            ("name",),
            ("model",),
            ("tasks",),
            ("train",),
            ("output",),
            ("model", "path"),
            ("tasks", 0, "data"),
        }
    if kind == "misspell" and isinstance(parent, dict):
        wrong = misspell(rng, key)
        known = wrong in parent
        parent[wrong] = parent.pop(key)
        return kind, not known and path[:-1] not in (*OPEN, ("mixture", "groups"))
    if kind == "retype":
        parent[key] = rng.choice(ODD_VALUES)
        return kind, path in {("tasks",), ("model",), ("train",), ("output",)}
    if kind == "add" and isinstance(parent, dict):
        parent["extra_key"] = rng.choice(ODD_VALUES)
        return kind, path[:-1] not in OPEN
    target = at(tree, rng.choice([place for place in places(tree) if isinstance(at(tree, place), dict)]))
    target[str(key)] = parent[key] if not isinstance(parent[key], dict | list) else 3
    return "move", False


def break_text(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 3)):
        index = rng.randrange(len(text))
        how = rng.randrange(4)
        if how == 0:
            text = text[:index] + text[index + rng.randint(1, 12) :]
        elif how == 1:
            text = text[:index] + rng.choice(ODD_CHARACTERS) + text[index:]
        elif how == 2:
            text = text[:index] + text[max(0, index - 20) : index] + text[index:]
        else:
            lines = text.splitlines(keepends=True)
            rng.shuffle(lines) if rng.random() < 0.2 else lines.pop(rng.randrange(len(lines)))
            text = "".join(lines) or "\n"
    return text


def break_override(rng: random.Random, tree: dict) -> str:
    path = ".".join(map(str, rng.choice([place for place in places(tree) if place])))
    if rng.random() < 0.4:
        path = misspell(rng, path)
    value = rng.choice(["", "3", "[", "x: y", "{a: 1}", "null", "-1", "1e-4", "\x00"])
    return path + rng.choice(["=", "=", "=", ""]) + value


def verdict(file: Path, overrides: list[str]) -> str:
    """`valid` or `refused`; anything else is a failure of this test."""
    refusal: UserError | None = None
    try:
        recipe = load_recipe(file, overrides)
    except UserError as error:
        refusal = error
    if refusal is not None:
        assert not FOREIGN.search(str(refusal)), refusal
        assert refusal.where, refusal
        return "refused"
    again = file.with_name("again.yaml")
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe
    return "valid"


@pytest.mark.parametrize(
    ("seed", "number"), [(4, 200), *(pytest.param(seed, CASES // 4, marks=pytest.mark.slow) for seed in (0, 1, 2, 3))]
)
def test_broken_recipes(folder, seed, number, capsys):
    rng = random.Random(seed)
    if seed % 2:  # half of them break a curriculum
        values = read_yaml(folder.recipe).values
        del values["sweep"]
        folder.write(json.dumps(values | {"mixture": CURRICULUM}, indent=1))
    good = folder.recipe.read_text(encoding="utf-8")
    tree = read_yaml(folder.recipe).values
    counts: Counter[tuple[str, str]] = Counter()
    for _ in range(number):
        how, overrides, refused = rng.choice(["value", "value", "text", "override"]), [], False
        if how == "value":
            broken = json.loads(json.dumps(tree))
            how, refused = break_one(rng, broken)
            folder.write(json.dumps(broken))  # JSON is YAML
        elif how == "text":
            folder.recipe.write_bytes(break_text(rng, good).encode("utf-8", "surrogatepass"))
        else:
            folder.write(good)
            overrides = [break_override(rng, tree)]
        result = verdict(folder.recipe, overrides)
        assert not (refused and result == "valid"), f"{how} accepted:\n{folder.recipe.read_text(encoding='utf-8')}"
        counts[how, result] += 1
    assert sum(counts.values()) == number
    assert {result for _, result in counts} == {"valid", "refused"}  # the fuzzing reaches both sides
    with capsys.disabled():
        total = Counter(
            {result: sum(n for (_, r), n in counts.items() if r == result) for result in ("valid", "refused")}
        )
        print(
            f"\nfuzzed recipes, seed {seed}: {dict(total)}; "
            + ", ".join(f"{k} {r} {n}" for (k, r), n in sorted(counts.items()))
        )


def test_every_key_of_the_schema_refuses_an_unknown_neighbour(folder):
    """In each section of a full recipe, one key more is an error that names it (R21)."""
    full = folder.load(
        "sweep.model={path: m}", "sweep.lora={r: 4}", "fuse.base={path: m}", "mixture.shares={temperature: 1}"
    )
    tree = YAML(typ="safe", pure=True).load(dump_recipe(full))
    sections = [place for place in places(tree) if isinstance(at(tree, place), dict)]
    judged_elsewhere = {
        *OPEN,
        ("mixture", "floors"),
        ("mixture", "caps"),
        ("mixture", "groups"),
        ("sweep", "objective"),
        ("tasks", 1, "format"),
        *(("tasks", task, "chat_template_kwargs") for task in (0, 1)),
    }
    checked = 0
    for place in sections:
        if place in judged_elsewhere:
            continue
        broken = json.loads(json.dumps(tree))
        at(broken, place)["extra_key"] = 1
        folder.write(json.dumps(broken))
        assert "'extra_key' is not a key of" in folder.message(), place
        checked += 1
    assert checked >= 15
