"""The OpenAI protocol, as far as the server speaks it: requests in, jobs out; answers in OpenAI's shapes.

What the server can't do is refused by name (400), never ignored: a client must not believe that it was heard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from data_mixers.common.suggest import closest_match
from mtft.fuse.alpha.spec import FusionError, FusionSpec
from mtft.fuse.decoding.generate_request import row_specs
from mtft.fuse.decoding.prompts import encode_prompt
from mtft.fuse.fusion_core import FusionCore
from mtft.fuse.server.jobs import TokenScore

SAMPLING = (
    "model",
    "n",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "user",
)
STEERING = ("alpha", "alpha_rule", "expert_weights", "trace")
COMPLETION = (*SAMPLING, *STEERING, "prompt", "logprobs", "echo")
CHAT = (*SAMPLING, *STEERING, "messages", "max_completion_tokens", "logprobs", "top_logprobs")
UNSUPPORTED = (
    *("tools", "tool_choice", "functions", "function_call", "response_format", "best_of", "logit_bias", "suffix"),
    *("presence_penalty", "frequency_penalty", "parallel_tool_calls", "modalities", "audio", "prediction"),
)
MAX_STOPS, MAX_TOP, DEFAULT_TOKENS = 16, 20, 16


class RequestError(Exception):
    """An answer with a 4xx or 5xx status, in OpenAI's shape."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class ServerLimits:
    """What clients may ask for: bytes of a body, n, answers that wait, seconds that one waits, answers made at once."""

    body_bytes: int = 1 << 20
    answers: int = 8
    queue: int = 64
    wait_seconds: float = 60.0
    rows: int = 8


@dataclass
class CompletionRequest:
    """A checked request."""

    chat: bool
    model: str
    source: str | int
    prompts: list[list[int]]
    texts: list[str]  # of the prompts, for echo
    spec: FusionSpec
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    logprobs: bool
    top: int
    echo: bool
    trace: bool
    created: int = 0
    id: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def read_completion_request(
    body: Any, fused: FusionCore, models: dict[str, str | int], limits: ServerLimits, *, chat: bool
) -> CompletionRequest:
    """Check a request body. RequestError names the parameter."""
    if not isinstance(body, dict):
        raise RequestError("the body is no JSON object")
    _check_names(body, CHAT if chat else COMPLETION)
    model = body.get("model", next(iter(models)))
    if model not in models:
        raise RequestError(
            f"no model {model!r}: {', '.join(models)}", status=404, param="model", code="model_not_found"
        )
    n = _number(body, "n", 1, 1, limits.answers, whole=True)
    asked = "max_completion_tokens" if chat and "max_completion_tokens" in body else "max_tokens"
    echo = _flag(body, "echo")
    max_tokens = _number(body, asked, None, 0 if echo else 1, None, whole=True)
    try:
        prompts, texts = _prompts(body, fused, chat)
        spec = row_specs(fused.spec, 1, fused.experts, *_steering(body))[0]
    except FusionError as error:
        raise RequestError(f"{error.what}: {error.do}" if error.do else error.what) from error
    longest = max(map(len, prompts))
    if max_tokens is None:
        max_tokens = min(DEFAULT_TOKENS, fused.context - longest) if not chat else fused.context - longest
    if longest + max_tokens > fused.context or max_tokens < 0:
        raise RequestError(
            f"the prompt has {longest} tokens and max_tokens is {max_tokens}: the context holds {fused.context}",
            param=asked,
            code="context_length_exceeded",
        )
    if len(prompts) * n > limits.queue:
        raise RequestError(f"{len(prompts)} prompts with n = {n} are more than the queue of {limits.queue}", param="n")
    logprobs, top = _logprobs(body, chat)
    stream = _flag(body, "stream")
    if stream and echo:
        raise RequestError("echo is not streamed", param="echo", code="unsupported_parameter")
    return CompletionRequest(
        chat=chat,
        model=model,
        source=models[model],
        prompts=prompts,
        texts=texts,
        spec=spec,
        n=n,
        max_tokens=max_tokens,
        temperature=_number(body, "temperature", 1.0, 0, 2),
        top_p=_number(body, "top_p", 1.0, 1e-6, 1),
        top_k=_number(body, "top_k", 0, 0, None, whole=True),
        seed=_number(body, "seed", None, -(2**63), 2**63 - 1, whole=True),
        stops=_stops(body.get("stop")),
        stream=stream,
        usage=_include_usage(body.get("stream_options"), stream),
        logprobs=logprobs,
        top=top,
        echo=echo,
        trace=_flag(body, "trace"),
    )


def _check_names(body: dict[str, Any], known: tuple[str, ...]) -> None:
    for name, value in body.items():
        if name in UNSUPPORTED and value not in (None, False, 0, 0.0, [], {}, "none", 1) and value != {"type": "text"}:
            raise RequestError(f"{name} is not supported", param=name, code="unsupported_parameter")
        if name not in known and name not in UNSUPPORTED:
            near = closest_match(name, known)
            hint = f": did you mean {near}?" if near else ""
            raise RequestError(f"unknown parameter {name}{hint}", param=name, code="unknown_parameter")


def _number(
    body: dict[str, Any], name: str, default: Any, low: float | None, high: float | None, *, whole: bool = False
) -> Any:
    value = body.get(name)
    if value is None:
        return default
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise RequestError(f"{name} is {value!r}: must be a {'whole ' if whole else ''}number", param=name)
    if (low is not None and value < low) or (high is not None and value > high):
        raise RequestError(
            f"{name} is {value}: must be from {low} to {high if high is not None else 'the context'}", param=name
        )
    return value


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}: must be true or false", param=name)
    return bool(value)


def _steering(body: dict[str, Any]) -> tuple[Any, Any, Any]:
    alpha, rule, weights = (body.get(name) for name in STEERING[:3])
    if rule is not None and not isinstance(rule, str):
        raise RequestError(f"alpha_rule is {rule!r}: must be a name", param="alpha_rule")
    if weights is not None and not (isinstance(weights, list) and all(isinstance(w, int | float) for w in weights)):
        raise RequestError(f"expert_weights is {weights!r}: must be a list of numbers", param="expert_weights")
    return tuple(alpha) if isinstance(alpha, list) else alpha, rule, weights or None


def _prompts(body: dict[str, Any], fused: FusionCore, chat: bool) -> tuple[list[list[int]], list[str]]:
    if chat:
        ids = [encode_prompt(fused.tokenizer, messages=body.get("messages") or [])]
    else:
        prompt: Any = body.get("prompt")
        several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
        ids = [encode_prompt(fused.tokenizer, one) for one in (prompt if several else [prompt])]
    for row in ids:
        if min(row) < 0 or max(row) >= fused.vocab_size:
            raise FusionError(f"the prompt holds an id outside of 0 ... {fused.vocab_size - 1}")
    return ids, [fused.tokenizer.decode(row) for row in ids]


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise RequestError("stop must be a text or a list of texts", param="stop")
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop has {len(stops)} texts: at most {MAX_STOPS}", param="stop")
    return tuple(stops)


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream or not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise RequestError("stream_options takes include_usage, with stream", param="stream_options")
    return bool(options.get("include_usage"))


def _logprobs(body: dict[str, Any], chat: bool) -> tuple[bool, int]:
    if not chat:
        top = _number(body, "logprobs", None, 0, MAX_TOP, whole=True)
        return top is not None, top or 0
    wanted, top = _flag(body, "logprobs"), _number(body, "top_logprobs", 0, 0, MAX_TOP, whole=True)
    if top and not wanted:
        raise RequestError("top_logprobs needs logprobs", param="top_logprobs")
    return wanted, top


def completion_logprobs(fused: FusionCore, scores: list[TokenScore], offset: int = 0) -> dict[str, Any]:
    """The legacy shape: parallel lists. Two ids with one string: the larger number stays."""
    tokens = [fused.tokenizer.decode([score.id]) for score in scores]
    tops: list[dict[str, float] | None] = []
    offsets = []
    for token, score in zip(tokens, scores, strict=True):
        offsets.append(offset)
        offset += len(token)
        if score.logprob is None:
            tops.append(None)
            continue
        best: dict[str, float] = {}
        chosen = ((score.id, score.logprob),) if score.top and math.isfinite(score.logprob) else ()
        for i, value in (*score.top, *chosen):
            text = fused.tokenizer.decode([i])
            best[text] = max(value, best.get(text, -math.inf))
        tops.append(best)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(score.logprob) for score in scores],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def chat_logprobs(fused: FusionCore, scores: list[TokenScore]) -> dict[str, Any]:
    def entry(i: int, value: float | None) -> dict[str, Any]:
        text = fused.tokenizer.decode([i])
        return {"token": text, "logprob": _finite(value), "bytes": list(text.encode())}

    return {"content": [entry(s.id, s.logprob) | {"top_logprobs": [entry(*pair) for pair in s.top]} for s in scores]}


def _finite(value: float | None) -> float | None:
    """JSON has no infinity; OpenAI writes -9999."""
    return value if value is None or math.isfinite(value) else -9999.0
