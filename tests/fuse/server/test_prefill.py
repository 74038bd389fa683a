"""A prompt that joins a running batch is read in parts: the others go on meanwhile, and nobody's answer changes."""

import threading

import pytest
import torch

from mtft.fuse.decoding.model_state import CachedModel
from mtft.fuse.server import batch_engine
from mtft.fuse.server.batch_engine import BatchEngine
from mtft.fuse.server.jobs import GenerationJob
from mtft.fuse.server.prefill import cut_prompts
from tests.fuse import tiny

PART = 4
LONG, SHORT, SMALL = list(range(3, 33)), [5, 6, 7, 8, 9], list(range(20, 41))
RUNS = 20  # tokens of the job that runs


class Heard:
    """The events of the jobs of one engine, in the order in which they come."""

    def __init__(self):
        self.order, self.tokens, self.errors, self.ended = [], {}, {}, threading.Semaphore(0)

    def job(self, name, ids, tokens, spec, **options):
        def on_event(event):
            self.order.append(name)
            self.tokens.setdefault(name, []).extend(score.id for score in event.tokens)
            if event.error is not None:
                self.errors[name] = event.error
            if event.finish_reason is not None or event.error is not None:
                self.ended.release()

        return GenerationJob(ids, tokens, spec, on_event, temperature=0, **options)

    def wait(self, count):
        for _ in range(count):
            assert self.ended.acquire(timeout=60)


@pytest.fixture
def fused(folders):
    made = tiny.fused(tiny.weak(folders["base"], [folders["one"], folders["odd"]]))
    made.tokenizer = tiny.tokenizer(61)
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture
def widths(monkeypatch):
    """Columns of every read."""
    seen, read = [], CachedModel.read

    def spy(self, ids_BL, *args, **kwargs):
        seen.append(ids_BL.shape[1])
        return read(self, ids_BL, *args, **kwargs)

    monkeypatch.setattr(CachedModel, "read", spy)
    monkeypatch.setattr(batch_engine, "PART", PART)
    return seen


def late(engine, heard, jobs):
    """Submits `jobs` once the first job has given its third token."""

    class Order(list):
        def append(self, name):
            super().append(name)
            if len(self) == 3:
                engine.submit(jobs)

    heard.order = Order()


def answers(fused, jobs, together):
    """Tokens of each job; the first runs when the others come, or each has an engine of its own."""
    heard, tokens = Heard(), {}
    if together:
        engine = BatchEngine(fused)
        made = [heard.job(name, *job) for name, job in jobs.items()]
        late(engine, heard, made[1:])
        engine.start()
        engine.submit(made[:1])
        heard.wait(len(made))
        engine.stop()
        return heard
    for name, job in jobs.items():
        engine = BatchEngine(fused)
        engine.start()
        engine.submit([heard.job(name, *job)])
        heard.wait(1)
        engine.stop()
        tokens[name] = heard.tokens[name]
    return tokens


def test_who_runs_is_not_halted_and_nobody_is_changed(fused, widths):
    jobs = {"runs": (SHORT, RUNS, fused.spec), "long": (LONG, 5, fused.spec), "brief": (SHORT[:2], 5, fused.spec)}
    alone = answers(fused, jobs, together=False)
    widths.clear()
    heard = answers(fused, jobs, together=True)
    assert heard.tokens == alone
    assert max(widths) == max(PART, len(SHORT))  # nobody runs while the first prompt is read
    first = heard.order.index("long")
    assert heard.order[:first].count("runs") >= 3 + len(LONG) // PART  # a token between any two parts


def test_a_client_that_leaves_takes_its_prompt_along(fused, widths):
    heard = Heard()
    engine = BatchEngine(fused)
    runs, long = heard.job("runs", SHORT, RUNS, fused.spec), heard.job("long", LONG, 5, fused.spec)
    late(engine, heard, [long])
    read = batch_engine.BatchEngine._read_prompts
    parts = []

    def leave(self):
        if self._prefill is not None and long in self._prefill.jobs:
            parts.append(self._prefill)
            if len(parts) == 2:
                engine.cancel([long])
        return read(self)

    engine._read_prompts = leave.__get__(engine)
    engine.start()
    engine.submit([runs])
    heard.wait(1)
    engine.stop()
    assert len(heard.tokens["runs"]) == RUNS
    assert len(parts) == 2
    assert "long" not in heard.tokens
    assert engine.idle


def test_a_failure_in_a_later_part_is_heard_by_all(fused, widths, monkeypatch):
    heard = Heard()
    engine = BatchEngine(fused)
    runs, long = heard.job("runs", SHORT, RUNS, fused.spec), heard.job("long", LONG, 5, fused.spec)
    late(engine, heard, [long])
    read, parts = batch_engine.BatchEngine._read_prompts, []

    def fail(self):
        if self._prefill is not None and long in self._prefill.jobs:
            parts.append(self._prefill)
            if len(parts) == 3:
                raise RuntimeError("no memory")
        return read(self)

    engine._read_prompts = fail.__get__(engine)
    engine.start()
    engine.submit([runs])
    heard.wait(2)
    assert all("no memory" in heard.errors[name] for name in ("runs", "long"))
    engine.submit([heard.job("next", SHORT, 3, fused.spec)])
    heard.wait(1)
    engine.stop()
    assert len(heard.tokens["next"]) == 3


@pytest.mark.parametrize(("strong", "small"), [(30, None), (30, 7), (7, 30), (30, 2), (4, None), (1, None)])
def test_parts_hold_every_token_once(strong, small):
    def prompt(length):
        return torch.arange(2 * length).view(2, length), torch.ones(2, length, dtype=torch.long)

    parts = cut_prompts(prompt(strong), None if small is None else prompt(small), PART)
    for which, length in ((0, strong), (1, small)):
        pieces = [part[which] for part in parts]
        if length is None:
            assert pieces == [None] * len(parts)
            continue
        assert torch.equal(torch.cat([ids for ids, _ in pieces], 1), prompt(length)[0])
        assert all(ids.shape == mask.shape and ids.shape[1] for ids, mask in pieces)
        if min(strong, small or strong) >= len(parts) * PART / 2:
            assert all(ids.shape[1] <= PART for ids, _ in pieces)


def test_an_own_prompt_of_the_small_models_is_cut_too(fused, widths):
    def tokens(part, together):
        batch_engine.PART = part
        heard = Heard()
        engine = BatchEngine(fused)
        runs = heard.job("runs", SHORT, RUNS, fused.spec)
        long = heard.job("long", LONG, 5, fused.spec, small_ids=SMALL)
        if together:
            late(engine, heard, [long])
        engine.start()
        engine.submit([runs] if together else [long])
        heard.wait(1 + together)
        engine.stop()
        return heard.tokens["long"]

    assert tokens(PART, together=True) == tokens(1000, together=False)
