"""`mtft fuse score` with real models against sums written out here: one text, both models alone, no caches; alpha by
bisection in float64. SmolLM2 steers itself (`strict`), and Gemma (`tokens: map`)."""

import json

import peft
import pytest
import torch
from tokenizers import decoders
from transformers import AutoTokenizer

from mtft.fuse.batch import jsonl_commands
from mtft.recipe.schema.recipe import Recipe
from tests.real.conftest import load

pytestmark = [pytest.mark.real, pytest.mark.slow]

ROWS = [
    {"prompt": "The capital of France is", "response": " the city of Paris."},
    {"prompt": "One, two, three,", "response": " four, five, 6, 7."},
]
RULES = ("fixed", "jeffreys")
CHAT = {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "response": "It is 4."}


@pytest.fixture(scope="module")
def expert(smollm2, tmp_path_factory):
    """Random, written by PEFT: strong enough to move every token."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(smollm2), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05)
    folder = tmp_path_factory.mktemp("expert")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(smollm2, expert):
    """The small model in plain PEFT: with the adapter the expert, without it the base."""
    return peft.PeftModel.from_pretrained(load(smollm2), expert).eval()


@pytest.fixture(scope="module")
def small_tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def gemma(gemma3):
    return load(gemma3)


@pytest.fixture(scope="module")
def gemma_tokenizer(gemma3):
    return AutoTokenizer.from_pretrained(gemma3)


def scores(strong, smollm2, expert, folder, rows, **fuse):
    """What `mtft fuse score` writes."""
    section = {"strong": {"path": str(strong), "dtype": "fp32"}, "adapters": [str(expert)], **fuse}
    recipe = Recipe.model_validate(
        {
            "name": "real",
            "model": {"path": str(smollm2), "dtype": "fp32"},
            "tasks": [{"name": "x", "data": "x.jsonl"}],
            "train": {"steps": 1},
            "output": {"dir": str(folder)},
            "fuse": section,
        }
    )
    source, out = folder / "rows.jsonl", folder / "scores.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert jsonl_commands.score(recipe, source, out).failed == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def logp_behind(model, ids, last=1):
    """log p of what follows each of the last tokens of one text."""
    return model(input_ids=torch.tensor([ids]), logits_to_keep=last).logits[0].double().log_softmax(-1)


def answer_logp(model, prompt, answer):
    logp = logp_behind(model, prompt + answer[:-1], len(answer))
    return float(logp.gather(-1, torch.tensor(answer)[:, None]).sum())


def kl_both_ways(x, y):
    return float(((x.exp() - y.exp()) * (x - y)).sum())


def fused_logp(logp, shift, target, rule):
    """log P_a with P_a ~ P exp(a shift). jeffreys: KL(P_a|P) + KL(P|P_a) = target, by bisection on [0, 2]."""

    def tilted(a):
        return (logp + a * shift).log_softmax(-1)

    if rule == "fixed":
        return tilted(1.0)
    low, high = 0.0, 2.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_both_ways(tilted(middle), logp) < target else (low, middle)
    return tilted(low)


def test_steered_by_its_own_expert_the_base_is_the_expert(smollm2, expert, small, small_tokenizer, tmp_path):
    """P = Q: with a = 1 P_a is Q_E, and 1 is also the step that jeffreys finds."""
    rows = [{**row, "alpha_rule": rule} for row in (ROWS[0], CHAT) for rule in RULES]
    for row, score in zip(rows, scores(smollm2, smollm2, expert, tmp_path, rows), strict=True):
        text = row.get("prompt")
        if text is None:
            text = small_tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        prompt, answer = (small_tokenizer.encode(part, add_special_tokens=False) for part in (text, row["response"]))
        tuned = answer_logp(small, prompt, answer)
        with small.disable_adapter():
            base = answer_logp(small, prompt, answer)
        assert abs(tuned - base) > 0.05  # the expert does something
        assert [score["logprob"], score["base_logprob"]] == pytest.approx([tuned, base], abs=1e-3)
        assert score["expert_logprobs"] == pytest.approx([tuned], abs=1e-3)
        assert score["tokens"] == len(answer)


def counterparts(gemma_tokenizer, small_tokenizer):
    """int64 [V]: the small token with the same text as a token of Gemma, -1 without one; ends of text by their role."""
    by_text = {}
    special = set(small_tokenizer.all_special_ids) | set(small_tokenizer.added_tokens_decoder)
    for index, token in reversed(list(enumerate(small_tokenizer.convert_ids_to_tokens(list(range(49152)))))):
        text = decoders.ByteLevel().decode([token])
        if index not in special and "\ufffd" not in text:
            by_text[text] = index
    size = len(gemma_tokenizer)
    marked = {index for index, token in gemma_tokenizer.added_tokens_decoder.items() if token.special}
    ids = []
    for index, token in enumerate(gemma_tokenizer.convert_ids_to_tokens(list(range(size)))):
        if len(token) == 6 and token.startswith("<0x"):
            byte = int(token[3:5], 16)
            token = chr(byte) if byte < 128 else "\ufffd"
        ids.append(-1 if index in marked else by_text.get(token.replace("▁", " "), -1))
    ids[gemma_tokenizer.eos_token_id] = small_tokenizer.eos_token_id
    ids[gemma_tokenizer.bos_token_id] = small_tokenizer.bos_token_id
    return torch.tensor(ids)


@pytest.mark.filterwarnings("ignore:tokens. map steers")
def test_gemma_steered_by_smollm2_is_the_sum_by_hand(
    gemma3, smollm2, expert, gemma, small, gemma_tokenizer, small_tokenizer, tmp_path
):
    """Before each token of Gemma's the small models read the same text in their own, as their tokenizer begins it."""
    rows = [{**row, "alpha_rule": rule} for row in ROWS for rule in RULES]
    found = iter(scores(gemma3, smollm2, expert, tmp_path, rows, tokens="map"))
    counterpart = counterparts(gemma_tokenizer, small_tokenizer)
    for row in ROWS:
        prompt = gemma_tokenizer.encode(row["prompt"])
        assert prompt[0] == gemma_tokenizer.bos_token_id
        answer = gemma_tokenizer.encode(row["response"], add_special_tokens=False)
        fused, alone = dict.fromkeys(RULES, 0.0), 0.0
        for at, logp in enumerate(logp_behind(gemma, prompt + answer[:-1], len(answer))):
            small_ids = small_tokenizer.encode(row["prompt"] + gemma_tokenizer.decode(answer[:at]))
            tuned = logp_behind(small, small_ids)[0]
            with small.disable_adapter():
                base = logp_behind(small, small_ids)[0]
            shift = torch.where(counterpart < 0, 0.0, (tuned - base)[counterpart.clamp(min=0)])
            alone += float(logp[answer[at]])
            for rule in RULES:
                fused[rule] += float(fused_logp(logp, shift, kl_both_ways(tuned, base), rule)[answer[at]])
        whole = small_tokenizer.encode(row["prompt"] + row["response"])
        for rule, score in zip(RULES, found):
            assert abs(fused[rule] - alone) > 0.05  # the small models do something
            assert [score["logprob"], score["strong_logprob"]] == pytest.approx([fused[rule], alone], abs=1e-3)
            assert score["small_tokens"] == len(whole) - len(small_tokenizer.encode(row["prompt"]))
