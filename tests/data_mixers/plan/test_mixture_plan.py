"""Golden values of the spec; exact quotas, epochs without repeats, any world size, resume (twice), caps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_mixers import MixError, Mixture, MixturePlan
from data_mixers.plan.permutation import half_bits, mix_bits, permute, round_keys
from data_mixers.plan.quota import StepQuota, interleave, largest_remainder

ORDERS = {
    (0, 0, 0): [4, 1, 9, 3, 7, 6, 2, 8, 0, 5],
    (0, 0, 1): [0, 3, 6, 7, 5, 4, 1, 9, 8, 2],
    (0, 1, 0): [4, 5, 2, 3, 9, 8, 1, 6, 0, 7],
    (7, 2, 3): [3, 0, 1, 8, 4, 5, 6, 7, 2, 9],
}


def test_mix_golden():
    assert int(mix_bits(0)[0]) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("key", ORDERS)
def test_order_golden(key):
    assert permute(np.arange(10), 10, half_bits(10), round_keys(*key)).tolist() == ORDERS[key]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_order_is_a_permutation(size):
    order = permute(np.arange(size), size, half_bits(size), round_keys(3, 9, 1))
    assert sorted(order.tolist()) == list(range(size))


@pytest.mark.parametrize(
    ("total", "steps", "digits"),
    [
        ((26, 19, 13, 6), 8, "3221 3311 3221 4220 3311 3221 3221 4310"),
        ((20, 12, 6, 2), 10, "2110 2110 2200 2110 2101 2110 2110 2200 2110 2101"),
    ],
)
def test_quota_golden(total, steps, digits):
    rows = StepQuota(np.array(total), steps).rows(0, steps)
    assert " ".join("".join(map(str, row)) for row in rows) == digits


def test_slots_golden():
    assert interleave(np.array([[3, 2, 2, 1]]), np.zeros(4, dtype=np.int64))[0].tolist() == [0, 1, 2, 0, 3, 1, 2, 0]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 12), st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**32))
def test_quota_is_exact_at_every_prefix(tasks, steps, batch, seed):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(tasks, 0.3))
    total = largest_remainder(shares * steps * batch, steps * batch)
    assert total.sum() == steps * batch
    assert np.abs(total - shares * steps * batch).max() < 1 + 1e-5
    rows = StepQuota(total, steps).rows(0, steps)
    assert np.all(rows.sum(axis=1) == batch)
    assert np.array_equal(rows.sum(axis=0), total)
    assert np.all((rows == total // steps) | (rows == -(-total // steps)))
    ideal = np.arange(1, steps + 1)[:, None] * total / steps
    assert np.abs(np.cumsum(rows, axis=0) - ideal).max() < 1


def small_plan(**options):
    mixture = Mixture.of({"sql": 0.45, "sum": 0.3, "chat": 0.2, "rare": 0.05, "never": 0.0})
    sizes = {"sql": 40, "sum": 500, "chat": 7, "rare": 3, "never": 9}
    return MixturePlan(mixture, sizes, **{"steps": 50, "batch": 13, "seed": 5, **options})


def test_no_row_twice_before_its_epoch_ends_and_every_epoch_has_its_own_order():
    task, epoch, row = small_plan().locate(np.arange(50 * 13))
    orders = {}
    for t in range(5):
        for e in np.unique(epoch[task == t]):
            rows = row[(task == t) & (epoch == e)].tolist()
            assert len(set(rows)) == len(rows)
            orders.setdefault(t, []).append(tuple(rows))
    assert 4 not in orders
    full = [rows for rows in orders[0] if len(rows) == 40]
    assert len(full) >= 7
    assert all(sorted(rows) == list(range(40)) for rows in full)
    assert len(set(full)) == len(full)


def test_any_world_size_sees_the_same_rows():
    plan = small_plan()
    for s in (0, 17, 49):
        whole = np.stack(plan.step(s))
        for world in (1, 2, 3, 8, 64):
            parts = [np.stack(plan.step(s, rank, world)) for rank in range(world)]
            for rank, part in enumerate(parts):
                assert np.array_equal(part, whole[:, rank::world])


def test_locate_in_any_order_and_counts_agree_with_steps():
    plan = small_plan()
    shuffled = np.random.default_rng(0).permutation(len(plan))
    everything = np.stack(plan.locate(np.arange(len(plan))))
    assert np.array_equal(np.stack(plan.locate(shuffled)), everything[:, shuffled])
    for s in (0, 1, 30, 50):
        assert np.array_equal(plan.counts(s), np.bincount(everything[0, : s * 13], minlength=5))


def test_another_plan_has_another_fingerprint():
    prints = {small_plan(**options).fingerprint for options in ({}, {"seed": 6}, {"steps": 60}, {"batch": 14})}
    assert len(prints) == 4
    assert small_plan().fingerprint in prints


def test_adding_a_task_does_not_reshuffle_the_others():
    one = MixturePlan(Mixture.of({"a": 1.0}), [50], steps=5, batch=10, seed=1)
    two = MixturePlan(Mixture.of({"b": 0.5, "a": 0.5}), [20, 50], steps=10, batch=10, seed=1)
    task, _, row = two.locate(np.arange(100))
    assert row[task == 1].tolist() == one.locate(np.arange(50))[2].tolist()


def test_blocks_change_nothing():
    mixture = Mixture.of({"a": 0.61, "b": 0.29, "c": 0.1})
    plan = MixturePlan(mixture, [1000, 10, 100], steps=3000, batch=7, seed=0)
    far = MixturePlan(mixture, [1000, 10, 100], steps=3000, batch=7, seed=0)
    a = [np.stack(plan.step(s)) for s in range(3000)]
    for s in (2999, 0, 1024, 1023, 2048):
        assert np.array_equal(np.stack(far.step(s)), a[s])
    assert np.array_equal(far.counts(3000), far.rows_K)


def test_caps_refuse_or_redistribute():
    with pytest.raises(MixError, match="chat: 130 rows asked, 14 allowed") as error:
        small_plan(max_epochs={"chat": 2})
    assert "fewer steps" in str(error.value)
    plan = small_plan(max_epochs={"chat": 2.0, "rare": 1}, on_cap="redistribute")
    assert plan.rows_K[2] == 14
    assert plan.rows_K[3] == 3
    assert plan.rows_K.sum() == 650
    assert plan.rows_K[4] == 0
    assert plan.rows_K[0] / plan.rows_K[1] == pytest.approx(1.5, rel=0.02)
    with pytest.raises(MixError, match="all tasks together"):
        small_plan(max_epochs=0.5, on_cap="redistribute")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.3, 3))
def test_redistributed_totals_never_pass_a_cap(seed, slack):
    rng = np.random.default_rng(seed)
    K = int(rng.integers(2, 8))
    sizes = rng.integers(1, 200, K)
    total = max(8, int(slack * sizes.sum() / 2))
    caps = rng.random(K) * 4
    mixture = Mixture(tuple(map(str, range(K))), rng.dirichlet(np.ones(K)))
    try:
        plan = MixturePlan(
            mixture,
            sizes,
            steps=4,
            batch=total // 4,
            seed=0,
            max_epochs=dict(zip(mixture.names, caps, strict=True)),
            on_cap="redistribute",
        )
    except MixError:
        assert np.floor(caps * sizes).sum() < total
        return
    assert np.all(plan.rows_K <= np.floor(caps * sizes + 1e-9))
    assert plan.rows_K.sum() == 4 * (total // 4)


def test_start_goes_on_in_the_epoch():
    mixture, sizes = Mixture.of({"a": 0.5, "b": 0.5}), [30, 7]
    whole = MixturePlan(mixture, sizes, steps=20, batch=4, seed=3)
    rest = MixturePlan(mixture, sizes, steps=10, batch=4, seed=3, start=whole.counts(10).tolist())
    for s in range(10):
        assert np.array_equal(np.stack(rest.step(s)), np.stack(whole.step(10 + s)))


def test_table_and_empty_tasks():
    table = {row["task"]: row for row in small_plan().table()}
    assert table["sql"]["rows"] == 292  # of 292.5, as `rare` has 33 of 32.5: ties go by name
    assert table["sql"]["epochs"] == pytest.approx(292 / 40)
    assert sum(row["realised"] for row in table.values()) == pytest.approx(1)
    assert table["never"]["rows"] == 0
    MixturePlan(Mixture.of({"a": 1.0, "b": 0.0}), {"a": 5, "b": 0}, steps=2, batch=2, seed=0).step(1)
    with pytest.raises(MixError, match="b has no rows"):
        MixturePlan(Mixture.of({"a": 0.5, "b": 0.5}), {"a": 5, "b": 0}, steps=2, batch=2, seed=0)


class TestTokens:
    def plan(self, seed=0, **options):
        rng = np.random.default_rng(seed)
        K = int(rng.integers(3, 12))
        mixture = Mixture(tuple(f"t{k}" for k in range(K)), rng.dirichlet(np.ones(K)))
        self.lengths = [rng.integers(1, int(rng.integers(20, 200)), int(rng.integers(5, 400))) for _ in range(K)]
        sizes = [len(length) for length in self.lengths]
        return MixturePlan(
            mixture,
            sizes,
            **{"steps": 40, "batch": 700, "seed": 2, "unit": "tokens", "lengths": self.lengths, **options},
        )

    @pytest.mark.parametrize("seed", range(8))
    def test_error_at_every_prefix_is_within_the_bound(self, seed):
        plan = self.plan(seed)
        task, _, row = plan.locate(np.arange(len(plan)))
        own = np.array([self.lengths[t][r] for t, r in zip(task, row, strict=True)])
        longest = np.array([length.max() for length in self.lengths])
        so_far = np.cumsum(own[:, None] * (task[:, None] == np.arange(len(longest))), axis=0)
        error = np.abs(so_far - plan.mixture.shares * np.cumsum(own)[:, None])
        assert np.all(error <= longest / 2 + plan.mixture.shares * longest.sum() / 2 + 1e-6)
        assert error.max() <= longest.max()

    def test_steps_reach_their_tokens_and_no_more(self):
        plan = self.plan(1)
        seen = 0
        for s in range(40):
            task, _, row = plan.step(s)
            own = [int(self.lengths[t][r]) for t, r in zip(task, row, strict=True)]
            assert seen + sum(own[:-1]) < (s + 1) * 700 <= seen + sum(own)
            seen += sum(own)
            assert np.array_equal(
                plan.counts(s + 1),
                np.bincount(plan.locate(np.arange(plan.step_range(s)[1]))[0], minlength=len(self.lengths)),
            )

    def test_epochs_do_not_repeat_rows(self):
        plan = self.plan(4)
        task, epoch, row = plan.locate(np.arange(len(plan)))
        assert len({*zip(task, epoch, row, strict=True)}) == len(plan)

    def test_caps(self):
        with pytest.raises(MixError, match="more epochs than max_epochs"):
            self.plan(3, max_epochs=0.05)
        plan = self.plan(3, max_epochs={"t0": 0.5}, on_cap="redistribute", steps=60)
        assert plan.rows_K[0] <= 0.5 * len(self.lengths[0])

    def test_lengths_are_needed_and_checked(self):
        with pytest.raises(MixError, match="needs the lengths"):
            self.plan(lengths=None)
        with pytest.raises(MixError, match="a row of"):
            self.plan(batch=10)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_permuting_tasks_changes_nothing_but_their_order(seed):
    rng = np.random.default_rng(seed)
    K = int(rng.integers(2, 9))
    names, sizes, shares = tuple(f"t{k}" for k in range(K)), rng.integers(1, 10**7, K), rng.dirichlet(np.ones(K))
    order = rng.permutation(K)
    options = {"steps": 20, "batch": 32, "seed": 9}
    plain = MixturePlan(Mixture(names, shares), sizes, **options)
    turned = MixturePlan(Mixture(tuple(names[k] for k in order), shares[order]), sizes[order], **options)
    assert np.array_equal(plain.rows_K[order], turned.rows_K)
    a, b = plain.locate(np.arange(640)), turned.locate(np.arange(640))
    for k in range(K):
        place = int(np.flatnonzero(order == k)[0])
        assert np.array_equal(a[2][a[0] == k], b[2][b[0] == place])  # the same rows in the same order


def test_totals_of_constant_shares_need_no_step_to_be_scheduled(monkeypatch):
    def plan(steps):
        return MixturePlan(Mixture.of({"a": 0.5, "b": 0.3, "c": 0.2}), [7, 11, 13], steps=steps, batch=9, seed=3)

    small = plan(2050)
    assert small.counts(2050).tolist() == (small.counts(2049) + np.bincount(small.step(2049)[0], minlength=3)).tolist()
    monkeypatch.setattr(StepQuota, "_schedule", None)
    large = plan(10**7)
    assert sum(entry["rows"] for entry in large.table()) == 9 * 10**7
    assert len(large.fingerprint) == 64


def test_an_order_by_tokens_that_no_memory_holds_is_refused():
    with pytest.raises(MixError, match="100,000,000,000 rows") as caught:
        MixturePlan(Mixture.of({"a": 1.0}), [2], steps=10**6, batch=10**6, seed=0, unit="tokens", lengths=[[10, 10]])
    assert "mixture.unit" in caught.value.do
