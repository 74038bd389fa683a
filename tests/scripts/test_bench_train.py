"""The benchmark of trainers does what it says it counts, on a shape that takes a second."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_train.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["bench_train"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_train"]


def test_our_side_trains_on_stores_in_memory(bench):
    stores = bench.make_stores(bench.TINY, 48)
    clock = bench.run_mtft(bench.TINY, stores, 2)
    assert len(clock.marks) == 2
    assert sum(clock.tokens) <= sum(store.lengths.sum() for store in stores)


@pytest.mark.slow
def test_all_sides_count_real_tokens(bench):
    stores = bench.make_stores(bench.TINY, 96)
    sizes = np.concatenate([store.lengths for store in stores])
    for name, (_, run, settings) in bench.sides(bench.TINY).items():
        clock = run(bench.TINY, stores, 3, **settings)
        assert len(clock.marks) == 3, name
        assert clock.rate() > 0
        if not name.startswith("trl bfd"):  # whole examples, 8 in a step (ours: 8 on average)
            least, most = np.sort(sizes)[:7].sum(), np.sort(sizes)[-9:].sum()
            assert all(least <= count <= most for count in clock.tokens[:3]), name
        assert max(clock.tokens) <= (9 if "bfd" not in name else 2) * bench.TINY.max_length


def test_lengths_are_lognormal_and_answers_a_part(bench):
    stores = bench.make_stores(bench.SMALL, 3000)
    lengths = np.concatenate([store.lengths for store in stores])
    assert np.median(lengths) == pytest.approx(96, rel=0.06)
    assert lengths.max() <= 512
    share = sum(store.supervised.sum() for store in stores) / lengths.sum()
    assert share == pytest.approx(0.4, abs=0.02)


def test_half_the_tokens_of_the_mixed_case_are_in_long_examples(bench):
    lengths = np.concatenate([store.lengths for store in bench.make_stores(bench.MIXED, 4000)])
    assert lengths[lengths >= 2048].sum() / lengths.sum() == pytest.approx(0.58, abs=0.06)
    short = np.concatenate([store.lengths for store in bench.make_stores(bench.LONG, 4000)])
    assert short.mean() == pytest.approx(200, rel=0.06)


@pytest.mark.slow
def test_the_large_part_runs_without_a_gpu_too(bench, capsys):
    found = bench.large(bench.TINY, "cpu", steps=2, budget=256)
    assert {"LoRA, mtft", "LoRA, mtft, fused loss", "LoRA, trl bfd, 2 rows"} <= found.keys()
    assert "tokens/s" in capsys.readouterr().out
