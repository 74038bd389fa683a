"""Text that is shown never changes: stop strings across tokens, characters across tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtft.fuse.server.incremental_detokenizer import IncrementalDetokenizer
from tests.fuse import tiny


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def shown(tokenizer, text, stops=()):
    stream, parts = IncrementalDetokenizer(tokenizer, stops), []
    for token in tokenizer.encode(text):
        parts.append(stream.add(token))
        if stream.finished:
            break
    else:
        parts.append(stream.rest())
    return parts, stream


def test_characters_of_several_bytes_come_whole(tokenizer):
    parts, stream = shown(tokenizer, "a😀é日")
    assert len(tokenizer.encode("a😀é日")) == 1 + 4 + 2 + 3
    assert [part for part in parts if part] == ["a", "😀", "é", "日"]
    assert stream.text == "a😀é日"


def test_stop_across_tokens(tokenizer):
    parts, stream = shown(tokenizer, "xENyENDz", ["END"])
    assert "".join(parts) == stream.text == "xENy"
    assert stream.finished
    assert all("E" not in part or "N" in part for part in parts)  # "E" is held until it can't begin the stop


def test_earliest_stop_wins_and_is_not_returned(tokenizer):
    assert "".join(shown(tokenizer, "one two three", ["three", "two"])[0]) == "one "


def test_held_text_comes_at_the_end(tokenizer):
    parts, stream = shown(tokenizer, "abEN", ["END"])
    assert "".join(parts) == "abEN"
    assert not stream.finished


def test_bytes_that_never_become_a_character(tokenizer):
    """A broken tail is shown as it is at the end, not lost."""
    tokens = tokenizer.encode("😀")[:2]
    stream = IncrementalDetokenizer(tokenizer)
    assert [stream.add(token) for token in tokens] == ["", ""]
    assert stream.rest() != ""


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 299), max_size=60), st.sampled_from([(), ("the",), ("ab", "\ufffd\ufffd"), ("o", " fox")])
)
def test_what_is_shown_is_what_the_decoder_makes_of_all(tokenizer, tokens, stops):
    """Any ids: broken characters, special tokens that are not shown."""
    stream, parts = IncrementalDetokenizer(tokenizer, stops), []
    for token in tokens:
        parts.append(stream.add(token))
        if stream.finished:
            break
    parts.append(stream.rest())
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    ends = [at for stop in stops if "\ufffd" not in stop and (at := whole.find(stop)) >= 0]
    if "\ufffd" not in "".join(stops):
        assert "".join(parts) == stream.text == (whole[: min(ends)] if ends else whole)


def test_a_token_costs_the_same_at_the_end_of_a_long_text(tokenizer, monkeypatch):
    """Counted in tokens that are decoded, not in seconds. Ordinary text, and bytes that never become a character."""
    for tokens in (tokenizer.encode("the quick brown fox ") * 200, [tokenizer.encode("😀")[1]] * 2000, [1] * 2000):
        decoded = []
        real = type(tokenizer).decode

        def counting(self, ids, *arguments, decoded=decoded, real=real, **options):
            decoded.append(len(ids))
            return real(self, ids, *arguments, **options)

        monkeypatch.setattr(type(tokenizer), "decode", counting)
        stream = IncrementalDetokenizer(tokenizer, ["zzz"])
        for token in tokens:
            stream.add(token)
        monkeypatch.undo()
        assert max(decoded) <= 80
