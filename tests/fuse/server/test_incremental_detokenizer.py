"""Text that is shown never changes: stop strings across tokens, characters across tokens."""

import pytest

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
