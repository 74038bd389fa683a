"""What tokenizers and configs tell is refused before a weight is read: the weights of these folders can't be read."""

import json
import shutil

import pytest
from transformers import MistralConfig

from mtft.fuse.alpha.spec import FusionError, FusionSpec
from mtft.fuse.batch import jsonl_commands
from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.fusion_plan import plan_fusion
from tests.fuse import pairs, tiny
from tests.fuse.batch.test_jsonl_commands import read, recipe_of, write


def unreadable(folder):
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"no weights")


@pytest.fixture
def places(tmp_path):
    found = pairs.folders(tmp_path / "models")
    unreadable(found["strong"])
    unreadable(found["small"])
    return found


def load(places, spec=None, **options):
    spec = spec or FusionSpec(tokens="map")
    return FusedCausalLM.load(places["strong"], places["small"], [places["expert"]], spec, **options)


def test_the_weights_are_really_unreadable(places):
    with pytest.warns(UserWarning, match="tokens: map"), pytest.raises(Exception, match=r"[Hh]eader|safetensors"):
        load(places)


def sliding_small(places):
    config = MistralConfig(vocab_size=320, sliding_window=4, max_position_embeddings=64, num_hidden_layers=1)
    config.save_pretrained(places["small"])


def narrow(places):
    path = places["strong"] / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"vocab_size": 17}))


def other_base(places):
    path = places["expert"] / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "other/base"}))


def no_lora(places):
    (places["expert"] / "adapter_config.json").write_text('{"peft_type": "IA3"}')


@pytest.mark.parametrize(
    "spoil, spec, message",
    [
        (sliding_small, None, "the strong one may be of any kind|rolls back what the small models have read"),
        (narrow, None, "17 logits for 302 ids"),
        (other_base, None, "trained on 'other/base'"),
        (no_lora, None, "only LoRA adapters"),
        (None, FusionSpec(tokens="prefix"), "tokenizer differ"),
        (None, FusionSpec(tokens="map", weights="user", user_weights=(0.5, 0.5)), "2 entries for 1 experts"),
        (None, FusionSpec(tokens="map", weights="router"), "there is no router"),
    ],
)
def test_refused_before_weights(places, spoil, spec, message):
    if spoil is not None:
        spoil(places)
    with pytest.raises(FusionError, match=message):
        load(places, spec)


def test_only_the_side_that_is_rolled_back_may_not_slide(places):
    plan = plan_fusion(places["strong"], places["small"], [places["expert"]], FusionSpec(tokens="map"))
    assert (plan.vocab_size, plan.context) == (302, 256)


def test_rows_are_checked_before_weights(places, tmp_path):
    """Every row is bad: the run ends with its reasons, and never looks for weights."""
    recipe = recipe_of(places, tmp_path, tokens="map")
    source = write(tmp_path / "x.jsonl", [{"prompt": ""}, {"prompt": "a", "alpha": -1}])
    for kind in (jsonl_commands.generate, jsonl_commands.score):
        done = kind(recipe, source, tmp_path / f"{kind.__name__}.jsonl")
        assert (done.rows, done.failed, len(done.reasons)) == (2, 2, 2)
        assert all("error" in answer for answer in read(tmp_path / f"{kind.__name__}.jsonl"))


@pytest.mark.parametrize("count", [256, 10**6])
def test_what_no_row_can_satisfy(places, tmp_path, count):
    recipe = recipe_of(places, tmp_path, tokens="map", max_new_tokens=count)
    source = write(tmp_path / "x.jsonl", [{"prompt": "the quick"}])
    with pytest.raises(FusionError, match="no prompt leaves room") as refused:
        jsonl_commands.generate(recipe, source, tmp_path / "y.jsonl")
    assert refused.value.where == "fuse.max_new_tokens"
    assert not (tmp_path / ".y.jsonl.mtft-part").exists()


def test_a_plan_is_what_is_loaded(tmp_path):
    places = tiny.folders_with_text(tmp_path)
    shutil.copytree(places["expert"], tmp_path / "second")
    experts = [places["expert"], tmp_path / "second"]
    plan = plan_fusion(places["strong"], places["small"], experts, FusionSpec())
    fused = FusedCausalLM.load(places["strong"], places["small"], experts, dtype="fp32", plan=plan)
    for name in ("tokenizer", "small_tokenizer", "vocab_size", "shared", "token_map", "spec", "experts", "context"):
        assert getattr(plan, name) == getattr(fused, name), name
