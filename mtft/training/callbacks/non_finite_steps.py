"""Steps that were skipped, and when a run that goes wrong is ended."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from mtft.common.atomic_io import finite
from mtft.common.errors import UserError


@dataclass
class NonFiniteSteps:
    """Steps that were skipped: `empty` (nothing supervised that counts) or `non-finite` (loss or gradient)."""

    most: int  # in a row, before a run is given up
    counts: dict[str, int] = field(default_factory=lambda: {"non-finite": 0, "empty": 0})
    in_a_row: int = 0

    def count(self, trouble: str) -> None:
        """One more of them, after the last ones or after a good one (which sets `in_a_row` to 0)."""
        self.in_a_row += 1
        self.counts[trouble] += 1

    def give_up(self, line: dict[str, Any], examples: list[dict[str, str]], run_dir: Path | None) -> NoReturn:
        """Ends the run. The step's metrics and examples go to bad-step-N.json in run_dir (None: nowhere)."""
        path = None if run_dir is None else run_dir / f"bad-step-{line['step']}.json"
        if path is not None:
            path.write_text(json.dumps({**finite(line), "examples": examples}, indent=1), encoding="utf-8")
        empty = line["skipped"] == "empty"
        why = "no supervised token that counts" if empty else "a loss or gradient that is not finite"
        raise UserError(
            f"{self.in_a_row} steps in a row had {why} (up to step {line['step']}; tasks {', '.join(line['tasks'])})",
            where=None if path is None else f"the examples of the last one: {path}",
            do="give the tasks a weight above 0"
            if empty
            else "lower train.learning_rate, use fp32 or bf16, and look at those examples",
        )
