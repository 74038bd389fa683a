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


def defect(content: Any) -> str | None:
    """What is wrong with the content of a ledger's line; None if nothing is, or if a newer version wrote it (v)."""
    if not isinstance(content, dict):
        return "it holds no object"
    version = content.get("v")
    if not isinstance(version, int) or isinstance(version, bool):
        return "key v is missing" if version is None else "key v is no whole number"
    if version > VERSION:
        return None
    for key, (kind, check) in _KEYS.items():
        if key not in content:
            if key in _ALWAYS:
                return f"key {key} is missing"
        elif not check(content[key]):
            return f"key {key} is no {kind}"
    if content["status"] not in ("done", "failed"):
        return f"key status is {content['status']!r}, neither done nor failed"
    if content.get("points", 1) < 1:
        return "key points is below 1"
    shares = content["mixture"].values()
    if abs(sum(shares) - 1) > SUM_TOLERANCE:
        return f"the mixture of trial {content['trial']} adds up to {sum(shares):.6g}, not 1"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _mapping(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


_ALWAYS = ("trial", "status", "mixture")
# What a line may hold, in words, and whether a value is such.
_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("trial", "status", "config", "time"), ("text", _is_text)),
    **dict.fromkeys(("model", "error"), ("text or null", _or_null(_is_text))),
    **dict.fromkeys(("scale", "tokens"), ("number or null", _or_null(_is_number))),
    **dict.fromkeys(("seed", "points"), ("whole number", _is_whole)),
    "steps": ("whole number or null", _or_null(_is_whole)),
    "progress": ("number", _is_number),
    "mixture": ("object of numbers", _mapping(lambda share: _is_number(share) and share >= 0)),
    **dict.fromkeys(("scores", "cost"), ("object of numbers and nulls", _mapping(_or_null(_is_number)))),
    "goal": ("object of texts", _mapping(_is_text)),
    "sizes": ("object of numbers, or null", _or_null(_mapping(_is_number))),
}


def finite(score: float | None) -> float | None:
    return float(score) if score is not None and math.isfinite(score) else None
