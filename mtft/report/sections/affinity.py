"""The section on how the tasks' gradients get on with each other: three heat maps and what they speak for."""

from __future__ import annotations

import math

from mtft.report.components import plots
from mtft.report.components.elements import PageSection, Paragraph, Plot, Plots, table
from mtft.report.components.run_data import RunData, TrainRunData

NOISY = (
    "The gradient of one step is noisy, which pulls cosines towards 0: compare pairs with each other rather than with "
    "1, or measure with loss.gradients.split: true."
)
SPLIT = "Measured on halves of each task's examples: noise widens these cosines, and does not pull them towards 0."


def affinity(run: RunData) -> PageSection | None:
    """One block for each training run that measured its tasks' gradients."""
    measured = [train for train in run.trains if len(train.affinity.get("tasks", [])) > 1]
    parts: list = []
    for train in measured:
        if len(measured) > 1:
            parts.append(Paragraph(train.name, "heading"))
        parts += _parts(train)
    return PageSection("affinity", "Affinity: which tasks pull together", parts) if parts else None


def _parts(train: TrainRunData) -> list:
    measured = train.affinity
    groups = measured.get("clusters", {}).get("groups", {})
    tasks = [task for group in groups.values() for task in group] or measured["tasks"]
    place = [measured["tasks"].index(task) for task in tasks]

    def matrix(name: str) -> list[list[float | None]]:
        return [[measured[name][i][j] for j in place] for i in place]

    blocks = [len(group) for group in groups.values()] if len(groups) > 1 else []
    transfer = matrix("transfer")
    off = [abs(value) for i, row in enumerate(transfer) for j, value in enumerate(row) if i != j and value is not None]
    widest = max(off, default=0.0) or 1.0
    unit = 10 ** math.floor(math.log10(widest))
    scaled = [[None if value is None else value / unit for value in row] for row in transfer]
    maps = [
        Plot("Cosine of the tasks' gradients: 1 (blue) the same direction, 0 unrelated, −1 (red) opposed",
             plots.heat_map(matrix("cosine"), tasks, blocks=blocks)),
        Plot("Conflict rate: share of the measurements in which the two pointed against each other",
             plots.heat_map(matrix("conflict_rate"), tasks, low=0, high=1, blocks=blocks)),
        Plot(f"Transfer, in units of {unit:.0e}: relative fall of the column's loss by a step on the row's task alone",
             plots.heat_map(scaled, tasks, low=-widest / unit, high=widest / unit, blocks=blocks,
                        ylabel="step on", xlabel="effect on the loss of")),
    ]  # fmt: skip
    parts: list = [
        Paragraph(_verdict(measured, groups), "verdict"),
        Paragraph(
            f"Mean of {measured['measures']} measurements, old ones fading (the last at step {measured['step']:,}). "
            f"{SPLIT if measured.get('split') else NOISY} Transfer is first order, for a plain gradient step; Adam's "
            "steps differ. A dash: never measured together.",
            "note",
        ),
        Plots(maps),
    ]
    curves = _norms(train, measured["tasks"])
    if curves:
        parts.append(Plots([Plot("Length of each task's gradient", plots.line_plot(curves, ylabel="gradient norm"))]))
    pairs = _pairs(measured)
    if pairs:
        parts += [Paragraph("Pairs that conflict most", "heading"),
                  table(["tasks", "cosine", "conflict rate", "measured together"], pairs)]  # fmt: skip
    return parts


def _verdict(measured: dict, groups: dict[str, list[str]]) -> str:
    if not groups:
        return f"{measured['measures']} measurements are too few to group the tasks (at least 5)."
    if len(groups) == 1:
        opposed = _opposed(measured)
        if opposed:
            return (
                f"No group of tasks stands apart from the others, but these point against each other too often for "
                f"chance: {'; '.join(opposed)}."
            )
        return (
            "No group of tasks stands apart from the others: nothing here speaks for training tasks apart, "
            "or for gradient surgery."
        )
    named = "; ".join(", ".join(group) for group in groups.values())
    score = measured["clusters"].get("silhouette")
    clear = "" if score is None else f" (silhouette {score:.2f}; above 0.5 is clear, below 0.25 is noise)"
    guessed = measured["clusters"].get("guessed")
    unsure = f" Pairs never measured together count as unrelated here ({len(guessed)})." if guessed else ""
    return (
        f"Groups whose gradients pull together: {named}{clear}.{unsure} Worth a try: one adapter a group, then "
        "`mtft merge`; or `loss.balancer.groups` with the path of this run's affinity.json."
    )


def _opposed(measured: dict) -> list[str]:
    """Pairs whose conflict rate is three standard deviations or more above a coin's."""
    tasks, out = measured["tasks"], []
    for i in range(len(tasks)):
        for j in range(i + 1, len(tasks)):
            rate, times = measured["conflict_rate"][i][j], measured["measured_together"][i][j]
            if rate is not None and (rate - 0.5) * 2 * math.sqrt(times) >= 3:
                out.append(f"{tasks[i]} and {tasks[j]} ({rate:.0%} of {times})")
    return out


def _norms(train: TrainRunData, tasks: list[str]) -> dict[str, tuple[list[int], list[float]]]:
    """{task: (steps, gradient norms)} from the measured steps of metrics.jsonl."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for task in tasks:
        points = [(line["step"], line.get("gradients", {}).get("norm", {}).get(task)) for line in train.steps]
        finite = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
        if len(finite) > 1:
            curves[task] = ([step for step, _ in finite], [value for _, value in finite])
    return curves


def _pairs(measured: dict, most: int = 10) -> list[list[object]]:
    """The pairs with the lowest cosines, if below 0."""
    tasks, cosine = measured["tasks"], measured["cosine"]
    pairs = [
        (cosine[i][j], i, j)
        for i in range(len(tasks))
        for j in range(i + 1, len(tasks))
        if cosine[i][j] is not None and cosine[i][j] < 0
    ]
    return [
        [f"{tasks[i]} – {tasks[j]}", value, measured["conflict_rate"][i][j], measured["measured_together"][i][j]]
        for value, i, j in sorted(pairs)[:most]
    ]
