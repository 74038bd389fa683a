"""The process in which scripts/check_gpu.py runs its checks."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_checks import Bench, Check, Line, reason, skip


def facts() -> dict[str, Any]:
    """Of the machine, by torch."""
    import platform

    import torch

    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else "no GPU"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else None
    return {
        "device": "cuda" if on_gpu else "cpu",
        "card": name,
        "card_gib": memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
    }


def work(names: Sequence[str], scratch: Path, checks: dict[str, Check], known: dict[str, Any] | None = None) -> int:
    """Runs the checks; every event is a line of JSON on what was the standard output. known: for `facts()`."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between

    def tell(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    if known is None:
        from quiet_libraries import quiet

        known = facts()
        quiet()  # what libraries say is for the log
    bench = Bench(known["device"], scratch, tuple(filter(None, os.environ.get("CHECK_GPU_ALL", "").split(","))))
    tell(event="hello", facts=known)
    for name in names:
        tell(event="begin", check=name)
        if checks[name].gpus and not bench.on_gpu:
            tell(event="line", check=name, line=asdict(skip(checks[name].about, "torch sees no GPU")), seconds=0.0)
            tell(event="end", check=name)
            continue
        begun = time.perf_counter()
        try:
            for line in checks[name].run(bench):
                tell(event="line", check=name, line=asdict(line), seconds=time.perf_counter() - begun)
                begun = time.perf_counter()
        except BaseException as error:  # noqa: BLE001  whatever it was, it is this check's
            traceback.print_exc()
            missed = Line(checks[name].about, "MISS", note=reason(error))
            tell(event="line", check=name, line=asdict(missed), seconds=time.perf_counter() - begun)
            if isinstance(error, KeyboardInterrupt) or not bench.sound():
                tell(event="lost", check=name)
                return 1
        tell(event="end", check=name)
        bench.free()
    return 0
