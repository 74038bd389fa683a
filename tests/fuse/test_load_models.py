"""From folders to a fused model: tokenizers, precision, quantisation, and the warning about strangers."""

import shutil
import warnings

import pytest
import torch

from mtft.common.errors import UserError
from mtft.fuse.alpha.spec import FusionError, FusionSpec
from mtft.fuse.decoding.score_text import fused_scores
from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.load_models import load_model
from tests.fuse import tiny
from tests.fuse.decoding.test_score_text import batch

STRANGERS = "same favourite token at"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tiny.folders_with_text(tmp_path_factory.mktemp("load"))


def load(places, **options):
    return FusedCausalLM.load(
        options.pop("strong", places["strong"]),
        places["small"],
        [places["expert"]],
        **({"dtype": "fp32", "device": "cpu"} | options),
    )


def test_random_models_are_strangers(places):
    with pytest.warns(UserWarning, match=STRANGERS):
        fused = load(places)
    assert fused.vocab_size == 300  # the logits are 320 wide
    assert fused.forward(torch.tensor([[5, 6]])).logits.shape == (1, 2, 300)


def test_a_model_and_itself_are_not(places):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(places, strong=places["small"])


def test_extras_in_the_strong_tokenizer(places, tmp_path):
    """Refused strictly; with prefix the extra id can be read and written, and is never steered."""
    strong = tmp_path / "strong"
    shutil.copytree(places["strong"], strong)
    text = tiny.tokenizer()
    text.add_tokens(["<tool>"])
    text.save_pretrained(strong)
    with pytest.raises(FusionError, match="level that accepts: prefix"):
        load(places, strong=strong)
    with pytest.warns(UserWarning, match=STRANGERS):
        fused = load(places, strong=strong, tokens="prefix")
    assert (fused.vocab_size, fused.shared) == (301, 300)
    ids = torch.tensor([[5, 300, 7]])
    out = fused.forward(ids).logits[0]
    moved = out - fused.strong(ids).logits[0, :, :301].log_softmax(-1)
    same = fused.fuse(torch.zeros(1, 301), [torch.zeros(1, 300)], torch.zeros(1, 300), [FusionSpec()])
    assert same.logprobs_NV.shape == (1, 301)
    d = moved[:, 300]  # only the normaliser: every id that is not steered moves by the same
    assert torch.allclose(moved.exp() * fused.strong(ids).logits[0, :, :301].softmax(-1), out.exp(), atol=1e-6)
    assert d.isfinite().all()
    assert fused.generate(input_ids=ids, max_new_tokens=3, do_sample=False, speculative=2).shape[1] <= 6


def test_precision_of_each_side(places):
    with pytest.warns(UserWarning, match=STRANGERS):
        fused = load(places, dtype="bf16", base_dtype="fp32")
    assert fused.strong.dtype == torch.bfloat16
    assert fused.weak.model.dtype == torch.float32
    assert fused.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[0] == 1
    assert fused.forward(torch.tensor([[5, 6]])).logits.dtype == torch.float32


def test_4_bit(tmp_path):
    """Both sides quantised (blocks of 64 weights, so wider models): rows of a 4-bit base get their adapter too."""
    for name, seed in (("strong", 7), ("small", 1)):
        tiny.model(seed, width=64, dtype=torch.float32, vocab_size=320).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    places = {"strong": tmp_path / "strong", "small": tmp_path / "small"}
    places["expert"] = tiny.adapter(tmp_path / "expert", places["small"], 11)
    with pytest.warns(UserWarning, match=STRANGERS):
        fused = load(places, quantization="nf4", base_quantization="nf4")
    for model in (fused.strong, fused.weak.model):
        assert "Linear4bit" in {type(module).__name__ for module in model.modules()}
    ids = torch.tensor([[5, 6, 7]])
    _, experts, base = fused.cached_models().read(ids, keep=0)
    whole = load(places)
    _, exact, plain = whole.cached_models().read(ids, keep=0)
    gained, expected = experts[0] - base, exact[0] - plain
    assert float((gained - expected).norm() / expected.norm()) < 0.5  # the rounding of 4 bits, not a lost adapter
    out = fused.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert (fused.score(out).greedy_BL[0, 3:]).all()


def test_strong_model_with_an_adapter(places, tmp_path):
    own = tiny.adapter(tmp_path / "own", places["strong"], 31)
    with pytest.warns(UserWarning, match=STRANGERS):
        plain, tuned = load(places), load(places, strong_adapter=own)
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.allclose(plain.strong(ids).logits, tuned.strong(ids).logits, atol=1e-3)
    assert not torch.allclose(plain.forward(ids).logits, tuned.forward(ids).logits, atol=1e-3)


def test_missing_folder_and_pickled_weights(places, tmp_path):
    with pytest.raises(UserError, match="no model folder"):
        load(places, strong=tmp_path / "nowhere")
    pickled = tmp_path / "pickled"
    shutil.copytree(places["strong"], pickled)
    state = load_model(pickled, dtype="fp32", device="cpu").state_dict()
    (pickled / "model.safetensors").unlink()
    torch.save(state, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles"):
        load(places, strong=pickled)


def test_unknown_precision(places):
    with pytest.raises(FusionError, match="did you mean 'bf16'"):
        load(places, dtype="bf1")


def test_the_evaluators_inference_mode(places):
    """score_tasks runs everything under inference_mode."""
    with pytest.warns(UserWarning, match=STRANGERS):
        fused = load(places)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = (ids > 0).long()
    one = batch(ids, mask, mask.bool())
    with torch.inference_mode():
        nll, hit = fused_scores(fused, one)
    again, _ = fused_scores(fused, one)
    torch.testing.assert_close(nll, again)
    assert hit.dtype == torch.bool
