"""The tasks of the quickstart, made from the standard library.

| task | prompt | response |
|---|---|---|
| call, defaults, pytest, type | a signature, an assertion, an expression | one right answer each (rewrites.py) |
| naming | a function whose name is masked | its name |
| docstring | a function without its docstring | the first line of the docstring |
| next_line | a function up to some line | the next line |
| code | signature and docstring | the body |

Training rows come from the training modules, evaluation rows from the held-out modules
(`mtft.quickstart.stdlib_corpus`). A held-out function whose code occurs in a training module as well is left out, and
so is a held-out row that a training row equals. Which rows there are depends on nothing but the library: the same
Python gives the same rows.
"""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mtft.common.atomic_io import write_text
from mtft.common.errors import UserError
from mtft.common.fingerprint import content_hash, hash_number
from mtft.common.own_files import defect, read_own, write_own
from mtft.quickstart import stdlib_corpus
from mtft.quickstart.functions import Function, functions_of
from mtft.quickstart.parsed_module import ParsedModule, TaskRow
from mtft.quickstart.rewrites import REWRITES

PROMPT_TOKENS = 320  # room for the chat template within 384
RESPONSE_TOKENS = 96
TOKENIZER = Path(__file__).parent / "models" / "weak" / "tokenizer.json"
MADE = "tasks.json"


@dataclass(frozen=True)
class TaskFiles:
    """Where the rows of one task lie, and how many there are."""

    train: Path
    eval: Path
    train_rows: int
    eval_rows: int


def naming(function: Function) -> TaskRow | None:
    """Mask the name everywhere in the code, recursion and calls of super() included. Special methods count too."""
    if len(function.name) < 3:
        return None
    masked = re.sub(rf"\b{re.escape(function.name)}\b", "____", function.code)
    return TaskRow(f"Name the function.\n\n{masked}", function.name, function.id)


def docstring(function: Function) -> TaskRow | None:
    """The first line of the docstring, if it is a phrase."""
    line = (function.docstring or "").strip().split("\n")[0].strip()
    if len(line) < 12 or line.count(" ") < 2 or not line[0].isalpha():
        return None
    return TaskRow(f"Describe the function.\n\n{function.code}", line, function.id)


def next_line(function: Function) -> TaskRow | None:
    """Cut before a statement, which one decided by the hash of the id; the prompt shows the 12 lines before the cut."""
    starts = [i for i in function.starts if i >= 2 and len(function.body[i].strip()) >= 8]
    if not starts:
        return None
    cut = starts[hash_number(function.id, "big") % len(starts)]
    before = [line for line in (*function.header, *function.body[:cut]) if line.strip()][-12:]
    row_id = f"{function.id}+{cut}"
    return TaskRow("Write the next line.\n\n" + "\n".join(before), function.body[cut].strip(), row_id)


def code(function: Function) -> TaskRow | None:
    """Short bodies of documented functions; the response is dedented."""
    lines = [line for line in function.body if line.strip()]
    indent = len(lines[0]) - len(lines[0].lstrip())
    if function.docstring is None or len(lines) > 6 or lines[0].strip() in ("pass", "..."):
        return None
    if any(line[:indent].strip() for line in lines):
        return None
    signature = "\n".join((*function.header, *function.docstring_lines))
    return TaskRow(f"Write the body.\n\n{signature}", "\n".join(line[indent:] for line in lines), function.id)


@dataclass(frozen=True)
class TaskKind:
    """rows: of which rows the task is made, given a module and those of its functions that count; train_rows,
    eval_rows: the largest numbers; most_alike: the largest share of one answer among them.
    """

    rows: Callable[[ParsedModule, list[Function]], Iterable[TaskRow]]
    train_rows: int
    eval_rows: int = 200
    most_alike: float = 1.0


def _of_functions(make: Callable[[Function], TaskRow | None], train_rows: int) -> TaskKind:
    return TaskKind(lambda _, functions: filter(None, map(make, functions)), train_rows, eval_rows=160)


def _of_module(name: str, train_rows: int, most_alike: float = 1.0) -> TaskKind:
    return TaskKind(lambda module, _: REWRITES[name](module), train_rows, most_alike=most_alike)


# Unequal numbers of training rows on purpose: what to do about sizes is the question that mixtures answer.
TASKS: dict[str, TaskKind] = {
    "call": _of_module("call", 2000),
    "defaults": _of_module("defaults", 1200),
    "pytest": _of_module("pytest", 3200),
    "type": _of_module("type", 2800, most_alike=0.3),
    "naming": _of_functions(naming, 2400),
    "docstring": _of_functions(docstring, 1600),
    "next_line": _of_functions(next_line, 4800),
    "code": _of_functions(code, 800),
}


def build(out_dir: str | Path, library: Path | None = None) -> dict[str, TaskFiles]:
    """Write `<task>.train.jsonl` and `<task>.eval.jsonl` into `out_dir`; where they stand already, only say so.

    Rows are {"prompt", "response", "id"}. `tasks.json` holds the fingerprint of everything that the rows depend on.
    `library` is another folder of modules than the standard library of the running interpreter.
    """
    out = Path(out_dir)
    files = stdlib_corpus.library_files(library)
    fingerprint = _fingerprint(files)
    standing = _standing(out, fingerprint)
    if standing is not None:
        return standing
    out.mkdir(parents=True, exist_ok=True)
    result = {}
    for name, (train, held_out) in build_rows(files).items():
        paths = out / f"{name}.train.jsonl", out / f"{name}.eval.jsonl"
        for path, rows in zip(paths, (train, held_out), strict=True):
            write_text(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows))
        result[name] = TaskFiles(*paths, len(train), len(held_out))
    counts = {name: {"train": files.train_rows, "eval": files.eval_rows} for name, files in result.items()}
    # Last, so that its presence says that the rest is whole.
    write_own(out / MADE, {"fingerprint": fingerprint, "tasks": counts})
    return result


def build_rows(files: Iterable[stdlib_corpus.SourceFile]) -> dict[str, tuple[list[TaskRow], list[TaskRow]]]:
    """(training rows, evaluation rows) of every task; the order is a fixed shuffle."""
    files = list(files)
    training, known = _rows_of((file for file in files if not file.is_eval), without=set())
    held_out, _ = _rows_of((file for file in files if file.is_eval), without=known)
    result = {}
    for name, kind in TASKS.items():
        train, evaluation = (_shuffled(name, side[name]) for side in (training, held_out))
        seen = {_body(row) for row in train}
        unseen = [row for row in evaluation if _body(row) not in seen]
        result[name] = (_short(train, kind.train_rows, kind), _short(unseen, kind.eval_rows, kind))
    return result


def _rows_of(files: Iterable[stdlib_corpus.SourceFile], without: set[str]) -> tuple[dict[str, list[TaskRow]], set[str]]:
    """(all rows of every task, keys of the functions), without functions of those keys.

    One module at a time: the trees of all of them would keep the garbage collector busy.
    """
    rows: dict[str, list[TaskRow]] = {name: [] for name in TASKS}
    keys: set[str] = set()
    for module in map(ParsedModule.of, files):
        functions = [function for function in functions_of(module) if function.key not in without]
        keys.update(function.key for function in functions)
        for name, kind in TASKS.items():
            rows[name].extend(kind.rows(module, functions))
    return rows, keys


def _shuffled(task: str, rows: Iterable[TaskRow]) -> list[TaskRow]:
    """Without repetitions of prompt and response, or of the id, ordered by the hash of the id."""
    unique = {_body(row): row for row in sorted(rows, key=lambda row: row.id, reverse=True)}
    unique = {row.id: row for row in unique.values()}  # parts of an f-string stand in one place, says Python 3.11
    return sorted(unique.values(), key=lambda row: hash_number(f"{task} {row.id}", "big"))


def _short(rows: list[TaskRow], most: int, kind: TaskKind) -> list[TaskRow]:
    """The first `most` rows within the limits of length, and of what one answer may have of them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    short: list[TaskRow] = []
    alike: Counter[str] = Counter()
    for start in range(0, len(rows), 1000):
        chunk = rows[start : start + 1000]
        prompts = tokenizer.encode_batch_fast([row.prompt for row in chunk])
        responses = tokenizer.encode_batch_fast([row.response for row in chunk])
        for row, prompt, response in zip(chunk, prompts, responses, strict=True):
            fits = len(prompt) <= PROMPT_TOKENS and len(response) <= RESPONSE_TOKENS
            if fits and alike[row.response] < kind.most_alike * most:
                alike[row.response] += 1
                short.append(row)
        if len(short) >= most:
            break
    return short[:most]


def _body(row: TaskRow) -> tuple[str, str]:
    """What two rows must not share: prompt and response up to white space."""
    return " ".join(row.prompt.split()), " ".join(row.response.split())


def _fingerprint(files: list[stdlib_corpus.SourceFile]) -> str:
    # The parser's version matters too: the same file may parse with one Python and not with another.
    versions = f"{platform.python_version()} {stdlib_corpus.fingerprint(files)}\n".encode()
    own_files = (TOKENIZER, *sorted(Path(__file__).parent.glob("*.py")))
    return content_hash(b"".join([versions, *(path.read_bytes() for path in own_files)]))


def _standing(out: Path, fingerprint: str) -> dict[str, TaskFiles] | None:
    """What an earlier call has written, if it is whole and nothing that it depends on has changed."""
    try:
        saved = read_own(out / MADE, {"fingerprint": str, "tasks": dict}, do="delete it")
    except UserError:  # not there, or damaged: all is made anew
        return None
    if any(defect(counts, {"train": int, "eval": int}) for counts in saved["tasks"].values()):
        return None
    result = {
        name: TaskFiles(out / f"{name}.train.jsonl", out / f"{name}.eval.jsonl", counts["train"], counts["eval"])
        for name, counts in saved["tasks"].items()
    }
    whole = all(files.train.exists() and files.eval.exists() for files in result.values())
    return result if whole and saved["fingerprint"] == fingerprint else None
