"""Caches with room: as transformers' own, without its copies."""

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from mtft.models import preallocated_cache as caches
from mtft.models.preallocated_cache import COLUMNS, SHARE, PreallocatedLayer, preallocated_cache
from tests.fuse import tiny

MODEL = tiny.model(3)


def read(cache, lengths, rows=3, seed=0):
    """Logits of the last read, after reads of so many tokens."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for length in lengths:
            logits = MODEL(torch.randint(3, 61, (rows, length)), cache=cache).logits
    return logits


def pair():
    return preallocated_cache(MODEL), DynamicCache(config=MODEL.config)


@pytest.mark.parametrize("short", [0, 12, 128])
def test_same_as_transformers_cache_through_growth_crops_and_selections(monkeypatch, short):
    monkeypatch.setattr(caches, "SHORT", short)
    roomy, plain = pair()
    for change in (
        lambda cache: None,
        lambda cache: cache.crop(-2),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
        lambda cache: cache.crop(-3),
    ):
        for cache in (roomy, plain):
            change(cache)
        rows = 3 if roomy.layers[0].keys is None else len(roomy.layers[0].keys)
        assert torch.equal(read(roomy, [5, 1, 1, 3], rows), read(plain, [5, 1, 1, 3], rows))
        assert roomy.get_seq_length() == plain.get_seq_length()
        for mine, theirs in zip(roomy.layers, plain.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys)
            assert torch.equal(mine.values, theirs.values)


def test_a_token_is_written_in_place(monkeypatch):
    monkeypatch.setattr(caches, "SHORT", 3)
    cache = preallocated_cache(MODEL)
    read(cache, [4])
    layer = cache.layers[0]
    keys, values = layer.keys, layer.values
    read(cache, [1] * COLUMNS)
    assert layer.keys.data_ptr() == keys.data_ptr()
    assert layer.values.data_ptr() == values.data_ptr()
    assert torch.equal(layer.keys[:, :, :4], keys)
    read(cache, [1])  # the room is used up
    assert layer.keys.data_ptr() != keys.data_ptr()
    assert torch.equal(layer.keys[:, :, :4], keys)


def test_room_is_bounded():
    cache = preallocated_cache(MODEL)
    for length in (4, 100, 10, 200):
        read(cache, [length], rows=1)
        layer = cache.layers[0]
        columns = layer.keys.untyped_storage().nbytes() // layer.keys[:, :, :1].nbytes
        assert columns <= layer.keys.shape[2] + max(COLUMNS, layer.keys.shape[2] // SHARE)


@pytest.mark.parametrize("short", [0, 128])
def test_what_is_selected_does_not_share_memory(monkeypatch, short):
    """One row is taken out, and the rest reads on: neither writes into the other's columns."""
    monkeypatch.setattr(caches, "SHORT", short)
    cache = preallocated_cache(MODEL)
    read(cache, [6])
    before = [layer.keys for layer in cache.layers]
    kept = [keys.clone() for keys in before]
    cache.batch_select_indices(torch.tensor([1, 2]))
    read(cache, [2], rows=2)
    assert all(torch.equal(keys, copy) for keys, copy in zip(before, kept, strict=True))


def test_other_kinds_of_layers_stay_transformers_own():
    config = MistralConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, sliding_window=6)
    config.num_attention_heads = config.num_key_value_heads = 2
    cache = preallocated_cache(MistralForCausalLM(config))
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer"] * 2
    assert all(type(layer) is PreallocatedLayer for layer in preallocated_cache(MODEL).layers)
