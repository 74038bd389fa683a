"""`tasks`: the data sets that one model is trained on together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtft.recipe.schema.metric import Metrics
from mtft.recipe.schema.section import (
    DATA,
    NotNegative,
    Positive,
    RecipeSection,
    SomeTexts,
    TaskName,
    TemplateOptions,
    Texts,
)
from mtft.recipe.schema.shots import ShotsSection

# Keys of later versions: at their default they don't stand in a recipe's fingerprint, so that older ones stay the same.
LATER_KEYS = ("system", "chat_template_kwargs", "shots", "auxiliary", "generate")
LATER_KEYS += ("loss_on", "row_weight", "thinking_weight")


class GenerateSection(RecipeSection):
    """How answers are made for metrics that look at answers (docs/tasks.md)."""

    max_new_tokens: Annotated[int, Field(gt=0, le=2**20)] = 256
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """0: the most likely token; else drawn from softmax(logits / temperature), from the recipe's seed."""
    stop: Texts = ()
    """Texts that end an answer, besides the tokens that end the task's own answers; they are cut off."""


class TaskSection(RecipeSection):
    name: TaskName
    """Short name: letters, digits, `_ . -`. It stands in metrics, mixtures and overrides (tasks.NAME.weight=2)."""
    data: Annotated[str | SomeTexts, DATA]
    """File, glob, folder of `save_to_disk`, `hub:org/name`, `quickstart:TASK`; or a list of them.
    Relative to the recipe."""
    split: str | None = None
    """Split of a `hub:` or saved dataset that `data` names (null: train); `eval_data` takes validation, else test."""
    format: str | dict[str, str] = "auto"
    """How a row becomes prompt and response: a format's name, or {prompt: COLUMN, response: COLUMN}.
    `auto` looks at the columns."""
    template: str | SomeTexts | None = None
    """Jinja template over the columns (sandboxed) that gives the prompt; the response comes from `format`. Of a list of
    templates each row has one, drawn from `seed`."""
    system: str | None = None
    """System prompt of the rows that have no system (or developer) message of their own."""
    chat_template_kwargs: TemplateOptions = {}
    """What the chat template is given beside the messages, in training and evaluation: {enable_thinking: false}. A name
    that it does not read is an error."""
    shots: ShotsSection | None = None
    """Demonstrations (other rows with their answers) in front of each prompt, never learnt: {n: 3, retrieve: bm25}."""
    eval_data: Annotated[str | SomeTexts | None, DATA] = None
    """Held-out rows of this task, same format."""
    weight: NotNegative = 1.0
    """The user's weight of this task in the loss; multiplies the balancer's."""
    loss_on: Literal["all", "last"] = "all"
    """Which assistant turns of a row are learnt: all, or the last one of those that the row itself doesn't exclude."""
    row_weight: str | None = None
    """Column with how much a row counts: 0 (the row is not learnt), or a number from 0.000001 to 1,000,000."""
    thinking_weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """How much the tokens of an answer's thinking count, its opening tag included; the closing tag counts 1."""
    max_epochs: Positive | None = None
    """How often a row may be seen at the most. The plan refuses, or redistributes, what goes beyond."""
    limit: Annotated[int, Field(gt=0, le=10**12)] | None = None
    """Use only the first rows."""
    metrics: Metrics = ("loss", "token_accuracy", "exact_match")
    """What `mtft eval` reports for this task: names, {name: NAME, option: value}, {python: FILE.py:FUNCTION}
    (docs/tasks.md)."""
    generate: GenerateSection = GenerateSection()
    """How answers are made for metrics that look at answers."""
    auxiliary: bool = False
    """Trained, and its own figures are shown, but it counts in no mean, worst or verdict over the tasks."""

    @property
    def templates(self) -> tuple[str | None, ...]:
        """The templates that a row's one is drawn from; (None,) without any."""
        return self.template if isinstance(self.template, tuple) else (self.template,)
