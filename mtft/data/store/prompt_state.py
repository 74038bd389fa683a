"""What of a task's keys stands in the fingerprint of its stores: a key only where it is set, so that others stay."""

from __future__ import annotations

from typing import Any

from mtft.data.demonstrations.pool import PoolSource
from mtft.recipe.schema.task import TaskSection


def prompt_state(task: TaskSection, pool: PoolSource | None, seed: int) -> dict[str, Any]:
    """Template, system prompt, options of the chat template, demonstrations and their rows; the seed where it draws."""
    state: dict[str, Any] = {"template": _template(task)}
    if task.system is not None:
        state["system"] = task.system
    if task.chat_template_kwargs:
        state["chat_template_kwargs"] = task.chat_template_kwargs
    if task.shots is not None and pool is not None:
        rows = [[part.name, part.content().digest] for part in pool.parts]
        read: dict[str, Any] = {"format": pool.task.format, "template": _template(pool.task), "limit": pool.task.limit}
        if pool.task.row_weight is not None:  # rows of weight 0 are no demonstrations
            read["row_weight"] = pool.task.row_weight
        state["shots"] = {"n": task.shots.n, "retrieve": task.shots.retrieve, "rows": rows, **read}
    if task.shots is not None or len(task.templates) > 1:
        state["seed"] = seed
    return state


def learnt_state(task: TaskSection) -> dict[str, Any]:
    """What a task says about which tokens count."""
    said = {key: getattr(task, key) for key in ("loss_on", "row_weight", "thinking_weight")}
    return {key: value for key, value in said.items() if value != TaskSection.model_fields[key].default}


def _template(task: TaskSection) -> str | list[str | None] | None:
    first, *others = task.templates
    return [first, *others] if others else first
