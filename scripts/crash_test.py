"""Kill every command that writes with SIGKILL, give the same command again, and compare the end with an unbroken run.

    python scripts/crash_test.py --kills 500
    python scripts/crash_test.py --kills 20 --cases merge-overwrite fuse
    python scripts/crash_test.py --pairs 100         two runs in one folder at random distances: never both write

A kill falls at a random time after the start of the process, or at a random one of its file operations (before a file
is opened for writing, renamed or removed, a folder made or removed), which hits the instants that time rarely hits. A
killed command is given again, and killed again, until it comes to its end. Then every file below its folder has to be
there with the same content (times of the clock apart), and nothing else: no side files, no locks. Tiny models and tasks
are made in a temporary folder; each run is a process forked from one that has everything imported.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: OpenMP's threads don't survive a fork, and the runs would hang
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from crash_cases import CASES, Case, differences, inside, picture  # noqa: E402

PATIENCE = 600  # seconds after which a command hangs
OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "ctypes.call_function"}


def file_operations(folder: Path, kill_at: int | None, note: Path) -> None:
    """Counts this process' file operations below `folder` in `note`; kills it before operation `kill_at`."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event == "open":
            path, mode, flags = arguments
            if not inside(path, str(folder)) or not (flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
        elif event not in OPERATIONS or (event.startswith("os.") and not inside(arguments[0], str(folder))):
            return
        count += 1
        if kill_at is None:
            os.ftruncate(counted, 0)
            os.pwrite(counted, str(count).encode(), 0)
        elif count == kill_at:
            os.pwrite(counted, f"{event} {arguments[:2]}".encode(), 0)
            os.kill(os.getpid(), signal.SIGKILL)

    counted = os.open(note, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(hook)


class Attempt:
    """One try of a command: a process for each rank, silent, in the folder."""

    def __init__(self, case: Case, folder: Path, kill_at: int | None = None) -> None:
        self.note = folder.with_name("note")
        self.note.unlink(missing_ok=True)
        port = _free_port() if case.ranks > 1 else 0
        self.ranks = []
        for rank in range(case.ranks):
            at = kill_at if rank == 0 else None
            work = (case, folder, rank, port, at, self.note if rank == 0 else folder.with_name("note-1"))
            self.ranks.append(multiprocessing.get_context("fork").Process(target=_work, args=work))
            self.ranks[-1].start()

    def wait(self, seconds: float) -> bool:
        """True if every rank has ended by then. As a launcher does, it kills the others when one has failed."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(rank.is_alive() for rank in self.ranks):
            if any(rank.exitcode not in (None, 0) for rank in self.ranks):
                self.kill()
            self.ranks[0].join(0.01)
        return not any(rank.is_alive() for rank in self.ranks)

    def kill(self) -> None:
        for rank in self.ranks:
            if rank.is_alive():
                os.kill(rank.pid or 0, signal.SIGKILL)
        for rank in self.ranks:
            rank.join()

    @property
    def codes(self) -> list[int | None]:
        return [rank.exitcode for rank in self.ranks]


def _work(case: Case, folder: Path, rank: int, port: int, kill_at: int | None, note: Path) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    log = os.open(folder.with_name(f"log-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    os.chdir(folder)
    os.environ["MTFT_CACHE"] = str(folder / "cache")
    if case.ranks > 1:
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{case.ranks}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "ACCELERATE_USE_CPU": "true"}
    file_operations(folder, kill_at, note)
    code = 1
    try:
        case.work()
        code = 0
    except BaseException:  # noqa: BLE001  told by exit code and log
        import traceback

        traceback.print_exc()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Trial:
    """A case under fire: `kills` so far, `runs` that came to their end, `faults` found."""

    def __init__(self, case: Case, scratch: Path, draw: random.Random) -> None:
        self.case, self.draw = case, draw
        self.template, self.folder = scratch / "template", scratch / "work"
        self.kills, self.runs, self.faults = 0, 0, []
        self.where: Counter[str] = Counter()
        self.instants: list[int] = []  # file operations that are still to be hit before any is hit again
        self._prepare()
        begin = time.perf_counter()
        attempt = self._start_anew()
        if not attempt.wait(PATIENCE) or any(attempt.codes):
            raise SystemExit(f"{case.name}: the unbroken run fails\n{self._log()}")
        self.length = time.perf_counter() - begin
        self.operations = int(attempt.note.read_text() or 1)
        self.expected = picture(self.folder)
        before = picture(self.template / case.standing) if case.standing else None
        after = picture(self.folder / case.standing) if case.standing else None
        self.whole = [before, after]

    def _prepare(self) -> None:
        """In the folder where it will be used: paths stand in some of the files."""
        self.folder.mkdir(parents=True)
        prepare = Case(self.case.name, self.case.prepare, self.case.prepare)
        attempt = Attempt(prepare, self.folder)
        if not attempt.wait(PATIENCE) or any(attempt.codes):
            raise SystemExit(f"{self.case.name}: its inputs can't be made\n{self._log()}")
        self.folder.rename(self.template)

    def _start_anew(self, kill_at: int | None = None) -> Attempt:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder, symlinks=True)
        return Attempt(self.case, self.folder, kill_at)

    def _log(self) -> str:
        logs = [self.folder.with_name(f"log-{rank}") for rank in range(self.case.ranks)]
        return "\n".join(log.read_text(errors="replace")[-3000:] for log in logs if log.exists())

    def run(self, kills: int) -> None:
        """One run from its start to its end, killed on the way at most `kills` times."""
        begun, last = False, "no kill"
        left = self.draw.randint(1, max(1, min(kills, 6)))
        while True:
            kill_at = self._instant() if left and self.draw.random() < 0.6 else None
            attempt = Attempt(self.case, self.folder, kill_at) if begun else self._start_anew(kill_at)
            begun = True
            by_time = left and kill_at is None
            if not attempt.wait(self.draw.uniform(0, self.length) if by_time else PATIENCE):
                attempt.kill()
                if not by_time:
                    self._fault(f"hangs after {last}")
                    return
            if all(code == 0 for code in attempt.codes):
                break
            if -signal.SIGKILL not in attempt.codes:
                if self.case.once and not differences(picture(self.folder), self.expected):
                    break  # the last kill fell behind its end
                self._fault(f"exit code {attempt.codes} after {last}\n{self._log()}")
                return
            last = attempt.note.read_text() if kill_at else "a kill by time"
            self.where[last.split(" ")[0] if kill_at else "time"] += 1
            self.kills, left = self.kills + 1, left - 1
            if self.case.standing and picture(self.folder / self.case.standing) not in self.whole:
                self._fault(f"{self.case.standing} is not whole after {last}")
        self.runs += 1
        if other := differences(picture(self.folder), self.expected):
            self._fault(f"differs after {last}: {'; '.join(other[:6])}")

    def _instant(self) -> int:
        if not self.instants:
            self.instants = self.draw.sample(range(1, self.operations + 1), self.operations)
        return self.instants.pop()

    def _fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"{self.case.name}: {text}", flush=True)


def pairs(count: int, scratch: Path, draw: random.Random) -> int:
    """Two runs in one folder at random distances; how many pairs did not end as one run's work."""
    trial = Trial(CASES["train"], scratch, draw)
    wrong, codes = 0, Counter()
    for _ in range(count):
        first = trial._start_anew()
        time.sleep(draw.uniform(0, 1.1 * trial.length))
        second = Attempt(trial.case, trial.folder)
        ended = first.wait(PATIENCE) and second.wait(PATIENCE)
        ends = (first.codes[0], second.codes[0])
        codes[ends] += 1
        other = differences(picture(trial.folder), trial.expected) if ended else ["a run hangs"]
        if other or 0 not in ends:
            wrong += 1
            print(f"pair: exit codes {ends}: {'; '.join(other[:6])}\n{trial._log()}", flush=True)
    told = ", ".join(f"{number} x {ends}" for ends, number in sorted(codes.items()))
    print(f"{count} pairs, exit codes {told} (1: refused); {wrong} did not end as one run")
    return wrong


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=50, help="how many processes to kill (default 50)")
    options.add_argument("--pairs", type=int, default=0, help="instead: pairs of runs in one folder")
    options.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    options.add_argument("--seed", type=int, default=0, help="of the instants")
    asked = options.parse_args()
    draw = random.Random(asked.seed)
    import mtft.training.run_training  # noqa: F401
    import tests.fuse.tiny  # noqa: F401  so that the forked processes have it all

    with tempfile.TemporaryDirectory(prefix="mtft-crash-") as scratch:
        if asked.pairs:
            return 1 if pairs(asked.pairs, Path(scratch), draw) else 0
        shares = sum(CASES[name].share for name in asked.cases)
        kills = runs = faults = 0
        for name in asked.cases:
            trial = Trial(CASES[name], Path(scratch) / name, draw)
            goal = max(1, round(asked.kills * CASES[name].share / shares))
            while trial.kills < goal and len(trial.faults) < 5:
                trial.run(goal - trial.kills)
            where = ", ".join(f"{count} {at}" for at, count in trial.where.most_common())
            told = f"{trial.kills} kills ({where}), {trial.runs} runs to the end, {len(trial.faults)} faults"
            print(f"{name:16} {trial.length:5.1f} s, {trial.operations} file operations: {told}", flush=True)
            kills, runs, faults = kills + trial.kills, runs + trial.runs, faults + len(trial.faults)
            shutil.rmtree(Path(scratch) / name)
    print(f"{kills} kills; {runs} runs came to their end as unbroken ones do, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
