"""What a training step costs beside other trainers: same model, same examples, same supervised tokens, in one run.

    python scripts/bench_train.py                        rows of 512 and 4,096 tokens, fp32, 1 thread (about 10 minutes)
    python scripts/bench_train.py --only short --rounds 5 --json out.json

    hf          plain transformers.Trainer, rows padded to the longest of a batch of 8
    trl         TRL's SFTTrainer: default (padded), grouped by length, packed (`bfd`), and padding-free (all examples of
                a batch in one row)
    mftcoder    a loop as MFTCoder has it: padded, full logits, a mean for each task in turn
    mtft        MultiTaskTrainer, packed
    mtft, mask  the same with attention sdpa: a mask over the whole row, as it was before attention over segments

    short       rows of at most 512 tokens, lengths lognormal (median 96, sigma 0.8); about 8 examples a step
    long        rows of at most 4,096 tokens, lengths lognormal (mean 200); a full row a step
    mixed       as `long`, but a twelfth of the examples has 2,048 to 4,096 tokens: half of all tokens

Data: random ids, the answer 20 to 60 % of an example, 3 tasks. Model: Llama shape, width 256, 4 layers, vocabulary 16k,
LoRA r 8 on all linears. AdamW.
Counted are real tokens (no padding) per second of CPU time of the process, from the second step on; the trainers take
turns, and the figure is all their tokens over all their seconds: how much of a padded batch is padding differs much.

On a GPU also (else said to be skipped): 1.3 B parameters, random weights, bf16, packed, LoRA and QLoRA: tokens/s, peak
memory and MFU beside TRL's packed trainer.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parent))

import numpy as np
import torch
import torch.nn.functional as F
from quiet_libraries import quiet
from torch import Tensor

# Times as many tokens per CPU-second, ours over theirs (trl: the best of it; mask: ours with a mask).
BARS = {"short": {"hf": 4.0, "trl": 3.0}, "long": {"trl": 3.0, "mask": 2.5}, "mixed": {"trl": 1.0}}
TASKS = ("short", "middle", "long")
IGNORE = -100
BATCH = 8  # examples in a step
WARM = 1  # steps that are not counted


@dataclass(frozen=True)
class Shape:
    """A Llama shape and the data for it."""

    width: int
    layers: int
    mlp: int
    heads: int
    vocabulary: int
    max_length: int
    median: int
    rank: int = 8
    dtype: torch.dtype = torch.float32
    long_share: float = 0.0  # of the examples, that are at least half of max_length


SMALL = Shape(width=256, layers=4, mlp=704, heads=4, vocabulary=16_384, max_length=512, median=96)
LONG = replace(SMALL, max_length=4096, median=145)  # mean = median * exp(0.8**2 / 2)
MIXED = replace(LONG, long_share=1 / 12)
LARGE = Shape(2048, 24, 5632, 16, 32_768, 4096, 600, rank=16, dtype=torch.bfloat16)
TINY = Shape(64, 2, 128, 4, 512, 128, 40, rank=4)


@dataclass
class Store:
    """The examples of one task, in memory; what mtft's batches need of a token store."""

    task: str
    examples: list[tuple[np.ndarray, np.ndarray]]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids, _ in self.examples])

    @property
    def supervised(self) -> np.ndarray:
        return np.array([int(learnt.sum()) for _, learnt in self.examples])

    @property
    def num_examples(self) -> int:
        return len(self.examples)

    @property
    def ids(self) -> list[str]:
        return [f"{self.task}:{index}" for index in range(len(self.examples))]

    @property
    def fingerprint(self) -> str:
        return self.task

    @property
    def stats(self) -> dict[str, Any]:
        learnt = sum(int(learnt.sum()) for _, learnt in self.examples)
        return {"largest_id": max(int(ids.max()) for ids, _ in self.examples), "weights": [learnt, len(self.examples)]}

    def example(self, i: int):
        from mtft.data.tokenize.encode import Example

        return Example(*self.examples[i])


def make_stores(shape: Shape, count: int, seed: int = 0, tasks: Sequence[str] = TASKS) -> list[Store]:
    """`count` examples, dealt to the tasks in turn."""
    draw = np.random.default_rng(seed)
    stores = [Store(task, []) for task in tasks]
    lengths = np.exp(draw.normal(np.log(shape.median), 0.8, count))
    if shape.long_share:
        is_long = draw.random(count) < shape.long_share
        lengths[is_long] = draw.uniform(shape.max_length / 2, shape.max_length, int(is_long.sum()))
    for index, length in enumerate(np.clip(lengths, 16, shape.max_length).astype(int)):
        learnt = np.zeros(length, dtype=bool)
        learnt[length - max(2, round(length * draw.uniform(0.2, 0.6))) :] = True
        ids = draw.integers(3, shape.vocabulary, length).astype(np.int32)
        stores[index % len(stores)].examples.append((ids, learnt))
    return stores


def make_model(shape: Shape, device: str = "cpu", quantise: bool = False):
    """Random weights, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=0,
    )
    if not quantise:
        with torch.device(device):
            return LlamaForCausalLM._from_config(config, dtype=shape.dtype)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:  # bitsandbytes quantises while it loads
        LlamaForCausalLM._from_config(config, dtype=shape.dtype).save_pretrained(folder)
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=shape.dtype,
        )
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=shape.dtype, quantization_config=quantisation, device_map={"": device}
        )


def lora(shape: Shape):
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=shape.rank, lora_alpha=2 * shape.rank, target_modules="all-linear")


def make_rows(stores: Sequence[Store]):
    """All examples as the other trainers want them, in the order of the plan's tasks (one of each in turn)."""
    from datasets import Dataset

    rows = []
    for i in range(max(store.num_examples for store in stores)):
        for k, store in enumerate(stores):
            if i < store.num_examples:
                ids, learnt = store.examples[i]
                labels = np.where(learnt, ids, IGNORE)
                rows.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "task": k, "length": len(ids)})
    return Dataset.from_list(rows)


def make_tokenizer(shape: Shape):
    """SFTTrainer asks for one; nothing is tokenised with it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(shape.vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1")


class Clock:
    """Seconds and real tokens of the steps after the first WARM; CPU time of the process, or wall time of a GPU."""

    def __init__(self, device: str) -> None:
        self.device, self.marks, self.tokens = device, [], []

    def mark(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter() if self.device == "cuda" else time.process_time())

    def counted(self) -> tuple[int, float]:
        """Tokens and seconds."""
        return sum(self.tokens[WARM : len(self.marks)]), self.marks[-1] - self.marks[WARM - 1]

    def rate(self) -> float:
        """Tokens per second."""
        tokens, seconds = self.counted()
        return tokens / seconds


def watch(clock: Clock):
    from transformers.trainer_callback import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.mark()

    return Watch()


def pad(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), IGNORE)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length], labels[index, :length] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        mask[index, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def arguments(folder: str, steps: int, device: str, shape: Shape) -> dict[str, Any]:
    """What all Trainers share."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "bf16": shape.dtype == torch.bfloat16,
        "dataloader_pin_memory": device != "cpu",
        "remove_unused_columns": False,
        "seed": 1,
    }


def run_hf(shape: Shape, stores: Sequence[Store], steps: int, device: str = "cpu", **_: Any) -> Clock:
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    clock, model = Clock(device), get_peft_model(make_model(shape, device), lora(shape))

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        clock.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return pad(rows)

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(**arguments(folder, steps, device, shape), per_device_train_batch_size=BATCH)
        trainer = Trainer(model, args, train_dataset=make_rows(stores), data_collator=collate, callbacks=[watch(clock)])
        with contextlib.redirect_stdout(None):  # its own summary
            trainer.train()
    return clock


def run_trl(
    shape: Shape, stores: Sequence[Store], steps: int, device: str = "cpu", quantise: bool = False, **settings: Any
) -> Clock:
    from trl import SFTConfig, SFTTrainer

    clock, model = Clock(device), make_model(shape, device, quantise)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        config = SFTConfig(
            **arguments(folder, steps, device, shape) | {"remove_unused_columns": True},
            shuffle_dataset=False,
            # trl's own default, True, has the name that transformers 5.24 calls deprecated: the new one stands above it
            **{
                "activation_checkpointing": False,
                "per_device_train_batch_size": BATCH,
                "max_length": shape.max_length,
                **settings,
            },
        )
        rows = make_rows(stores).remove_columns(["task", "length"])
        trainer = SFTTrainer(
            model,
            config,
            train_dataset=rows,
            processing_class=make_tokenizer(shape),
            peft_config=lora(shape),
            callbacks=[watch(clock)],
        )
        inner, parts = trainer.data_collator, config.gradient_accumulation_steps

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = inner(rows)
            batches.append(sum(len(row["input_ids"]) for row in rows))
            return batch

        batches: list[int] = []
        trainer.data_collator = collate
        trainer.train()
        clock.tokens = [sum(batches[i : i + parts]) for i in range(0, len(batches), parts)]
    return clock


def run_mftcoder(shape: Shape, stores: Sequence[Store], steps: int, device: str = "cpu", **_: Any) -> Clock:
    """Padded rows, logits of every position, the mean over tasks of the task's token mean, task by task."""
    from peft import get_peft_model

    clock, model = Clock(device), get_peft_model(make_model(shape, device), lora(shape)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = make_rows(stores).shuffle(seed=1).to_list()
    for step in range(steps):
        taken = rows[step * BATCH : (step + 1) * BATCH]
        clock.tokens.append(sum(row["length"] for row in taken))
        batch = {key: value.to(device) for key, value in pad(taken).items()}
        labels_BT = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORE)
        logits_BTV = model(**batch).logits.float()
        nll_BT = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none").view(labels_BT.shape)
        task_B = torch.tensor([row["task"] for row in taken], device=device)
        learnt_BT = labels_BT != IGNORE
        means = [nll_BT[task_B == k].sum() / learnt_BT[task_B == k].sum() for k in task_B.unique()]
        torch.stack(means).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.mark()
    return clock


def run_mtft(
    shape: Shape,
    stores: Sequence[Store],
    steps: int,
    device: str = "cpu",
    quantise: bool = False,
    batch_tokens: int | None = None,
    micro_batch_tokens: int | None = None,
    path: str = "auto",
    attention: str = "auto",
    balancer: str = "uniform",
) -> Clock:
    from transformers.trainer_callback import TrainerCallback

    from mtft.data.planning import make_plan
    from mtft.models.lora import add_lora
    from mtft.models.segment_attention import NAME as SEGMENTS
    from mtft.models.segment_attention import register, use_segments
    from mtft.recipe.schema.recipe import Recipe
    from mtft.training.run_files.metrics_log import MetricsLog
    from mtft.training.trainer import build_trainer
    from mtft.training.training_arguments import training_arguments
    from mtft.training.training_inputs import TrainingInputs

    with tempfile.TemporaryDirectory() as folder:
        mean = float(np.concatenate([store.lengths for store in stores]).mean())
        recipe = Recipe.model_validate(
            {
                "name": "bench",
                "model": {"path": folder, "dtype": "fp32" if shape.dtype == torch.float32 else "bf16"},
                "tasks": [{"name": store.task, "data": "none"} for store in stores],
                "mixture": {"shares": "uniform"},
                "lora": {"r": shape.rank, "alpha": 2 * shape.rank},
                "loss": {"path": path, "balancer": {"name": balancer}},
                "train": {
                    "steps": steps,
                    "batch_tokens": batch_tokens or int(BATCH * mean) + 1,
                    "micro_batch_tokens": micro_batch_tokens or 2 * shape.max_length,
                    "max_length": shape.max_length,
                    "learning_rate": 1e-4,
                    "warmup": 0,
                },
                "output": {"dir": folder},
            }
        )
        model = make_model(shape, device, quantise)
        if attention == "auto":
            use_segments(model)
        elif attention == SEGMENTS:
            register()
            model.set_attn_implementation(SEGMENTS)
        if path == "fused":
            from mtft.losses.token_nll import add_fused_head

            add_fused_head(model)
        inputs = TrainingInputs(make_tokenizer(shape), stores, [None] * len(stores))
        plan = make_plan(recipe, stores)
        args = training_arguments(recipe, Path(folder), steps=steps, evaluates=False, saves=False)
        log = MetricsLog(Path(folder), steps=steps, quiet=True)  # metrics are written, as in every run
        trainer = build_trainer(recipe, inputs, plan, add_lora(model, recipe.lora, seed=1), args, log=log)
        clock = Clock(device)

        class Watch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                clock.tokens.append(int(trainer.steps.content(state.global_step - 1).tokens_K.sum()))
                clock.mark()

        trainer.add_callback(Watch())
        trainer.train()
    return clock


Side = tuple[str, Callable[..., Clock], dict[str, Any]]  # whose, what runs it, its settings


def sides(shape: Shape) -> dict[str, Side]:
    """{name: side}. TRL's batches are of about as many tokens as ours; a long row's is one row."""
    bfd = {"packing": True, "per_device_train_batch_size": 1}
    if shape.max_length > SMALL.max_length:
        full_row = {"batch_tokens": shape.max_length, "micro_batch_tokens": shape.max_length}
        free = {"padding_free": True, "max_length": None, "per_device_train_batch_size": 2 * BATCH}
        return {
            "mtft": ("mtft", run_mtft, full_row),
            "mtft, mask": ("mask", run_mtft, {**full_row, "attention": "sdpa"}),
            "hf padded": ("hf", run_hf, {}),
            "trl grouped by length": ("trl", run_trl, {"train_sampling_strategy": "group_by_length"}),
            "trl bfd, 1 row": ("trl", run_trl, bfd),
            "trl padding-free": ("trl", run_trl, free),
        }
    return {
        "mtft": ("mtft", run_mtft, {}),
        "mtft, mask": ("mask", run_mtft, {"attention": "sdpa"}),
        "hf padded": ("hf", run_hf, {}),
        "mftcoder-style": ("mftcoder", run_mftcoder, {}),
        "trl grouped by length": ("trl", run_trl, {"train_sampling_strategy": "group_by_length"}),
        "trl bfd, 1 row x 2": ("trl", run_trl, {**bfd, "gradient_accumulation_steps": 2}),
        "trl default": ("trl", run_trl, {"activation_checkpointing": True}),  # as it ships: padded, checkpointing
    }


SHAPES = {"short": SMALL, "long": LONG, "mixed": MIXED}
PEERS = {"hf": "plain HF Trainer, padded", "trl": "TRL's best ({best})", "mask": "our own with a mask over the row"}
SLOW = ("trl default",)  # looked at in the first round only
TWICE = ("mtft", "hf", "mask")  # twice the steps: ours are fast, and a bar hangs on the padding of few batches


def compare(part: str, rounds: int, steps: int) -> dict[str, Any]:
    """Tokens per CPU-second of each side, and how many times as many ours makes."""
    shape = SHAPES[part]
    every = sides(shape)
    counted = {name: np.zeros(2) for name in every}
    run_mtft(shape, make_stores(shape, 3 * BATCH), 2)  # libraries are loaded now
    examples = 3 * BATCH * (steps + 2) * (4 if shape.max_length > SMALL.max_length else 1)
    for turn in range(rounds):
        stores = make_stores(shape, examples, seed=turn)
        for name, (whose, run, settings) in every.items():
            if turn and name in SLOW:
                continue
            say(f"{part}, round {turn + 1} of {rounds}: {name}")
            counted[name] += run(shape, stores, 2 * steps if whose in TWICE else steps, **settings).counted()
            gc.collect()
    rates = {name: float(tokens / seconds) for name, (tokens, seconds) in counted.items()}
    table = {
        name: {"tokens_per_cpu_second": round(rate, 1), "ours": rates["mtft"] / rate} for name, rate in rates.items()
    }
    verdicts = {}
    for peer, bar in BARS[part].items():
        best = min((name for name in table if every[name][0] == peer), key=lambda name: table[name]["ours"])
        verdicts[peer] = {"ratio": table[best]["ours"], "bar": bar, "side": best}
    print(f"{part}: rows of at most {shape.max_length} tokens")
    for name, row in table.items():
        print(f"{name:24s} {row['tokens_per_cpu_second']:8.0f} tokens/CPU-s   ours {row['ours']:5.2f}x")
    for peer, found in verdicts.items():
        words = PEERS[peer].format(best=found["side"])
        passed = "PASS" if found["ratio"] >= found["bar"] else "MISS"
        print(f"{passed}  {found['ratio']:.2f}x {words} (bar {found['bar']}x)")
    return {"sides": table, "verdicts": verdicts}


PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16 FLOP/s


def large(shape: Shape, device: str, steps: int, budget: int) -> dict[str, Any]:
    """LoRA and QLoRA on a large shape, packed: tokens/s, peak memory, MFU; ours beside TRL's packed trainer.

    MFU counts 4 FLOPs a parameter and token (forward, and the gradient of activations: the weights are frozen).
    budget: tokens of a micro-batch and of a step.
    """
    stores = make_stores(shape, max(64, 2 * steps * budget // shape.median))
    rows = max(1, budget // shape.max_length)
    packed = {"packing": True, "per_device_train_batch_size": rows}
    single = {**packed, "per_device_train_batch_size": 1, "gradient_accumulation_steps": rows}
    ours = {"batch_tokens": budget, "micro_batch_tokens": budget}
    of_gpu = {
        "mtft": (run_mtft, ours),
        "mtft, fused loss": (run_mtft, {**ours, "path": "fused"}),
        f"trl bfd, {rows} rows": (run_trl, packed),
        f"trl bfd, 1 row x {rows}": (run_trl, single),
    }
    width, mlp = shape.width, shape.mlp
    parameters = shape.layers * (4 * width**2 + 3 * width * mlp) + shape.vocabulary * width
    peak = None
    if device == "cuda":
        peak = next((flops for name, flops in PEAKS.items() if name in torch.cuda.get_device_name()), None)
    out: dict[str, Any] = {"parameters": parameters}
    for quantise in (False, True) if device == "cuda" else (False,):
        for name, (run, settings) in of_gpu.items():
            label = f"{'QLoRA' if quantise else 'LoRA'}, {name}"
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                rate = run(shape, stores, steps, device=device, quantise=quantise, **settings).rate()
            except torch.OutOfMemoryError:
                print(f"{label:32s} out of memory")
                continue
            finally:
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
            row = {"tokens_per_second": round(rate, 1), "mfu": None if peak is None else 4 * parameters * rate / peak}
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
            out[label] = row
            tail = "" if row["mfu"] is None else f"   MFU {row['mfu']:.3f}"
            tail += "" if row["peak_gib"] is None else f"   peak {row['peak_gib']:.1f} GiB"
            print(f"{label:32s} {rate:10.0f} tokens/s{tail}")
    return out


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=4, help="steps of a round, the first not counted (ours: twice)")
    options.add_argument("--only", choices=[*SHAPES, "large"], help="one part; large needs a GPU")
    options.add_argument("--json", type=Path, help="write the figures here too")
    asked = options.parse_args()
    quiet()
    out: dict[str, Any] = {}
    if asked.only != "large":
        torch.set_num_threads(1)
        for part in [asked.only] if asked.only else SHAPES:
            out[part] = compare(part, asked.rounds, asked.steps)
    if asked.only in (None, "large"):
        if torch.cuda.is_available():
            print(torch.cuda.get_device_name())
            torch.set_num_threads(os.cpu_count() or 1)
            out["large"] = large(LARGE, "cuda", steps=12, budget=16_384)
        else:
            print("skipped: the large shape in bf16, LoRA and QLoRA (no GPU here)")
    if asked.json is not None:
        asked.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
