"""README.md and merge.json beside a merged adapter: what went in, what was done, what was lost."""

from __future__ import annotations

import json
from pathlib import Path

from mtft.merge.engine.report import MergeReport


def write_merge_card(folder: Path, report: MergeReport) -> None:
    """Write both files. Nothing in them depends on the time or on the output folder: same inputs, same bytes."""
    facts = report.facts()
    (folder / "merge.json").write_text(json.dumps(facts, indent=2, ensure_ascii=True, allow_nan=False) + "\n", "utf-8")
    (folder / "README.md").write_text(_readme(report), "utf-8")


def _readme(report: MergeReport) -> str:
    base = report.inputs[0]["base"]
    head = [
        "---",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        "library_name: peft",
        "tags: [lora, merge]",
        "---",
    ]
    options = f" ({', '.join(f'{key} = {value}' for key, value in report.options.items())})" if report.options else ""
    rows = []
    for item in report.inputs:
        cells = [_cell(item["name"]), f"{item['weight']:g}", item["r"], f"{item['alpha']:g}", item["rslora"]]
        rows.append(f"| {' | '.join(map(str, cells))} | `{item['sha256'][:16]}` |")
    lines = [
        *head,
        "",
        "# Merged LoRA adapter",
        "",
        f"Method `{report.method}`{options}, scale {report.scale:g}, rank {report.rank}.",
        f"The adapter holds {report.energy:.2%} of the squared norm of the merged deltas;"
        f" worst module: `{report.worst[0]}`, {report.worst[1]:.2%}.",
        "",
        "| adapter | weight | r | alpha | rsLoRA | SHA-256 |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "All settings, hashes and the energy of every module are in `merge.json`.",
    ]
    if report.warnings:
        lines += ["", "Warnings:", "", *(f"- {_cell(text)}" for text in report.warnings)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Names come from folders: keep them from breaking the table."""
    return "".join(c for c in text if c.isprintable()).replace("|", "/").replace("<", "(")[:300]
