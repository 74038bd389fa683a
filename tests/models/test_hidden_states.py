"""The last layer's states are those that transformers' own forward gives out, for every architecture."""

import pytest
import torch

from mtft.models.hidden_states import last_token_states
from mtft.models.loading import load_base
from mtft.models.lora import add_lora
from mtft.recipe.schema.lora import LoraSection
from mtft.recipe.schema.model import ModelSection
from tests.models.test_architectures import REFUSED
from tests.models.tiny_architectures import ARCHITECTURES, write_architecture

IDS = torch.arange(12)[None].repeat(2, 1) % 9 + 3
MASK = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in REFUSED])
def test_states_are_those_of_the_whole_model(tmp_path, name):
    model = load_base(ModelSection(path=str(write_architecture(tmp_path / name, name)), dtype="fp32")).eval()
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True, use_cache=False)
    expected = out.hidden_states[-1][torch.arange(2), MASK.sum(-1) - 1]
    assert torch.equal(last_token_states(model, IDS, MASK), expected)
    with torch.no_grad():
        alone = model(input_ids=IDS[:1], output_hidden_states=True, use_cache=False).hidden_states[-1]
    assert torch.equal(last_token_states(model, IDS[:1]), alone[:, -1])


def test_an_adapter_counts(tmp_path):
    folder = write_architecture(tmp_path / "phi3", "phi3")
    base = load_base(ModelSection(path=str(folder), dtype="fp32")).eval()
    plain = last_token_states(base, IDS, MASK)
    adapted = add_lora(base, LoraSection(r=2), seed=0).eval()
    assert torch.equal(last_token_states(adapted, IDS, MASK), plain)  # B is 0
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.ones_(parameter)
    assert not torch.allclose(last_token_states(adapted, IDS, MASK), plain)
