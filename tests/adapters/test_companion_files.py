"""A merged adapter is prompted like those it was made from, if they all are prompted alike."""

import pytest
from transformers import AutoTokenizer, GenerationConfig

from mtft.adapters.companion_files import COMPANIONS, copy_companions
from mtft.training.export.chat_files import save_chat_files
from tests.data.tokenize.stock import stock


@pytest.fixture
def adapters(tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "bare")]
    for folder in folders:
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    for folder in folders[:2]:
        save_chat_files(folder, stock("qwen3"), GenerationConfig())
    return folders


def test_files_that_are_alike_are_copied(adapters, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert copy_companions(adapters, out)
    assert AutoTokenizer.from_pretrained(out).chat_template == stock("qwen3").chat_template
    assert {path.name for path in out.iterdir()} == {path.name for path in adapters[0].iterdir()} - {
        "adapter_config.json"
    }


def test_other_templates_are_not_mixed(adapters, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    save_chat_files(adapters[1], stock("qwen2_5"), GenerationConfig())
    assert not copy_companions(adapters, out)
    assert not list(out.iterdir())
    assert copy_companions(adapters[2:], out)


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "gemma3"])
def test_everything_that_an_export_writes_is_known(tmp_path, name):
    """A file of a newer transformers that nobody copies would be lost in every merge."""
    save_chat_files(tmp_path, stock(name), GenerationConfig())
    assert {path.name for path in tmp_path.iterdir()} <= COMPANIONS
