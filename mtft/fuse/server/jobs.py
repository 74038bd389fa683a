"""What the engine's clients hand in and hear back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from mtft.fuse.alpha.spec import FusionSpec
from mtft.fuse.decoding.token_trace import TokenTrace, top_tokens


@dataclass(frozen=True)
class TokenScore:
    """A token and its log-probability under the served distribution before any processor; `top` holds the best k."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class StreamEvent:
    """News of a job: text that is certain now, the tokens of this step, and at the end why it ended, or what failed.

    prompt: scores of the prompt's own tokens, of a job that asked for them.
    """

    text: str = ""
    tokens: tuple[TokenScore, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    status: int = 200
    prompt: tuple[TokenScore, ...] | None = None


@dataclass
class GenerationJob:
    """One answer to make. source: `fused`, `strong`, or the number of an expert that answers alone."""

    ids: list[int]
    max_tokens: int
    spec: FusionSpec
    on_event: Callable[[StreamEvent], None]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    sample: int = 0
    stops: tuple[str, ...] = ()
    top: int = 0  # best tokens to report at each step
    source: str | int = "fused"
    trace: TokenTrace | None = None
    small_ids: list[int] | None = None  # the small models' own prompt
    cancelled: bool = False
    since: float = field(default_factory=time.monotonic)

    def tell(self, event: StreamEvent) -> None:
        """To its client, if there is one."""
        try:
            self.on_event(event)
        except RuntimeError:  # the loop that listened is closed
            self.cancelled = True


class ServerBusy(Exception):
    """The queue is full."""


class ServerStopping(Exception):
    """The server takes nothing new: it is about to end."""


class EngineFailed(Exception):
    """The engine can't serve at present: what is wrong."""


def token_score(logp_V: Tensor, token: int, top: int) -> TokenScore:
    """The chosen token's number and its entry among the best are the same float."""
    return TokenScore(token, float(logp_V[token]), tuple(top_tokens(logp_V, top)))
