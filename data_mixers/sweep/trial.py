"""A trial to be made, how an attempt at it ended, and the line that the ledger keeps of it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from data_mixers.mixture.mixture import SUM_TOLERANCE, Mixture

VERSION = 1
Goal = Literal["min", "max"]  # of a score: losses are minimised


@dataclass(frozen=True)
class Trial:
    """One run to be made: a mixture and a seed. `config` = SHA-256 of the recipe without its mixture."""

    mixture: Mixture
    seed: int = 0
    config: str = ""
    scale: float | None = None
    model: str | None = None
    steps: int | None = None
    tokens: int | None = None
    sizes: Mapping[str, int] | None = None
    goal: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """12 hex digits of SHA-256 of mixture, seed, config and scale."""
        shares = [repr(float(p)) for p in self.mixture.shares]
        key = [list(self.mixture.names), shares, self.seed, self.config, self.scale]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]


Points = list[tuple[float, dict[str, float]]]  # (progress, {target: score})
RunTrial = Callable[..., Points]  # of a Trial, and where a sweep may end trials early also of stop=StopRule


@dataclass(frozen=True)
class TrialOutcome:
    """How one attempt ended: points, or an error (one line: type and message; then the last lines of its trace)."""

    points: Points | None
    error: str | None
    seconds: float


Finish = Callable[[Trial, TrialOutcome], bool]  # what a backend tells of each attempt; True: try again


@dataclass(frozen=True)
class TrialRecord:
    """One line of the ledger."""

    trial: str
    status: Literal["done", "failed"]
    mixture: Mapping[str, float]
    progress: float = 1.0
    scores: Mapping[str, float | None] = field(default_factory=dict)
    goal: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    scale: float | None = None
    steps: int | None = None
    tokens: int | None = None
    seed: int = 0
    sizes: Mapping[str, int] | None = None
    cost: Mapping[str, float | None] = field(default_factory=dict)
    config: str = ""
    error: str | None = None
    time: str = ""
    points: int = 1
    v: int = VERSION

    def line(self) -> str:
        """JSON of this record; a non-finite score becomes null."""
        out = vars(self) | {"scores": {name: finite(score) for name, score in self.scores.items()}}
        for key in ("mixture", "goal", "cost", "sizes"):
            out[key] = None if out[key] is None else dict(out[key])
        return json.dumps(out, allow_nan=False)


def record_defect(content: Mapping[str, Any]) -> str | None:
    """What is wrong with the content of a line of a ledger; None: it may become a TrialRecord."""

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    mixture, scores = content["mixture"], content.get("scores", {})
    if not isinstance(content["trial"], str) or content["status"] not in ("done", "failed"):
        return "trial is no text, or status is neither done nor failed"
    if not isinstance(mixture, dict) or not all(number(share) and share >= 0 for share in mixture.values()):
        return f"the mixture of trial {content['trial']} holds more than shares >= 0"
    if abs(sum(mixture.values()) - 1) > SUM_TOLERANCE:
        return f"the mixture of trial {content['trial']} adds up to {sum(mixture.values()):.6g}, not 1"
    if not isinstance(scores, dict) or not all(score is None or number(score) for score in scores.values()):
        return f"a score of trial {content['trial']} is neither a number nor null"
    if not number(content.get("progress", 1.0)) or not isinstance(content.get("points", 1), int):
        return f"progress or points of trial {content['trial']} are no numbers"
    if not isinstance(content.get("goal", {}), dict) or not isinstance(content.get("config", ""), str):
        return f"goal or config of trial {content['trial']} are of another type"
    return None


def done_records(
    trial: Trial, points: Sequence[tuple[float, Mapping[str, float]]], seconds: float
) -> list[TrialRecord]:
    """The lines of a finished trial from its [(progress, {target: score})]."""
    common = _common(trial, seconds)
    scored = [(float(progress), {name: finite(score) for name, score in scores.items()}) for progress, scores in points]
    return [TrialRecord(status="done", progress=at, scores=s, points=len(points), **common) for at, s in scored]


def failed_record(trial: Trial, error: str, seconds: float) -> TrialRecord:
    """The line of a trial that broke."""
    return TrialRecord(status="failed", error=error, **_common(trial, seconds))


def _common(trial: Trial, seconds: float) -> dict[str, Any]:
    """What the record takes from the trial, whose fields it has all; what it cost, and when it is written."""
    return vars(trial) | {
        "trial": trial.id,
        "mixture": trial.mixture.as_dict(),
        "goal": dict(trial.goal),
        "cost": {"seconds": round(seconds, 3), "flops": None},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def finite(score: float | None) -> float | None:
    return float(score) if score is not None and math.isfinite(score) else None
