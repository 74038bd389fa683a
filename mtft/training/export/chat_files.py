"""How an export is talked to: the tokenizer, the chat template it was trained with, and the tokens that end a turn.

A base without a chat template is trained with a default one, which nobody would have afterwards; and a base whose
`eos_token` is not what its template ends turns with would go on after the answer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtft.data.formats.messages import Message
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.recipe.schema.task import TaskSection

EXAMPLE: list[Message] = [{"role": "user", "content": "What is the capital of Italy?"}]


def save_chat_files(folder: Path, tokenizer: Any, generation_config: Any) -> None:
    """Writes the tokenizer with its chat template, and generation_config.json with every token that ends an answer.

    generation_config: the base model's (transformers.GenerationConfig); it is not changed.
    """
    renderer = ChatRenderer(tokenizer)
    saved = copy.copy(tokenizer)
    saved.chat_template = tokenizer.chat_template or renderer.template.source
    saved.save_pretrained(folder)
    settings = copy.deepcopy(generation_config)
    ends = end_ids(renderer, generation_config)
    settings.eos_token_id = ends if len(ends) != 1 else ends[0]
    settings.save_pretrained(folder)


def end_ids(renderer: ChatRenderer, generation_config: Any) -> list[int]:
    """Ids that end an answer: those of the base, and those that the chat template ends turns with."""
    known = generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    return list(dict.fromkeys([*known, *renderer.tokenizer.convert_tokens_to_ids(list(renderer.end_tokens))]))


def how_to_prompt(tokenizer: Any, tasks: Sequence[TaskSection] = ()) -> list[str]:
    """Lines of a model card: what a question looks like to the model, and what the tasks' own stood behind."""
    renderer = ChatRenderer(tokenizer)
    ends = " or ".join(f"`{token}`" for token in renderer.end_tokens) or "nothing of its own"
    of = "MTFT's default chat template (the base has none)" if renderer.template.default else "the chat template"
    return [
        "## How to prompt",
        "",
        f"Trained with {of}, which stands beside the weights: `tokenizer.apply_chat_template(messages, "
        f"add_generation_prompt=True)`. Answers end with {ends}. A question as the model reads it:",
        "",
        "```text",
        renderer.prompt(EXAMPLE),
        "```",
        "",
        *_own_prompts(tasks),
    ]


def _own_prompts(tasks: Sequence[TaskSection]) -> list[str]:
    """What a task says of its prompts beside its rows: whoever asks without it asks what was not trained."""
    lines = []
    for task in tasks:
        said: dict[str, Any] = {"system": task.system, "chat_template_kwargs": task.chat_template_kwargs}
        said |= {"template": task.template} if len(task.templates) > 1 else {}
        said |= {"shots": task.shots.model_dump(mode="json")} if task.shots is not None else {}
        if said := {key: value for key, value in said.items() if value}:
            lines.append(json.dumps({task.name: said}, ensure_ascii=False))
    if not lines:
        return []
    return [
        "Tasks with prompts of their own, which belong there again: `system` stood where a conversation had no system "
        "message; `chat_template_kwargs` go to `apply_chat_template`; of several `template`s each row had one; "
        "`shots`: so many rows of `from` (null: the task's own) stood with their answers in front of each question.",
        "",
        "```json",
        *lines,
        "```",
        "",
    ]
