"""The sections of the page, in reading order: results, mixture, training, trials.

(Merge and fusion: merge_and_fuse.py.)
"""

from __future__ import annotations

import math
from statistics import fmean

from mtft.report.components import plots
from mtft.report.components.elements import (
    Code,
    Folded,
    HeaderCell,
    HtmlTable,
    PageSection,
    Paragraph,
    Plot,
    Plots,
    TableCell,
    TableRow,
    number,
    percent,
    table,
)
from mtft.report.components.run_data import RunData, TrainRunData

# metric -> (title, the better direction)
METRICS = {
    "loss": ("Held-out loss (nats per supervised token, lower is better)", -1),
    "token_accuracy": ("Token accuracy (greedy token = reference, higher is better)", 1),
    "exact_match": ("Exact match (greedy decoding gives the whole reference, higher is better)", 1),
}
_WORDS = {1: " (higher is better)", -1: " (lower is better)", 0: ""}
# Yardsticks that are not candidates for "best": another model, or one adapter per task.
REFERENCES = ("base", "single", "strong base", "strong tuned")


def results(run: RunData) -> PageSection | None:
    """One table a metric: tasks down, stages across, the mean last (without auxiliary tasks)."""
    if not run.results:
        return None
    stages = list(run.results)
    parts: list = [
        Paragraph(
            "Rows are tasks, columns are what was evaluated, all on the same held-out rows. Bold green is the best of "
            "the models that serve every task; grey columns are yardsticks."
        )
    ]
    scored = [task for task in run.tasks if any(task in stage for stage in run.results.values())]
    told = {metric for stage in run.results.values() for scores in stage.values() for metric in scores}
    names = sorted(told - {*METRICS, "examples", "tokens"})
    more = {name: (f"{name}{_WORDS[run.directions.get(name, 0)]}", run.directions.get(name, 0)) for name in names}
    for metric, (title, direction) in (METRICS | more).items():
        rows = {task: [run.results[stage].get(task, {}).get(metric) for stage in stages] for task in scored}
        if metric in more:  # the others are every task's
            rows = {task: row for task, row in rows.items() if any(value is not None for value in row)}
        if all(value is None for row in rows.values() for value in row):
            continue
        body = [_result_row(run.label(task), values, stages, direction) for task, values in rows.items()]
        counted = [values for task, values in rows.items() if task not in run.auxiliary]
        columns = list(zip(*counted, strict=True))
        means = [fmean(column) if all(value is not None for value in column) else None for column in columns]
        body.append(_result_row("mean over tasks", means, stages, direction, total=True))
        parts += [
            Paragraph(title, "heading"),
            HtmlTable([HeaderCell("task"), *(HeaderCell(stage, ref=stage in REFERENCES) for stage in stages)], body),
        ]
    return PageSection("results", "Results", parts)


def _result_row(name: str, values: list, stages: list[str], direction: int, total: bool = False) -> TableRow:
    candidates = [
        value for value, stage in zip(values, stages, strict=True) if value is not None and stage not in REFERENCES
    ]
    told = direction and len(set(candidates)) > 1
    best = max(candidates, key=lambda value: direction * value) if told else None
    cells = [TableCell(name)]
    for value, stage in zip(values, stages, strict=True):
        mark = "ref" if stage in REFERENCES else "best" if value is not None and value == best else ""
        cells.append(TableCell(number(value), mark))
    return TableRow(cells, total=total)


def mixture(run: RunData) -> PageSection | None:
    """Asked and realised shares of each joint run, and the verdict on the proposal."""
    several = [train for train in run.trains if train.plan and len(train.plan.get("tasks", {})) > 1]
    joints = [train for train in several if train.name != "strong"] or several  # strong plays what joint plays
    if not joints:
        return None
    parts: list = []
    if run.proposal.get("text"):
        parts.append(Paragraph(run.proposal["text"], "verdict"))
    bars = {
        task: {train.name: train.plan["tasks"][task]["asked"] for train in joints} for task in joints[0].plan["tasks"]
    }
    parts.append(Plots([Plot("Asked share of each task", plots.grouped_bars(bars))]))
    for train in joints:
        rows = [
            [task, percent(row["asked"]), percent(row["realised"]), row["rows"], row["size"], f"{row['epochs']:.2f}"]
            for task, row in train.plan["tasks"].items()
        ]
        parts += [
            Paragraph(f"{train.name}: {train.plan['steps']:,} steps of {train.plan['batch']:,} examples", "heading"),
            table(["task", "asked", "realised", "rows seen", "rows in the set", "epochs"], rows),
        ]
    return PageSection("mixture", "Mixture: asked and realised", parts)


def training(run: RunData) -> PageSection | None:
    """Losses and weights over the steps, and throughput."""
    trains = [train for train in run.trains if train.steps]
    if not trains:
        return None
    parts: list = []
    for train in (train for train in trains if len(train.tasks) > 1 or len(trains) == 1):
        parts += [Paragraph(train.name, "heading"), Plots(_training_plots(train))]
    rows = [
        [
            train.name,
            len(train.steps),
            sum(line.get("tokens") or 0 for line in train.steps),
            _digits(train.tokens_per_second, 0),
            _digits(sum(line.get("seconds") or 0.0 for line in train.steps), 1),
            train.steps[-1].get("loss"),
        ]
        for train in trains
    ]
    head = ["run", "steps", "tokens", "tokens/s", "seconds in steps", "last step's loss"]
    parts += [Paragraph("Throughput", "heading"), table(head, rows)]
    return PageSection("training", "Training", parts)


def _training_plots(train: TrainRunData) -> list[Plot]:
    losses = {task: train.curve(task, "loss") for task in train.tasks}
    held_out = {task: train.eval_curve(task, "loss") for task in train.tasks}
    window = max(1, len(train.steps) // 12)
    caption = "Training loss per task (line) and held-out loss (dots)"
    out = [Plot(caption, plots.line_plot(losses, ylabel="loss", points=held_out, smooth=window))]
    weights = {task: train.curve(task, "weight") for task in train.tasks}
    values = [value for _, y in weights.values() for value in y]
    if values and max(values) - min(values) > 1e-9:
        out.append(Plot("Weight of each task in the loss", plots.line_plot(weights, ylabel="weight")))
    if shares := train.share_curves:
        out.append(Plot("Share of each task, as mixture.online decided", plots.line_plot(shares, ylabel="share")))
    return out


def trials(run: RunData) -> PageSection | None:
    """What the surrogates make of the trials: predictions against measurements, and how far to trust them."""
    targets = run.fit.get("targets", {})
    if not targets:
        return None
    reasons = {name: target["unsaid"] for name, target in targets.items() if target.get("unsaid")}
    parts: list = []
    for why in dict.fromkeys(reasons.values()):
        parts.append(Paragraph(f"{', '.join(name for name in reasons if reasons[name] == why)}: {why}.", "verdict"))
    targets = {name: target for name, target in targets.items() if name not in reasons}
    if not targets:
        return PageSection("trials", "Trials and surrogates", parts)
    parts.append(
        Paragraph(
            "Each dot is a trial: its measured held-out loss against what a surrogate predicts that has not seen it "
            "(cross-validation by mixture), with the calibrated interval."
        )
    )
    drawn = []
    for name, target in list(targets.items())[:12]:
        points = target["trials"]
        columns = [[point[key] for point in points] for key in ("measured", "predicted", "lower", "upper")]
        if points:
            drawn.append(Plot(name, plots.prediction_plot(*columns)))
    parts.append(Plots(drawn))
    rows, every = [], []
    for name, target in targets.items():
        candidates = target["candidates"]
        chosen = sorted(
            (candidate for candidate in candidates if candidate["weight"] > 0.005),
            key=lambda candidate: -candidate["weight"],
        )
        used = ", ".join(f"{candidate['name']} {candidate['weight']:.2f}" for candidate in chosen[:3])
        used += f" + {len(chosen) - 3} more" if len(chosen) > 3 else ""
        quality = [
            _digits(target["rho"], 0),
            target["r2"],
            percent(target["coverage"], 0),
            target["noise_sd"],
            target["sd"],
        ]
        rows.append([name, target["n"], used or "none beats the mean", *quality])
        every += [
            [name, candidate["name"], _digits(candidate["rho"], 0), candidate["r2"], candidate["weight"]]
            for candidate in candidates
        ]
    head = [
        "target",
        "trials",
        "surrogates and weights",
        "Spearman × 100",
        "R²",
        "coverage",
        "noise sd",
        "sd over trials",
    ]
    parts.append(table(head, rows))
    parts.append(Folded("All candidates", table(["target", "surrogate", "Spearman × 100", "R²", "weight"], every)))
    return PageSection("trials", "Trials and surrogates", parts)


def _digits(value: float | None, digits: int) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def environment(run: RunData) -> PageSection | None:
    envs = [train.env for train in run.trains if train.env]
    parts: list = []
    if envs:
        flat = [[key, value] for key, value in _flat(envs[0]) if not isinstance(value, float) or math.isfinite(value)]
        parts.append(table(["what", "value"], flat[:40], words=True))
    if run.recipe:
        parts.append(Code("The recipe", run.recipe))
    return PageSection("environment", "Environment and recipe", parts) if parts else None


def _flat(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    out: list[tuple[str, object]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            out += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            out.append((f"{prefix}{key}", (" " if key == "command" else ", ").join(map(str, value)) or "none"))
        else:
            out.append((f"{prefix}{key}", value))
    return out
