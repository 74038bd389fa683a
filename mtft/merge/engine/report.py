"""What a merge did: for the terminal, the card, and the run's report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


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
        facts = asdict(self)
        for key in ("out", "seconds"):
            del facts[key]
        return facts

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
