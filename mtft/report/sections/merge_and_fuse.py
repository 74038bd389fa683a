"""The sections on what happens after training: the merged adapter, and the strong model that a small one steers."""

from __future__ import annotations

from mtft.report.components import plots
from mtft.report.components.elements import PageSection, Paragraph, Plot, Plots, Tokens, TokenSpan, percent, table
from mtft.report.components.run_data import RunData
from mtft.report.sections.pareto import front_caption, front_svg


def merging(run: RunData) -> PageSection | None:
    """Retention of each task, and how the single-task adapters get on with each other."""
    tasks = run.retention.get("tasks", {})
    if not tasks:
        return None
    parts: list = [
        Paragraph(
            f"Method: {run.retention['method']}{_rank(run.retention)}. "
            "Retained share = (base − merged) / (base − single) of the held-out loss, the same of the accuracy: "
            "1 keeps all that the single-task adapter had learnt, 0 is the base model. "
            "With 95 % paired-bootstrap intervals over the examples."
        )
    ]
    titles = {"loss": "Held-out loss", "accuracy": "Token accuracy"}
    answered = dict.fromkeys(key for row in tasks.values() for key in row if key not in (*titles, "exact_match"))
    for metric, title in (titles | {key: key for key in answered}).items():
        rows = [[run.label(task), *_retained(row[metric])] for task, row in tasks.items() if metric in row]
        parts += [Paragraph(title, "heading"), table(["task", "base", "single", "merged", "retained share"], rows)]
    retained = {task: row["loss"]["retained"]["value"] for task, row in tasks.items()}
    drawn = [Plot("Share of the single-task adapter's gain in loss that the merged adapter keeps", _bars(retained))]
    cosines = run.retention.get("cosines")
    if cosines and len(cosines["names"]) > 1:
        caption = "Cosine between the adapters' updates, over all modules"
        drawn.append(Plot(caption, plots.heat_map(cosines["values"], cosines["names"])))
    parts.append(Plots(drawn))
    if run.retention.get("interference"):
        rows = [[name, run.retention["norms"][name], value] for name, value in run.retention["interference"].items()]
        text = (
            "Norm of each adapter's update, and its interference: how wrong the merged update is on the inputs that "
            "this adapter reacts to, as a share of its norm. 0 is the adapter alone; 1 and more is as if it were gone."
        )
        parts += [Paragraph(text), table(["adapter", "norm", "interference"], rows)]
    if run.front:
        caption = f"Trade-offs between the tasks: held-out loss of {front_caption(run.front)}"
        parts += [Plots([Plot(caption, front_svg(run.front))]), Paragraph(f"Search: {run.front['verdict']}.", "note")]
    if run.retention.get("energy") is not None:
        kept_energy = percent(run.retention["energy"], 2)
        text = f"The merged adapter's rank keeps {kept_energy} of the exact merge's squared singular values."
        parts.append(Paragraph(text, "note"))
    return PageSection("merge", "Merge: what one adapter keeps", parts)


def _rank(retention: dict) -> str:
    return "" if retention.get("rank") is None else f", rank {retention['rank']}"  # arrow merges nothing


def fusion(run: RunData) -> PageSection | None:
    """Gap closed by the fused model, the rule's alphas, and one generated text with each token's alpha in colour."""
    fused = run.fusion
    if not fused.get("gap"):
        return None
    parts: list = [
        Paragraph(
            f"Rule: {fused['rule']}. Gap closed = (fused − strong) / (tuned − strong): 0 is the strong model alone, "
            "1 the strong model tuned itself. The ratio is fused / tuned, the figure that the fusion literature prints."
        )
    ]
    rows = []
    for task, metrics in fused["gap"].items():
        for metric, row in metrics.items():
            low, high = row["gap_interval"] or (None, None)
            gap = _range({"value": row["gap"], "lower": low, "upper": high, "why": row["reason"]})
            if row["gap"] is None and row["strong"] == row["fused"] == row["tuned"]:
                continue  # nothing moved: nothing to say
            rows.append([run.label(task), metric, row["strong"], row["fused"], row["tuned"], gap, row["ratio"]])
    parts.append(table(["task", "metric", "strong alone", "fused", "strong tuned", "gap closed", "ratio"], rows))
    alpha = fused.get("alpha", {})
    if alpha:
        quantiles = ", ".join(f"{float(q):.0%} {value:.2f}" for q, value in alpha["alpha_quantiles"].items())
        shares = f"clipped {percent(alpha['clipped_share'])}, flat {percent(alpha['flat_share'])}"
        mean = f"mean {alpha['alpha_mean']:.2f}, quantiles {quantiles}"
        text = f"alpha over {alpha['positions']:,} positions: {mean}; {shares}."
        parts.append(Paragraph(text, "note"))
    for sample in fused.get("samples", []):
        parts.append(Paragraph(f"{sample['task']}: a held-out prompt, decoded greedily", "heading"))
        parts.append(Paragraph("Stronger colour: the small model moved the strong one further (larger alpha).", "note"))
        top = max((token["alpha"] for token in sample["tokens"]), default=0.0) or 1.0
        parts.append(Tokens([TokenSpan(sample["prompt"], 0.0, "prompt")]))
        parts.append(
            Tokens(
                [
                    TokenSpan(t["text"], round(0.75 * t["alpha"] / top, 3), f"alpha {t['alpha']:.2f}")
                    for t in sample["tokens"]
                ]
            )
        )
        if sample.get("strong"):
            parts.append(Paragraph("The strong model alone wrote:", "note"))
            parts.append(Tokens([TokenSpan(sample["strong"], 0.0, "strong model alone")]))
    return PageSection("fusion", "Fusion: a small model steers a large one", parts)


def _retained(row: dict) -> list:
    return [row["base"], row["single"], row["merged"], _range(row["retained"])]


def _range(row: dict) -> str:
    """`0.85 [0.80, 0.91]`, or the reason why there is no number."""
    if row.get("value") is None:
        return row.get("why") or "–"
    text = f"{row['value']:.2f}"
    if row.get("lower") is not None:
        text += f" [{row['lower']:.2f}, {row['upper']:.2f}]"
    return text


def _bars(values: dict) -> str:
    known = {name: value for name, value in values.items() if value is not None}
    return plots.bar_plot(known, xlabel="retained share", reference=1.0)
