"""Runs attacks one after the other, and says what each kind came to.

python -m tests.hostile.siege --count 1000        of all the attacks, drawn evenly from the three kinds
python -m tests.hostile.siege --only "train: half/checkpoint-2/state.json"
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch: its threads don't survive a fork

from tests.hostile.attacks import Attack, on_files, on_keys, on_places
from tests.hostile.judge import faults, results, run, snapshot
from tests.hostile.world import COMMANDS, build, copy_back

KINDS = {"file": on_files, "key": on_keys, "place": on_places}


class Siege:
    """The world in a scratch folder, and what every command makes of it undamaged."""

    def __init__(self, scratch: Path) -> None:
        self.here, self.template, self.log = scratch / "world", scratch / "template", scratch / "log"
        self.here.mkdir()
        builder = multiprocessing.get_context("fork").Process(target=self._build)
        builder.start()
        builder.join()
        if builder.exitcode != 0:
            raise RuntimeError(f"the world can't be made:\n{self.log.read_text()}")
        self.here.rename(self.template)
        self._right: dict[str, dict[str, bytes | str]] = {}

    def _build(self) -> None:
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(self.here)
        os.environ["MTFT_CACHE"] = str(self.here / "cache")
        build(self.here)

    def right(self, command: str) -> dict[str, bytes | str]:
        """The results of a command in the undamaged world."""
        if command not in self._right:
            copy_back(self.template, self.here)
            outcome = run(COMMANDS[command], self.here, self.log)
            if outcome.code != 0:
                raise RuntimeError(f"{command} fails undamaged (exit code {outcome.code}):\n{outcome.said}")
            self._right[command] = results(command, outcome.files)
        return self._right[command]

    def strike(self, attack: Attack) -> tuple[list[str], str]:
        """What is wrong with the end of the attack, and what was said."""
        expected = self.right(attack.command) if attack.ours else None
        copy_back(self.template, self.here)
        around = snapshot_around(self.here)
        attack.strike(self.here)
        before = snapshot(self.here)
        outcome = run(list(attack.arguments), self.here, self.log)
        wrong = faults(attack.command, outcome, before, expected, attack.names, attack.place)
        beside = sorted(snapshot_around(self.here) - around)
        if beside and attack.place != "..":
            wrong.append(f"leaves {', '.join(beside)} beside its folder")
        for path in beside:
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        return wrong, outcome.said


def snapshot_around(here: Path) -> set[str]:
    """Names beside the world, and where an output could stray to."""
    places = (here.parent, Path.home(), Path("/"))
    return {str(path) for place in places for path in place.iterdir() if path.name not in ("log", ".cache")}


def draw(count: int | None, seed: int = 0, kinds: Sequence[str] = tuple(KINDS)) -> list[Attack]:
    """`count` attacks (None: all), as many of each kind as there are, up to an equal part."""
    lists = [list(KINDS[kind](COMMANDS)) for kind in kinds]
    if count is None:
        return [attack for attacks in lists for attack in attacks]
    chosen: list[Attack] = []
    for left, attacks in zip(range(len(lists), 0, -1), sorted(lists, key=len), strict=True):
        part = min(len(attacks), (count - len(chosen)) // left)
        chosen += random.Random(seed).sample(attacks, part)
    return chosen


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--count", type=int, help="how many attacks; default: all")
    options.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options.add_argument("--only", help="those whose name holds this text")
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    attacks = draw(asked.count, asked.seed, asked.kinds)
    if asked.only:
        attacks = [attack for attack in attacks if asked.only in str(attack)]
    scratch = Path(tempfile.mkdtemp(prefix="mtft-siege-"))
    import tests.fuse.tiny  # noqa: F401  so that the forked processes have all libraries

    try:
        siege = Siege(scratch)
        codes: Counter[str] = Counter()
        broken = 0
        for number, attack in enumerate(attacks, 1):
            wrong, said = siege.strike(attack)
            codes["fault" if wrong else "held"] += 1
            if wrong:
                broken += 1
                tail = "\n    ".join(said.strip().splitlines()[-8:])
                print(f"{attack}: {'; '.join(wrong)}\n    {tail[:1500]}", flush=True)
            elif asked.only:
                print(f"{attack}: held\n    " + "\n    ".join(said.strip().splitlines()[-8:]))
            if number % 100 == 0:
                print(f"{number} of {len(attacks)} attacks, {broken} faults", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{len(attacks)} attacks, {broken} faults")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
