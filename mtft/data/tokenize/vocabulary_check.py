"""Tokens that the model has no row for: a tokenizer that grew while the embedding did not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtft.common.errors import UserError
from mtft.data.store.token_store import TokenStore


def check_vocabulary(stores: Sequence[TokenStore | None], tokenizer: Any, config: Any) -> None:
    """Refuse data with ids beyond the embedding of a model (`config`: its config), which would end in an index error.

    Only tokens that occur count: tokenizers often have some, such as a padding token, that no model row belongs to.
    """
    rows = int(config.get_text_config().vocab_size)
    for store in stores:
        if store is not None and store.stats["largest_id"] >= rows:
            token = tokenizer.convert_ids_to_tokens(store.stats["largest_id"])
            raise UserError(
                f"task {store.task} holds the token {token!r} with the id {store.stats['largest_id']}, and the model "
                f"has rows for {rows} tokens only: tokens were added to the tokenizer, and the model was not resized",
                where="model.path",
                do=f"once: model.resize_token_embeddings({len(tokenizer)}); model.save_pretrained(NEW_FOLDER), the "
                "tokenizer too, and name that folder (a LoRA adapter trains no rows: train them first, or lora: null)",
            )
