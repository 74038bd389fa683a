"""What stands beside an adapter's weights so that others can prompt it: tokenizer, chat template, end tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE),
    *("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt"),
)
COMPANIONS = frozenset({*TOKENIZER_FILES, "generation_config.json", MORE_TEMPLATES})


def copy_companions(adapters: Sequence[Path], folder: Path) -> bool:
    """Copies the files that every adapter which has any holds alike. False: some differ, and none was copied.

    Adapters that were trained with other chat templates, or other tokens, have no one way to be prompted.
    """
    contents = [found for path in adapters if (found := _companions(path))]
    if any(content != contents[0] for content in contents):
        return False
    for name, content in contents[0].items() if contents else ():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return True


def _companions(folder: Path) -> dict[str, bytes]:
    """{name: content} of the companions in a folder; tokenizers may have templates with names too (tool_use)."""
    named = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    paths = [*(folder / name for name in sorted((*TOKENIZER_FILES, "generation_config.json"))), *named]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}
