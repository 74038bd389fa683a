"""Long tokenising in a log: a line now and then, none of short work."""

import pytest

from mtft.common import long_work
from mtft.data.store import progress as progress_module
from mtft.data.store.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass with each look at the clock."""

    class Clock:
        now, step = 0.0, 0.0

        def monotonic(self):
            self.now += self.step
            return self.now

    made = Clock()
    monkeypatch.setattr(progress_module, "time", made)
    monkeypatch.setattr(long_work.LongWork.__init__, "__kwdefaults__", {
        **long_work.LongWork.__init__.__kwdefaults__, "clock": made.monotonic,
    })  # fmt: skip
    return made


@pytest.mark.parametrize("total", [100, None])
def test_a_line_now_and_then(clock, capsys, total):
    clock.step = 6.0
    with progress("tokenising sql (train)", total) as advance:
        for _ in range(6):
            advance(10)
    said = capsys.readouterr().err.splitlines()
    assert 2 <= len(said) <= 3
    assert all(line.startswith("tokenising sql (train): ") and "done after" in line for line in said)


def test_short_work_is_silent(clock, capsys):
    clock.step = 0.1
    with progress("tokenising sql (train)", 30) as advance:
        for _ in range(3):
            advance(10)
    assert capsys.readouterr().err == ""
