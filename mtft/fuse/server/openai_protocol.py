"""The OpenAI protocol, as far as the server speaks it: requests in, jobs out; answers in OpenAI's shapes.

What the server can't do is refused by name (400), never ignored: a client must not believe that it was heard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from data_mixers.common.suggest import closest_match
from mtft.fuse.alpha.spec import FusionError, FusionSpec
from mtft.fuse.decoding.generate_request import request_spec
from mtft.fuse.decoding.prompts import Prompt, encode_prompt
from mtft.fuse.fusion_core import FusionCore
from mtft.fuse.request_values import ROW_ERRORS, check_values

# What is known and not done: refused, but for values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "best_of": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
}
MAX_STOPS, MAX_TOP, DEFAULT_TOKENS = 16, 20, 16
TOLD = 500  # characters of an error


class RequestError(Exception):
    """An answer with a 4xx or 5xx status, in OpenAI's shape."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message if len(message) <= TOLD else f"{message[:TOLD]}..."
        self.param = param[:TOLD] if param else param
        self.status, self.code = status, code

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


def _stop_strings(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("stop must be a text or a list of texts")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop has {len(stops)} texts: at most {MAX_STOPS}")
    return tuple(stops)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = None


class RequestBody(BaseModel):
    """Fields of both endpoints; null stands for the default. Fields of type Any are checked against the models."""

    model_config = ConfigDict(strict=True)

    n: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=1e-6, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop_strings)] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    alpha: Any = None
    alpha_rule: str | None = None
    expert_weights: list[float] | None = None
    trace: bool = False
    model: Any = None
    user: Any = None


class CompletionBody(RequestBody):
    """Body of /v1/completions."""

    prompt: Any = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    echo: bool = False


class ChatBody(RequestBody):
    """Body of /v1/chat/completions."""

    messages: Any = None
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP)


@dataclass
class CompletionRequest:
    """A checked request: its body, and what came out of it. texts: of the prompts, for echo; top: best tokens shown."""

    chat: bool
    body: RequestBody
    model: str
    source: str | int
    prompts: list[Prompt]
    texts: list[str]
    spec: FusionSpec
    max_tokens: int
    logprobs: bool
    top: int
    echo: bool


def read_completion_request(
    body: Any, fused: FusionCore, models: dict[str, str | int], limits: ServerLimits, *, chat: bool
) -> CompletionRequest:
    """Check a request body. RequestError names the parameter."""
    if not isinstance(body, dict):
        raise RequestError("the body is no JSON object")
    body = _known_values(body, ChatBody if chat else CompletionBody)
    parsed = _validate(body, ChatBody if chat else CompletionBody)
    model = body.get("model", next(iter(models)))
    if not isinstance(model, str):
        raise RequestError(f"model is {type(model).__name__}, not a name", param="model")
    if model not in models:
        raise RequestError(
            f"no model {model!r}: {', '.join(models)}", status=404, param="model", code="model_not_found"
        )
    if parsed.n > limits.answers:
        raise RequestError(f"n is {parsed.n}: must be from 1 to {limits.answers}", param="n")
    if isinstance(parsed, ChatBody):
        limit_name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        logprobs, top, echo = parsed.logprobs, parsed.top_logprobs, False
        if top and not logprobs:
            raise RequestError("top_logprobs needs logprobs", param="top_logprobs")
    else:
        limit_name, echo = "max_tokens", parsed.echo
        logprobs, top = parsed.logprobs is not None, parsed.logprobs or 0
    max_tokens = getattr(parsed, limit_name)
    if max_tokens == 0 and not echo:
        raise RequestError(f"{limit_name} is 0: must be from 1 to the context", param=limit_name)
    if parsed.stream_options is not None and not parsed.stream:
        raise RequestError("stream_options takes include_usage, with stream", param="stream_options")
    if parsed.stream and echo:
        raise RequestError("echo is not streamed", param="echo", code="unsupported_parameter")
    given = _prompts(body, chat)
    if len(given) * parsed.n > limits.queue:
        raise RequestError(
            f"{len(given)} prompts with n = {parsed.n} are more than the queue of {limits.queue}", param="n"
        )
    try:
        prompts = [encode_prompt(fused, **one) for one in given]
        spec = request_spec(fused, parsed.alpha, parsed.alpha_rule, parsed.expert_weights or None)
    except FusionError as error:
        raise RequestError(f"{error.what}: {error.do}" if error.do else error.what) from error
    except ROW_ERRORS as error:
        raise RequestError(f"the request can't be used: {type(error).__name__}: {error}") from error
    longest = max(len(ids) for prompt in prompts for ids in (prompt.ids, prompt.small_ids or ()))
    if max_tokens is None:
        room = fused.context - longest
        if room < (not echo):
            raise RequestError(
                f"the prompt has {longest} tokens: the context holds {fused.context}", code="context_length_exceeded"
            )
        max_tokens = room if chat else min(DEFAULT_TOKENS, room)
    if longest + max_tokens > fused.context:
        raise RequestError(
            f"the prompt has {longest} tokens and max_tokens is {max_tokens}: the context holds {fused.context}",
            param=limit_name,
            code="context_length_exceeded",
        )
    texts = [str(fused.tokenizer.decode(prompt.ids)) for prompt in prompts]
    return CompletionRequest(chat, parsed, model, models[model], prompts, texts, spec, max_tokens, logprobs, top, echo)


def _known_values(body: dict[str, Any], schema: type[RequestBody]) -> dict[str, Any]:
    """The body without nulls, which stand for keys that are not there. What can't be done is refused by name."""
    try:
        check_values(body)
    except FusionError as error:
        raise RequestError(error.what) from error
    known = tuple(schema.model_fields)
    for name, value in body.items():
        if name in UNSUPPORTED and value is not None and not _asks_for_nothing(name, value):
            raise RequestError(f"{name} is not supported", param=name, code="unsupported_parameter")
        if name not in known and name not in UNSUPPORTED:
            near = closest_match(name[:TOLD], known)
            hint = f"did you mean {near}?" if near else f"known are {', '.join(known)}"
            raise RequestError(f"unknown parameter {name[:60]}: {hint}", param=name, code="unknown_parameter")
    return {name: value for name, value in body.items() if value is not None}


def _asks_for_nothing(name: str, value: Any) -> bool:
    """Of the very type: true is no penalty of 1, and 1 no penalty of 0."""
    return any(type(value) is type(neutral) and value == neutral for neutral in UNSUPPORTED[name])


def _validate(body: dict[str, Any], schema: type[ChatBody] | type[CompletionBody]) -> ChatBody | CompletionBody:
    try:
        return schema.model_validate(body)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
        name = str(error["loc"][0])
        message = f"{name} is {body[name]!r}: {error['msg'].replace('Input should be', 'must be')}"
        if error["type"] == "value_error":
            message = str(error.get("ctx", {})["error"])
        elif name == "stream_options":
            message = "stream_options takes include_usage, with stream"
        raise RequestError(message, param=name) from invalid


def _prompts(body: dict[str, Any], chat: bool) -> list[dict[str, Any]]:
    """What encode_prompt takes, for each prompt."""
    if chat:
        return [{"messages": body.get("messages") or []}]
    prompt: Any = body.get("prompt")
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    return [{"prompt": one} for one in (prompt if several else [prompt])]
