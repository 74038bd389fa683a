"""Whole runs on a device: precision, proof, checkpoints, signals, memory. Checks of scripts/check_gpu.py."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_checks import (
    Bench,
    Check,
    Line,
    Lines,
    at_most,
    command,
    distance,
    exported,
    holds,
    info,
    last_line,
    result_of,
    skip,
    step_lines,
    train_apart,
    write_recipe,
)

PACKAGES = ("transformers", "peft", "accelerate", "bitsandbytes", "flash-attn", "trl", "liger-kernel", "deepspeed")


def versions(bench: Bench) -> Lines:
    """What is installed, and what the card can do."""
    import torch

    from mtft.models.loading import resolve_dtype

    for name in PACKAGES:
        installed = package(name)
        yield skip(name, "not installed") if installed is None else info(name, installed)
    if not bench.on_gpu:
        yield skip("CUDA, driver, compute capability", "no GPU here")
        yield info("dtype auto", f"{resolve_dtype('auto')}: measured on this CPU")
    else:
        major, minor = torch.cuda.get_device_capability()
        yield info("CUDA, compute capability", f"{torch.version.cuda or torch.version.hip}, {major}.{minor}")
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        yield info("native bf16", "yes" if native else "no: emulated, or not at all")
        chosen = resolve_dtype("auto")
        yield holds("dtype auto is bf16 where it is native", (chosen == torch.bfloat16) == native, str(chosen))
    yield info("torch's own varlen attention", "there" if has_varlen() else "not in this torch")
    yield from four_bits(bench)


def package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def has_varlen() -> bool:
    from importlib.util import find_spec

    return find_spec("torch.nn.attention.varlen") is not None


def four_bits(bench: Bench) -> Lines:
    """A matrix there and back through bitsandbytes."""
    what = "bitsandbytes: nf4 there and back, relative error"
    if package("bitsandbytes") is None:
        yield skip(what, "bitsandbytes is not installed")
        return
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(bench.device)
    packed, state = quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    back = dequantize_4bit(packed, state)
    yield at_most(what, float((back.to(x) - x).norm() / x.norm()), 0.15)


def finished(recipe: Any, *, prove: bool = True) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The run's steps and its result."""
    from mtft import train

    result = train(recipe, quiet=True, prove=prove)
    return step_lines(result.out_dir), result_of(result.out_dir)


def proof(what: str, result: Mapping[str, Any], bar: float) -> Line:
    """The export against what was trained, by a fresh process."""
    if result.get("proof") is None:
        return holds(what, False, str(result.get("not_proved") or "no proof was made"))
    return at_most(what, result["proof"], bar)


def lora_bf16(bench: Bench) -> Lines:
    """Twenty steps, and the same in fp32 on the CPU."""
    changes: dict[str, Any] = {"train": {"steps": 20, "learning_rate": 3e-3}}
    steps, result = finished(bench.recipe("lora-bf16", model={"dtype": "bf16"}, **changes))
    yield proof("LoRA, bf16, 20 steps: proof", result, 3e-2)
    reference = bench.content("lora-fp32", model={"dtype": "fp32"}, **changes)
    expected = step_lines(train_on_cpu(bench, reference))
    apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(steps, expected, strict=True))
    yield at_most("LoRA, bf16: loss of every step against fp32 on the CPU", apart, 0.02)
    fall = statistics.fmean(s["loss"] for s in steps[-3:]) / statistics.fmean(s["loss"] for s in steps[:3])
    yield at_most("LoRA, bf16: loss at the end by that at the start", fall, 1.0)


def train_on_cpu(bench: Bench, content: dict[str, Any]) -> Path:
    """The folder of a run on the CPU: in this process where it sees no GPU anyway."""
    if bench.on_gpu:
        return train_apart(content, cpu=True)
    from mtft import Recipe, train

    return train(Recipe.model_validate(content), quiet=True, prove=False).out_dir


def full_fp32(bench: Bench) -> Lines:
    """All weights, in fp32."""
    steps, result = finished(bench.recipe("full-fp32", lora=None, train={"steps": 5}))
    yield proof("full fine-tuning, fp32, 5 steps: proof", result, 1e-4)
    yield holds("full fine-tuning: every loss is finite", all(s["loss"] == s["loss"] for s in steps))


def quantised(bench: Bench) -> Lines:
    """QLoRA on nf4 and int8: train, proof, stop, resume."""
    for kind in ("nf4", "int8"):
        if package("bitsandbytes") is None:
            yield skip(f"{kind}: train, proof, resume", "bitsandbytes is not installed")
            continue
        name = f"{kind}: "
        changes: dict[str, Any] = {
            "model": {"dtype": "bf16", "quantise": kind, "path": str(bench.model(width=128))},
            "train": {"steps": 6},
        }
        whole = bench.recipe(kind, **changes)
        steps, result = finished(whole)
        yield proof(f"{name}proof", result, 3e-2)
        halved = bench.recipe(f"{kind}-halved", **changes)
        run = stopped(halved, 3)
        yield holds(f"{name}a stop leaves a checkpoint", (run / "checkpoint-3").is_dir(), "after step 3")
        again, _ = finished(halved, prove=False)
        resumed = f"{name}resumed against unbroken"
        yield same_end(resumed, Path(whole.output.dir), run, steps, again, exact=not bench.on_gpu)


@contextmanager
def terminating(step: int) -> Iterator[None]:
    """SIGTERM to this process in the middle of a step."""
    from mtft import MultiTaskTrainer

    before = MultiTaskTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, *args, **kwargs)

    MultiTaskTrainer.training_step = training_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        MultiTaskTrainer.training_step = before  # type: ignore[method-assign]


def stopped(recipe: Any, step: int) -> Path:
    """The folder of a run that was stopped in `step`."""
    from mtft import train

    with terminating(step):
        try:
            train(recipe, quiet=True, prove=False)
        except SystemExit as ended:
            if ended.code != 0:
                raise RuntimeError(f"a stopped run ended with {ended.code}") from ended
        else:
            raise RuntimeError("the run did not stop")
    return Path(recipe.output.dir)


def same_end(
    what: str, whole: Path, broken: Path, expected: list[dict[str, Any]], found: list[dict[str, Any]], *, exact: bool
) -> Line:
    """exact: to the bit. Else the losses are held: sums in atomic order round anew, and AdamW magnifies it where
    gradients are near zero.
    """
    weights = distance(exported(whole), exported(broken))
    apart = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(expected, found, strict=True))
    if exact:
        return at_most(f"{what}: weights", weights, 0.0, "" if apart == 0 else f"losses {apart:.1e}", losses=apart)
    return at_most(f"{what}: losses", apart, 1e-3, f"weights {weights:.1e}", weights=weights)


def sigterm(bench: Bench) -> Lines:
    """SIGTERM to the whole process group, as torchrun, accelerate and Slurm send it; the same command goes on."""
    train = {"steps": 60, "micro_batch_tokens": bench.sizes.max_length, "deterministic": True}
    changes: dict[str, Any] = {"train": train}
    whole = train_apart(bench.content("unbroken", **changes), cpu=False)
    content = bench.content("group", **changes)
    run = Path(content["output"]["dir"])
    file = write_recipe(content, run.with_name("recipe.yaml"))
    process = subprocess.Popen(
        command("train", file), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        until = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < until and count_lines(run / "metrics.jsonl") < 3:
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    yield holds("SIGTERM to the group: exit status 0", process.returncode == 0, f"{process.returncode}")
    steps = len(step_lines(run))
    left = sorted(path.name for path in run.glob("checkpoint-*"))
    good = 0 < steps < 60 and f"checkpoint-{steps}" in left
    note = f"stopped after step {steps}; {', '.join(left) or 'no checkpoint'}"
    yield holds("SIGTERM to the group: its last step is saved", good, note if good else f"{note}; {last_line(said)}")
    train_apart(content, cpu=False)
    what = "SIGTERM to the group: resumed against unbroken"
    yield same_end(what, whole, run, step_lines(whole), step_lines(run), exact=True)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def memory(bench: Bench) -> Lines:
    """The estimate against the peak of a run of packed rows of 8192 tokens, and what auto gives back."""
    import torch

    from mtft.training.memory.auto_micro_batch import with_auto_micro_batch
    from mtft.training.memory.estimate import estimate_memory
    from mtft.training.training_inputs import read_training_inputs

    model = bench.model(hidden_size=1024, num_hidden_layers=12, intermediate_size=2816, num_attention_heads=16,
                        num_key_value_heads=8, vocab_size=32_000)  # fmt: skip
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    changes: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "bf16" if native else "fp32"},
        "train": {"steps": 3, "batch_tokens": 16_384, "micro_batch_tokens": 8192, "max_length": 8192},
    }
    for name, more in (("LoRA", {}), ("LoRA, checkpointed", {"gradient_checkpointing": True})):
        recipe = bench.recipe("memory", **{**changes, "train": {**changes["train"], **more}})
        estimate = estimate_memory(recipe, learnt_share=supervised_share(recipe)).total
        bench.free()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        finished(recipe, prove=False)
        peak = torch.cuda.max_memory_allocated() - before
        note = f"estimate {estimate / 2**30:.2f} GiB, peak {peak / 2**30:.2f} GiB"
        yield at_most(f"{name}, 8k packed: |estimate / peak - 1|", abs(estimate / peak - 1), 0.15, note)
    from mtft.training.build_model import load_for_training

    auto = bench.recipe("auto", **{**changes, "train": {**changes["train"], "micro_batch_tokens": "auto"}})
    Path(auto.output.dir).mkdir(parents=True)
    network: Any = load_for_training(auto)
    network.to(torch.device("cuda"))
    bench.free()
    held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    found = with_auto_micro_batch(auto, network, read_training_inputs(auto), before=None, say=lambda _: None)
    kept = torch.cuda.memory_allocated() - held[0], torch.cuda.memory_reserved() - held[1]
    note = f"chose {found.train.micro_batch_tokens} tokens; {kept[1] / 2**20:.0f} MiB more reserved"
    yield at_most("auto micro-batch: memory it keeps, MiB", kept[1] / 2**20, 256, note, allocated=kept[0])


def supervised_share(recipe: Any) -> float:
    """Supervised tokens by tokens, as the recipe's shares mix the tasks."""
    from mtft.training.training_inputs import read_training_inputs

    shares = recipe.mixture.shares
    parts = [(shares[store.task], store.supervised, store.lengths) for store in read_training_inputs(recipe).stores]
    learnt = sum(share * float(supervised.mean()) for share, supervised, _ in parts)
    return learnt / sum(share * float(lengths.mean()) for share, _, lengths in parts)


TRAIN = (
    Check("versions", "versions, native bf16, flash, bitsandbytes", versions, (8, 10)),
    Check("lora", "LoRA in bf16: proof, and the loss of fp32 on the CPU", lora_bf16, (10, 25)),
    Check("full", "full fine-tuning in fp32: proof", full_fp32, (8, 12)),
    Check("quantised", "nf4 and int8: train, proof, resume", quantised, (20, 25)),
    Check("sigterm", "SIGTERM to the process group, and resume", sigterm, (25, 30)),
    Check("memory", "estimate against peak, auto gives memory back", memory, (0, 20), gpus=1),
)
