"""Weights of turns, thoughts and rows in the objective: a loop over single examples is the oracle, in float64.

Rows go all the way: through the token store, the plan and the batches, in every layout that a step may have.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data_mixers.mixture.mixture import Mixture
from data_mixers.plan.mixture_plan import MixturePlan
from mtft.data.batching.batch import IGNORE
from mtft.data.batching.batches import BatchSource, collate
from mtft.data.store.token_store import open_store
from mtft.gradients.capture.split_halves import SplitHalves
from mtft.losses.sample_weights import SampleWeights
from mtft.losses.task_reduction import (
    NORMALISATIONS,
    TaskCounts,
    coefficients,
    count,
    reduce_sums,
    step_counts,
    task_coefficients,
    task_losses,
    task_probs,
    task_sums,
)
from mtft.recipe.schema.task import TaskSection
from tests.data.toy_examples import TEMPLATES, tokenizer, write_jsonl
from tests.losses.builders import gradient
from tests.losses.test_task_reduction import golden_batch

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "answer", "forest", "nobody")
W_K = torch.tensor([1.0, 0.5, 3.0, 2.0], dtype=torch.float64)
KINDS = {
    "turn": {},
    "row": {"row_weight": "worth"},
    "thinking": {"thinking_weight": 0.3},
    "last": {"loss_on": "last", "row_weight": "worth", "thinking_weight": 1.7},
}


def rows_of(kind, rng, count):
    """Conversations of one or two rounds; what the kind doesn't ask for is left out."""

    def say(most):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    for _ in range(count):
        turns = []
        for _ in range(rng.choice([1, 1, 2])):
            thought = f"<think>{say(6)}</think>" if kind in ("thinking", "last") and rng.random() < 0.6 else ""
            turns += [{"role": "user", "content": say(4)}, {"role": "assistant", "content": thought + say(7)}]
            if kind in ("turn", "last"):
                turns[-1]["weight"] = rng.choice([1, 0.1, 2.5, 0.7])
        yield {"messages": turns} | ({"worth": rng.choice([0.3, 1, 2, 4.1])} if "row_weight" in KINDS[kind] else {})


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """{kind: stores of three tasks}; the last task has no weights at all. A fourth is in no step."""
    folder, made, rng = tmp_path_factory.mktemp("stores"), tokenizer(TEMPLATES["chatml"]), random.Random(0)
    found = {}
    for kind, keys in KINDS.items():
        found[kind] = []
        for k, name in enumerate("abc"):
            path = folder / f"{kind}-{name}.jsonl"
            plain = ({"prompt": "the dog", "response": word} for word in WORDS[:5])
            write_jsonl(path, rows_of(kind, rng, 8) if k < 2 else plain)
            task = TaskSection(name=name, data=str(path), **(keys if k < 2 else {}))
            found[kind].append(open_store(task, "train", made, max_length=64, cache_dir=folder))
    return found


@pytest.fixture(scope="module")
def model():
    """Token and position in, the next token out, all in float64 (transformers' models have fp32 inside)."""
    torch.manual_seed(0)
    sizes = ((400, 16), (64, 16), (16, 400))
    return nn.ParameterList([nn.Parameter(torch.randn(size, dtype=torch.float64)) for size in sizes])


def token_nll(model, batch):
    tokens_VD, positions_TD, head_DV = model
    states_BTD = torch.tanh(tokens_VD[batch.input_ids_BT] + positions_TD[batch.position_ids_BT])
    labels_BT = batch.labels_BT
    nll_N = F.cross_entropy((states_BTD @ head_DV).flatten(0, 1), labels_BT.flatten(), reduction="none")
    return nll_N.view_as(labels_BT)


def by_example(model, examples, mode):
    """The objective written out: a loop over examples, each alone in the model. examples: [(Example, task)]."""
    told = []
    for example, task in examples:
        batch = collate([[(example, task)]], 0)
        nll_T, learnt_T = token_nll(model, batch)[0], batch.labels_BT[0] != IGNORE
        u = example.weights if example.weights is not None else example.supervised
        u_T = torch.tensor(u[1:][example.supervised[1:]].astype("float64"))
        told.append((task, example.row_weight, u_T, nll_T[learnt_T]))
    tasks = sorted({task for task, *_ in told})
    over = {k: torch.zeros((), dtype=torch.float64) for k in tasks}
    under = dict.fromkeys(tasks, 0.0)
    for task, r, u_T, nll_T in told:
        if mode.endswith("token"):
            over[task], under[task] = over[task] + r * (u_T * nll_T).sum(), under[task] + r * float(u_T.sum())
        else:
            over[task], under[task] = over[task] + r * (u_T * nll_T).sum() / u_T.sum(), under[task] + r
    w = {k: float(W_K[k]) for k in tasks}
    if mode.startswith("task"):
        loss = sum(w[k] * over[k] / under[k] for k in tasks) / sum(w.values())
    else:
        loss = sum(w[k] * over[k] for k in tasks) / sum(w[k] * under[k] for k in tasks)
    return loss, {k: float((over[k] / under[k]).detach()) for k in tasks}


LAYOUTS = [
    {"micro_batch_tokens": 400},
    {"micro_batch_tokens": 64},
    {"micro_batch_tokens": 70, "packing": False},
    {"micro_batch_tokens": 1000, "packing": False},
    {"micro_batch_tokens": 128, "unmixed": True},
    {"micro_batch_tokens": 100, "world": 2},
    {"micro_batch_tokens": 64, "world": 3, "packing": False},
]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_loop_over_examples_in_any_layout(stores, model, kind):
    held = stores[kind]
    assert any(store.example(i).weights is not None or store.example(i).row_weight != 1
               for store in held[:2] for i in range(len(store)))  # fmt: skip
    shares = Mixture.of({"a": 0.5, "b": 0.3, "c": 0.2})
    plan = MixturePlan(shares, [len(store) for store in held], steps=2, batch=11, seed=3, max_epochs=None,
                       on_cap="error", unit="examples")  # fmt: skip
    task_N, _, row_N = plan.step(1)
    examples = [(held[k].example(int(i)), int(k)) for k, i in zip(task_N, row_N, strict=True)]
    oracle = {mode: by_example(model, examples, mode) for mode in NORMALISATIONS}
    slopes = {mode: gradient(model, loss) for mode, (loss, _) in oracle.items()}
    for layout in LAYOUTS:
        options = {"packing": True, "max_length": 64, "pad_id": 0, "world": 1, **layout}
        splits = [BatchSource(held, plan, rank=rank, **options)[1] for rank in range(options["world"])]
        counts = TaskCounts(*(sum(parts) for parts in zip(*(step_counts(own, 4) for own in splits), strict=True)))
        batches = [batch for own in splits for batch in own]
        nll = [token_nll(model, batch) for batch in batches]
        sums = reduce_sums([task_sums(nll_BT, batch, 4) for nll_BT, batch in zip(nll, batches, strict=True)], 4)
        for mode, (loss, losses) in oracle.items():
            c = [coefficients(batch, counts, W_K, mode, torch.float64) for batch in batches]
            assert float(sum(c_BT.sum() for c_BT in c)) == pytest.approx(1, abs=1e-12)
            total = sum((c_BT * token_nll(model, batch)).sum() for c_BT, batch in zip(c, batches, strict=True))
            assert total.item() == pytest.approx(loss.item(), rel=1e-9), (layout, mode)
            slope = gradient(model, total)
            assert float((slope - slopes[mode]).norm()) <= 1e-9 * float(slopes[mode].norm()), (layout, mode)
            found_K = task_losses(sums, counts, mode)
            assert found_K[:3].tolist() == pytest.approx([losses[k] for k in range(3)], rel=1e-9)
            assert found_K[3].isnan()
            share_K = task_coefficients(counts, W_K, mode)
            by_task = [sum(float(c_BT[b.task_ids_BT == k].sum()) for c_BT, b in zip(c, batches)) for k in range(4)]
            assert share_K.tolist() == pytest.approx(by_task, abs=1e-12)


def weighted(parts, u=(), r=()):
    """`golden_batch` of samples with a weight for each of their tokens, and for each sample."""
    batch, nll_BT = golden_batch(parts)
    u_BT = r_BT = None
    if u:
        u_BT = torch.zeros(batch.labels_BT.shape)
        for row, own in enumerate(u):
            u_BT[row, 1 : 1 + len(own)] = torch.tensor(own)
    if r:
        r_BT = torch.tensor(r)[:, None] * (batch.segment_ids_BT >= 0)
    return replace(batch, token_weights_BT=u_BT, row_weights_BT=r_BT), nll_BT


# (task, losses), weights of the tokens, weight of the row
A, B, C = (0, [1.0, 3.0]), (0, [2.0]), (1, [4.0, 6.0, 1.0])
BY_HAND = {  # w = 1, 2; S, N and M of the module's docstring by hand
    "token": (1 * (2 * (1 + 0.5 * 3) + 2) + 2 * (2 * 4 + 6 + 3 * 1)) / (1 * (3 + 1) + 2 * 6),
    "sample": (1 * (2 * 2.5 / 1.5 + 2) + 2 * 17 / 6) / (1 * 3 + 2 * 1),
    "task_token": (1 * (2 * 2.5 + 2) / 4 + 2 * 17 / 6) / 3,
    "task_sample": (1 * (2 * 2.5 / 1.5 + 2) / 3 + 2 * 17 / 6) / 3,
}


@pytest.mark.parametrize("mode", NORMALISATIONS)
def test_by_hand(mode):
    batch, nll_BT = weighted([A, B, C], u=[[1, 0.5], [1], [2, 1, 3]], r=[2.0, 1.0, 1.0])
    c_BT = coefficients(batch, count(batch, 2), torch.tensor([1.0, 2.0]), mode, torch.float64)
    assert float((c_BT * nll_BT).sum()) == pytest.approx(BY_HAND[mode], rel=1e-12)


SAMPLES = [(0, [1.0, 0.3]), (0, [2.0]), (1, [0.5, 1.5, 0.1]), (1, [3.0, 1.0]), (0, [0.2])]
TIMES = [2, 1, 3, 1, 2]


@pytest.mark.parametrize("mode", NORMALISATIONS)
def test_a_row_of_weight_two_is_the_row_twice(mode):
    """In the loss, in what balancers see, in the weights of samples, in the halves of the tasks' gradients."""
    one, nll_BT = weighted(SAMPLES, r=[float(n) for n in TIMES])
    many, nlls_BT = golden_batch([sample for sample, n in zip(SAMPLES, TIMES, strict=True) for _ in range(n)])
    w_K, found = torch.tensor([1.0, 2.0]), []
    for batch, x_BT in ((one, nll_BT), (many, nlls_BT)):
        counts, sums = count(batch, 2), task_sums(x_BT, batch, 2)
        c_BT = coefficients(batch, counts, w_K, mode, torch.float64)
        figures = [(c_BT * x_BT).sum()[None], task_losses(sums, counts, mode), task_probs(sums, counts)]
        for rule in ("linupper", "quadratic", "extremes", "focal"):
            for group in ("task", "all"):
                u_BT = SampleWeights(rule, group=group, burn_in=0).factors(1, x_BT, batch, 2)
                figures.append((c_BT * u_BT * x_BT).sum()[None])
        found.append(torch.cat(figures).tolist())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_equal_weights_of_all_tokens_change_nothing():
    plain, nll_BT = golden_batch(SAMPLES)
    same, _ = weighted(SAMPLES, u=[[0.3] * len(losses) for _, losses in SAMPLES], r=[0.7] * 5)
    for mode in NORMALISATIONS:
        ways = [coefficients(b, count(b, 2), torch.ones(2), mode, torch.float64) for b in (plain, same)]
        torch.testing.assert_close(*ways, rtol=1e-6, atol=0)  # 0.3 and 0.7 are fp32
    for rule in ("linupper", "extremes", "focal"):
        learnt_BT = plain.labels_BT != IGNORE
        rules = [SampleWeights(rule, burn_in=0).factors(1, nll_BT, b, 2)[learnt_BT] for b in (plain, same)]
        torch.testing.assert_close(*rules, rtol=1e-6, atol=1e-7)


def test_rows_without_weights_are_as_ever():
    """No weights, and weights that are all 1, have the same coefficients to the bit."""
    plain, nll_BT = golden_batch(SAMPLES)
    ones, _ = weighted(SAMPLES, u=[[1.0] * len(losses) for _, losses in SAMPLES], r=[1.0] * 5)
    assert all(torch.equal(a, b) for a, b in zip(count(plain, 2), count(ones, 2), strict=True))
    for mode in NORMALISATIONS:
        ways = [coefficients(b, count(b, 2), torch.tensor([1.0, 3.0]), mode) for b in (plain, ones)]
        assert torch.equal(*ways), mode


@pytest.mark.parametrize("by_samples", [False, True])
def test_halves_are_as_large_as_their_weights(by_samples):
    batch, _ = weighted([A, B, C, C], u=[[1, 0.5], [1], [2, 1, 3], [1, 1, 1]], r=[2.0, 1.0, 1.0, 0.5])
    halves = SplitHalves(2, by_samples=by_samples)
    halves.deal(batch)
    sizes = [2, 1, 1, 0.5] if by_samples else [3, 1, 6, 1.5]  # of A, B: task 0; C, C: task 1
    expected = [sizes[0] / (sizes[0] + sizes[1]), sizes[1] / (sizes[0] + sizes[1])]
    expected += [sizes[2] / (sizes[2] + sizes[3]), sizes[3] / (sizes[2] + sizes[3])]
    assert halves.parts().tolist() == pytest.approx(expected, rel=1e-12)
