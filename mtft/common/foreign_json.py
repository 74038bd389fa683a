"""JSON files that others wrote (configs of models and adapters): read strictly, named when they are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtft.common.errors import UserError
from mtft.common.own_files import irregular, type_name

MOST_BYTES = 64 << 20  # full module names of a large mixture of experts reach a few MB


def read_foreign(path: Path, *, do: str, error: type[UserError] = UserError, most: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises `error`, with the line, for anything else, and for a key that stands twice."""
    try:
        if (kind := irregular(path)) is not None:
            raise ValueError(f"it is {kind}")
        if path.stat().st_size > most:
            raise ValueError(f"it is larger than {most >> 20} MB")
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type_name(type(content))}, not an object")
    except json.JSONDecodeError as bad:
        what = f"{path.name} can't be read: not valid JSON ({bad.msg})"
        raise error(what, where=f"{path}:{bad.lineno}", do=do) from None
    except (OSError, ValueError, RecursionError) as bad:
        reason = "nested too deeply" if isinstance(bad, RecursionError) else getattr(bad, "strerror", None) or str(bad)
        raise error(f"{path.name} can't be read: {reason}", where=str(path), do=do) from None
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice[:80]!r} stands twice")
    return content
