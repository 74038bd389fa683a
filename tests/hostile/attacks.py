"""The attacks: every file that a command reads by every damage, recipe keys by odd values, outputs by odd places."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mtft.recipe.schema.recipe import Recipe

Damage = Callable[[Path, random.Random], None]


def _write(content: bytes) -> Damage:
    return lambda path, draw: path.write_bytes(content) and None


def _cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(max(1, len(content) - 1))])


def _flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(8):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))


def _grow(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(24))


def _instead(make: Callable[[Path], object]) -> Damage:
    def damage(path: Path, draw: random.Random) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return damage


def _other_types(path: Path, draw: random.Random) -> None:
    """JSON that parses, with one value of another type."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = draw.randrange(len(lines))
    content = json.loads(lines[number])
    node, key = content, None
    while isinstance(node, dict | list) and node:
        inner = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        holder, key, node = node, inner, node[inner]
        if draw.random() < 0.3:
            break
    if key is not None:
        holder[key] = draw.choice([None, -1, "x", [], {}, True, 1e300, [[]]])
    lines[number] = json.dumps(content)
    path.write_text("\n".join(lines) + ("\n" if path.suffix == ".jsonl" else ""))


DAMAGES: dict[str, Damage] = {
    "empty": _write(b""),
    "cut": _cut,
    "bits flipped": _flip,
    "grown": _grow,
    "zeros": _write(bytes(4096)),
    "[]": _write(b"[]"),
    "null": _write(b"null\n"),
    "a number": _write(b"5"),
    "deep": _write(b"[" * 60_000),
    "not UTF-8": _write(b'{"\xff\xfe": "\x80"}\n'),
    "another type": _other_types,
    "newer": _write(b'{"format": 99, "version": 99, "v": 99}\n'),
    "gone": _instead(lambda path: None),
    "a folder": _instead(os.mkdir),
    "a named pipe": _instead(os.mkfifo),
    "a device": _instead(lambda path: os.symlink("/dev/zero", path)),
    "a link to itself": _instead(lambda path: os.symlink(path.name, path)),
}
ROWS = "copy.train.jsonl shout.eval.jsonl"
MODEL = "model/config.json model/model.safetensors model/tokenizer.json model/tokenizer_config.json"
STORE = " ".join(f"cache/stores/copy-train-*/{name}" for name in ("meta.json", "ids.bin", "offsets.bin", "learnt.bin"))


def _checkpoint(folder: str) -> str:
    files = ("manifest.json", "state.json", "state.safetensors", "weights.safetensors", "trainer_state.json")
    return " ".join(f"{folder}/{name}" for name in files)


READS: dict[str, str] = {
    "check": f"r.yaml {MODEL} {ROWS} {STORE}",
    "train": f"r.yaml {MODEL} {ROWS} {STORE}",
    "resume": "half.yaml half/recipe.yaml half/env.json half/plan.json half/metrics.jsonl half/eval.jsonl "
    f"{_checkpoint('half/checkpoint-2')} {STORE}",
    "finished": "run/result.json run/recipe.yaml run/env.json run/scores/copy.jsonl",
    "export": f"ended/recipe.yaml ended/plan.json {_checkpoint('ended/checkpoint-4')}",
    "eval": "run/recipe.yaml run/result.json run/adapter/adapter_config.json run/adapter/base.json "
    "run/adapter/adapter_model.safetensors",
    "report": "run/recipe.yaml run/env.json run/plan.json run/metrics.jsonl run/eval.jsonl run/scores/copy.jsonl "
    "swept/mix/fit.json swept/mix/proposal.json",
    "sweep": "swept.yaml swept/mix/ledger.jsonl swept/mix/design.csv",
    "propose": "swept.yaml swept/mix/ledger.jsonl",
    "fit": "x.csv y.csv",
    "from-csv": "x.csv y.csv",
    "merge": "one/adapter_config.json two/adapter_config.json one/adapter_model.safetensors",
    "replace": "one/adapter_config.json one/adapter_model.safetensors merged/merge.json merged/README.md",
    "generate": "fuse.yaml prompts.jsonl strong/config.json strong/model.safetensors strong/tokenizer.json "
    "expert/adapter_config.json expert/adapter_model.safetensors",
}
OURS = ("cache/stores/", "half/", "ended/", "swept/mix/design")
"""What may not change a result without a word: files of ours that have checksums, or that no result hangs on."""


@dataclass(frozen=True)
class Attack:
    """`strike` changes the world; the command is then run.

    names: what a refusal has to name; ours: it is a file of ours; place: where the output was asked for.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    strike: Callable[[Path], None]
    names: tuple[str, ...] = ()
    ours: bool = False
    place: str | None = None

    def __str__(self) -> str:
        return f"{self.command}: {self.name}"


def on_files(commands: dict[str, list[str]]) -> Iterator[Attack]:
    """Each file that a command reads by each damage."""
    for command, files in READS.items():
        for file in files.split():
            for kind, damage in DAMAGES.items():
                if kind == "another type" and not file.endswith((".json", ".jsonl")):
                    continue
                seed = f"{command} {file} {kind}"

                def strike(here: Path, file: str = file, damage: Damage = damage, seed: str = seed) -> None:
                    damage(sorted(here.glob(file))[0], random.Random(seed))

                parts = file.split("/")
                names = (parts[-1], parts[0], parts[-2]) if len(parts) > 1 else (parts[-1],)
                if file.startswith("cache/") or file.endswith((".train.jsonl", ".eval.jsonl")):
                    names = (*names, "copy", "shout")  # the task
                yield Attack(f"{file} {kind}", command, tuple(commands[command]), strike, names, file.startswith(OURS))


VALUES = ["-1", "0", "1", str(10**20), str(10**400), "1e-300", "1e300", ".nan", ".inf", "text", "''", "[]", "[1, a]"]
VALUES += ["{}", "{a: 1}", "null", "true", "..", "/dev/zero", "a" * 3000, "'\\x00'", "$HOME", "~", "2026-01-01"]


def recipe_keys() -> list[str]:
    """Every key of a recipe that takes a value, dotted; of the sections that r.yaml has."""
    schema = Recipe.model_json_schema()
    keys: list[str] = []

    def visit(node: dict, prefix: str) -> None:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        for branch in node.get("anyOf", []):
            if "$ref" in branch:
                visit(branch, prefix)
        for key, inner in node.get("properties", {}).items():
            keys.append(f"{prefix}{key}")
            visit(inner, f"{prefix}{key}.")

    visit(schema, "")
    return [key for key in dict.fromkeys(keys) if not key.startswith("tasks.")]


def on_keys(commands: dict[str, list[str]]) -> Iterator[Attack]:
    """Every key of a recipe by every odd value: `mtft check`, and every fifth time `mtft train`."""
    for number, key in enumerate(recipe_keys()):
        for at, value in enumerate(VALUES):
            command = "train" if (number + at) % 5 == 0 else "check"
            arguments = (*commands[command], f"{key}={value}")
            yield Attack(f"{key}={value[:30]}", command, arguments, lambda here: None, (key.split(".")[-1], key))


def _make(kind: str) -> Callable[[Path], None]:
    def strike(here: Path) -> None:
        place = here / "odd"
        {
            "folder": lambda: (place.mkdir(), (place / "mine.txt").write_text("mine")),
            "file": lambda: place.write_text("mine"),
            "pipe": lambda: os.mkfifo(place),
            "link": lambda: place.symlink_to("x.csv"),
            "broken link": lambda: place.symlink_to("nowhere"),
            "loop": lambda: place.symlink_to("odd"),
        }.get(kind, lambda: None)()

    return strike


PLACES = {
    "folder": "odd",
    "file": "odd",
    "pipe": "odd",
    "link": "odd",
    "broken link": "odd",
    "loop": "odd",
    "below a file": "x.csv/out",
    "device": "/dev/null",
    "proc": "/proc/out",
    "sys": "/sys/out",
    "long": "n" * 300,
    "long path": "/".join(["deep" * 20] * 60),
    "not UTF-8": os.fsdecode(b"out-\xff"),
    "empty": "",
    "here": ".",
    "above": "..",
    "root": "/",
    "an input": "x.csv",
    "rows": "copy.train.jsonl",
    "the recipe": "r.yaml",
    "a model": "model",
    "an adapter": "one",
    "inside an adapter": "one/out",
    "home": "~/mtft-odd-output",
    "line break": "a\nb",
    "dots": "a/../b/../odd-output",
}


def on_places(commands: dict[str, list[str]]) -> Iterator[Attack]:
    """Every command that writes by every odd place for its output."""
    for command, words in commands.items():
        for kind, place in PLACES.items():
            if "--out" in words:
                at = words.index("--out") + 1
                arguments = (*words[:at], place, *words[at + 1 :])
            elif command == "train":
                arguments = ("train", "r.yaml", f"output.dir={place}")
            else:
                continue
            yield Attack(f"output {kind}", command, arguments, _make(kind), place=place)
