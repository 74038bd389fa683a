"""What every attack is judged by: exit 0 with the right result, or exit 2 with one block; nothing lost or ignored."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from tests.hostile.world import COMMANDS, WRITES, quick

PATIENCE = 120.0  # seconds after which a command hangs (one of them takes two, on a busy machine ten)
MEMORY = 8 << 30  # bytes of address space: what wants more has lost its bounds
LINES, CHARACTERS = 40, 6000  # of a refusal; ten times that of a result
FOREIGN = re.compile(r"Traceback|object at 0x|NoneType|pydantic|Input should|\bKeyError|\bTypeError|\bAttributeError")


@dataclass(frozen=True)
class Outcome:
    """How a command ended. code None: it hung and was killed."""

    code: int | None
    said: str
    files: dict[str, bytes | str]


def run(command: list[str], here: Path, log: Path) -> Outcome:
    """The command in a forked process in `here`."""
    process = multiprocessing.get_context("fork").Process(target=_command, args=(command, here, log))
    process.start()
    process.join(PATIENCE)
    code = process.exitcode
    if process.is_alive():
        process.kill()
        process.join()
        code = None
    return Outcome(code, log.read_text(encoding="utf-8", errors="replace"), snapshot(here))


def _command(command: list[str], here: Path, log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  pytest has put others in their place
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    os.chdir(here)
    os.environ |= {"MTFT_CACHE": str(here / "cache"), "HOME": str(here / "home")}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    code = 99
    try:
        quick()
        from mtft.__main__ import main

        code = main(command)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001  what nobody caught
        traceback.print_exc()
    os._exit(code)


def snapshot(here: Path) -> dict[str, bytes | str]:
    """{path: content} of the files below a folder; of what is no file: its kind. Nothing is waited for."""
    found: dict[str, bytes | str] = {}
    for folder, folders, files in os.walk(here):
        for name in [*files, *(name for name in folders if os.path.islink(os.path.join(folder, name)))]:
            path = Path(folder) / name
            key = os.fsdecode(os.path.relpath(path, here))
            if path.is_symlink():
                found[key] = f"link to {os.readlink(path)}"
            elif path.is_file():
                found[key] = path.read_bytes() if path.stat().st_size < 1 << 24 else f"{path.stat().st_size} bytes"
            else:
                found[key] = "no file"
    return found


def faults(
    name: str,
    outcome: Outcome,
    before: dict[str, bytes | str],
    expected: dict[str, bytes | str] | None = None,
    names: tuple[str, ...] = (),
    place: str | None = None,
) -> list[str]:
    """What the rule finds wrong. expected: results of the undamaged command, where damage may not change them.

    names: one of them has to be named by a refusal (the damaged file, or the key).
    """
    wrong = []
    if outcome.code is None:
        wrong.append("hangs")
    elif outcome.code not in (0, 2) and not (name == "generate" and " failed, " in outcome.said):  # rows may fail
        wrong.append(f"exit code {outcome.code}")
    if found := FOREIGN.search(outcome.said):
        wrong.append(f"says {found[0]!r}")
    more = 1 if outcome.code == 2 else 10
    if len(outcome.said.splitlines()) > more * LINES or len(outcome.said) > more * CHARACTERS:
        wrong.append(f"says {len(outcome.said.splitlines())} lines, {len(outcome.said)} characters")
    if outcome.code == 2:
        if outcome.said.count("error: ") != 1 and "Usage:" not in outcome.said:
            wrong.append(f"{outcome.said.count('error: ')} blocks")
        if names and not any(name in outcome.said for name in names):
            wrong.append(f"names none of {', '.join(names)}")
    may_change = (*WRITES.get(name, ()), "cache/", "home/.cache/", "home/.config/")  # matplotlib has a cache of its own
    for path, content in before.items():
        if not path.startswith(may_change) and outcome.files.get(path) != content:
            wrong.append(f"{'changes' if path in outcome.files else 'loses'} {path}")
    if place:  # an odd one, and still the place that was asked for
        normal = os.path.normpath(place)
        may_change = (*may_change, "" if normal == "." else normal, " ".join(normal.split()), "home/")
    left = [path for path in outcome.files if path not in before and not path.startswith(may_change)]
    if left:
        wrong.append(f"leaves {', '.join(left[:3])}")
    if outcome.code == 0 and expected is not None:
        other = [path for path, content in expected.items() if outcome.files.get(path) != content]
        if other:
            wrong.append(f"another result without a word: {', '.join(other[:3])}")
    return wrong


def results(name: str, files: dict[str, bytes | str]) -> dict[str, bytes | str]:
    """What of a command's output says whether it was the right one: weights, predictions, answers, mixtures."""
    ends = ("adapter_model.safetensors", "predicted.csv", "answers.jsonl", "mixture.yaml", "proposed.yaml")
    places = WRITES.get(name, ())
    return {path: content for path, content in files.items() if path.startswith(places) and path.endswith(ends)}


__all__ = ["COMMANDS", "Outcome", "faults", "results", "run", "snapshot", "time"]
