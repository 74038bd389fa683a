"""mtft fuse generate, score, serve."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtft.cli.common import Overrides, Overwrite, RecipeArgument, load, say
from mtft.cli.numbers import number, whole

if TYPE_CHECKING:
    from mtft.fuse.batch.resumable_jsonl import BatchSummary

fuse_app = typer.Typer(help="Steer a large model with a small tuned one.", no_args_is_help=True)

Rows = Annotated[Path, typer.Option("--in", help="File of rows to read: JSONL, or any other kind that training reads.")]
RowsOut = Annotated[Path, typer.Option("--out", help="JSONL file to write; the same command continues it.")]


@fuse_app.command("generate")
def fuse_generate(
    recipe: RecipeArgument, rows: Rows, out: RowsOut, overrides: Overrides = None, overwrite: Overwrite = False
) -> None:
    """Answer prompts with the fused model.

    A row is {"prompt": TEXT} or {"messages": [...]}, and may have id, max_tokens, alpha, alpha_rule, seed, trace.
    """
    from mtft.fuse.batch.jsonl_commands import generate

    with _warnings_at_once():
        loaded = load(recipe, overrides, "fuse", files=False)
        done = generate(loaded, rows, out, overwrite=overwrite, inputs=[recipe], say=say)
    _summarise(done, out)


@fuse_app.command("score")
def fuse_score(
    recipe: RecipeArgument, rows: Rows, out: RowsOut, overrides: Overrides = None, overwrite: Overwrite = False
) -> None:
    """Log-probability of given responses under the fused model.

    A row is {"prompt": TEXT, "response": TEXT}, {"messages": [...], "response": TEXT}, or a row of training: messages
    that end in an answer.
    """
    from mtft.fuse.batch.jsonl_commands import score

    with _warnings_at_once():
        loaded = load(recipe, overrides, "fuse", files=False)
        done = score(loaded, rows, out, overwrite=overwrite, inputs=[recipe], say=say)
    _summarise(done, out)


@fuse_app.command("serve")
def fuse_serve(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than this machine's needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, whole("--port", 0, 65535, help="Port to listen on; 0: a free one.")] = 8000,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the bearer token.")] = None,
    rows: Annotated[int, whole("--rows", 1, 10**5, help="Answers that are made at the same time.")] = 8,
    queue: Annotated[int, whole("--queue", 1, 10**6, help="Answers that may wait; beyond, clients get 429.")] = 64,
    wait: Annotated[
        float, number("--wait", 0, 10**6, help="Seconds that one may wait; beyond, its client gets 503.")
    ] = 60,
    body_bytes: Annotated[int, whole("--body-bytes", 1, 2**32, help="Largest request; beyond, clients get 413.")] = 1
    << 20,
) -> None:
    """Serve the fused model (OpenAI-compatible). Ctrl-C or SIGTERM: what runs is finished, then it ends."""
    from importlib.util import find_spec

    from mtft.common.errors import UserError

    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise UserError("the server needs fastapi and uvicorn", where="command line", do='pip install "mtft[serve]"')
    loaded = load(recipe, overrides, "fuse", files=False)
    from mtft.fuse.server.app import serve
    from mtft.fuse.server.openai_protocol import ServerLimits

    limits = ServerLimits(rows=rows, queue=queue, wait_seconds=wait, body_bytes=body_bytes)
    with _warnings_at_once():
        serve(loaded, host=host, port=port, api_key_env=api_key_env, limits=limits, announce=say)


def _summarise(done: BatchSummary, out: Path) -> None:
    """Rows that failed stand in the output as {"error": ...}; the exit code says that there are some."""
    say(f"{done.rows} rows in {out}, {done.failed} failed, {done.resumed} were there already")
    for reason in done.reasons:
        say(f"  {reason}")
    if done.failed > len(done.reasons):
        say(f"  and {done.failed - len(done.reasons)} more")
    if done.failed:
        raise typer.Exit(1)


@contextmanager
def _warnings_at_once() -> Iterator[None]:
    """Warnings as lines for people, each once and when it is due: models take minutes to load."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("once", UserWarning)
        warnings.showwarning = show
        yield
