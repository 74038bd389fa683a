"""Scores against a plain loop over single examples, and exact match against greedy decoding itself."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mtft.data.store.token_store import open_store
from mtft.evaluation.evaluate_model import evaluate_model
from mtft.evaluation.heldout_loss import BatchLayout, score_tasks
from mtft.losses.token_scores import token_scores
from mtft.recipe.schema.task import TaskSection

LAYOUT = BatchLayout(micro_batch_tokens=128, max_length=64, pad_id=0)


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(("<pad>", "<bos>", "<eos>", *alphabet))}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"prompt": f"say {word} {i}", "response": word} for i, word in enumerate(["yes", "no", "a", "tea"] * 4)]
    (folder / "say.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskSection(name="say", data=str(folder / "say.jsonl"), eval_data=str(folder / "say.jsonl"))
    return open_store(task, "eval", tokenizer, max_length=64, cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def model(tokenizer, store):
    """Trained for a moment, so that some responses are reproduced and some are not."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(60):
        for i in range(8):
            example = store.example(i)
            ids = torch.from_numpy(example.input_ids).long()[None]
            labels = torch.where(torch.from_numpy(example.supervised), ids[0], -100)[None]
            network(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval()


def by_hand(model, store):
    """(nll, tokens, correct) of each example, one at a time, no packing, no mask."""
    out = []
    for i in range(store.num_examples):
        ids, supervised = store.example(i)
        ids = torch.from_numpy(ids).long()[None]
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].log_softmax(-1)
        places = [t for t in range(1, ids.shape[1]) if supervised[t]]
        nll = -sum(float(logp[t - 1, ids[0, t]]) for t in places)
        out.append((nll, len(places), sum(int(logp[t - 1].argmax() == ids[0, t]) for t in places)))
    return np.array(out).T


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro_batch_tokens", [64, 1024])
def test_equals_a_loop_over_examples(model, store, packing, micro_batch_tokens):
    layout = BatchLayout(micro_batch_tokens, max_length=64, pad_id=0, packing=packing)
    scores = evaluate_model(model, [store], layout)["say"]
    nll_N, tokens_N, correct_N = by_hand(model, store)
    np.testing.assert_allclose(scores.nll_N, nll_N, rtol=1e-5)
    assert scores.tokens_N.tolist() == tokens_N.tolist()
    assert scores.correct_N.tolist() == correct_N.tolist()
    assert scores.ids == tuple(store.ids)


def test_exact_match_is_what_greedy_decoding_reproduces(model, store):
    """`generate` gets the prompt and must give the response up to and with the end of turn, token by token."""
    scores = evaluate_model(model, [store], LAYOUT)["say"]
    reproduced = []
    for i in range(store.num_examples):
        ids, supervised = store.example(i)
        first, end = int(np.flatnonzero(supervised)[0]), int(np.flatnonzero(supervised)[-1]) + 1
        assert supervised[first:end].all()  # one response; what the template puts behind its end is not learnt
        prompt = torch.from_numpy(ids[:first]).long()[None]
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=end - first,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        reproduced.append(out[0].tolist() == ids[:end].tolist())
    assert scores.exact_N.tolist() == reproduced
    assert 0 < sum(reproduced) < len(reproduced)


def test_any_score_function_and_tasks_without_rows(model, store):
    scores = score_tasks(lambda batch: token_scores(model, batch), [None, store], LAYOUT)
    assert list(scores) == ["say"]
    assert np.array_equal(scores["say"].nll_N, evaluate_model(model, [store], LAYOUT)["say"].nll_N)


def test_mode_of_the_model_is_kept(model, store):
    model.train()
    try:
        evaluate_model(model, [store], LAYOUT)
        assert model.training
    finally:
        model.eval()
