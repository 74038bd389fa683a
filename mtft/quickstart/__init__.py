"""The embedded default: tiny base models and real code tasks from the installed Python. No network, no hub.

In a recipe, `quickstart:weak` and `quickstart:strong` name the models, and `quickstart:call` etc. the tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtft.quickstart.tasks import TaskFiles

MODELS = ("weak", "strong")
TASKS = ("call", "defaults", "pytest", "type", "naming", "docstring", "next_line", "code")


def model_path(size: str) -> Path:
    """The folder of a shipped base model, "weak" or "strong": loads with `AutoModelForCausalLM` and `AutoTokenizer`."""
    if size not in MODELS:
        raise ValueError(f"the quickstart has no model {size!r}: {' or '.join(MODELS)}")
    return Path(__file__).parent / "models" / size


def build_tasks(out_dir: str | Path) -> dict[str, TaskFiles]:
    """Write the rows of all tasks into `out_dir`, or find them there (see `mtft.quickstart.tasks.build`)."""
    from mtft.quickstart.tasks import build

    return build(out_dir)
