"""A token trace as one offline HTML page: every token in the colour of its alpha, details when pointed at.

White: the step was 0. Blue, deeper with alpha: the experts moved the token. Underlined: fusion chose another token
than the strong model's favourite. Framed: the step was clipped at alpha_max.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.7 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
pre { white-space: pre-wrap; font: 14px/1.9 ui-monospace, monospace; border: 1px solid #ccc; padding: 1rem }
.t { border-radius: 2px } .moved { text-decoration: underline 2px } .clipped { outline: 1px solid #c00 }
.key span { padding: 0 .6em }
"""


def trace_page(rows: Sequence[dict[str, Any]], *, title: str = "Token trace", alpha_max: float = 2.0) -> str:
    """HTML of answers with a `trace` (as `mtft fuse generate` writes them); rows without one are left out."""
    parts = []
    for row in rows:
        if row.get("trace"):
            name = row.get("id") if row.get("id") is not None else row.get("index", "")
            tokens = "".join(_token(token, alpha_max) for token in row["trace"])
            parts.append(f"<h2>{escape(str(name))}</h2>\n<pre>{tokens}</pre>")
    levels = [alpha_max * step / 4 for step in range(5)]
    key = "".join(f'<span style="{_colour(a, alpha_max)}">{a:g}</span>' for a in levels)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n<h1>{escape(title)}</h1>\n"
        f'<p class="key">alpha {key} &nbsp; <span class="moved">not the strong model\'s first choice</span> '
        f'<span class="clipped">clipped</span></p>\n' + "\n".join(parts) + "\n</html>\n"
    )


def _token(token: dict[str, Any], alpha_max: float) -> str:
    favourite = token["top"]["strong"][0]["token"] if token["top"]["strong"] else None
    classes = ["t"] + ["moved"] * (favourite != token["token"]) + ["clipped"] * bool(token["clipped"])
    alpha = sum(token["alpha"])
    text = token["text"] if token["text"] is not None else f"[{token['token']}]"
    return (
        f'<span class="{" ".join(classes)}" style="{_colour(alpha, alpha_max)}" title="{escape(_details(token))}">'
        f"{escape(text)}</span>"
    )


def _details(token: dict[str, Any]) -> str:
    def best(top: Sequence[dict[str, Any]]) -> str:
        return ", ".join(f"{entry['text']!r} {entry['logprob']:.2f}" for entry in top)

    lines = [
        f"alpha {', '.join(f'{a:.3f}' for a in token['alpha'])}   lam {token['lam']:.3f}",
        f"KL {token['g']:.4f}   target {', '.join(f'{c:.4f}' for c in token['c'])}   TV {token['tv']:.3f}",
    ]
    named = [(name, token["top"][name]) for name in ("fused", "strong", "base")]
    named += [(f"expert {t}", top) for t, top in enumerate(token["top"]["experts"])]
    return "\n".join([*lines, *(f"{name}: {best(top)}" for name, top in named)])


def _colour(alpha: float, alpha_max: float) -> str:
    share = min(max(alpha / alpha_max, 0.0), 1.0)
    return f"background: rgba(30, 110, 220, {0.75 * share:.2f})"
