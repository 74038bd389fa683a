"""The recipe of made tasks, as text: a line a task, with comments for who changes it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from scripts.task_makers.base import TaskMaker

TEMPLATE = "chat_template.jinja"
RECIPE = """\
# Tasks with exact answers, made by scripts/make_tasks.py (docs/made-tasks.md).
#
#   mtft check recipe.yaml
#   mtft run recipe.yaml
name: made-tasks
seed: 17

model:
  path: quickstart:weak # a base of 1.8 M parameters that ships with MTFT; change it to your own
  dtype: fp32
{template}
tasks:
{tasks}

mixture:
  shares: uniform # tasks are alike in rows, not in how much they need

lora: {{r: 16, alpha: 32}}

loss:
  normalise: task_token # every task counts the same, whatever the length of its answers

train:
  steps: 100
  batch_tokens: 8192
  micro_batch_tokens: 4096
  max_length: 1024
  learning_rate: 8e-3 # for quickstart:weak; 2e-4 is usual with LoRA on larger models
  schedule: linear
  warmup: 0.05

output:
  dir: runs/made-tasks
"""


def recipe(makers: Sequence[TaskMaker]) -> str:
    """Its data lies beside it."""
    with_tools = any(TEMPLATE in maker.beside for maker in makers)
    template = (
        f"  chat_template: {TEMPLATE} # leave out for a model whose own template shows tools\n" if with_tools else ""
    )
    return RECIPE.format(template=template, tasks="\n".join(map(task_line, makers)))


def task_line(maker: TaskMaker) -> str:
    """JSON, which is YAML too."""
    section = {
        "name": maker.name,
        "data": f"{maker.name}.train.jsonl",
        "eval_data": f"{maker.name}.eval.jsonl",
        "format": maker.format,
        "metrics": maker.metrics,
        "generate": {"max_new_tokens": maker.max_new_tokens},
    }
    return f"  - {json.dumps(section)}"
