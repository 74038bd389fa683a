"""What `mtft check` keeps of the model without weights: the same again, nothing stale, and every refusal anew."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

import mtft.training.memory.estimate as estimate
from mtft.__main__ import main
from mtft.common.errors import UserError
from mtft.pipeline import model_facts
from mtft.pipeline.check import check_recipe
from mtft.quickstart import model_path
from mtft.recipe.load import load_recipe

RECIPE = """\
name: check
model: {path: ./model, dtype: fp32}
tasks:
  - {name: a, data: rows.jsonl}
lora: {r: 2, alpha: 4}
train: {steps: 2, batch_tokens: 512, micro_batch_tokens: 512, max_length: 128, packing: false}
output: {dir: out}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """load(*overrides), on a copy of the quickstart's weak model."""
    monkeypatch.setenv("MTFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_path("weak"), tmp_path / "model")
    write_rows(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return lambda *overrides: load_recipe(tmp_path / "recipe.yaml", overrides)


def write_rows(folder, longest=20):
    rows = [{"prompt": f"count to {n}", "response": " ".join(map(str, range(n)))} for n in range(1, longest)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def estimates(monkeypatch):
    """One item for each estimate that is made."""
    made, real = [], estimate.estimate_memory

    def counted(*arguments, **options):
        made.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(estimate, "estimate_memory", counted)
    return made


def kept(tmp_path):
    return sorted((tmp_path / "cache" / model_facts.FOLDER).iterdir())


def test_the_second_check_says_the_same_and_estimates_nothing(recipe, estimates, tmp_path):
    first, second = check_recipe(recipe()), check_recipe(recipe())
    assert second.text() == first.text()
    assert second.as_dict() == first.as_dict()
    assert (len(estimates), len(kept(tmp_path))) == (1, 1)


@pytest.mark.parametrize(
    "overrides",
    [("name=other",), ("output.dir=elsewhere",), ("run.predicted=always",), ("output.keep=3",)],
    ids=lambda overrides: overrides[0],
)
def test_what_the_model_is_not_asked_for_makes_no_new_estimate(recipe, estimates, overrides):
    check_recipe(recipe())
    check_recipe(recipe(*overrides))
    assert len(estimates) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ("lora.r=4",),
        ("lora=null",),
        ("lora.targets=[q_proj]",),
        ("model.attention=eager",),
        ("train.optimizer=sgd",),
        ("train.micro_batch_tokens=256",),
        ("train.gradient_checkpointing=true",),
        ("loss.label_smoothing=0.1",),
        ("loss.gradients={every: 2}",),
    ],
    ids=lambda overrides: overrides[0],
)
def test_what_decides_about_memory_is_estimated_anew(recipe, estimates, overrides):
    check_recipe(recipe())
    changed = check_recipe(recipe(*overrides))
    assert len(estimates) == 2
    shutil.rmtree(os.environ["MTFT_CACHE"])
    assert check_recipe(recipe(*overrides)).as_dict() == changed.as_dict()


def test_data_model_launch_and_versions_are_parts_of_the_key(recipe, estimates, monkeypatch, tmp_path):
    def asked() -> int:
        check_recipe(recipe())
        return len(estimates)

    assert asked() == 1
    write_rows(tmp_path, longest=25)
    assert asked() == 2
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    assert asked() == 3
    os.utime(next((tmp_path / "model").glob("*.safetensors")))
    assert asked() == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert asked() == 5
    versions = model_facts.package_versions() | {"torch": "99.0"}
    monkeypatch.setattr(model_facts, "package_versions", lambda: versions)
    assert asked() == 6
    assert asked() == 6


def flip(text: str) -> str:
    """Another digit in the estimate."""
    place = text.index('"weights": ') + len('"weights": ')
    return f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}"


@pytest.mark.parametrize(
    "damage",
    [lambda text: "", lambda text: text[:100], lambda text: "[1]", flip, lambda text: text.replace('"notes"', '"n"')],
    ids=["empty", "cut", "another kind", "a digit", "a key"],
)
def test_a_damaged_file_is_made_anew(recipe, estimates, tmp_path, damage):
    first = check_recipe(recipe())
    (place,) = kept(tmp_path)
    whole = place.read_text()
    place.write_text(damage(whole))
    assert check_recipe(recipe()).text() == first.text()
    assert place.read_text() == whole
    assert len(estimates) == 2


def test_the_facts_of_another_key_are_not_taken(recipe, estimates, tmp_path):
    check_recipe(recipe())
    (first,) = kept(tmp_path)
    report = check_recipe(recipe("lora.r=4"))
    (second,) = set(kept(tmp_path)) - {first}
    shutil.copy(first, second)
    assert check_recipe(recipe("lora.r=4")).memory == report.memory
    assert len(estimates) == 3


def test_without_a_place_to_keep_it_the_check_goes_on(recipe, estimates, tmp_path):
    first = check_recipe(recipe())
    shutil.rmtree(tmp_path / "cache" / model_facts.FOLDER)
    (tmp_path / "cache" / model_facts.FOLDER).write_text("a file")
    assert check_recipe(recipe()).text() == check_recipe(recipe()).text() == first.text()
    assert len(estimates) == 3


def lose_a_weight(folder):
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "q_proj" in name)]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    ("overrides", "change", "said"),
    [
        (("lora.targets=[nowhere]",), None, "nowhere"),
        ((), lose_a_weight, "q_proj"),
        (("loss.gradients={aggregator: upgrad}", "lora.targets=[q_proj, embed_tokens]"), None, "embed_tokens"),
    ],
    ids=["targets", "weights", "gradients"],
)
def test_a_refusal_comes_after_a_success_and_again(recipe, tmp_path, overrides, change, said):
    check_recipe(recipe())
    if change is not None:
        change(tmp_path / "model")
    told = []
    for _ in range(2):
        with pytest.raises(UserError, match=said) as caught:
            check_recipe(recipe(*overrides))
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert len(kept(tmp_path)) == 1  # nothing of what is refused


def test_a_warning_of_a_library_is_said_each_time(recipe, estimates):
    for number in (1, 2):
        with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
            check_recipe(recipe("lora.targets=[q_proj, embed_tokens]"))
        assert len(estimates) == number


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_data_come_first_and_the_memory_last(recipe, monkeypatch):
    screen, seen, real = Terminal(), [], model_facts.model_facts

    def later(*arguments, **options):
        seen.append(screen.getvalue())
        found = real(*arguments, **options)
        return replace(found, notes=("a note of the adapter",))

    monkeypatch.setattr(model_facts, "model_facts", later)
    monkeypatch.setattr("sys.stdout", screen)
    assert main(["check", "recipe.yaml"]) == 0
    assert "check: data" in seen[0]
    assert "memory" not in seen[0]
    rest = screen.getvalue().removeprefix(seen[0])
    assert rest.index("a note of the adapter") < rest.index("in memory, for each process: about")
    assert "examples" not in rest
