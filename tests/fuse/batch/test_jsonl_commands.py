"""JSONL in, JSONL out: killed and resumed equals uninterrupted, bad rows stay rows, a row equals itself alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mtft.adapters.routers import CentroidRouter
from mtft.common.errors import UserError
from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.batch import jsonl_commands
from mtft.fuse.batch.answers_file import AnswersFile
from mtft.fuse.from_recipe import fingerprint, load_fusion
from mtft.recipe.schema.recipe import Recipe
from tests.fuse import tiny

ROWS = [
    {"prompt": "the quick", "id": "a"},
    {"prompt": "jumps over the lazy dog and then", "max_tokens": 3},
    {"messages": [{"role": "user", "content": "fox"}], "alpha_rule": "forward"},
    {"prompt": "dog", "alpha": 0.0, "seed": 5},
    {"prompt": "brown fox", "trace": True, "max_tokens": 4},
    {"prompt": "over the", "expert_weights": [1.0]},
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tiny.folders_with_text(tmp_path_factory.mktemp("batch"))


def recipe_of(places, out, **fuse):
    section = {"strong": {"path": str(places["strong"]), "dtype": "fp32"}, "adapters": [str(places["expert"])]}
    section |= {"max_new_tokens": 6, "temperature": 1.0, "batch_size": 2}
    return Recipe.model_validate(
        {
            "name": "t",
            "model": {"path": str(places["small"]), "dtype": "fp32"},
            "tasks": [{"name": "x", "data": "x.jsonl"}],
            "train": {"steps": 1},
            "output": {"dir": str(out)},
            "fuse": section | fuse,
        }
    )


@pytest.fixture(scope="module")
def fused(places, tmp_path_factory):
    return load_fusion(recipe_of(places, tmp_path_factory.mktemp("out")))


def write(path: Path, rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def ask(places, fused, tmp_path):
    recipe = recipe_of(places, tmp_path)

    def run(rows, name="y.jsonl", kind=jsonl_commands.generate, **options):
        return kind(recipe, write(tmp_path / "x.jsonl", rows), tmp_path / name, fused=fused, **options)

    run.recipe, run.folder = recipe, tmp_path
    return run


def test_answers(ask):
    summary = ask(ROWS)
    answers = read(ask.folder / "y.jsonl")
    assert (summary.rows, summary.failed, summary.resumed) == (6, 0, 0)
    assert [answer["index"] for answer in answers] == list(range(6))
    assert [answer["id"] for answer in answers] == ["a", *[None] * 5]
    assert answers[1]["tokens"] <= 3
    assert answers[3]["alpha_mean"] == 0
    assert all(answer["finish_reason"] in ("stop", "length") for answer in answers)
    trace = answers[4]["trace"]
    assert [step["position"] for step in trace] == list(range(answers[4]["tokens"]))
    assert {"token", "text", "logprob", "alpha", "lam", "c", "g", "h", "clipped", "flat", "tv", "top"} <= set(trace[0])
    assert sum(step["alpha"][0] for step in trace) / len(trace) == pytest.approx(answers[4]["alpha_mean"])
    assert len(trace[0]["top"]["fused"]) == 5
    assert 0 <= trace[0]["tv"] <= 1
    assert sorted(path.name for path in ask.folder.iterdir()) == ["x.jsonl", "y.jsonl"]


def test_a_row_alone_gives_the_same(ask):
    ask(ROWS)
    for index in (0, 2):
        seed = jsonl_commands.key(ask.recipe.seed, index, 0)
        ask([ROWS[index] | {"seed": seed}], f"alone{index}.jsonl")
        alone = read(ask.folder / f"alone{index}.jsonl")[0]
        assert alone["text"] == read(ask.folder / "y.jsonl")[index]["text"]


def test_killed_and_resumed_equals_uninterrupted(ask, monkeypatch):
    ask(ROWS, "whole.jsonl")
    real, calls = jsonl_commands.generate_bucket, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(jsonl_commands, "generate_bucket", dying)
    with pytest.raises(KeyboardInterrupt):
        ask(ROWS)
    part = ask.folder / ".y.jsonl.mtft-part"
    with part.open("a") as file:
        file.write('{"index": 5, "id": null, "te')  # torn by the kill
    summary = ask(ROWS)
    assert summary.resumed == 4
    assert len(calls) == 4  # only the third bucket was left
    assert (ask.folder / "y.jsonl").read_bytes() == (ask.folder / "whole.jsonl").read_bytes()


def test_changed_rows_are_done_again(ask, monkeypatch):
    monkeypatch.setattr(AnswersFile, "finish", lambda *_: None)  # leaves it behind, as a kill at the very end does
    ask(ROWS)
    changed = [*ROWS[:5], {"prompt": "something else"}]
    assert ask(changed).resumed == 5


def test_another_recipe_does_not_continue_this_one(ask, places, fused, monkeypatch):
    monkeypatch.setattr(AnswersFile, "finish", lambda *_: None)
    ask(ROWS)
    other = recipe_of(places, ask.folder, alpha_rule="forward")
    assert fingerprint(other) != fingerprint(ask.recipe)
    with pytest.raises(FusionError, match="another recipe, seed or other weights"):
        jsonl_commands.generate(other, ask.folder / "x.jsonl", ask.folder / "y.jsonl", fused=fused)


def test_finished_output_is_not_overwritten_by_accident(ask):
    ask(ROWS[:1])
    with pytest.raises(UserError, match="there already"):
        ask(ROWS[:1])
    assert ask(ROWS[:1], overwrite=True).rows == 1


def test_bad_rows_do_not_stop_the_run(ask):
    bad = {
        '{"prompt": ': "broken JSON",
        "[1]": "not an object",
        '{"promt": "a"}': "did you mean 'prompt'",
        '{"prompt": "a", "messages": []}': "either prompt or messages",
        '{"prompt": ""}': "empty",
        '{"prompt": "a", "alpha": 99}': "alpha is 99",
        '{"prompt": "a", "alpha_rule": "newton"}': "alpha_rule is 'newton'",
        '{"prompt": "a", "max_tokens": 0}': "max_tokens is 0",
        '{"prompt": "a", "max_tokens": 1000}': "past the smaller context of 128",
        '{"prompt": "a", "expert_weights": [0.5, 0.5]}': "2 entries for 1 experts",
        '{"messages": [{"role": "user"}]}': "messages[0].content: expected text",
        '{"prompt": [999]}': "outside of 0",
    }
    summary = ask([*bad, ROWS[0]])
    assert summary.failed == len(bad)
    answers = read(ask.folder / "y.jsonl")
    for answer, message in zip(answers, bad.values(), strict=False):
        assert message in answer["error"]
    assert "text" in answers[-1]


def test_score(ask, fused):
    rows = [
        {"prompt": "the quick", "response": " brown fox"},
        {"prompt": "a", "response": "b", "alpha": 0.0},
        {"prompt": "a"},
    ]
    assert ask(rows, kind=jsonl_commands.score).failed == 1
    first, second, third = read(ask.folder / "y.jsonl")
    ids = fused.tokenizer.encode("the quick") + fused.tokenizer.encode(" brown fox", add_special_tokens=False)
    found = fused.score(torch.tensor([ids]))
    assert first["logprob"] == pytest.approx(float(found.logprob_BL[0, -first["tokens"] :].sum()), abs=1e-4)
    assert second["alpha_mean"] == 0
    assert "response is missing" in third["error"]


def test_a_response_that_is_ruled_out_has_no_logprob(ask, places):
    """Minus infinity, which JSON has not."""
    strict = recipe_of(places, ask.folder, plausibility=0.999)
    write(ask.folder / "x.jsonl", [{"prompt": "the quick", "response": "zzzz"}])
    assert jsonl_commands.score(strict, ask.folder / "x.jsonl", ask.folder / "y.jsonl").failed == 0
    assert read(ask.folder / "y.jsonl")[0]["logprob"] is None


def test_temperature_zero_is_greedy(ask, places, fused):
    greedy = recipe_of(places, ask.folder, temperature=0.0)
    write(ask.folder / "x.jsonl", [{"prompt": "the quick", "max_tokens": 5}])
    jsonl_commands.generate(greedy, ask.folder / "x.jsonl", ask.folder / "y.jsonl", fused=fused)
    ids = fused.tokenizer("the quick", return_tensors="pt").input_ids
    out = fused.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert read(ask.folder / "y.jsonl")[0]["text"] == fused.tokenizer.decode(out, skip_special_tokens=True)


def test_missing_adapter(places, tmp_path):
    with pytest.raises(FusionError, match="no expert"):
        load_fusion(recipe_of(places, tmp_path, adapters=None))


def test_a_recipe_with_a_router(places, tmp_path):
    """Each prompt gets the weights that the router gives it; another router makes another run."""
    two, file = tiny.adapter(tmp_path / "two", places["small"], 12), tmp_path / "router.safetensors"
    states = np.random.default_rng(0).normal(size=(2, 6, 16))
    CentroidRouter.fit({"two": states[0], "expert": states[1]}).save(file)
    experts = {"adapters": [str(places["expert"]), str(two)], "temperature": 0.0}
    recipe = recipe_of(places, tmp_path, weights="router", router=str(file), **experts)
    fused, rows = load_fusion(recipe), [{"prompt": "the quick"}, {"prompt": "dog"}]
    jsonl_commands.generate(recipe, write(tmp_path / "x.jsonl", rows), tmp_path / "routed.jsonl", fused=fused)
    for row in rows:
        weights = fused.router.weights(fused.weak, torch.tensor(fused.tokenizer.encode(row["prompt"])))
        assert 0.01 < weights[0] < 0.99
        row["expert_weights"] = weights
    given = write(tmp_path / "given.jsonl", rows)
    jsonl_commands.generate(recipe_of(places, tmp_path, **experts), given, tmp_path / "y.jsonl", fused=fused)
    assert read(tmp_path / "routed.jsonl") == read(tmp_path / "y.jsonl")
    before = fingerprint(recipe)
    CentroidRouter.fit({"two": states[1], "expert": states[0]}).save(file)
    assert fingerprint(recipe) != before
    file.unlink()
    with pytest.raises(FusionError, match="no router there"):
        fingerprint(recipe)


def test_another_chat_template_makes_another_run(tmp_path):
    places = tiny.folders_with_text(tmp_path)
    recipe = recipe_of(places, tmp_path)
    seen = {fingerprint(recipe)}
    for folder in places.values():
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
        seen.add(fingerprint(recipe))
    assert len(seen) == 4
