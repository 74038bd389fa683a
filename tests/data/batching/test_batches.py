"""From a plan to micro-batches: the same examples for any split, equal counts on every rank (R1, R2, R3, R8, R14)."""

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_mixers.mixture.mixture import Mixture
from data_mixers.plan.mixture_plan import MixturePlan
from mtft.common.errors import UserError
from mtft.data.batching.batches import BatchSource, collate, deal_micro_batches, eval_batches
from mtft.data.tokenize.encode import Example

PAD, BASE = 0, 100_000


class Toy:
    """A store in memory: example i of task k holds the tokens BASE k + i + 1, as often as it is long."""

    def __init__(self, task, lengths, k=0):
        self.task, self.lengths, self.k = task, np.asarray(lengths, dtype=np.int64), k

    def example(self, i):
        ids = np.full(self.lengths[i], BASE * self.k + i + 1, dtype=np.int32)
        return Example(ids, np.arange(len(ids)) >= len(ids) // 2)


def toys(sizes=(40, 25, 10), seed=0, low=2, high=30):
    rng = np.random.default_rng(seed)
    return [Toy(f"t{k}", rng.integers(low, high, n), k) for k, n in enumerate(sizes)]


def plan_of(stores, steps=6, batch=12, shares=(0.5, 0.3, 0.2), **options):
    mixture = Mixture.of({store.task: share for store, share in zip(stores, shares)})
    return MixturePlan(mixture, [len(store.lengths) for store in stores], steps=steps, batch=batch, seed=3, **options)


def source_of(stores=None, *, rank=0, world=1, packing=True, micro=64, plan=None, max_length=32, unmixed=False):
    stores = stores or toys()
    plan = plan or plan_of(stores)
    return BatchSource(
        stores,
        plan,
        micro_batch_tokens=micro,
        max_length=max_length,
        packing=packing,
        pad_id=PAD,
        unmixed=unmixed,
        rank=rank,
        world=world,
    )


def examples_in(batch):
    """[(task, example)] of a batch of toys, checked against the labels, positions and tasks."""
    found = []
    for ids, positions, segments, tasks, labels in zip(*(getattr(batch, name) for name in FIELDS)):
        for segment in range(int(segments.max()) + 1):
            here = segments == segment
            values = ids[here].unique()
            assert len(values) == 1
            length = int(here.sum())
            assert positions[here].tolist() == list(range(length))
            task, example = divmod(int(values) - 1, BASE)
            assert tasks[here].unique().tolist() == [task]
            first = max(length // 2, 1) - 1  # the position before the first supervised token
            expected = [int(values) if first <= t < length - 1 else -100 for t in range(length)]
            assert labels[here].tolist() == expected
            found.append((task, example))
        padding = segments == -1
        assert (ids[padding] == PAD).all()
        assert (labels[padding] == -100).all()
        assert (tasks[padding] == -1).all()
    return found


FIELDS = ("input_ids_BT", "position_ids_BT", "segment_ids_BT", "task_ids_BT", "labels_BT")


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("micro", [32, 100, 1000])
def test_any_split_holds_the_examples_of_the_plan(packing, world, micro):
    sources = [source_of(rank=rank, world=world, packing=packing, micro=micro) for rank in range(world)]
    for s in range(len(sources[0])):
        task, row, _ = sources[0].step(s)
        per_rank = [source[s] for source in sources]
        assert len({len(batches) for batches in per_rank}) == 1  # no rank can hang another (R8)
        batches = [batch for batches in per_rank for batch in batches]
        assert all(batch.input_ids_BT.numel() <= micro for batch in batches)
        found = [pair for batch in batches for pair in examples_in(batch)]
        assert sorted(found) == sorted(zip(task.tolist(), row.tolist()))
        assert all(batch.packed is False for batch in batches) or packing


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("micro", [32, 100, 1000])
def test_unmixed_micro_batches_hold_one_task_and_the_step_holds_them_all(packing, world, micro):
    stores = toys()
    sources = [source_of(stores, rank=r, world=world, packing=packing, micro=micro, unmixed=True) for r in range(world)]
    for s in range(len(sources[0])):
        ranks = [source[s] for source in sources]
        assert len({len(batches) for batches in ranks}) == 1  # no rank waits for another
        held = [examples_in(batch) for batches in ranks for batch in batches]
        assert all(len({task for task, _ in batch}) <= 1 for batch in held)
        task, row, _ = sources[0].step(s)
        assert sorted(example for batch in held for example in batch) == sorted(zip(task.tolist(), row.tolist()))
        assert all(batch.input_ids_BT.numel() <= micro for batches in ranks for batch in batches)
    mixed = source_of(stores, micro=1000)
    assert any(len({task for task, _ in examples_in(batch)}) > 1 for batch in mixed[0])  # the naive way mixes them


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4)), min_size=1, max_size=60),
    st.integers(40, 300),
    st.integers(1, 64),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_unmixed_layout_of_any_step(examples, budget, world, packing):
    """Every example once, one task a micro-batch, within the budget, the same number on each rank."""
    length, task = (np.array(column) for column in zip(*examples))

    class Whole:
        steps, step = 1, staticmethod(lambda s: (task, np.zeros_like(task), np.arange(len(task)) - start[task]))

    order = np.argsort(task, kind="stable")
    length, task = length[order], task[order]
    start = np.searchsorted(task, np.arange(5))
    stores = [Toy(f"t{k}", length[task == k], k) for k in range(5)]
    layout = source_of(stores, plan=Whole, world=world, micro=budget, max_length=40, packing=packing, unmixed=True)
    ranks = layout.layout(layout.step(0))
    assert len({len(batches) for batches in ranks}) == 1
    batches = [rows for batches in ranks for rows in batches]
    assert sorted(i for rows in batches for row in rows for i in row) == list(range(len(task)))
    for rows in batches:
        assert len({int(task[i]) for row in rows for i in row}) <= 1
        assert len(rows) * max((int(length[row].sum()) for row in rows), default=0) <= budget


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_alternating_steps_hold_one_task_each(unit):
    stores = toys()
    lengths = [store.lengths for store in stores] if unit == "tokens" else None
    options = {"unit": unit, "lengths": lengths, "style": "alternating"}
    plan = plan_of(stores, steps=40, batch=12 if unit == "examples" else 150, **options)
    source = source_of(stores, plan=plan)
    turns = []
    for s in range(40):
        tasks = {task for batch in source[s] for task, _ in examples_in(batch)}
        assert len(tasks) == 1
        turns += tasks
    assert np.bincount(turns).tolist() == [20, 12, 8]  # of 40: 0.5, 0.3, 0.2
    so_far = np.cumsum(np.array(turns)[:, None] == np.arange(3), axis=0)
    assert np.abs(so_far - np.arange(1, 41)[:, None] * [0.5, 0.3, 0.2]).max() < 1


def test_rows_do_not_depend_on_the_split():
    rows = []
    for world, micro in ((1, 64), (2, 64), (3, 200)):
        source = source_of(world=world, micro=micro)
        layout = source.layout(source.step(2))
        rows.append(sorted(row for rank in layout for batch in rank for row in batch))
    assert rows[0] == rows[1] == rows[2]


def test_planned_steps_are_real_steps():
    """R14: packing changes rows, never the number of optimizer steps."""
    stores = toys()
    for packing in (True, False):
        source = source_of(stores, packing=packing)
        assert len(source) == 6 == sum(1 for _ in source)  # iteration ends by IndexError at len


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_realised_shares_at_every_prefix(unit):
    """R1, R2: counted in the batches themselves, the asked share is there after every step, to within one example."""
    stores = toys((5000, 1500, 50))
    shares = np.array([0.6, 0.3, 0.1])
    lengths = [store.lengths for store in stores] if unit == "tokens" else None
    batch = 400 if unit == "tokens" else 32
    plan = plan_of(stores, steps=30, batch=batch, shares=shares, unit=unit, lengths=lengths)
    source = source_of(stores, plan=plan, micro=1000)
    seen = np.zeros(3)
    for s in range(len(source)):
        for micro_batch in source[s]:
            for task, example in examples_in(micro_batch):
                seen[task] += stores[task].lengths[example] if unit == "tokens" else 1
        slack = 2 * 30 if unit == "tokens" else 1.0 + 1e-9
        assert np.abs(seen - shares * seen.sum()).max() <= slack


def test_interleave_datasets_misses_the_shares():
    """The naive way (R1): stops when the first set is used up, or shows a small set dozens of times."""
    sizes, shares = (1000, 300, 10), [0.5, 0.3, 0.2]
    sets = [datasets.Dataset.from_dict({"task": [k] * n}) for k, n in enumerate(sizes)]
    first = datasets.interleave_datasets(sets, probabilities=shares, seed=0, stopping_strategy="first_exhausted")
    assert len(first) < 0.1 * sum(sizes)
    last = datasets.interleave_datasets(sets, probabilities=shares, seed=0, stopping_strategy="all_exhausted")
    assert (np.asarray(last["task"]) == 2).sum() / sizes[2] > 20  # epochs of the small set

    stores = [Toy(f"t{k}", [4] * n, k) for k, n in enumerate(sizes)]
    capped = plan_of(stores, steps=10, batch=100, shares=shares, max_epochs=4, on_cap="redistribute")
    tasks = np.concatenate([source_of(stores, plan=capped, micro=1000).step(s)[0] for s in range(10)])
    assert (tasks == 2).sum() <= 4 * sizes[2]


def test_order_differs_by_epoch_and_is_reproducible():
    """R3, R13: epoch 2 is another order of the same rows, and the same one whenever it is asked for."""
    stores = [Toy("only", [4] * 24)]
    orders = []
    for _ in range(2):
        source = source_of(stores, plan=plan_of(stores, steps=6, batch=8, shares=(1.0,)))
        orders.append(np.concatenate([source.step(s)[1] for s in range(6)]))
    np.testing.assert_array_equal(*orders)
    first, second = orders[0][:24], orders[0][24:]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first.tolist() != second.tolist()


def test_a_step_needs_no_history():
    """R13: step 5 read alone is step 5 read after the others."""
    walked, jumped = source_of(), source_of()
    for s in range(5):
        _ = walked[s]
    for a, b in zip(walked[5], jumped[5], strict=True):
        for name in FIELDS:
            assert (getattr(a, name) == getattr(b, name)).all()


def test_padding_is_counted_and_small_when_packed():
    stores = toys((400, 300, 300), low=4, high=60)
    plan = plan_of(stores, steps=3, batch=256)
    packed = source_of(stores, plan=plan, micro=1024, max_length=256)
    single = source_of(stores, plan=plan, micro=1024, max_length=256, packing=False)
    for source, most in ((packed, 0.03), (single, 0.10)):
        real, positions = np.sum([source.padding(s) for s in range(3)], axis=0)
        assert positions == sum(batch.input_ids_BT.numel() for s in range(3) for batch in source[s])
        assert real == sum(int((batch.segment_ids_BT >= 0).sum()) for s in range(3) for batch in source[s])
        assert 1 - real / positions <= most


def test_more_ranks_than_rows_get_empty_batches():
    stores = [Toy("only", [5, 5])]
    plan = plan_of(stores, steps=1, batch=2, shares=(1.0,))
    batches = [source_of(stores, plan=plan, rank=r, world=4, packing=False)[0] for r in range(4)]
    assert [len(b) for b in batches] == [1] * 4
    empty = [b[0] for b in batches if not (b[0].segment_ids_BT >= 0).any()]
    assert len(empty) == 2
    assert (empty[0].labels_BT == -100).all()


def test_examples_that_fit_no_micro_batch_are_refused_at_once():
    with pytest.raises(UserError, match="the longest example of task t0 has") as caught:
        source_of(toys(high=50), micro=32)
    assert caught.value.where == "train.micro_batch_tokens"


@given(
    lengths=st.lists(st.integers(1, 40), max_size=60), budget=st.integers(40, 200), world=st.integers(1, 9)
)  # fmt: skip
@settings(max_examples=200)
def test_deal(lengths, budget, world):
    rows = [[i] for i in range(len(lengths))]
    dealt = deal_micro_batches(np.asarray(lengths, dtype=np.int64), rows, budget, world)
    assert len({len(rank) for rank in dealt}) == 1
    assert len(dealt[0]) >= 1
    assert sorted(row for rank in dealt for batch in rank for row in batch) == rows
    for rank in dealt:
        for batch in rank:
            assert len(batch) * max((lengths[row[0]] for row in batch), default=0) <= budget
    if len(lengths) >= world * len(dealt[0]):  # nobody idles while others have two rows to give
        assert all(batch for rank in dealt for batch in rank)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_sees_every_example_once(packing, world, monkeypatch):
    monkeypatch.setattr("mtft.data.batching.batches.EVAL_WINDOW", 16)
    store = toys((50,))[0]
    options = {"micro_batch_tokens": 64, "max_length": 32, "packing": packing, "pad_id": PAD}
    ranks = [list(eval_batches(store, 0, **options, rank=r, world=world)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    held = []
    for batch, examples in (item for batches in ranks for item in batches):
        assert [example for _, example in examples_in(batch)] == examples.tolist()  # (row, segment) order
        held += examples.tolist()
    assert sorted(held) == list(range(50))


def test_labels_are_those_of_the_next_token():
    batch = collate([[(Example(np.array([5, 6, 7, 8], np.int32), np.array([0, 0, 1, 1], bool)), 4)]], PAD)
    assert batch.labels_BT.tolist() == [[-100, 7, 8, -100]]
    assert batch.task_ids_BT.tolist() == [[4, 4, 4, 4]]
    assert [str(getattr(batch, name).dtype) for name in FIELDS] == [
        f"torch.{kind}" for kind in ("int64", "int64", "int32", "int32", "int64")
    ]
