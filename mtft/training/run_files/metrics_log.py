"""What a run says while it trains: metrics.jsonl, eval.jsonl and a progress line. Only on the rank that writes.

One line of metrics.jsonl is one optimizer step:

    {"step": 12, "loss": 1.83, "learning_rate": 2e-4, "grad_norm": 0.7, "tokens": 8190, "supervised": 2210,
     "seconds": 0.41, "tokens_per_second": 19975.0, "tasks": {"sql": {"loss": 1.2, "weight": 1.0, "share": 0.4,
     "loss_share": 0.33, "tokens": 700, "examples": 12}, ...}}

`share` is the task's part of the step's examples (of its tokens, with unit tokens); `loss_share` its part of the loss;
a task's `tokens` are the supervised ones. A loss is null where the task has no supervised token in the step.
A step whose task gradients were measured also has "gradients": {"norm": {"sql": 0.3, ...}, "gram": [[...], ...]} (rows
and columns in the order of the tasks, null where absent), with "alpha": {"sql": 0.5, ...} if it followed a mix of them;
with loss.gradients.split also "halves": {"sql": 0.05, ...}, the squared lengths without noise (one step's may be < 0).
With mixture.online a step after which the shares change has "mixture": {"from": 21, "shares": {"sql": 0.4, ...},
"wanted": {...}}: the first step that has them, and what the method asked for; "notes": [...]: what bounds gave way.
One line of eval.jsonl: {"step": 12, "tasks": {"sql": {"loss": ..., "token_accuracy": ..., "exact_match": ..., ...}}}.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from mtft.common.atomic_io import finite, write_text
from mtft.common.long_work import SILENCE, LongWork, duration
from mtft.common.run_history import EVALS, METRICS, evaluated_steps, read_history
from mtft.data.batching.batches import StepContent

MINUTE = 60.0
MOST_TASKS, WORST = 20, 5  # whose losses are shown in one line; of more tasks so many


class MetricsLog:
    """Appends to the two files of `run_dir` (None: writes nothing) and draws the progress bar (`quiet`: none)."""

    def __init__(self, run_dir: Path | None, *, steps: int, quiet: bool = False) -> None:
        self.run_dir, self.steps, self.quiet = run_dir, steps, quiet
        self.console = Console(stderr=True, quiet=quiet)
        self._bar: Progress | None = None
        self.eval_every: int | None = None  # when the run evaluates, beside its last step
        self.eval_on_start = False
        self._told = time.monotonic()  # when a step's line was last shown
        self._work: LongWork | None = None  # what is under way, where it is told of
        self._new_work: Callable[[], LongWork] | None = None
        self._begun = 0.0

    def say(self, text: str) -> None:
        """One line for the person who watches; that the terminal is gone ends no run."""
        with suppress(OSError):
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, step: int) -> None:
        """Forgets what was logged after `step` (a resumed run logs those steps again) and shows the bar.

        Says what is wrong with the lines before it.
        """
        for name in (METRICS, EVALS):
            # from the start: nothing is kept, step 0 is evaluated again
            self._cut(name, step or -1, self._expected(name, step) if step else ())
        if self.quiet or not self.console.is_terminal:
            return
        columns = [TextColumn("train"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA")]
        columns += [TimeRemainingColumn(), TextColumn("{task.fields[losses]}")]
        self._bar = Progress(*columns, console=self.console, refresh_per_second=4)
        self._bar.add_task("train", total=self.steps, completed=step, losses="")
        self._bar.start()

    def history(self, step: int) -> list[str]:
        """What is wrong with the lines up to `step`: damaged, doubled, missing. UserError if a file can't be read."""
        if self.run_dir is None:
            return []
        both = [(self.run_dir / name, self._expected(name, step)) for name in (METRICS, EVALS)]
        return [problem for path, expected in both for problem in read_history(path, expected, until=step).problems]

    def _expected(self, name: str, step: int) -> Sequence[int]:
        evals = name == EVALS
        return evaluated_steps(step, self.eval_every, at_start=self.eval_on_start) if evals else range(1, step + 1)

    def begin_step(self, step: int, micro_batches: int, tokens: int, *, first: bool) -> None:
        """Optimizer step `step` begins; the first one of a process says what it is about to do."""
        if self.quiet:
            return
        what = f"step {step}/{self.steps}: micro-batch"
        if first:
            held = f"{micro_batches} micro-batch{'es' if micro_batches != 1 else ''}, {tokens:,} tokens"
            self.say(f"step {step}/{self.steps} begins: {held} on this process")
        left = self.steps - step + 1
        steps = f"the {left} steps that are left" if left > 1 else "the one step that is left"
        total: Callable[[float], str] = lambda one: f"{steps}: about {duration(left * one)}"  # noqa: E731
        self._begun, self._new_work = time.monotonic(), partial(LongWork, self.say, what, first=first, total=total)
        self._work = self._new_work() if first else None  # of the others only those that last

    def micro_batch(self, done: int, of: int) -> None:
        """So many of the step's micro-batches are done."""
        if self._work is None and self._new_work is not None and time.monotonic() - self._begun >= SILENCE:
            self._work = self._new_work()
            self._work.begin = self._work.said = self._begun
        if self._work is not None:
            self._work(done, of)

    def step(self, line: dict[str, Any]) -> None:
        """One optimizer step is done."""
        self._append(METRICS, line)
        losses = task_losses(line["tasks"])
        if self._bar is not None:
            with suppress(OSError):
                self._bar.update(self._bar.task_ids[0], completed=line["step"], losses=losses)
        elif not self.quiet and self._due(line["step"]):
            rate = f", {line['tokens_per_second']:,.0f} tokens/s" if line["tokens_per_second"] else ""
            self.say(f"step {line['step']}/{self.steps}: loss {_short(line['loss'])} ({losses}){rate}")

    def _due(self, step: int) -> bool:
        """Whether this step's line is shown: every tenth of the run, and once a minute."""
        due = step == self.steps or step % max(1, self.steps // 10) == 0 or time.monotonic() - self._told > MINUTE
        if due:
            self._told = time.monotonic()
        return due

    def evaluating(self, step: int, tasks: int, *, first: bool) -> LongWork | None:
        """An evaluation begins; what to tell of its progress. None: nobody is listening."""
        if self.quiet:
            return None
        what = f"step {step}: held-out examples"
        if first:
            self.say(f"{what} of {tasks} task{'s' if tasks != 1 else ''} are scored")
        return LongWork(self.say, f"{what}:", first=first)

    def answering(self, step: int) -> LongWork | None:
        """Answers to held-out prompts are generated; what to tell of its progress."""
        return None if self.quiet else LongWork(self.say, f"step {step}: answers to held-out prompts:", first=False)

    def evaluation(self, step: int, tasks: dict[str, dict[str, float]]) -> None:
        """Held-out scores of each task; a run that died after its last step takes them again, and replaces the line."""
        if self.run_dir is not None:
            self._cut(EVALS, step - 1, quiet=True)
        self._append(EVALS, {"step": step, "tasks": tasks})
        self.say(f"step {step}: held-out loss {task_losses(tasks)}")

    def close(self) -> None:
        if self._bar is not None:
            bar, self._bar = self._bar, None
            with suppress(OSError):
                bar.stop()

    def _cut(self, name: str, step: int, expected: Sequence[int] = (), *, quiet: bool = False) -> None:
        """Keeps one line of each step up to `step`; says what is wrong with them, and what goes."""
        path = self.run_dir and self.run_dir / name
        if path is None or not (path.exists() or expected):
            return
        history = read_history(path, expected, until=step)
        if not quiet and step >= 0:
            for problem in history.problems:
                self.say(f"warning: {problem}; the weights are not concerned")
            later = sum(known > step for known in history.by_step)
            if later:
                self.say(f"{name}: {later} line{'s' if later > 1 else ''} after step {step} are logged again")
        write_text(path, "".join(f"{_as_json(row)}\n" for row in history.up_to(step)))

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if self.run_dir is not None:
            with (self.run_dir / name).open("a", encoding="utf-8") as file:
                file.write(_as_json(line) + "\n")


def step_line(
    step: int,
    tasks: Sequence[str],
    held: StepContent,
    learning_rate: float,
    loss: float,
    loss_K: Tensor,
    w_K: Tensor,
    share_K: Tensor,
    supervised_K: Tensor,
) -> dict[str, Any]:
    """A line of metrics.jsonl, before gradient norm and time are known. `share_K`: each task's part of the loss."""
    values = {
        task: {
            "loss": float(loss_K[k]),
            "weight": float(w_K[k]),
            "share": float(held.share_K[k]),
            "loss_share": float(share_K[k]),
            "tokens": int(supervised_K[k]),
            "examples": int(held.examples_K[k]),
        }
        for k, task in enumerate(tasks)
    }
    return {
        "step": step,
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": None,
        "tokens": int(held.tokens_K.sum()),
        "supervised": int(supervised_K.sum()),
        "tasks": values,
    }


def task_losses(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """`sql 0.412  chat 1.207`; of more than MOST_TASKS tasks those with the highest losses. Files have them all."""
    shown = list(tasks)
    if len(shown) > MOST_TASKS:
        known = [task for task in shown if tasks[task]["loss"] is not None and not math.isnan(tasks[task]["loss"])]
        shown = sorted(known, key=lambda task: -tasks[task]["loss"])[:WORST]
    text = "  ".join(f"{task} {_short(tasks[task]['loss'])}" for task in shown)
    return text if len(shown) == len(tasks) else f"highest: {text}, and {len(tasks) - len(shown):,} more tasks"


def flat(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """{"loss": 1, "tasks": {"sql": {"loss": 2}}} -> {"loss": 1, "sql/loss": 2}, finite numbers only, for trackers."""
    out = {f"{prefix}{key}": value for key, value in line.items() if key not in ("tasks", "step")}
    for task, values in line["tasks"].items():
        out |= {f"{prefix}{task}/{key}": value for key, value in values.items()}
    return {key: value for key, value in out.items() if isinstance(value, int | float) and math.isfinite(value)}


def _as_json(line: dict[str, Any]) -> str:
    try:
        return json.dumps(line, allow_nan=False)
    except ValueError:  # a loss that is not finite: rare
        return json.dumps(finite(line), allow_nan=False)


def _short(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"
