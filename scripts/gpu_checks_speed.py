"""How fast: training at 8k tokens beside TRL, fused decoding beside strong alone; and several GPUs.

Checks of scripts/check_gpu.py, on the code of scripts/bench_train.py and scripts/bench_fuse.py.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gpu_checks import (
    ROOT,
    Bench,
    Check,
    Lines,
    at_least,
    at_most,
    info,
    last_line,
    result_of,
    skip,
    step_lines,
    write_recipe,
)
from gpu_checks_train import package

MFU = 0.35
LEAST_GIB = 40  # of a card for 1.3 B parameters at 8k tokens without checkpointing
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def throughput(bench: Bench, shape: Any = None, steps: int = 10) -> Lines:
    """LoRA on 1.3 B random parameters in bf16, packed rows of 8192 tokens: ours beside TRL's packed settings."""
    import bench_train
    import torch

    native = not bench.on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    total = torch.cuda.get_device_properties(0).total_memory / 2**30 if bench.on_gpu else LEAST_GIB
    if not native or total < LEAST_GIB:
        why = f"{total:.0f} GiB, and it takes {LEAST_GIB}" if native else "no native bf16"
        yield skip("1.3 B at 8k tokens: tokens/s, MFU, peak, beside TRL", why)
        return
    shape = replace(bench_train.LARGE, max_length=8192) if shape is None else shape
    budget = shape.max_length
    stores = bench_train.make_stores(shape, max(64, 2 * steps * budget // shape.median))
    packed = {"packing": True, "per_device_train_batch_size": 1}
    ours = {"batch_tokens": budget, "micro_batch_tokens": budget}
    sides: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "mtft": (bench_train.run_mtft, ours),
        "mtft, fused loss": (bench_train.run_mtft, {**ours, "path": "fused"}),
        "mtft, segments": (bench_train.run_mtft, {**ours, "attention": "segments"}),
        "mtft, segments, chunked loss": (bench_train.run_mtft, {**ours, "attention": "segments", "path": "chunked"}),
        "TRL bfd": (bench_train.run_trl, packed),
    }
    if package("liger-kernel") is not None and bench.on_gpu:
        sides["TRL bfd, Liger"] = (bench_train.run_trl, {**packed, "use_liger_kernel": True})
    if package("trl") is None:
        sides = {name: side for name, side in sides.items() if name == "mtft"}
        yield skip("TRL's packed settings", "trl is not installed")
    elif "TRL bfd, Liger" not in sides:
        yield skip("TRL bfd, Liger", "liger-kernel is not installed" if bench.on_gpu else "needs a GPU")
    rates: dict[str, float] = {}
    for name, (run, settings) in sides.items():
        bench.free()
        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            rates[name] = run(shape, stores, steps, device=bench.device, **settings).rate()
        except torch.OutOfMemoryError:
            yield info(f"{name}: tokens/s", "out of memory")
            continue
        note = f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if bench.on_gpu else "by CPU time"
        yield info(f"{name}: tokens/s", note, rates[name])
    best = max((rates[name] for name in rates if name.startswith("mtft")), default=float("nan"))
    theirs = max((rates[name] for name in rates if name.startswith("TRL")), default=None)
    if theirs is not None:
        yield info("tokens/s of ours by TRL's best", figure=best / theirs)
    what = "MFU of ours (4 FLOPs a parameter and token: the weights are frozen)"
    known = torch.cuda.get_device_name() if bench.on_gpu else "a CPU"
    peak = next((flops for card, flops in bench_train.PEAKS.items() if card in known), None)
    parameters = shape.layers * (4 * shape.width**2 + 3 * shape.width * shape.mlp) + shape.vocabulary * shape.width
    if peak is None:
        yield skip(what, f"the peak of {known} is not known to scripts/bench_train.py")
    else:
        yield at_least(what, 4 * parameters * best / peak, MFU)


def decoding(
    bench: Bench,
    strong: tuple[int, int] = (2048, 16),
    small: tuple[int, int] = (512, 8),
    batches: Sequence[int] = (1, 8, 32),
    tokens: int = 24,
    repeats: int = 3,
) -> Lines:
    """Seconds of a fused step by those of strong alone. strong, small: (width, layers)."""
    import bench_fuse
    import torch

    from mtft import FusedCausalLM, FusionSpec

    dtype = (
        torch.bfloat16 if bench.on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    )
    folder = bench.folder("decoding")
    bench_fuse.llama(*small, 2).save_pretrained(folder / "base")
    adapter = bench_fuse.make_adapter(folder / "adapter", folder / "base", 0)
    with torch.device(bench.device):
        alone: Any = bench_fuse.llama(*strong, 1)
        alone = alone.to(dtype)
    ours = copy.deepcopy(alone, {id(p): p for p in alone.parameters()})  # the same weights
    bench_fuse.transpose_lm_head(ours)  # as FusedCausalLM.load does
    weak = bench_fuse.load_weak_model(folder / "base", [adapter], dtype=dtype, device=bench.device)
    fused = FusedCausalLM(ours, weak, None, FusionSpec(), vocab_size=bench_fuse.VOCABULARY)
    for rows in batches:
        draw = torch.Generator().manual_seed(rows)
        ids = torch.randint(3, bench_fuse.VOCABULARY, (rows, bench_fuse.PROMPT), generator=draw).to(bench.device)
        for model in (alone, fused):  # kernels are chosen and compiled now
            bench_fuse.generated(model.generate, ids, 4)
        ways = {
            "alone": partial(bench_fuse.generated, alone.generate, ids, tokens),
            "fused": partial(bench_fuse.generated, fused.generate, ids, tokens),
        }
        found = bench_fuse.compare(ways, "alone", repeats)
        note = f"{found['fused']['wall_ms']:.1f} ms against {found['alone']['wall_ms']:.1f} ms, {dtype}"
        yield info(f"a fused step by one of strong alone, B = {rows}", note, found["fused"]["x_wall"])


def ranks(bench: Bench, engines: Sequence[str] = ENGINES, count: int = 2) -> Lines:
    """The same recipe in bf16 on two GPUs over NCCL, under each engine, against one GPU."""
    base: dict[str, Any] = {"model": {"dtype": "bf16"}, "train": {"steps": 8}}
    kinds = {"LoRA": base, "full": {**base, "lora": None}}
    expected = {name: launched(bench, bench.content(f"one-{name}", **kind), []) for name, kind in kinds.items()}
    for engine in engines:
        if engine.startswith("zero") and package("deepspeed") is None:
            yield skip(f"{engine} on {count} ranks", "deepspeed is not installed")
            continue
        config = ROOT / "recipes" / "accelerate" / f"{engine}.yaml"
        words = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        words += ["--num_processes", str(count), "--main_process_port", "0"]
        for name, kind in kinds.items():
            what = f"{engine}, {name}, bf16, {count} ranks: loss of every step against one"
            try:
                run = launched(bench, bench.content(f"{engine}-{name}", **kind), words, count)
            except RuntimeError as error:
                yield at_most(what, float("nan"), 5e-3, str(error))
                continue
            pairs = list(zip(step_lines(run), step_lines(expected[name]), strict=True))
            apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs)
            proof = result_of(run).get("proof")
            told = "no proof" if proof is None else f"proof {proof:.1e}"
            yield at_most(what, apart, 5e-3, told)


def launched(bench: Bench, content: dict[str, Any], words: Sequence[str], count: int = 1) -> Path:
    """The folder of a run under a launcher (none: one process)."""
    run = Path(content["output"]["dir"])
    file = write_recipe(content, run.with_name("recipe.yaml"))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(bench.gpus[:count])}
    command = [sys.executable, *words, "-m", "mtft", "train", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"ended with {done.returncode}: {last_line(done.stderr)}")
    return run


SPEED = (
    Check("throughput", "1.3 B at 8k tokens: tokens/s, MFU, peak, beside TRL", throughput, (0, 50), gpus=1),
    Check("decoding", "fused decoding against strong alone, B = 1, 8, 32", decoding, (0, 25), gpus=1),
    Check("ranks", "two GPUs over NCCL in bf16: DDP, FSDP2, ZeRO-1, 2, 3", ranks, (0, 240), gpus=2),
)
