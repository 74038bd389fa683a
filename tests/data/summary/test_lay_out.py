"""How long `mtft check` looks at steps does not grow with their number or their size, and what it says stays true."""

import pytest

from data_mixers.plan.quota import StepQuota
from mtft.data.batching import batches
from mtft.data.summary import lay_out
from mtft.data.summary.render_console import summary_text
from mtft.data.summary.summarize import summarize_data
from tests.data.summary.test_summary import recipe
from tests.data.toy_examples import TEMPLATES, tokenizer


@pytest.fixture
def made():
    return tokenizer(TEMPLATES["chatml"])


@pytest.fixture
def packed(monkeypatch):
    """How many examples were packed, call by call."""
    sizes, pack_evenly = [], batches.pack_evenly
    monkeypatch.setattr(batches, "pack_evenly", lambda n, c: (sizes.append(len(n)), pack_evenly(n, c))[1])
    return sizes


@pytest.mark.parametrize("style", ["mixed", "unmixed", "alternating"])
@pytest.mark.parametrize("batch_tokens", [512, 20_000, 10**8])
def test_work_is_bounded(tmp_path, made, packed, monkeypatch, batch_tokens, style):
    blocks, schedule = [], StepQuota._schedule
    monkeypatch.setattr(StepQuota, "_schedule", lambda *a: (blocks.append(a[1]), schedule(*a))[1])
    monkeypatch.setattr(lay_out, "MOST_ROWS", 2000)
    asked = recipe(tmp_path, batch_tokens=batch_tokens, steps=10**6, batch_style=style)
    found = summarize_data(asked, made, cache_dir=tmp_path)
    assert sum(packed) <= 2 * 2000
    assert len(blocks) <= 4  # of a thousand
    assert found.sampled == (batch_tokens == 10**8)


@pytest.mark.parametrize(
    "options", [{}, {"packing": False}, {"batch_style": "unmixed"}, {"batch_style": "alternating"}]
)
def test_a_part_of_a_large_step_tells_what_the_whole_would(tmp_path, made, monkeypatch, options):
    asked = recipe(tmp_path, batch_tokens=30_000, **options)
    whole = summarize_data(asked, made, cache_dir=tmp_path)
    monkeypatch.setattr(lay_out, "MOST_ROWS", 500)
    part = summarize_data(asked, made, cache_dir=tmp_path)
    assert (whole.sampled, part.sampled) == (False, True)
    assert part.padding_share == pytest.approx(whole.padding_share, abs=0.02)
    assert part.micro_batches_per_step == pytest.approx(whole.micro_batches_per_step, rel=0.05)
    assert part.tasks == whole.tasks
    assert "about" in summary_text(part)
    assert "about" not in summary_text(whole)
