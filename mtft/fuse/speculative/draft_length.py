"""How many tokens to draft: the length n with the lowest expected time per token, from measured times and acceptance.

    tokens of a round  E = (1 - beta^(n+1)) / (1 - beta)
    time of a round    (n + beta^n) e + v(n + 1)

beta = chance that a draft is accepted, e = one step of the drafting expert, v(n) = one pass of the other models over n
positions. n = 0 is plain decoding, whose time is measured by itself. E takes drafts as independent of each other; where
hits come in runs (a long list, then a change of subject) fewer tokens stand, so E is scaled by what rounds gave. A
round has costs that this formula does not know (caches that are cut and put together, masks): it is scaled by what
whole rounds took. And it is only a forecast: what rounds have lost against plain decoding is counted, and when it is
more than a small share of the time so far, decoding goes on plainly until it is that small share again.
"""

from __future__ import annotations

from collections import defaultdict, deque
from functools import partial
from statistics import median

WINDOW = 32  # rounds that the times are taken from
ENOUGH = 4  # rounds before their yield is believed
PATIENCE = 16  # rounds between two changes; the first three come after 4, 4 and 8
MEMORY = 0.9  # of beta, per round
MARGIN = 0.95  # of a plain step's time: a smaller gain is as likely noise in the times, and would be a loss
PER_POSITION = 0.05  # guess: each further position of a pass costs this share, until it has been measured
LOSS = 0.02  # of the time so far that rounds may have lost; beyond, decoding is plain
FIRST = 2  # drafts of the first round
CREDIT = 2.0  # plain steps: what rounds have gained counts against later losses so far only
_recent_times = partial(deque[float], maxlen=WINDOW)


class DraftLength:
    """A fixed length, or `auto`: 0 ... maximum, starting with plain decoding to learn beta without drafting."""

    def __init__(self, fixed: int | None = None, maximum: int = 6, draft_share: float = 0.2) -> None:
        """draft_share: guess of e as a share of a plain step, until it has been measured."""
        self.fixed, self.maximum, self.draft_share = fixed, maximum, draft_share
        self.current = 0 if fixed is None else fixed
        self.beta: float | None = None
        self._judged = self._accepted = 0.0  # fading sums: a few looks count fully from the start
        self.plain, self.draft = _recent_times(), _recent_times()
        self.verify: defaultdict[int, deque[float]] = defaultdict(_recent_times)  # by positions of the pass
        self.yields: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # tokens of a round: counted, and expected
        self.overhead: deque[float] = _recent_times()  # time of a whole round / what the formula says
        self.spent = self.lost = 0.0  # seconds so far, and how many of them plain decoding would have saved
        self.rounds = self.drafted = self.accepted = 0
        self._changes, self._since, self._patience = 0, 0, 4  # the first choice comes after four plain steps

    def warm_start(self, other: DraftLength) -> None:
        """Begin with the times and the acceptance of an earlier call with as many rows."""
        if other.beta is None or not other.plain:
            return
        self._judged, self._accepted, self.beta = other._judged / 2, other._accepted / 2, other.beta
        self.plain, self.draft, self.verify = other.plain.copy(), other.draft.copy(), other.verify.copy()
        self.yields, self.overhead = other.yields.copy(), other.overhead.copy()
        self.spent, self.lost = other.spent / 2, other.lost / 2
        self._changes = 1
        self.current = self._affordable(self._best())

    def record_acceptance(self, tests: float, accepted: float) -> None:
        """Acceptance of one round: how many drafts were judged (or would have been), and how many stood."""
        if tests > 0:
            self._judged = MEMORY * self._judged + tests
            self._accepted = MEMORY * self._accepted + accepted
            self.beta = self._accepted / self._judged

    def record_times(
        self,
        length: int,
        *,
        plain: float = 0.0,
        draft: float = 0.0,
        verify: float = 0.0,
        tokens: float | None = None,
        total: float | None = None,
    ) -> None:
        """Seconds of one round: `plain` for length 0, else one drafting step and one verification.

        tokens: per row; total: of the whole round.
        """
        self.rounds += 1
        self._since += 1
        if length == 0:
            self.plain.append(plain)
            self.spent += plain
            return
        if total is not None and tokens is not None and self.plain:
            step = median(self.plain)
            self.spent += total
            self.lost = max(self.lost + total - tokens * step, -CREDIT * step)
            extra = draft if tokens > length else 0.0
            self.overhead.append(total / max(length * draft + verify + extra, 1e-9))
        self.draft.append(draft)
        self.verify[length + 1].append(verify)
        if tokens is not None:
            self.yields.append((tokens, self._expected_tokens(length)))

    def next(self) -> int:
        """The length of the next round."""
        if self.fixed is not None or self.beta is None or not self.plain:
            return self.current
        if self._since >= self._patience or self._affordable(self.current) != self.current or self._untried:
            self._since, self._changes = 0, self._changes + 1
            self._patience = min(PATIENCE, 2 << self._changes)
            self.current = self._affordable(self._best())
        return self.current

    def next_round(self) -> int:
        """`next`, but a first round to learn from is a short one: what a pass costs here is a guess before it."""
        length = self.next()
        return length if self.fixed is not None or self.verify else min(length, FIRST)

    @property
    def _untried(self) -> bool:
        """The present length rests on guesses, and there is a first measurement now."""
        return self.current > 0 and 0 < sum(map(len, self.verify.values())) <= 2

    def _affordable(self, length: int) -> int:
        """`length`, but plain decoding when rounds have lost too much."""
        return length if self.lost <= LOSS * self.spent else 0

    def _best(self) -> int:
        best = min(range(1, self.maximum + 1), key=self.time_per_token)
        return best if self.time_per_token(best) < MARGIN * self.time_per_token(0) else 0

    def time_per_token(self, length: int) -> float:
        """Expected seconds per token."""
        plain = median(self.plain)
        if length == 0:
            return plain
        step = median(self.draft) if self.draft else self.draft_share * plain
        tokens = self._expected_tokens(length)
        if len(self.yields) >= ENOUGH:
            counted, expected = map(sum, zip(*self.yields, strict=True))
            tokens *= min(1.0, counted / expected)
        overhead = max(1.0, median(self.overhead)) if self.overhead else 1.0
        drafting = (length + self._bounded_beta**length) * step
        return overhead * (drafting + self._verify_time(length + 1, plain)) / tokens

    @property
    def _bounded_beta(self) -> float:
        return min(self.beta or 0.0, 0.999)

    def _expected_tokens(self, length: int) -> float:
        """E(length)."""
        return (1 - self._bounded_beta ** (length + 1)) / (1 - self._bounded_beta)

    def _verify_time(self, positions: int, plain: float) -> float:
        """v(positions): measured, or the nearest measured one and a guess per further position."""
        if not self.verify:
            return plain * (1 + PER_POSITION * (positions - 1))
        nearest = min(self.verify, key=lambda measured: abs(measured - positions))
        time = median(self.verify[nearest])
        each = (time - plain) / (nearest - 1)  # a plain step is a pass over one position
        return time + max(PER_POSITION * time if positions > nearest else 0.0, each) * (positions - nearest)
