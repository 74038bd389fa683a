"""What stands in front of a task's prompts, and which tasks count."""

from __future__ import annotations

from mtft.recipe.rules.rule import Rule, Stage
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.shots import DemonstrationRows
from mtft.recipe.schema.task import TaskSection

ALWAYS: tuple[Stage, ...] = ("check", "train", "eval", "mix", "merge", "fuse", "run")
# Names in a chat template that come from the row, from the tokenizer, or from how it is rendered.
GIVEN = ("messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "chat_template")
GIVEN += ("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs")
GIVEN += ("return_assistant_tokens_mask", "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
GIVEN += ("mask_token", "additional_special_tokens", "raise_exception", "strftime_now", "processor_kwargs")


def is_text(task: TaskSection | DemonstrationRows) -> bool:
    """Whether the rows are plain text, without turns. (`auto` may still find that they are.)"""
    return task.format == "text" or (isinstance(task.format, dict) and set(task.format) == {"text"})


def demonstrates_text(recipe: Recipe) -> bool:
    """Whether a task has demonstrations, and it or where they come from is plain text."""
    texts = {task.name for task in recipe.tasks if is_text(task)}
    for task in recipe.tasks:
        if task.shots is not None:
            source = task.shots.source
            text = is_text(source) if isinstance(source, DemonstrationRows) else source in texts
            if text or task.name in texts:
                return True
    return False


TASK_RULES: tuple[Rule, ...] = (
    Rule("tasks.*.shots + tasks.*.format: text", ALWAYS, lambda r, e, n: demonstrates_text(r),
        "plain text has no prompt and no answer, so there is nothing to demonstrate, or to put it in front of",
        "leave tasks.*.shots out, or read the rows in a format with turns"),
    Rule("tasks.*.system, chat_template_kwargs + tasks.*.format: text", ALWAYS,
        lambda r, e, n: any(is_text(task) and (task.system or task.chat_template_kwargs) for task in r.tasks),
        "plain text is learnt as it is, without a chat template", "leave these keys out of the task"),
    Rule("tasks.*.auxiliary", ALWAYS, lambda r, e, n: not r.counted_tasks,
        "every task is auxiliary, so no task is left that a mean or a verdict could be about",
        "set auxiliary: false for the tasks that you care about"),
)  # fmt: skip
