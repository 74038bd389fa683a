"""Every path of a recipe follows one rule: inputs are relative to the recipe, outputs to the working directory."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

from mtft.gradients.aggregators import AGGREGATORS
from mtft.losses.balancers import BALANCERS
from mtft.merge.methods import METHODS
from mtft.recipe.input_paths import input_paths
from mtft.recipe.load import dump_recipe, load_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.section import MERGE_OPTIONS, PathKind, RecipeSection

# Texts that are no paths. A new key with a text stands here, or says by a PathKind that it holds a path.
NO_PATHS = {
    ".name",
    *(f".{model}.revision" for model in ("model", "sweep.model", "fuse.strong", "fuse.base")),
    ".lora.targets",
    ".sweep.lora.targets",
    ".tasks.name",
    ".tasks.split",
    ".tasks.format",  # a format's name, or columns
    ".tasks.template",  # what is filled in
    ".tasks.system",
    ".tasks.chat_template_kwargs",
    ".tasks.shots.from",  # a task
    *(f".tasks.shots.from.{key}" for key in ("split", "format", "template")),
    ".tasks.generate.stop",
    ".eval.lm_eval.tasks",
    ".tasks.row_weight",  # a column
    ".sweep.objective",
    ".tasks.metrics",
    ".tasks.metrics.name",
    ".tasks.metrics.key",
    ".tasks.metrics.folder",  # absolute where it is written: no command may be kept from writing there
    ".output.trackers",
    ".train.optimizer",
    ".train.watch",
    ".sweep.surrogate",
    ".mixture.groups.tasks",
    ".loss.balancer.name",
    ".loss.gradients.aggregator",
    ".loss.gradients.options",
    ".merge.method",
    ".merge.saved",
    ".merge.gates.negate",
    ".merge.per_module.modules",
    ".merge.per_module.method",
}
TEXT_OPTIONS = {("lagged", "aggregator"), ("lagged", "options"), ("consensus", "tall")}  # no paths either
RECIPE = """
name: all
model: {path: ./in/model, chat_template: in/chat.jinja}
tasks:
  - {name: a, data: in/a.jsonl, eval_data: [in/b.jsonl, "hub:org/name"], metrics: [{python: "in/m.py:f"}]}
  - {name: b, data: ["quickstart:add"], eval_data: in/c.jsonl, shots: {n: 1, from: {data: in/d.jsonl}}}
mixture: {shares: SHARES, online: {name: group_dro, reference: in/run}}
lora: {r: 4, start: in/adapter}
train: {steps: 4}
loss: {balancer: {name: uniform, groups: in/affinity.json}}
sweep:
  {trials: 4, steps: 2, lora: {r: 4, start: in/start}, model: {path: ../above/small, chat_template: in/small.jinja}}
merge:
  {adapters: [in/one, in/two], base: in/base, out: out/merged, experts: {kind: arrow, general: [in/general]},
  method: regmean, options: {grams: in/grams}, per_module: [{modules: up, options: {grams: in/more, rho: 1}}]}
fuse:
  strong: {path: ./in/strong, chat_template: in/strong.jinja}
  base: {path: ./in/weak, chat_template: in/weak.jinja}
  adapters: [in/expert]
  router: in/router.safetensors
eval: {lm_eval: {tasks: [mine], include_path: in/harness}}
output: {dir: out/run}
"""
SHARES = ["{file: in/mixture.yaml}", "{schedule: [{at: 0, shares: natural}, {at: 1, shares: {file: in/late.yaml}}]}"]


def texts(annotation: Any, metadata: list[Any], place: str) -> Iterator[tuple[str, PathKind | None]]:
    """(key, kind of path) of every key of the schema that may hold a text; None: none is said."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from texts(parts[0], [*metadata, *parts[1:]], place)
    elif origin in (Union, types.UnionType, tuple, list):
        for part in parts:
            yield from texts(part, metadata, place)
    elif origin is dict:
        yield from texts(parts[1], metadata, place)
    elif isinstance(annotation, type) and issubclass(annotation, RecipeSection):
        for name, field in annotation.model_fields.items():
            yield from texts(field.annotation, field.metadata, f"{place}.{name}")
    elif isinstance(annotation, type) and issubclass(annotation, str):
        kind = next((item for item in metadata if isinstance(item, PathKind)), None)
        if kind is None or not kind.options:
            yield place, kind
        else:
            yield from ((f"{place}.{option}", kind) for option in kind.options)


def held(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of a recipe's values, wherever they are."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from held(value, f"{place}.{key}")
    elif isinstance(node, list):
        for value in node:
            yield from held(value, place)
    elif isinstance(node, str):
        yield place, node


@pytest.fixture(params=SHARES, ids=["file", "schedule"])
def places(request, tmp_path, monkeypatch):
    """(recipe file, working directory): neither lies in the other."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "recipes" / "r.yaml").write_text(RECIPE.replace("SHARES", request.param))
    return tmp_path / "recipes" / "r.yaml", tmp_path / "work"


def test_every_text_of_the_schema_is_known_to_be_a_path_or_none():
    assert {place for place, kind in texts(Recipe, [], "") if kind is None} <= NO_PATHS


def test_every_text_option_of_a_method_is_known_to_be_a_path_or_none():
    found = set()
    for methods in (BALANCERS, AGGREGATORS, METHODS):
        for name, method in methods.items():
            hints = get_type_hints(method)
            found |= {(name, field.name) for field in fields(method) if field.init and str in kinds(hints[field.name])}
    paths = {(name, option) for name, option in found if option in MERGE_OPTIONS.options}
    assert paths == {("regmean", "grams")}
    assert found - paths <= TEXT_OPTIONS


def kinds(annotation: Any) -> set[Any]:
    parts = get_args(annotation) if get_origin(annotation) else ()
    return {annotation}.union(*map(kinds, parts[1:] if get_origin(annotation) in (dict, Mapping) else parts))


def test_the_recipe_of_this_test_holds_every_path():
    written = {key for shares in SHARES for key, _ in held(yaml.safe_load(RECIPE.replace("SHARES", shares)))}
    assert {place for place, kind in texts(Recipe, [], "") if kind is not None} <= written


def test_inputs_are_relative_to_the_recipe_and_outputs_to_the_working_directory(places):
    file, work = places
    recipe = load_recipe(file, files=False)
    asked = dict(held_list(yaml.safe_load(file.read_text())))
    got = dict(held_list(recipe.model_dump(mode="json")))
    for key, text in asked.items():
        if "in/" in text or "../" in text:
            assert got[key] == str((file.parent / text).resolve()), key
        elif text.startswith("out/"):
            assert got[key] == str(work / text), key
        else:
            assert got[key] == text
    again = file.with_name("resolved.yaml")
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again, files=False) == recipe


def test_every_input_is_known_as_one(places):
    """So that no command writes there."""
    file, _ = places
    recipe = load_recipe(file, files=False)
    asked = [text for _, text in held_list(yaml.safe_load(file.read_text())) if "in/" in text or "../" in text]
    files = [text.removesuffix(":f") for text in asked]
    assert {str((file.parent / text).resolve()) for text in files} <= {str(path) for path in input_paths(recipe)}


def held_list(node: Any) -> list[tuple[tuple[str, int], str]]:
    """held, with the number of each text of a key."""
    out: list[tuple[tuple[str, int], str]] = []
    for key, text in held(node):
        out.append(((key, sum(one[0] == key for one, _ in out)), text))
    return out
