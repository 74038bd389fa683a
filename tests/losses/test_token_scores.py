"""Scores are made for some positions at a time: within a bound of bytes, equal to those of the whole logits."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from mtft.losses.token_scores import BUFFERS, token_scores
from mtft.models.loading import load_base
from mtft.recipe.schema.model import ModelSection
from mtft.training.memory.activation_peak import LiveBytes
from tests.losses.builders import isolated_inputs, lay_out, new_llama, random_samples
from tests.models.test_architectures import REFUSED
from tests.models.tiny_architectures import ARCHITECTURES, write_architecture

WIDTH = 4001  # ids: logits outweigh all else
ONE_ROW = 4 * BUFFERS * WIDTH  # the bound at which positions are scored one by one


def batch_of(supervised, vocabulary=61):
    rows = [[(0, 50, supervised // 2)], [(1, 50, supervised // 2)]]
    return lay_out([random_samples(row, vocabulary=vocabulary) for row in rows])


def peak(model, supervised, bound):
    batch = batch_of(supervised)
    inputs = isolated_inputs(batch)
    with LiveBytes([*model.parameters(), *(x for x in inputs.values() if torch.is_tensor(x))]) as live:
        token_scores(model, batch, inputs=inputs, max_logit_bytes=bound)
    return live.peak


@pytest.mark.parametrize("adapted", ["plain", "lora", "lora on the head"])
def test_bytes_stay_under_the_bound(adapted):
    model = new_llama(WIDTH)
    if adapted != "plain":
        targets = ["q_proj", "lm_head"] if "head" in adapted else "all-linear"
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    bound = 4 * ONE_ROW
    few, many = peak(model, 8, bound), peak(model, 96, bound)
    assert few < bound + 300_000  # and the layers' own
    assert many - few < ONE_ROW  # 88 rows of logits in fp32 alone are 22 times that


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in REFUSED])
def test_every_family_in_parts_gives_what_it_gives_at_once(tmp_path, name):
    """Whatever it does to the logits behind the head: scale them, cap them, leave some out."""
    model = load_base(ModelSection(path=str(write_architecture(tmp_path / name, name)), dtype="fp32")).eval()
    batch = batch_of(40)
    inputs = {"input_ids": batch.input_ids_BT, "use_cache": False}
    with torch.no_grad():
        logits_BTV = model(**inputs).logits
    expected_BT = F.cross_entropy(logits_BTV.transpose(1, 2), batch.labels_BT, reduction="none", ignore_index=-100)
    left = []  # what the head's own call has to do
    model.get_output_embeddings().register_forward_hook(lambda *call: left.append(call[-1].numel()))
    for rows in (1, 7, 1000):
        bound = rows * 4 * BUFFERS * logits_BTV.shape[-1]
        nll_BT, hit_BT = token_scores(model, batch, inputs=inputs, max_logit_bytes=bound)
        torch.testing.assert_close(nll_BT, expected_BT, atol=2e-5, rtol=0)
        assert torch.equal(hit_BT, logits_BTV.argmax(-1) == batch.labels_BT)
    assert left == [0, 0, 0]  # all went by in parts
