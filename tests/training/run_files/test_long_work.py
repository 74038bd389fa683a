"""What is said of a step that takes long: at once after its first part, then every ten seconds, with what is left."""

import pytest

from mtft.common.long_work import LongWork, duration
from mtft.training.run_files.metrics_log import MetricsLog


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (9.9, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min"), (250, "4 min 10 s"),
        (7500, "2 h 5 min"), (86400, "1 day"), (273600, "3 days 4 h"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_first_part_is_told_of_at_once_and_then_every_ten_seconds():
    now, said = [0.0], []
    options = {"total": lambda one: f"all in {duration(100 * one)}", "clock": lambda: now[0]}
    work = LongWork(said.append, "step 1/100: micro-batch", first=True, **options)
    for part in range(1, 9):
        now[0] += 4
        work(part, 8)
    assert said == [
        "step 1/100: micro-batch 1 of 8 done after 4.0 s, about 28 s to go; all in 53 min 20 s",
        "step 1/100: micro-batch 4 of 8 done after 16 s, about 16 s to go; all in 53 min 20 s",
        "step 1/100: micro-batch 7 of 8 done after 28 s, about 4.0 s to go; all in 53 min 20 s",
    ]


def test_a_fast_step_that_is_not_the_first_says_nothing():
    now, said = [0.0], []
    work = LongWork(said.append, "x", clock=lambda: now[0])
    for part in range(1, 9):
        now[0] += 1
        work(part, 8)
    assert said == []


def test_a_run_says_what_it_is_about_to_do_before_the_first_step(capsys):
    log = MetricsLog(None, steps=100)
    log.evaluating(0, 3, first=True)
    log.begin_step(1, 8, 65536, first=True)
    log.micro_batch(1, 8)
    log.begin_step(2, 8, 65536, first=False)
    log.micro_batch(1, 8)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "step 0: held-out examples of 3 tasks are scored",
        "step 1/100 begins: 8 micro-batches, 65,536 tokens on this process",
    ]
    assert lines[2].startswith("step 1/100: micro-batch 1 of 8 done after 0.0 s, about 0.0 s to go; the 100 steps that")
    assert len(lines) == 3
    quiet = MetricsLog(None, steps=100, quiet=True)
    quiet.begin_step(1, 8, 65536, first=True)
    quiet.micro_batch(1, 8)
    assert quiet.evaluating(0, 3, first=True) is None
    assert not capsys.readouterr().err


def test_a_later_step_is_told_of_where_it_lasts(capsys):
    log = MetricsLog(None, steps=100)
    log.begin_step(2, 8, 65536, first=False)
    log._begun -= 80
    log.micro_batch(4, 8)
    said = capsys.readouterr().err
    assert said.startswith("step 2/100: micro-batch 4 of 8 done after 1 min 20 s, about 1 min 20 s to go")
