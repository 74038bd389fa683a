"""What the data path costs, each figure against a peer in the same run.

    python scripts/bench_data.py                      everything (under three minutes on 2 quiet CPU cores)
    python scripts/bench_data.py --only padding --json out.json

tokenise   a JSONL file of prompts and responses to supervised tokens on disk, against trl's SFTTrainer on the same file
plan       a mixture over 10 million rows, against datasets.interleave_datasets with the same shares
padding    share of padding in lognormal lengths, rows of 8 times the mean: our steps against trl's `bfd` packing of
           the whole set at once (which gives up the order of the mixture)

The sides alternate. Times are CPU-seconds, which a busy machine changes little. The last lines say PASS or MISS for
each bar; the exit code is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_mixers.mixture.mixture import Mixture
from data_mixers.plan.mixture_plan import MixturePlan
from data_mixers.plan.schedule import MixtureSchedule
from mtft.data.batching.batches import BatchSource
from mtft.data.store.token_store import open_store
from mtft.quickstart import model_path, stdlib_corpus
from mtft.recipe.schema.task import TaskSection

SHARES = (0.4, 0.3, 0.2, 0.1)


def cpu_seconds() -> float:
    """CPU time of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(run: Callable[[], int]) -> tuple[float, float, int]:
    """(CPU seconds, seconds, what it returned)."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    result = run()
    return cpu_seconds() - cpu, time.perf_counter() - wall, result


def bar(what: str, value: float, sign: str, limit: float, unit: str) -> dict[str, object]:
    """One acceptance bar: what was measured, against which limit, and whether it holds."""
    holds = value >= limit if sign == ">=" else value <= limit
    return {"what": what, "measured": round(value, 4), "bar": f"{sign} {limit:g}", "unit": unit, "pass": bool(holds)}


def bench_tokenise(repeats: int, megabytes: float) -> dict[str, object]:
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model_path("weak"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    folder = Path(tempfile.mkdtemp())
    path, rows = folder / "rows.jsonl", 0
    with path.open("w", encoding="utf-8") as file:
        for source in stdlib_corpus.library_files():
            text = source.text()
            for start in range(0, len(text) - 1500, 1500):
                cut = start + 1200
                turns = {"prompt": text[start:cut], "response": text[cut : start + 1500].strip()}
                if turns["response"]:
                    file.write(json.dumps(turns) + "\n")
                    rows += 1
            if file.tell() > megabytes * 1e6:
                break

    def ours() -> int:
        task = TaskSection(name="code", data=str(path))
        store = open_store(task, "train", tokenizer, max_length=100_000, cache_dir=folder / "ours")
        shutil.rmtree(folder / "ours")
        return store.stats["tokens"]

    def trl() -> int:
        cache = folder / "trl"
        data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
        data = data.map(
            lambda row: {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["response"]}],
            },
            remove_columns=["response"],
        )
        arguments = SFTConfig(
            output_dir=str(folder / "out"), max_length=None, report_to="none", bf16=False, use_cpu=True
        )
        trainer = SFTTrainer(LlamaForCausalLM(config), arguments, train_dataset=data, processing_class=tokenizer)
        tokens = sum(map(len, trainer.train_dataset["input_ids"]))
        shutil.rmtree(cache)
        return tokens

    speed: dict[str, list[float]] = {"ours": [], "trl": []}
    wall: dict[str, list[float]] = {"ours": [], "trl": []}
    tokens: dict[str, int] = {}
    for _ in range(repeats):
        for name, run in (("ours", ours), ("trl", trl)):
            cpu, seconds, tokens[name] = timed(run)
            speed[name].append(tokens[name] / cpu)
            wall[name].append(tokens[name] / seconds)
    shutil.rmtree(folder)
    ratios = [a / b for a, b in zip(speed["ours"], speed["trl"])]
    return {
        "rows": rows,
        "tokens": tokens,
        "tokens per CPU-second": {name: round(statistics.median(values)) for name, values in speed.items()},
        "tokens per second": {name: round(statistics.median(values)) for name, values in wall.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "bars": [bar("tokens per CPU-second against TRL", statistics.median(ratios), ">=", 1.0, "x")],
    }


def bench_plan(rows: int) -> dict[str, object]:
    import datasets

    datasets.disable_progress_bars()
    sizes = [rows * 5 // 10, rows * 3 // 10, rows * 15 // 100, rows * 5 // 100]
    names = ("a", "b", "c", "d")
    steps = rows // 64
    mixture = Mixture.of(dict(zip(names, SHARES)))

    def plan(shares: Mixture | MixtureSchedule = mixture) -> MixturePlan:
        return MixturePlan(shares, sizes, steps=steps, batch=64, seed=1)

    def played(shares: Mixture | MixtureSchedule) -> int:
        whole = plan(shares)
        return sum(len(whole.step(s)[0]) for s in range(steps))

    sets = [datasets.Dataset.from_dict({"row": np.arange(size)}) for size in sizes]

    def peer() -> int:
        shares = {"probabilities": list(SHARES), "seed": 1}
        return len(datasets.interleave_datasets(sets, stopping_strategy="all_exhausted", **shares))

    ready = min(timed(lambda: len(plan().step(0)[0]))[0] for _ in range(3))
    resumed = min(timed(lambda: len(plan().step(steps // 2)[0]))[0] for _ in range(3))
    interleaving, _, interleaved = timed(peer)
    playing, _, planned = timed(lambda: played(mixture))
    changing, _, _ = timed(
        lambda: played(MixtureSchedule(((0.0, mixture), (1.0, Mixture(names, mixture.shares[::-1])))))
    )
    return {
        "rows": rows,
        "CPU seconds": {
            "plan, first step": round(ready, 4),
            "plan, resumed in the middle": round(resumed, 4),
            "plan, every step": round(playing, 2),
            "curriculum, every step": round(changing, 2),
            "interleave_datasets": round(interleaving, 2),
        },
        "rows played": planned,
        "rows interleaved": interleaved,
        "ratio": round(interleaving / ready),
        "bars": [
            bar(
                f"plan of {rows:,} rows, ready to play, against interleave_datasets",
                interleaving / ready,
                ">=",
                100,
                "x",
            ),
            bar(f"plan of {rows:,} rows, every row of it in order", playing, "<=", 5.0, " CPU s"),
            bar(f"curriculum of {rows:,} rows, every row of it in order", changing, "<=", 5.0, " CPU s"),
        ],
    }


class Lengths:
    """A store of which only the lengths are asked."""

    def __init__(self, task: str, lengths: np.ndarray) -> None:
        self.task, self.lengths = task, lengths

    def example(self, i: int):
        raise NotImplementedError("only lengths")


def bench_padding(batch_tokens: int) -> dict[str, object]:
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5.2, 0.8, 20_000).astype(np.int64).clip(8)
    capacity = 8 * int(lengths.mean())
    lengths = lengths.clip(max=capacity)
    found: dict[str, object] = {"rows": len(lengths), "mean": round(float(lengths.mean()), 1), "max_length": capacity}

    batch = batch_tokens // int(lengths.mean())
    steps = len(lengths) // batch
    plan = MixturePlan(Mixture.of({"all": 1.0}), [len(lengths)], steps=steps, batch=batch, seed=1)
    start = time.perf_counter()
    options = {"micro_batch_tokens": 2 * capacity, "max_length": capacity, "pad_id": 0}
    sources = {
        packing: BatchSource([Lengths("all", lengths)], plan, packing=packing, **options) for packing in (True, False)
    }
    packed_share = 1.0
    for packing, source in sources.items():
        real, positions = np.sum([source.padding(s) for s in range(steps)], axis=0)
        share = float(1 - real / positions)
        packed_share = share if packing else packed_share
        found["ours, packed in steps" if packing else "ours, unpacked and grouped"] = round(share, 4)
    found["ours, milliseconds a step"] = round(1000 * (time.perf_counter() - start) / steps / 2, 2)

    data = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in lengths]})
    start = time.perf_counter()
    packed = pack_dataset(data, capacity, "bfd")
    found["trl bfd of the whole set, seconds"] = round(time.perf_counter() - start, 2)
    used = np.array([len(ids) for ids in packed["input_ids"]])
    found["trl bfd, rows as they are padded to max_length"] = round(1 - used.sum() / (len(used) * capacity), 4)
    peer = found["trl bfd of the whole set, rows as they are padded to max_length"] = found.pop(
        "trl bfd, rows as they are padded to max_length"
    )
    found["bars"] = [bar("padding, packed in steps", packed_share, "<=", 0.03, f" of positions (TRL's bfd: {peer})")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("tokenise", "plan", "padding"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=3.0, help="size of the file to tokenise")
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the plan")
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    benches: dict[str, Callable[[], dict[str, object]]] = {
        "padding": lambda: bench_padding(asked.batch_tokens),
        "plan": lambda: bench_plan(asked.rows),
        "tokenise": lambda: bench_tokenise(asked.repeats, asked.megabytes),
    }
    results = {}
    for name, bench in benches.items():
        if asked.only in (None, name):
            results[name] = bench()
            print(name, json.dumps(results[name], indent=2), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    bars = [one for result in results.values() for one in result["bars"]]  # type: ignore[attr-defined]
    for one in bars:
        print(
            f"{'PASS' if one['pass'] else 'MISS'}  {one['what']}: {one['measured']:g}{one['unit']} (bar {one['bar']})"
        )
    sys.exit(0 if all(one["pass"] for one in bars) else 1)


if __name__ == "__main__":
    main()
