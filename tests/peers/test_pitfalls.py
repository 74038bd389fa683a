"""What goes wrong elsewhere (docs/pitfalls.md): each test first does it the usual way and shows the damage, then ours.

Numbers R1 ... R22 are those of the table. Here stand the ones about data and recipes.
"""

import multiprocessing
import time

import datasets
import numpy as np
import pytest
import torch
from pydantic import BaseModel
from yaml import safe_load

from data_mixers import MixError, Mixture, MixturePlan
from mtft.common.errors import UserError
from mtft.data.batching.batches import BatchSource, collate
from mtft.data.batching.packing import pack
from mtft.data.formats.messages import Conversation
from mtft.data.store.token_store import open_store
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.encode import draw, encode
from mtft.recipe.load import load_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.task import TaskSection
from tests.data.batching.test_batches import Toy
from tests.data.batching.test_packed_attention import examples, losses, tiny
from tests.data.toy_examples import TEMPLATES, tokenizer, write_jsonl

datasets.disable_progress_bars()
NAMES, SHARES, SIZES = ("a", "b", "c", "d"), (0.4, 0.3, 0.2, 0.1), (5000, 1500, 400, 50)
MIXTURE = Mixture.of(dict(zip(NAMES, SHARES)))


def interleaved(stop, sizes=SIZES):
    """Task of each row of the usual way."""
    sets = [datasets.Dataset.from_dict({"task": [k] * size, "row": range(size)}) for k, size in enumerate(sizes)]
    whole = datasets.interleave_datasets(sets, probabilities=list(SHARES), seed=0, stopping_strategy=stop)
    return np.asarray(whole["task"]), np.asarray(whole["row"])


def ours(**options):
    return MixturePlan(MIXTURE, SIZES, **{"steps": 190, "batch": 64, "seed": 0, **options})


def worst_prefix(task, batch=64):
    """Largest distance, in rows, of a task from its share at the end of any step."""
    so_far = np.cumsum(task[:, None] == np.arange(4), axis=0)
    at = np.arange(batch, len(task) + 1, batch)
    return np.abs(so_far[at - 1] - at[:, None] * np.array(SHARES)).max()


def test_r1_asked_shares_are_the_played_ones():
    first, _ = interleaved("first_exhausted")
    assert len(first) < 0.06 * sum(SIZES)  # the run ends when the smallest set does
    task, _ = interleaved("all_exhausted")
    assert worst_prefix(task) > 30
    assert (task == 3).sum() / SIZES[3] > 20  # epochs of the small set, and nobody asked
    without, _ = interleaved("all_exhausted_without_replacement")
    assert np.abs(np.bincount(without) / len(without) - SHARES).max() > 0.3  # the shares are not even tried

    plan = ours()
    assert worst_prefix(plan.locate(np.arange(len(plan)))[0]) < 2  # 1 for the step, 1 for rounding the total
    with pytest.raises(MixError, match="more epochs than max_epochs allows"):
        ours(max_epochs={"d": 4})
    assert ours(max_epochs={"d": 4}, on_cap="redistribute").rows_K[3] == 200


def test_r2_shares_of_tokens():
    lengths = [np.full(size, length) for size, length in zip(SIZES, (20, 40, 80, 400))]
    task, _ = interleaved("all_exhausted")
    tokens = np.bincount(task, weights=np.array([20, 40, 80, 400])[task])
    assert tokens[3] / tokens.sum() > 0.45  # 0.1 was asked for
    plan = ours(unit="tokens", lengths=lengths, batch=4000)
    assert [row["realised"] for row in plan.table()] == pytest.approx(SHARES, abs=0.002)


def test_r3_a_new_order_each_epoch():
    loader = torch.utils.data.DataLoader(
        range(50), sampler=datasets.Dataset.from_dict({"i": range(50)}).shuffle(0)["i"]
    )
    assert [int(i) for i in loader] == [int(i) for i in loader]  # shuffled once, then the same for ever
    plan = MixturePlan(Mixture.of({"a": 1.0}), [50], steps=20, batch=10, seed=0)
    epochs = plan.locate(np.arange(200))[2].reshape(4, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    again = MixturePlan(Mixture.of({"a": 1.0}), [50], steps=20, batch=10, seed=0)
    assert np.array_equal(again.step(17)[2], plan.step(17)[2])


def test_r9_neighbours_in_a_row():
    """The usual way: concatenate, one attention mask of ones. tests/data/batching/test_packed_attention.py goes
    through the models.
    """
    model = tiny("llama")
    one, two = examples([9, 7])
    rows = [collate([[first, two]], 0) for first in (one, examples([9], seed=1)[0])]
    ones = torch.ones_like(rows[0].input_ids_BT)
    with torch.no_grad():
        usual = [losses(model, row, attention_mask=ones)[0, 9:] for row in rows]
        kept = [losses(model, row)[0, 9:] for row in rows]
    assert (usual[0] - usual[1]).abs().max() > 1e-3
    assert torch.equal(kept[0], kept[1])


def test_r10_everything_masked(tmp_path):
    labels = torch.full((2, 8), -100)
    loss = torch.nn.functional.cross_entropy(torch.randn(16, 5), labels.flatten(), reduction="sum")
    assert loss == 0.0  # "success"
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "fox " * 40, "response": "the end"}] * 3)
    task = TaskSection(name="sums", data=str(path))
    made = tokenizer(TEMPLATES["chatml"])
    with pytest.raises(UserError, match="task sums has nothing to learn"):
        open_store(task, "train", made, max_length=20, too_long="truncate_right", cache_dir=tmp_path)


TALK = Conversation(({"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}))


ENDS = {
    "llama3": "<|eot_id|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "mistral": "<eos>",
    "phi3": "<|end|>\n<eos>",
    "chatml": "<|im_end|>",
    "harmony": "<|return|>",
}


@pytest.mark.parametrize("family", ENDS)
def test_r11_r12_the_mask_of_stock_templates(family):
    """r11: the mask by `{% generation %}` is all zero. r12: a mask of the answer's own text has no end of turn."""
    made = tokenizer(TEMPLATES[family])
    asked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    assert sum(made.apply_chat_template(list(TALK.messages), **asked)["assistant_masks"]) == 0
    (example,) = encode(made, ChatRenderer(made).render(TALK))
    learnt = draw(made, example).split("⟦")[1].split("⟧")[0]
    assert learnt.split("A1")[1] == ENDS[family]


def test_r14_planned_steps_are_real_steps():
    """The usual plan: epochs x rows / batch steps; packing then leaves a part of the rows, and of the schedule."""
    lengths = np.random.default_rng(0).integers(2, 30, 400)
    rows = len(pack(lengths, 64))
    assert rows / 8 < 0.4 * (400 / 8)  # 50 steps are planned for 8 examples each, under 20 are there
    store = Toy("only", lengths)
    plan = MixturePlan(Mixture.of({"only": 1.0}), [400], steps=50, batch=8, seed=0)
    source = BatchSource([store], plan, micro_batch_tokens=64, max_length=64, packing=True, pad_id=0)
    assert len(source) == plan.steps == 50
    assert all(any((batch.segment_ids_BT >= 0).any() for batch in source[s]) for s in range(50))
    assert sum(int((batch.segment_ids_BT >= 0).sum()) for s in range(50) for batch in source[s]) == lengths.sum()


def test_r19_numbers_as_yaml_1_2_has_them(tmp_path):
    text = "name: x\nmodel: {path: m}\ntasks: [{name: a, data: 'hub:org/a'}]\ntrain: {steps: 3, learning_rate: 1e-4}\n"
    assert isinstance(safe_load(text)["train"]["learning_rate"], str)
    (tmp_path / "recipe.yaml").write_text(text + "output: {dir: out}\n")
    assert load_recipe(tmp_path / "recipe.yaml").train.learning_rate == 1e-4


def _tokenise(path, cache, queue):
    """A rank: with its own cache (the usual way), or with the one that all share."""
    store = open_store(TaskSection(name="t", data=path), "train", tokenizer(TEMPLATES["chatml"]), max_length=64,
                       cache_dir=cache)  # fmt: skip
    queue.put((str(store.path), store.nbytes(), store.stats["tokens"]))


def test_r20_ranks_share_one_store(tmp_path):
    rows = [{"prompt": f"the quick brown fox {i}", "response": "jumps over the lazy dog"} for i in range(300)]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    context = multiprocessing.get_context("fork")

    def ranks(caches):
        queue = context.Queue()
        children = [context.Process(target=_tokenise, args=(path, cache, queue)) for cache in caches]
        for child in children:
            child.start()
        found = [queue.get(timeout=600) for _ in children]
        for child in children:
            child.join()
        return found

    apart = ranks([tmp_path / f"rank{r}" for r in range(3)])
    assert len({place for place, *_ in apart}) == 3  # the cache is as large as there are ranks
    together = ranks([tmp_path / "shared"] * 3)
    assert len({place for place, *_ in together}) == 1
    (_, size, tokens), *_ = together
    assert len(list((tmp_path / "shared" / "stores").iterdir())) == 1
    assert size < 2 * 2 * tokens + 40 * 300 + 2000  # two bytes a token, doubled; ids, lines and offsets of the rows


def test_r21_misspelt_keys(tmp_path):
    class Usual(BaseModel):
        learning_rate: float = 1e-3

    assert Usual.model_validate({"learning_rat": 5.0}).learning_rate == 1e-3  # dropped without a word
    text = "name: x\nmodel: {path: m}\ntasks: [{name: a, data: 'hub:org/a'}]\ntrain: {steps: 3, learning_rat: 1e-4}\n"
    (tmp_path / "recipe.yaml").write_text(text + "output: {dir: out}\n")
    with pytest.raises(UserError, match=r"'learning_rat' is not a key of train") as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert "line 4" in str(caught.value)
    assert "did you mean learning_rate?" in str(caught.value)
    assert Recipe.model_config["extra"] == "forbid"


def test_r22_ten_million_rows_are_planned_at_once():
    def seconds(work):
        begin = time.process_time()
        work()
        return time.process_time() - begin

    def plan(rows, at):
        sizes = [rows * 5 // 10, rows * 3 // 10, rows * 15 // 100, rows * 5 // 100]
        return MixturePlan(MIXTURE, sizes, steps=rows // 64, batch=64, seed=1).step(at)

    usual = seconds(lambda: interleaved("all_exhausted", (5_000, 3_000, 1_500, 500)))  # a thousandth of the rows
    start, middle = (min(seconds(lambda at=at: plan(10_000_000, at)) for _ in range(2)) for at in (0, 78_125))
    assert start < usual / 4  # a thirtieth when measured
    assert middle < usual  # a third
