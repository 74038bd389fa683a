"""Text on which two tokenizers must agree: 200 lines that touch spaces, digits, case, scripts, code and odd bytes."""

from __future__ import annotations

from itertools import pairwise

LINES = (
    "The quick brown fox jumps over the lazy dog.",
    "It's 3:45 p.m.; don't forget the 2nd meeting (room B-12)!",
    "Prices rose by 7.5% to $1,234,567.89 in 2023.",
    "See https://example.org/path?query=1&lang=en#top or mail a.b@example.com.",
    "“Curly quotes”, ‘single ones’, an em dash — and an ellipsis…",
    "naïve café, Zürich, Ångström, jalapeño, œuvre, straße",
    "Съешь же ещё этих мягких французских булок",
    "Η γρήγορη καφέ αλεπού πηδάει",
    "敏捷的棕色狐狸跳过了懒狗。",
    "いろはにほへと ちりぬるを",
    "다람쥐 헌 쳇바퀴에 타고파",
    "نص حكيم له سر قاطع",
    "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "emoji 😀 👩‍👩‍👧 🏳️‍🌈 and ± × ÷ ≤ ≥ ∑ √ π",
    "combining e\u0301 n\u0303, zero width\u200bspace, soft\u00adhyphen, no\u00a0break",
    "tabs\there\tand  double  spaces   triple",
    "ALLCAPS MixedCase snake_case kebab-case CamelCaseWords",
    "0 1 12 123 1234 12345 123456 1234567 3.14159 1e-10 0xDEADBEEF",
    "def add(a: int, b: int = 2) -> int:",
    '    return f"{a + b:>10}"  # sum',
    "for (int i = 0; i < n; ++i) { total += a[i] * b[i]; }",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "<div class=\"box\" id='x'>text &amp; more</div>",
    "if (x != y && !done || z == 0) { return -1; }",
    "import os, sys; print(os.path.join('a', 'b'), file=sys.stderr)",
    "$ grep -rn 'foo.*bar' src/ | sort -u > out.txt",
    "\\begin{equation} E = mc^2 \\end{equation}",
    "lambda x: {**x, 'y': [i ** 2 for i in range(10) if i % 2]}",
    "@dataclass(frozen=True)",
)


def probe_lines() -> list[str]:
    """The same 200 lines on every machine: whole lines, indented, upper case, joined, and cut inside words."""
    probe = list(LINES)
    probe += ["    " + line for line in LINES]
    probe += [line.upper() for line in LINES]
    probe += [line[len(line) // 3 :] for line in LINES]
    probe += [" " + line[: len(line) * 2 // 3] for line in LINES]
    probe += ["\t" + line + "\n" for line in LINES]
    probe += [f"{a}\n{b}" for a, b in pairwise(LINES)]
    return list(dict.fromkeys(probe))[:200]  # scripts without case give the same line twice
