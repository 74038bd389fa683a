"""Writes docs/recipe.md from the schema, so that the reference can't differ from what is checked.

python scripts/make_recipe_docs.py          write it
python scripts/make_recipe_docs.py --check  exit 1 if it is not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mtft.recipe.compatibility import TABLE
from mtft.recipe.error_messages import describe
from mtft.recipe.schema.data import DataSection
from mtft.recipe.schema.fuse import FuseSection
from mtft.recipe.schema.lora import LoraSection
from mtft.recipe.schema.loss import (
    BalancerSection,
    FlatMinimaSection,
    GradientSection,
    LossSection,
    SampleWeightsSection,
)
from mtft.recipe.schema.merge import Experts, GateTraining, MergeSection, ModuleRule, WeightSearch
from mtft.recipe.schema.metric import NamedMetricSection, PythonMetricSection
from mtft.recipe.schema.mixture import GroupSection, MixtureSection, OnlineSection, ScheduleStop
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.output import OutputSection
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.run import RunSection
from mtft.recipe.schema.section import RecipeSection
from mtft.recipe.schema.shots import DemonstrationRows, ShotsSection
from mtft.recipe.schema.sweep import SweepSection
from mtft.recipe.schema.task import TaskSection
from mtft.recipe.schema.train import TrainSection

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"

SECTIONS: dict[str, tuple[type[RecipeSection], str]] = {
    "top level": (Recipe, "A recipe is one YAML file. `name`, `model`, `tasks`, `train` and `output` must be there."),
    "model": (ModelSection, "The base model. Also the form of `sweep.model`, `fuse.strong` and `fuse.base`."),
    "tasks": (TaskSection, "A list; one item per task."),
    "tasks.shots": (ShotsSection, ""),
    "tasks.shots.from": (DemonstrationRows, ""),
    "tasks.metrics": (NamedMetricSection, "A name, or one of the two forms below ([tasks.md](tasks.md#metrics))."),
    "tasks.metrics.python": (PythonMetricSection, ""),
    "data": (DataSection, "What tokenises the rows ([data.md](data.md#what-tokenises-the-rows-data))."),
    "mixture": (MixtureSection, "Which share of which task."),
    "mixture.shares.schedule": (ScheduleStop, "A list of stops, in their order."),
    "mixture.groups.NAME": (GroupSection, ""),
    "mixture.online": (OnlineSection, ""),
    "lora": (LoraSection, "The adapter; `lora: null` is full fine-tuning. Also the form of `sweep.lora`."),
    "loss": (LossSection, "What is minimised."),
    "loss.balancer": (BalancerSection, "Beside `name`, the options of that balancer."),
    "loss.gradients": (GradientSection, ""),
    "loss.gradients.flat": (FlatMinimaSection, ""),
    "loss.sample_weights": (SampleWeightsSection, ""),
    "train": (TrainSection, "Length, batches, optimizer."),
    "output": (OutputSection, "What is written where."),
    "sweep": (SweepSection, ""),
    "merge": (MergeSection, "Several adapters into one."),
    "merge.search": (WeightSearch, ""),
    "merge.gates": (GateTraining, ""),
    "merge.experts": (Experts, ""),
    "merge.per_module": (ModuleRule, "A list; the first rule that matches counts."),
    "fuse": (FuseSection, "A small tuned model steers a large one."),
    "run": (RunSection, ""),
}

HEAD = """\
# The recipe

<!-- Made by scripts/make_recipe_docs.py from mtft/recipe/schema: change the docstrings there, then run it. -->

One YAML file says what a run does. Read as YAML 1.2: `1e-4` is a number, `no` is a text.
`mtft check RECIPE` says what a recipe would do and everything that is wrong with it; `mtft schema` prints the JSON
schema, from which editors complete.

- Unknown keys are errors, at any depth; all errors come at once, each with its line and the nearest known key.
- `key=value` on the command line changes a key: `train.steps=100`, `tasks.sql.weight=2`, `tasks.0.weight=2`,
  `lora=null`, `train.steps=` (null). The value is read as YAML.
- Inputs (data, models, adapters, mixture files) are relative to the recipe's folder; outputs (`output.dir`,
  `merge.out`) to the working directory. A model is a folder if it starts with `/`, `./`, `../` or `~`, or if there is
  such a folder beside the recipe; else it is a hub name.
"""


def default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, RecipeSection):
        return "its defaults"
    if field.default is None:
        return "null"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    if isinstance(field.default, tuple):
        return f"[{', '.join(field.default)}]"
    return str(field.default)


def kind(field: FieldInfo) -> str:
    annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    words = describe(annotation)
    for title, (section, _) in SECTIONS.items():
        words = words.replace(describe(section), f"[{title}](#{title.replace('.', '')})")
    return words


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def page() -> str:
    parts = [HEAD]
    for title, (section, words) in SECTIONS.items():
        parts.append(f"\n## {title}\n")
        parts.append(f"{words or cell(section.__doc__ or '')}\n")
        parts.append("| key | what it may be | default | meaning |\n|---|---|---|---|")
        for name, field in section.model_fields.items():
            parts.append(
                f"| `{name}` | {cell(kind(field))} | {cell(default(field))} | {cell(field.description or '')} |"
            )
    parts.append("\n## What can't go together\n")
    parts.append("Refused before anything is loaded, by `mtft check` and by the commands named.\n")
    parts.append("| keys | commands | why | what to do |\n|---|---|---|---|")
    for row in (row for row in TABLE if row.fatal):
        parts.append(f"| {cell(row.keys)} | {', '.join(row.stages)} | {cell(row.why)} | {cell(row.do)} |")
    parts.append("\nAllowed, with a warning:\n")
    parts.append("| keys | why | what to do |\n|---|---|---|")
    parts += [f"| {cell(row.keys)} | {cell(row.why)} | {cell(row.do)} |" for row in TABLE if not row.fatal]
    return "\n".join(parts) + "\n"


def main() -> int:
    if "--check" in sys.argv[1:]:
        fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        print(f"{PAGE.name} is {'up to date' if fresh else 'old: run python scripts/make_recipe_docs.py'}")
        return 0 if fresh else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
