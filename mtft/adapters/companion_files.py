"""What stands beside an adapter's weights so that others can prompt it: tokenizer, chat template, end tokens."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE),
    *("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt"),
)
COMPANIONS = frozenset({*TOKENIZER_FILES, "generation_config.json"})


def copy_companions(adapters: Sequence[Path], folder: Path) -> bool:
    """Copies the files that every adapter which has any holds alike. False: some differ, and none was copied.

    Adapters that were trained with other chat templates, or other tokens, have no one way to be prompted.
    """
    having = [path for path in adapters if any((path / name).is_file() for name in COMPANIONS)]
    names = sorted({name for path in having for name in COMPANIONS if (path / name).is_file()})
    contents = [[(path / name).read_bytes() if (path / name).is_file() else None for name in names] for path in having]
    if any(content != contents[0] for content in contents):
        return False
    for name in names:
        shutil.copyfile(having[0] / name, folder / name)
    return True
