"""How fast this machine's CPU multiplies in each precision: measured once, with a small matrix product.

bf16 is fast where the CPU has units for it (AMX, AVX512-BF16) and some fifty times slower than fp32 where it has not
(1.2 against 54 GFLOP/s on an AVX2 machine): a run would show no step for minutes. Flags of the CPU don't tell, since
libraries differ in what they use; so it is tried. The result stands in the cache beside the token stores, by processor
and version of torch: all processes of a run, and a run that goes on, take the same precision.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from mtft.common.atomic_io import write_json
from mtft.common.cache_folder import default_cache
from mtft.common.errors import UserError
from mtft.common.own_files import defect, read_own
from mtft.recipe.schema.model import ModelSection

SIZE, REPEATS = 256, 9  # the best of so many: other processes may be about
FASTER = 1.5  # times fp32: from here on bf16 is worth its 8 bits
SLOWER = 0.5  # times fp32: below it, it is said
MEASURED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@cache
def cpu_gflops() -> dict[str, float]:
    """{precision: GFLOP/s} of this machine's CPU."""
    place, key = default_cache() / "cpu_precision.json", _machine()
    known = _read(place)
    if key in known:
        return known[key]
    found = {name: round(_measure(dtype), 2) for name, dtype in MEASURED.items()}
    try:
        from filelock import FileLock

        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_suffix(".lock")):
            known = _read(place)
            found = known.setdefault(key, found)  # of the process that was first
            write_json(place, known)
    except OSError:  # nowhere to write: this process keeps its own
        pass
    return found


def cpu_dtype() -> torch.dtype:
    """What `dtype: auto` is on a CPU: bf16 where it is measured to be clearly faster, else fp32."""
    rate = cpu_gflops()
    return torch.bfloat16 if rate["bf16"] >= FASTER * rate["fp32"] else torch.float32


def slow_on_cpu(dtype: str) -> str | None:
    """Why a precision that was asked for is a bad choice on this CPU; None: it isn't, or is not one of the measured."""
    rate = cpu_gflops()
    if dtype == "auto" or dtype not in rate or rate[dtype] >= SLOWER * rate["fp32"]:
        return None
    times = rate["fp32"] / max(rate[dtype], 1e-3)
    return (
        f"this CPU has no fast {dtype}: a matrix product runs at {rate[dtype]:.3g} GFLOP/s, in fp32 at "
        f"{rate['fp32']:.3g}, so a step takes up to {times:.0f} times as long"
    )


def precision_warnings(models: Mapping[str, ModelSection | None]) -> list[str]:
    """What to say of the precision of each {key of the recipe: model}, where there is no GPU."""
    if torch.cuda.is_available():
        return []
    asked = {key: section.dtype for key, section in models.items() if section is not None}
    slow = {key: why for key, dtype in asked.items() if (why := slow_on_cpu(dtype)) is not None}
    said = [f"{why} ({key}.dtype): set {key}.dtype: auto, or fp32" for key, why in slow.items()]
    rate = cpu_gflops() if "auto" in asked.values() else {}
    if rate and cpu_dtype() == torch.bfloat16:
        times = rate["bf16"] / max(rate["fp32"], 1e-3)
        keys = ", ".join(f"{key}.dtype" for key, dtype in asked.items() if dtype == "auto")
        said.append(
            f"{keys}: auto is bf16 here, which this CPU multiplies {times:.1f} times as fast as fp32; it rounds to "
            "8 bits, so losses are coarser, and small adapters seem to do less than they do in fp32"
        )
    return said


def _measure(dtype: torch.dtype) -> float:
    """GFLOP/s: the best of a few, since other processes may be about."""
    left, right = (torch.full((SIZE, SIZE), 0.5, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - begin)
    return 2 * SIZE**3 / max(min(seconds), 1e-9) / 1e9


def _machine() -> str:
    limits = [os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")]
    return " | ".join([_processor(), torch.__version__, f"{torch.get_num_threads()} threads", *filter(None, limits)])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} {platform.processor()}".strip()


def _read(place: Path) -> dict[str, dict[str, float]]:
    """{machine: {precision: GFLOP/s}}; what is damaged is measured again."""
    try:
        known = read_own(place, do="delete it")
    except UserError:
        return {}
    rates = dict.fromkeys(MEASURED, float)
    return {key: value for key, value in known.items() if defect(value, rates) is None}
