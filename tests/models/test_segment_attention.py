"""Attention over segments is the masked path (its oracle): losses, gradients of all weights, windows, checkpointing."""

import gc
import inspect
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from mtft.common.packed_families import BY_BORDERS, BY_POSITIONS
from mtft.data.batching.batches import collate
from mtft.data.batching.packed_attention import model_inputs
from mtft.gradients.capture.task_gradients import TaskGradients
from mtft.losses.token_nll import token_nll
from mtft.models import segment_attention
from mtft.models.loading import load_base
from mtft.models.segment_attention import make_buckets, segments_refusal, use_segments
from mtft.recipe.schema.model import ModelSection
from tests.models.tiny_families import examples, tiny

LENGTHS = [[9, 14, 7, 3], [21, 2, 10], [33]]  # rows; windows in the families are of 5


def packed(rows=LENGTHS):
    return collate([examples(lengths, seed=k) for k, lengths in enumerate(rows)], 0)


def gradients(model, batch, **options):
    """{parameter: gradient} of the mean loss, and the loss of every token."""
    nll_BT = token_nll(model, batch, path="gather", **options)
    (nll_BT.sum() / len(batch.supervised_N)).backward()
    return nll_BT.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, atol=1e-6):
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=atol, rtol=0, msg=lambda text: f"{name}: {text}")  # noqa: B023


class Counted:
    """How often the kernel and how often the mask was asked for."""

    def __init__(self, patch):
        self.buckets = self.masks = 0
        kernel, mask = segment_attention._by_buckets, segment_attention.DeferredMask.__call__

        def by_buckets(*args):
            self.buckets += 1
            return kernel(*args)

        def make(deferred):
            self.masks += 1
            return mask(deferred)

        patch.setattr(segment_attention, "_by_buckets", by_buckets)
        patch.setattr(segment_attention.DeferredMask, "__call__", make)


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


@pytest.mark.parametrize("family", sorted(BY_BORDERS))
def test_losses_and_gradients_are_those_of_the_masked_path(family, counted):
    expected = gradients(tiny(family, "sdpa"), packed())
    assert_same(gradients(tiny(family, "segments"), packed()), expected)
    assert counted.buckets == (4 if family == "diffllama" else 2), "each of the two layers (diffllama: twice)"
    assert counted.masks == 0


def test_every_family_here_may_be_packed():
    assert BY_BORDERS < BY_POSITIONS
    assert segments_refusal(tiny("gemma2", "eager").config) is not None


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_checkpointing_and_the_weights_of_lora(family, counted):
    found = []
    for attention in ("sdpa", "segments"):
        model = tiny(family, attention)
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False)).train()
        found.append(gradients(adapted, packed()))
    assert_same(found[1], found[0])
    assert (counted.buckets, counted.masks) == (4, 0), "two layers, and each again in the backward"


def test_captured_task_gradients():
    batch, found = packed(), []
    for attention in ("sdpa", "segments"):
        torch.manual_seed(1)
        model = get_peft_model(tiny("llama", attention), LoraConfig(r=4, init_lora_weights=False)).eval()
        tasks = int(batch.task_ids_BT.max()) + 1
        with TaskGradients(model, tasks, isolated=True) as taps:
            taps.begin(batch.task_ids_BT, batch.labels_BT != -100)
            taps.watch(token_nll(model, batch, path="gather").sum() / 90).backward()
        found.append(taps.jacobian(torch.ones(tasks, dtype=torch.float64)))
    for name, block in found[0].items():
        torch.testing.assert_close(found[1][name], block, atol=1e-6, rtol=0)


def test_bf16_under_autocast():
    found = []
    for attention in ("sdpa", "segments"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(gradients(tiny("llama", attention), packed()))
    torch.testing.assert_close(found[1][0], found[0][0], atol=0.05, rtol=0)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=2e-3, rtol=0.05)


def test_without_borders_the_mask_is_made(counted):
    """A family that drops keywords, or anybody's own call with positions that start again."""
    batch = packed()
    inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
    with torch.no_grad():
        expected = tiny("llama", "sdpa")(**inputs).logits
        found = tiny("llama", "segments")(**inputs).logits
    assert torch.equal(found, expected)
    assert (counted.buckets, counted.masks) == (0, 2)


def test_dropout_in_attention_draws_as_the_masked_path_does(counted):
    batch, found = packed(), []
    for attention in ("sdpa", "segments"):
        model = tiny("llama", attention).train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        torch.manual_seed(5)
        with torch.no_grad():
            found.append(token_nll(model, batch))
    assert torch.equal(found[0], found[1])
    assert counted.buckets == 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generation_with_a_cache_and_prompts_of_two_lengths(family):
    ids = torch.tensor([[0, 0, 0, 5, 6, 7, 8, 9], [11, 12, 13, 14, 15, 16, 17, 18]])
    answers = [
        tiny(family, attention).generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=12, do_sample=False)
        for attention in ("sdpa", "segments")
    ]
    assert torch.equal(*answers)


def test_capped_scores_are_refused_not_ignored():
    model = tiny("gemma2", "eager")
    model.set_attn_implementation("segments")
    with pytest.raises(ValueError, match="softcap"):
        model(**model_inputs(packed(), "segments"))


def test_attention_mask_of_padded_rows():
    """As people call a model: rows padded on the right or left, with a mask."""
    ids = torch.tensor([[5, 6, 7, 8, 0, 0, 0], [11, 12, 13, 14, 15, 16, 17]])
    for rows in (ids, ids.flip(1)):
        with torch.no_grad():
            expected, found = (
                tiny("llama", attention)(rows, attention_mask=(rows != 0).long()).logits
                for attention in ("sdpa", "segments")
            )
        assert torch.equal(found, expected)


# Buckets.


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_buckets_hold_every_token_once(lengths):
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    sizes, take_M, back_N, padded, _ = make_buckets(borders)
    assert torch.equal(take_M[back_N], torch.arange(borders[-1]))
    assert sum(n for n, _ in sizes) == len(lengths)
    assert sum(n * longest for n, longest in sizes) == len(take_M)
    assert padded == (len(take_M) > borders[-1])
    place, of_example = 0, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    for n, longest in sizes:
        for row in take_M[place : place + n * longest].view(n, longest):
            example = of_example[row].unique()
            assert len(example) == 1, "one example a row"
            length = lengths[int(example)]
            assert longest <= max(1.2 * length, length + 8)
            assert torch.equal(row[:length], torch.arange(length) + borders[int(example)]), "in order, from its start"
        place += n * longest


def test_indices_are_made_once_for_all_layers(monkeypatch):
    calls = []
    made = segment_attention.make_buckets
    monkeypatch.setattr(segment_attention, "make_buckets", lambda *args: calls.append(1) or made(*args))
    model = tiny("llama", "segments")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    gradients(model.train(), packed())
    assert calls == [1]


def test_nothing_stays_behind_a_batch():
    """Bands of windows are as many as there are lengths: kept for a run they would fill the memory."""
    batch = packed()
    inputs = model_inputs(batch, "segments")
    borders = weakref.ref(inputs["cu_seq_lens_q"])
    model = tiny("gemma3_text", "segments")
    model(**inputs).logits.sum().backward()
    bands = [weakref.ref(band) for band in inputs["cu_seq_lens_q"]._buckets.bands.values()]
    assert bands
    inputs.clear()
    gc.collect()
    assert borders() is None
    assert all(band() is None for band in bands)


# torch's flash kernel for rows of many lengths: its call is checked here, the kernel itself on a GPU (check_gpu.py).


def reference_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
                     enable_gqa=False):  # fmt: skip
    """What torch documents: sequences one by one; a window of (left, right) positions beside the query's own."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    left, right = window_size
    assert right == 0, "causal"
    group = query.shape[1] // key.shape[1]
    assert enable_gqa == (group > 1)
    out = []
    for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (back >= 0) & ((back <= left) if left >= 0 else True)
        out.append(((q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "qwen3"])
def test_the_call_of_varlen_attn(family, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    expected = gradients(tiny(family, "sdpa"), packed())
    known = inspect.signature(varlen.varlen_attn).parameters
    assert inspect.signature(reference_varlen).parameters.keys() <= known.keys()
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    monkeypatch.setattr(segment_attention, "varlen_fits", lambda *_: True)
    assert_same(gradients(tiny(family, "segments"), packed()), expected, atol=2e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's flash kernel")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_varlen_attn_on_a_gpu(family):
    batch = packed().to("cuda")
    found = [gradients(tiny(family, attention).to("cuda", torch.bfloat16), batch) for attention in ("sdpa", "segments")]
    torch.testing.assert_close(found[1][0], found[0][0], atol=0.1, rtol=0.02)


# `model.attention: auto`.


def test_auto_takes_it_where_it_is_proven(tmp_path):
    for family, expected in {"llama": "segments", "nemotron": "sdpa", "gemma2": "eager"}.items():
        tiny(family, "eager" if family == "gemma2" else "sdpa").save_pretrained(tmp_path / family)
        for asked in ("auto", "sdpa") if family != "gemma2" else ("auto",):
            section = ModelSection(path=str(tmp_path / family), attention=asked, dtype="fp32")
            found = load_base(section).config._attn_implementation
            assert found == (expected if asked == "auto" else asked)


def test_an_attention_that_was_asked_for_stays():
    model = tiny("llama", "eager")
    use_segments(model)
    assert model.config._attn_implementation == "eager"


def test_what_is_saved_loads_without_mtft(tmp_path):
    model = tiny("llama", "segments")
    model.save_pretrained(tmp_path)
    assert "segments" not in (tmp_path / "config.json").read_text()
