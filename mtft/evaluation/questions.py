"""Held-out rows as questions: the metrics that a recipe wants answered, and whether its references can be scored.

What can be told without a model is told before one is loaded: a reference that holds no number for `mae`, rows without
a label, calls that can't be read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mtft.common.errors import UserError
from mtft.common.listing import clipped
from mtft.data.readers.rows_at import rows_at
from mtft.evaluation.answer_frame import AnswerFrame
from mtft.evaluation.metrics import make_metrics
from mtft.evaluation.metrics.base import Answer, Metric
from mtft.evaluation.metrics.labels import LabelMetric
from mtft.evaluation.prompts import HeldOutPrompt, answer_text, end_tokens, held_out_prompts
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.task import TaskSection


@dataclass(frozen=True)
class AskedMetrics:
    """The metrics of every task that cost more than the forward pass; tasks without any are left out.

    tasks  {task: its section of the recipe};  metrics  {task: {key: metric}}
    """

    tokenizer: Any
    tasks: Mapping[str, TaskSection]
    metrics: Mapping[str, Mapping[str, Metric]]
    seed: int = 0

    def __bool__(self) -> bool:
        return bool(self.metrics)

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: Any) -> AskedMetrics:
        """What a recipe asks for. Raises UserError for a metric that can't be used."""
        metrics: dict[str, dict[str, Metric]] = {}
        for task in recipe.tasks:
            own = {key: metric for key, metric in make_metrics(task).items() if metric.NEEDS != "forward"}
            _check_samples(task, own)
            if own and task.eval_data is not None:
                metrics[task.name] = own
        return cls(tokenizer, {task.name: task for task in recipe.tasks}, metrics, recipe.seed)

    def only(self, wanted: Collection[str]) -> AskedMetrics:
        """Those in `wanted`, as "task/metric"."""
        return self._chosen(lambda name: name in wanted)

    def without(self, unwanted: Collection[str]) -> AskedMetrics:
        """Those not in `unwanted`, as "task/metric"."""
        return self._chosen(lambda name: name not in unwanted)

    def _chosen(self, take: Callable[[str], bool]) -> AskedMetrics:
        chosen = {
            task: {key: metric for key, metric in of_task.items() if take(f"{task}/{key}")}
            for task, of_task in self.metrics.items()
        }
        return replace(self, metrics={task: of_task for task, of_task in chosen.items() if of_task})

    def user_code(self) -> dict[str, str]:
        """{"task/metric": SHA-256} of the user's own code that scores."""
        return {
            f"{task}/{key}": metric.digest
            for task, of_task in self.metrics.items()
            for key, metric in of_task.items()
            if metric.digest is not None
        }

    def describe(self) -> list[str]:
        """What `mtft check` says of the user's own code that scores."""
        told = {
            f"{task}/{key}": metric.describe()
            for task, of_task in self.metrics.items()
            for key, metric in of_task.items()
        }
        return [f"{name} {text}" for name, text in told.items() if text is not None]


@dataclass(frozen=True)
class Questions:
    """The held-out rows of one task, N of them. references: text; thinks: file:line of the first one with a thought;
    ends: tokens that end an answer.
    """

    task: TaskSection
    metrics: Mapping[str, Metric]
    prompts: Sequence[HeldOutPrompt]
    references: Sequence[str]
    thinks: str | None
    ends: tuple[int, ...]
    ids: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    tokenizer: Any
    frame: AnswerFrame

    @classmethod
    def of(cls, store: Any, asked: AskedMetrics, model_ends: Any = None) -> Questions:
        """model_ends: `eos_token_id` of the model's generation configuration. Raises UserError for plain text."""
        prompts, tokenizer = held_out_prompts(store), asked.tokenizer
        metrics, task = asked.metrics[store.task], asked.tasks[store.task]
        ends = end_tokens(prompts, tokenizer, model_ends)
        frame = AnswerFrame.of(tokenizer, ends, task.chat_template_kwargs)
        if task.thinking_weight == 0:
            prompts = [frame.asks_for_thought(prompt, tokenizer) for prompt in prompts]
        texts = [answer_text(tokenizer, prompt.reference.tolist(), ends) for prompt in prompts]
        told, places = [frame.read(text) for text in texts], [prompt.where for prompt in prompts]
        for text, one, place in zip(texts, told, places, strict=True):
            _check_stop(task, text[: text.rfind(one.answer)], place)
        columns = rows_at(task, "eval", places) if any(metric.NEEDS_ROW for metric in metrics.values()) else {}
        _, firsts = np.unique(store.row_numbers, return_index=True)
        ids = [str(store.ids[int(first)]) for first in firsts]
        rows = [columns.get(place, {}) for place in places]
        thinks = next((place for place, one in zip(places, told, strict=True) if one.thinking), None)
        return cls(task, metrics, prompts, [one.answer for one in told], thinks, ends, ids, rows, tokenizer, frame)

    @property
    def generated(self) -> dict[str, Metric]:
        """The metrics that look at answers."""
        return {key: metric for key, metric in self.metrics.items() if metric.NEEDS == "generation"}

    def text(self, ids: Sequence[int]) -> str:
        """What a metric compares of generated tokens."""
        return self.frame.read(answer_text(self.tokenizer, ids, self.ends, self.task.generate.stop)).answer

    def answers(self, texts: Sequence[Sequence[str]], first: int = 0) -> list[Answer]:
        """What a model wrote to the rows from number `first` on."""
        return [
            Answer(
                self.ids[row],
                self.tokenizer.decode(self.prompts[row].prompt.tolist(), skip_special_tokens=False),
                self.references[row],
                tuple(of_row),
                self.rows[row],
                self.prompts[row].where,
            )
            for row, of_row in enumerate(texts, first)
        ]

    def ideal(self, first: int = 0) -> list[Answer]:
        """The references as answers, from row `first` on."""
        samples = max((metric.samples for metric in self.generated.values()), default=1)
        return self.answers([[text] * samples for text in self.references[first:]], first)

    def labels(self, metric: LabelMetric) -> tuple[str, ...]:
        """The labels of a metric. Raises UserError for references that are none."""
        if self.thinks is not None:  # log p of the label would be that of a thought, of whichever row has it first
            what = f"{metric.NAME} asks for a label alone, and this row's answer begins with a thought"
            do = "take text_match, for which the model thinks and answers, or leave the thoughts out of eval_data"
            raise UserError(what, where=self.thinks, do=do)
        return metric.names(self.references, [prompt.where for prompt in self.prompts])

    def check(self) -> None:
        """Raises UserError for references that can't be scored. Runs nothing of the user's own."""
        for metric in self.metrics.values():
            if isinstance(metric, LabelMetric):
                self.labels(metric)
            elif metric.describe() is None:
                metric.statistics(self.ideal())


def _check_stop(task: TaskSection, before: str, where: str) -> None:
    """before: what stands in front of the words of a reference."""
    for stop in task.generate.stop:
        if stop in before:
            shown = clipped(before, 80)
            what = f"with the stop text {stop!r} this row would end before the answer begins: {shown!r}"
            do = f"leave it out of tasks.{task.name}.generate.stop: answers end with their turn all the same"
            raise UserError(what, where=where, do=do)


def check_questions(stores: Sequence[Any | None], asked: AskedMetrics) -> None:
    """Raises UserError where the held-out rows can't be asked or their references not be scored."""
    for store in stores:
        if store is not None and store.task in asked.metrics:
            Questions.of(store, asked).check()


def cut_questions(stores: Sequence[Any | None], asked: AskedMetrics) -> list[str]:
    """What to say of held-out rows longer than train.max_length: prompts, or references, are asked as they are cut."""
    return [
        f"{store.task}: {store.stats['truncated']:,} held-out examples are cut at {store.meta['max_length']} tokens "
        "(train.max_length): the metrics ask for what is left of their prompts and references"
        for store in stores
        if store is not None and store.task in asked.metrics and store.stats["truncated"]
    ]


def _check_samples(task: TaskSection, metrics: Mapping[str, Metric]) -> None:
    several = next((key for key, metric in metrics.items() if metric.samples > 1), None)
    if several is not None and task.generate.temperature == 0:
        what = f"{several} asks for several answers, and at temperature 0 they are all the same"
        where = f"tasks.{task.name}.generate.temperature"
        raise UserError(what, where=where, do="set a temperature, such as 0.8")
