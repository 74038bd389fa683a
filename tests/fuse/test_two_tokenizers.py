"""Two tokenizers, two chat templates, a strong model with a sliding window: `generate`, `score` and the server against
the same computed from texts alone, token by token, without caches."""

import json
import warnings

import pytest
import torch
from fastapi.testclient import TestClient

from mtft.fuse.alpha.fused_logits import fuse_logits
from mtft.fuse.alpha.spec import FusionSpec
from mtft.fuse.batch import jsonl_commands
from mtft.fuse.decoding.prompts import encode_prompt, end_of_turn
from mtft.fuse.from_recipe import load_fusion
from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.server.app import make_app
from mtft.fuse.tokenizers.token_map import TokenMap
from tests.fuse import pairs, tiny
from tests.fuse.batch.test_jsonl_commands import read, recipe_of, write

CHATS = [
    [{"role": "user", "content": "the quick brown fox jumps"}],
    [{"role": "user", "content": "lazy"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "dog"},
        {"role": "user", "content": "over 12?"},
    ],
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return pairs.folders(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def recipe(places, tmp_path):
    fp64 = {"path": str(places["strong"]), "dtype": "fp32"}
    return recipe_of(places, tmp_path, strong=fp64, tokens="map", temperature=0.0, max_new_tokens=10)


@pytest.fixture(scope="module")
def fused(places):
    with pytest.warns(UserWarning, match="tokens: map steers"):
        return FusedCausalLM.load(
            places["strong"], places["small"], [places["expert"]], FusionSpec(tokens="map"), dtype="fp64", device="cpu"
        )


def by_hand(fused, chat, continuation):
    """The fused distribution after `continuation` (strong ids), each model reading its own rendering of the chat."""
    strong, small = fused.tokenizer, fused.small_tokenizer
    texts = [
        text.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, chat_template=template)
        for text, template in ((strong, pairs.STRONG_TEMPLATE), (small, pairs.SMALL_TEMPLATE))
    ]
    ids = strong.encode(texts[0], add_special_tokens=False) + continuation
    said = strong.decode([i for i in continuation if i not in fused.end_ids])
    small_ids = small.encode(texts[1] + said.rstrip("\ufffd"), add_special_tokens=False)
    fused.weak.layout.set((0, -1), 1)
    with torch.no_grad():
        rows = fused.weak.model(torch.tensor([small_ids, small_ids])).logits[:, -1, : fused.shared]
        strong_1V = fused.strong(torch.tensor([ids])).logits[:, -1, : fused.vocab_size]
    if said.endswith("\ufffd"):  # inside of a character the small models have nothing to say
        rows = rows[1:].expand(2, -1)
    return fuse_logits(strong_1V, rows[None, :1], rows[1:], fused.spec, token_map=fused.token_map).logprobs_NV[0]


def greedy_by_hand(fused, chat, count):
    tokens = []
    while len(tokens) < count and not (tokens and tokens[-1] in fused.end_ids):
        tokens.append(int(by_hand(fused, chat, tokens).argmax()))
    return tokens


def test_generate_gives_each_model_its_own_template(recipe, fused, tmp_path):
    rows = [{"messages": chat} for chat in CHATS]
    done = jsonl_commands.generate(recipe, write(tmp_path / "x.jsonl", rows), tmp_path / "y.jsonl", fused=fused)
    assert done.failed == 0
    for chat, answer in zip(CHATS, read(tmp_path / "y.jsonl"), strict=True):
        tokens = greedy_by_hand(fused, chat, 10)
        assert answer["text"] == fused.tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer["tokens"] == len(tokens)


@pytest.mark.parametrize("chunk", [None, 1])
def test_score_gives_each_model_its_own_template(recipe, fused, tmp_path, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr(type(fused), "positions_at_once", lambda *_: chunk)
    answers = ["brown dog", "fox over the lazy quick", "jumps"]
    rows = [{"messages": chat, "response": answer} for chat, answer in zip(CHATS, answers, strict=True)]
    jsonl_commands.score(recipe, write(tmp_path / "x.jsonl", rows), tmp_path / "y.jsonl", fused=fused)
    for chat, text, found in zip(CHATS, answers, read(tmp_path / "y.jsonl"), strict=True):
        ids = fused.tokenizer.encode(text, add_special_tokens=False)
        expected = sum(float(by_hand(fused, chat, ids[:at])[token]) for at, token in enumerate(ids))
        assert found["logprob"] == pytest.approx(expected, abs=1e-5)
        small = fused.small_tokenizer
        prompt = small.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        before, whole = (small.encode(x, add_special_tokens=False) for x in (prompt, prompt + text))
        fused.weak.layout.set((0, -1), 1)
        logp = fused.weak.model(torch.tensor([whole, whole])).logits[:, :, : fused.shared].log_softmax(-1)
        own = [sum(float(logp[g, at - 1, whole[at]]) for at in range(len(before), len(whole))) for g in (0, 1)]
        assert [*found["expert_logprobs"], found["base_logprob"]] == pytest.approx(own, abs=1e-5)
        assert found["small_tokens"] == len(whole) - len(before)


def test_the_server_gives_each_model_its_own_template(fused):
    """Chats and completions in one batch: only the chats have prompts of the small model's own."""
    with TestClient(make_app(fused, "fusion")) as client:
        for chat in CHATS:
            wish = {"messages": chat, "temperature": 0, "max_tokens": 8}
            answer = client.post("/v1/chat/completions", json=wish).json()
            tokens = greedy_by_hand(fused, chat, 8)
            assert answer["choices"][0]["message"]["content"] == fused.tokenizer.decode(
                tokens, skip_special_tokens=True
            )
        wish = {"prompt": "the quick", "temperature": 0, "max_tokens": 6}
        text = client.post("/v1/completions", json=wish).json()["choices"][0]["text"]
    ids = fused.tokenizer("the quick", return_tensors="pt").input_ids
    out = fused.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=sorted(fused.end_ids))
    assert text == fused.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_equal_tokenizers_with_other_templates(tmp_path):
    """`strict`: the ids are the same, the prompts are not."""
    places = tiny.folders_with_text(tmp_path)
    text = tiny.tokenizer()
    text.chat_template = "{% for m in messages %}{{ 'say: ' + m.content + '</s>' }}{% endfor %}"
    text.save_pretrained(places["small"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = load_fusion(recipe_of(places, tmp_path, temperature=0.0))
    prompt = encode_prompt(fused, messages=CHATS[0])
    assert fused.tokenizer.decode(prompt.ids).startswith("User: ")
    assert fused.small_tokenizer.decode(prompt.small_ids) == "say: the quick brown fox jumps</s>"
    recipe, rows = recipe_of(places, tmp_path, temperature=0.0), [{"messages": chat} for chat in CHATS]
    scored = [row | {"response": "fox over"} for row in rows]
    jsonl_commands.generate(recipe, write(tmp_path / "x.jsonl", rows), tmp_path / "y.jsonl", fused=fused)
    jsonl_commands.score(recipe, write(tmp_path / "s.jsonl", scored), tmp_path / "t.jsonl", fused=fused)
    for row, answer, score in zip(rows, read(tmp_path / "y.jsonl"), read(tmp_path / "t.jsonl"), strict=True):
        prompt = encode_prompt(fused, messages=row["messages"])
        out = fused.generate(
            input_ids=torch.tensor([prompt.ids]),
            expert_input_ids=torch.tensor([prompt.small_ids]),
            max_new_tokens=6,
            do_sample=False,
        )[0, len(prompt.ids) :]
        assert answer["text"] == fused.tokenizer.decode(out, skip_special_tokens=True)
        response = fused.tokenizer.encode("fox over", add_special_tokens=False)
        fused.weak.layout.set((0, -1), 1)
        expected = base = 0.0
        for at, token in enumerate(response):
            with torch.no_grad():
                weak = fused.weak.model(torch.tensor([prompt.small_ids + response[:at]] * 2)).logits[:, -1, :300]
                strong = fused.strong(torch.tensor([prompt.ids + response[:at]])).logits[:, -1, :300]
            expected += float(fuse_logits(strong, weak[None, :1], weak[1:], fused.spec).logprobs_NV[0, token])
            base += float(weak[1].log_softmax(-1)[token])
        assert score["logprob"] == pytest.approx(expected, abs=1e-4)
        assert score["base_logprob"] == pytest.approx(base, abs=1e-4)


def test_the_template_beside_the_adapter_is_the_small_models(places, tmp_path):
    """What an export saves is what the expert was trained with."""
    import shutil

    from mtft.fuse.fusion_plan import plan_fusion

    expert = tmp_path / "expert"
    shutil.copytree(places["expert"], expert)
    template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    (expert / "chat_template.jinja").write_text(template)
    plan = plan_fusion(places["strong"], places["small"], [expert], FusionSpec(tokens="map"))
    assert plan.small_tokenizer.decode(encode_prompt(plan, messages=CHATS[1]).small_ids) == "lazy\n"


def test_ends_of_turn_meet():
    strong, small = pairs.strong_tokenizer(), pairs.small_tokenizer()
    ends = [strong.convert_tokens_to_ids("<end_of_turn>"), small.convert_tokens_to_ids("<|im_end|>")]
    assert [end_of_turn(strong), end_of_turn(small)] == ends
    token_map = TokenMap(strong, small)
    assert int(token_map.small_id_V[ends[0]]) == ends[1]
    assert int(token_map.small_id_V[strong.eos_token_id]) == small.eos_token_id
    assert token_map.encode([*strong.encode("fox"), ends[0]])[0][-1] == ends[1]
    plain = pairs.small_tokenizer()
    plain.chat_template = None  # then its turns end with its eos
    assert end_of_turn(plain) == plain.eos_token_id


def test_the_end_of_turn_of_the_template_ends_the_answer(fused, tmp_path, recipe):
    """generation_config lists the eos only, as converted and hand-made models do."""
    end = fused.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert fused.generation_config.eos_token_id == 2
    assert fused.end_ids == {2, end}


def test_coverage_is_said_when_a_map_is_used(fused, places):
    with pytest.warns(UserWarning) as caught:
        FusedCausalLM.load(
            places["strong"], places["small"], [places["expert"]], FusionSpec(tokens="map"), dtype="fp32"
        )
    said = next(str(warning.message) for warning in caught if "tokens: map" in str(warning.message))
    assert "of a probe text" in said
    assert "'<end_of_turn>' for the strong model and '<|im_end|>' for the small one" in said


def test_rows_of_training_through_two_tokenizers(fused, recipe, tmp_path):
    """The answer's last token is the strong end of turn; the small models judge their own."""
    rows = [{"messages": [*CHATS[0], {"role": "assistant", "content": "dog"}]}]
    jsonl_commands.score(recipe, write(tmp_path / "x.jsonl", rows), tmp_path / "y.jsonl", fused=fused)
    found = json.loads((tmp_path / "y.jsonl").read_text())
    ids = fused.tokenizer.encode("dog<end_of_turn>", add_special_tokens=False)
    expected = sum(float(by_hand(fused, CHATS[0], ids[:at])[token]) for at, token in enumerate(ids))
    assert found["logprob"] == pytest.approx(expected, abs=1e-5)
    assert found["tokens"] == len(ids)
