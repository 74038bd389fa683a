"""What scripts/check_gpu.py has found, as a page and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from gpu_checks import Line


@dataclass
class Row:
    """A line of the page with what it belongs to."""

    check: str
    line: Line
    seconds: float = 0.0


@dataclass
class Page:
    """Everything that was found."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def code(self) -> int:
        return 1 if any(row.line.verdict == "MISS" for row in self.rows) else 0

    def counts(self) -> dict[str, int]:
        verdicts = [row.line.verdict for row in self.rows]
        return {verdict: verdicts.count(verdict) for verdict in ("PASS", "MISS", "SKIP", "INFO")}

    def text(self) -> str:
        known = self.facts
        memory = f", {known['card_gib']:.0f} GiB" if known.get("card_gib") else ""
        head = f"{known.get('card', 'no worker answered')}{memory}; torch {known.get('torch', '?')}"
        head += f", Python {known.get('python', '?')}, {known.get('cpus', '?')} CPUs"
        wide = max((len(row.line.what) for row in self.rows), default=0)
        out, last = [head], None
        for row in self.rows:
            if row.check != last:
                out += ["", row.check]
                last = row.check
            line = row.line
            figure = "" if line.figure is None else f"{line.figure:.3g}"
            bar = "" if line.bar is None else f"bar {line.bar:.3g}"
            text = f"  {line.verdict}  {line.what:{wide}}  {figure:>9}  {bar:10}  {row.seconds:5.1f} s  {line.note}"
            out.append(text.rstrip())
        told = ", ".join(f"{count} {verdict}" for verdict, count in self.counts().items() if count)
        return "\n".join([*out, "", f"{told} in {self.seconds:.0f} s"])

    def as_dict(self) -> dict[str, Any]:
        rows = [{"check": row.check, "seconds": round(row.seconds, 2), **asdict(row.line)} for row in self.rows]
        return {"facts": self.facts, "counts": self.counts(), "seconds": round(self.seconds, 1), "lines": rows}
