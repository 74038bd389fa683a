"""Answers to held-out prompts in batches, beside the same prompts one by one, in the same run.

    python scripts/bench_generation.py [--model PATH] [--rows 64] [--tokens 48]

Prompts are those of the quickstart's `docstring` and `code`; the model is its weak one, or any of your own. Both sides
generate as many tokens (no end token), so only the batches differ; rounds alternate, and the ratio is of medians of
CPU-seconds. Bar: batches are 5 times as fast or more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mtft.data.store.token_store import open_store
from mtft.evaluation.evaluation_mode import evaluation_mode
from mtft.evaluation.generation import GenerateOptions, generate_answers
from mtft.evaluation.prompts import held_out_prompts
from mtft.models.loading import load_base, load_tokenizer, pad_id
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.task import TaskSection

BAR = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart:weak")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    section = ModelSection(path=asked.model, dtype="fp32")
    tokenizer, model = load_tokenizer(section), load_base(section)
    prompts = []
    for name in ("docstring", "code"):
        task = TaskSection(name=name, data=f"quickstart:{name}", eval_data=f"quickstart:{name}")
        store = open_store(task, "eval", tokenizer, max_length=512, limit=asked.rows // 2)
        prompts += [prompt.prompt for prompt in held_out_prompts(store)]
    batched = GenerateOptions(asked.tokens, 0.0, (), (), pad_id(tokenizer), tokens_at_once=4096)
    seconds: dict[int, list[float]] = {1: [], 4096: []}
    answers = {}
    with evaluation_mode(model):
        for _ in range(asked.rounds):
            for size, taken in seconds.items():
                begin = time.process_time()
                answers[size] = generate_answers(model, prompts, replace(batched, tokens_at_once=size), tokenizer)
                taken.append(time.process_time() - begin)
    same = sum(left == right for left, right in zip(*answers.values(), strict=True))
    alone, together = (statistics.median(taken) for taken in seconds.values())
    print(f"{len(prompts)} prompts, {asked.tokens} tokens each, {asked.model}, {asked.threads} thread(s)")
    print(f"one by one {alone:.2f} s, in batches {together:.2f} s; {same} of {len(prompts)} answers equal")
    ratio = alone / together
    print(f"{'PASS' if ratio >= BAR else 'MISS'} one by one / in batches = {ratio:.2f} (bar {BAR:g})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
