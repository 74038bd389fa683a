"""What a merge did: for the terminal, the run's report, and the card beside the adapter."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mtft.common.own_files import write_own


@dataclass
class MergeReport:
    """Outcome of one merge.

    energy: share of the squared Frobenius norm of the merged deltas that the exported rank holds, over all modules;
    worst: the module that lost most; modules: name -> {rank, energy, norm}; inputs: one dict per adapter.
    """

    out: Path
    method: str
    options: dict[str, object]
    scale: float
    rank: int
    energy: float
    worst: tuple[str, float]
    modules: dict[str, dict[str, float]] = field(repr=False)
    inputs: list[dict[str, Any]] = field(repr=False)
    settings: dict[str, object] = field(repr=False)
    warnings: list[str]
    seconds: float
    diagnostics: dict[str, object] | None = field(default=None, repr=False)

    def facts(self) -> dict[str, object]:
        """Everything that is the same whenever and wherever the merge runs (merge.json)."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "seconds")}

    def as_dict(self) -> dict[str, object]:
        """JSON-able, with the folder and the time."""
        return {"out": str(self.out), "seconds": self.seconds, **self.facts()}

    def text(self) -> str:
        """A few lines for the terminal."""
        names = ", ".join(f"{item['name']} x {item['weight']:g}" for item in self.inputs)
        lines = [
            f"merged {len(self.inputs)} adapters ({names}) by {self.method} in {self.seconds:.1f} s",
            f"rank {self.rank} holds {self.energy:.2%} of the merged deltas;"
            f" worst module {self.worst[0]}: {self.worst[1]:.2%}",
            *(f"warning: {text}" for text in self.warnings),
            f"wrote {self.out}",
        ]
        return "\n".join(lines)


def write_merge_card(folder: Path, report: MergeReport) -> None:
    """Write both files. Nothing in them depends on the time or on the output folder: same inputs, same bytes."""
    write_own(folder / "merge.json", report.facts(), indent=2)
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
