"""Is this machine's GPU trained, merged and fused on rightly, and how fast? One page, one JSON, a few minutes.

    python scripts/check_gpu.py                            # everything that fits into five minutes
    python scripts/check_gpu.py --minutes 15 --json gpu.json
    python scripts/check_gpu.py --only packing fusion      # some checks; --list names them

Random models, no network. Each line is PASS or MISS with its figure and its bar, INFO where there is no bar, or SKIP
with what the machine lacks. Exit status 0 if nothing missed, 1 if something did. What needs no GPU runs on a machine
without one too, on smaller shapes; nothing is said of a GPU then.

Checks run one after the other in a worker process. One that dies of a check (a CUDA error ends it too: nothing after
it on that device could be believed), or takes far longer than it should (--patience), is a MISS, and the next worker
goes on with the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from check_gpu_session import PATIENCE, Session, Worker  # noqa: E402
from check_gpu_worker import work  # noqa: E402
from gpu_checks import all_checks  # noqa: E402


def visible_gpus() -> tuple[str, ...]:
    """Of CUDA_VISIBLE_DEVICES, or all that nvidia-smi knows. Nothing is imported."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(name.strip() for name in chosen.split(",") if name.strip() and name.strip() != "-1")
    if shutil.which("nvidia-smi") is None:
        return ()
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    return tuple(done.stdout.split()) if done.returncode == 0 else ()


def environment(gpus: Sequence[str], scratch: Path) -> dict[str, str]:
    """Of a worker: one GPU, no network, its own cache."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": gpus[0] if gpus else "",
        "CHECK_GPU_ALL": ",".join(gpus),
        "HF_HUB_OFFLINE": "1",
        "MTFT_CACHE": str(scratch / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not gpus:
        own["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # tiny shapes: threads only wait
    return {**os.environ, **own}


def main(arguments: Sequence[str] | None = None) -> int:
    checks = all_checks()
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=5.0, help="checks that don't fit any more are skipped")
    options.add_argument("--json", type=Path, metavar="FILE", help="write everything here too")
    options.add_argument("--only", nargs="+", metavar="NAME", help="these checks only")
    options.add_argument("--list", action="store_true", help="name the checks and stop")
    options.add_argument(
        "--patience", type=float, default=PATIENCE, help="times what a check should take until it is stopped"
    )
    options.add_argument("--worker", help=argparse.SUPPRESS)
    options.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    asked = options.parse_args(arguments)
    if asked.list:
        for check in checks.values():
            print(f"{check.name:14} {check.about}")
        return 0
    if asked.worker is not None:
        return work(asked.worker.split(","), asked.scratch, checks)
    if unknown := [name for name in asked.only or () if name not in checks]:
        options.error(f"no check {unknown[0]!r}: choose from {', '.join(checks)}")
    if not (asked.minutes > 0 and asked.patience > 0):
        options.error("--minutes and --patience must be above 0")
    if asked.json is not None and not asked.json.resolve().parent.is_dir():
        options.error(f"there is no folder {asked.json.resolve().parent}")
    gpus = visible_gpus()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker is ended too
    with tempfile.TemporaryDirectory(prefix="mtft-check-gpu-") as scratch:
        count = iter(range(1_000_000))

        def start(names: Sequence[str]) -> Worker:
            words = [sys.executable, str(Path(__file__).resolve()), "--worker", ",".join(names), "--scratch", scratch]
            return Worker(words, environment(gpus, Path(scratch)), Path(scratch) / f"worker-{next(count)}.log")

        session = Session(
            checks,
            [name for name in checks if asked.only is None or name in asked.only],
            minutes=asked.minutes,
            start=start,
            gpus=len(gpus),
            say=lambda text: print(text, file=sys.stderr, flush=True),
            patience=asked.patience,
        )
        page = session.run()
    if asked.json is not None:
        asked.json.write_text(json.dumps(page.as_dict(), indent=1) + "\n", encoding="utf-8")
    print(page.text())
    return page.code


if __name__ == "__main__":
    sys.exit(main())
