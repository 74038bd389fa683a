"""Train the two base models that are shipped in `mtft/quickstart/models`, from the standard library of this Python.

    python scripts/build_quickstart_models.py tokenizer
    python scripts/build_quickstart_models.py train weak --bf16 --minutes 24
    python scripts/build_quickstart_models.py train strong --bf16 --minutes 85 [--grow]
    python scripts/build_quickstart_models.py card

It needs torch 2.9 or newer (torch.optim.Muon). `train` stops by the clock and writes the finished model; called with
`--resume` it goes on from the last checkpoint for another `--minutes`. On a GPU it uses the GPU. `export` writes the
model of the last checkpoint as it stands.

Model: Llama, tied embeddings. Optimizer: Muon for the matrices, AdamW for embeddings and norms. Schedule: warm-up,
constant, and a linear decay to zero over the last `--decay` of the time. Text: library modules and tests of the
training split (`mtft.quickstart.stdlib_corpus`), separated by the end-of-text token; the decay sees library modules
only.
The held-out modules are measured at the end, never trained on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import random
import shutil
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mtft.quickstart import stdlib_corpus

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "mtft" / "quickstart" / "models"
VOCABULARY = 2048
END = "<|endoftext|>"
# Plain text that the BPE knows from comments in code: no special token with an untrained embedding. Only the end of
# the assistant's turn is special, and it is the document separator of the pre-training.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '# Answer:\\n' + message['content'] + eos_token -}}"
    "{%- elif message['role'] == 'system' -%}{{- '# Note:\\n' + message['content'] + '\\n\\n' -}}"
    "{%- else -%}{{- '# Question:\\n' + message['content'] + '\\n\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '# Answer:\\n' -}}{%- endif -%}"
)
SHAPES = {
    "weak": {"hidden_size": 144, "intermediate_size": 400, "num_hidden_layers": 5, "num_attention_heads": 3},
    "strong": {"hidden_size": 288, "intermediate_size": 800, "num_hidden_layers": 5, "num_attention_heads": 6},
}
SEED = 20240
WINDOW = 512  # tokens of one training sequence
LIBRARY_SHARE = 0.7  # of the sequences before the decay; the rest are tests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["tokenizer", "train", "export", "measure", "card"])
    parser.add_argument("size", nargs="?", choices=list(SHAPES))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quickstart", help="checkpoints and token arrays")
    parser.add_argument("--minutes", type=float, default=20.0, help="wall clock of this call, decay included")
    parser.add_argument("--decay", type=float, default=0.25, help="share of --minutes spent in the decay")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint before a decay")
    parser.add_argument("--grow", action="store_true", help="start strong from weak's checkpoint before its decay")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {WINDOW} tokens in a step")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    if args.command in ("train", "export", "measure") and args.size is None:
        parser.error(f"{args.command} needs a size: weak or strong")
    {"tokenizer": build_tokenizer, "train": train, "export": export, "measure": measure, "card": write_card}[
        args.command
    ](args)


# --- text -------------------------------------------------------------------------------------------------------------


def documents() -> tuple[list[str], list[str], list[str]]:
    """(library and prose, tests, held out) as texts."""
    library, tests, held_out = stdlib_corpus.pretraining_files()
    return stdlib_corpus.prose() + [f.text() for f in library], [f.text() for f in tests], [f.text() for f in held_out]


def build_tokenizer(args: argparse.Namespace) -> None:
    """Train the byte-level BPE and write the token arrays of the three parts."""
    library, tests, held_out = documents()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The template's lines are given often enough that they are learnt.
    tokenizer.train_from_iterator([*library, *["\n# Question:\n\n# Answer:\n# Note:\n"] * 2000], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(args.work / "tokenizer")
    # transformers 5 writes a class name that older releases and other servers don't know.
    path = args.work / "tokenizer" / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
    )
    end = tokenizer.token_to_id(END)
    for name, texts in (("library", library), ("tests", tests), ("held_out", held_out)):
        ids = [i for text in texts for i in [*tokenizer.encode(text).ids, end]]
        size = sum(len(text.encode()) for text in texts)
        np.save(args.work / f"{name}.npy", np.asarray(ids, dtype=np.uint16))
        print(f"{name}: {len(texts)} documents, {size:,} bytes, {len(ids):,} tokens, {size / len(ids):.2f} bytes/token")


class Windows:
    """Endless sequences [batch, WINDOW + 1]; every pool is read in a new random order in every epoch."""

    def __init__(self, work: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self._pools = {
            name: torch.from_numpy(np.load(work / f"{name}.npy").astype(np.int64)) for name in ("library", "tests")
        }
        self._order: dict[str, list[int]] = {"library": [], "tests": []}

    def batch(self, size: int, library_share: float) -> torch.Tensor:
        names = ["library" if self._random.random() < library_share else "tests" for _ in range(size)]
        return torch.stack([self._next(name) for name in names])

    def _next(self, name: str) -> torch.Tensor:
        pool = self._pools[name]
        if not self._order[name]:
            # A random shift each epoch, so that the windows don't always cut at the same places.
            shift = self._random.randrange(WINDOW)
            self._order[name] = list(range(shift, len(pool) - WINDOW - 1, WINDOW))
            self._random.shuffle(self._order[name])
        start = self._order[name].pop()
        return pool[start : start + WINDOW + 1]

    def state(self) -> dict:
        version, internal, gauss = self._random.getstate()
        return {"random": [version, list(internal), gauss], "order": self._order}

    def load(self, state: dict) -> None:
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))
        self._order = state["order"]


# --- training ---------------------------------------------------------------------------------------------------------


def new_model(size: str) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **SHAPES[size],
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def grow(small: dict[str, torch.Tensor], model: LlamaForCausalLM) -> None:
    """Fill `model` with the function of a model of half its width: every activation x becomes [x, x].

    HyperCloning (Samragh et al. 2024, arXiv 2409.12903) with noise that cancels on duplicated inputs, so that the
    halves learn different things: W -> 1/2 [[W + n, W - n], [W + m, W - m]]. The tied head would double the logits: the
    last norm is halved.
    """
    for name, weight in model.state_dict().items():
        old = small[name]
        if weight.ndim == 1:
            weight.copy_(old.repeat(2) / (2 if name == "model.norm.weight" else 1))
        elif "embed" in name or "lm_head" in name:
            weight.copy_(old.repeat(1, 2))
        else:
            n, m = (torch.randn_like(old) * old.std() for _ in range(2))
            weight.copy_(torch.cat([torch.cat([old + n, old - n], 1), torch.cat([old + m, old - m], 1)], 0) / 2)


def optimizers(model: torch.nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(args: argparse.Namespace) -> None:
    """Train by the clock; checkpoints before the decay, the finished model after it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = new_model(args.size)
    step, tokens, checkpoint = 0, 0, args.work / f"{args.size}.pt"
    if args.grow:
        small = torch.load(args.work / "weak.pt", weights_only=True, map_location="cpu")
        grow(small["model"], model)
        tokens = small["tokens"]
    model = model.to(device)
    opts = optimizers(model, args)
    windows = Windows(args.work, SEED + args.grow)  # a grown model reads in another order than the small one did
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(state)
        windows.load(saved["windows"])
        step, tokens = saved["step"], saved["tokens"]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.size}: {parameters:,} parameters on {device}, from step {step}, {tokens:,} tokens", flush=True)
    for opt in opts:
        for group in opt.param_groups:
            group["peak"] = args.muon_lr if isinstance(opt, torch.optim.Muon) else args.adam_lr
    with (args.work / f"{args.size}.commands").open("a" if args.resume else "w") as log:
        log.write(f"python scripts/build_quickstart_models.py {' '.join(sys.argv[1:])}\n")  # for the model card
    start, last_save, seen = time.monotonic(), time.monotonic(), []
    model.train()
    while (share := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        decay = min(1.0, (1 - share) / args.decay) if args.decay > 0 else 1.0
        if decay < 1 and last_save is not None:
            save(checkpoint, model, opts, windows, step, tokens)  # a later call can go on from here with --resume
            last_save = None
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * min(1.0, (step + 1) / args.warmup) * decay
        ids = windows.batch(args.batch, LIBRARY_SHARE if decay == 1 else 1.0).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16 or device.type == "cuda"):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + args.batch * WINDOW
        seen.append(loss.item())
        if step % 20 == 0:
            seconds = time.monotonic() - start
            print(
                f"step {step} loss {np.mean(seen):.3f} decay {decay:.2f} {seconds:.0f} s {tokens:,} tokens", flush=True
            )
            seen = []
        if last_save is not None and time.monotonic() - last_save > 120:
            save(checkpoint, model, opts, windows, step, tokens)
            last_save = time.monotonic()
    write_model(args, model, {"steps": step, "tokens": tokens})
    measure(args)


def save(path: Path, model, opts, windows: Windows, step: int, tokens: int) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [opt.state_dict() for opt in opts],
        "windows": windows.state(),
        "step": step,
        "tokens": tokens,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


# --- output -----------------------------------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> None:
    """Write the model of the last checkpoint as it stands, without a decay."""
    saved = torch.load(args.work / f"{args.size}.pt", weights_only=True, map_location="cpu")
    model = new_model(args.size)
    model.load_state_dict(saved["model"])
    write_model(args, model, {"steps": saved["step"], "tokens": saved["tokens"]})


def write_model(args: argparse.Namespace, model: LlamaForCausalLM, progress: dict) -> None:
    """bfloat16 safetensors, config, tokenizer and generation config."""
    out = MODELS / args.size
    model = model.to("cpu", torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0, max_new_tokens=96)
    model.save_pretrained(out)
    shutil.copytree(args.work / "tokenizer", out, dirs_exist_ok=True)
    (args.work / f"{args.size}.progress.json").write_text(json.dumps(progress))
    print(f"wrote {out} at {progress}", flush=True)


@torch.inference_mode()
def measure(args: argparse.Namespace) -> None:
    """Bits per byte of the shipped model on the held-out modules: windows of 1024 tokens, every token once."""
    model = AutoModelForCausalLM.from_pretrained(MODELS / args.size, dtype=torch.float32).eval()
    _, _, held_out = documents()
    ids = torch.from_numpy(np.load(args.work / "held_out.npy").astype(np.int64))
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), ids])  # the separator predicts the first token
    nats = 0.0
    for start in range(0, len(ids) - 1, 1024):
        window = ids[start : start + 1025]
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    size = sum(len(text.encode()) for text in held_out)
    bits = nats / math.log(2) / size
    path = args.work / f"{args.size}.progress.json"
    progress = json.loads(path.read_text())
    path.write_text(json.dumps({**progress, "bits_per_byte": bits, "parameters": model.num_parameters()}))
    print(f"{args.size}: {bits:.4f} bits per byte on {size:,} held-out bytes", flush=True)


def write_card(args: argparse.Namespace) -> None:
    """Write models/README.md from what the other commands have measured."""
    library, tests, held_out = stdlib_corpus.pretraining_files()
    text = "".join(documents()[2]).encode()
    unigram = -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())
    zipped = 8 * len(gzip.compress(text, 9)) / len(text)
    rows = {size: json.loads((args.work / f"{size}.progress.json").read_text()) for size in SHAPES}
    table = "\n".join(
        f"| {size} | {row['parameters']:,} | {row['tokens']:,} | {row['steps']:,} | {row['bits_per_byte']:.3f} |"
        for size, row in rows.items()
    )
    (MODELS / "README.md").write_text(CARD.format(
        table=table, unigram=unigram, gzip=zipped, bytes=len(text), python=platform.python_version(), seed=SEED,
        fingerprint=stdlib_corpus.fingerprint([*library, *tests, stdlib_corpus.prose_file()]),
        held_out=stdlib_corpus.fingerprint(held_out),
        commands=textwrap.indent("".join((args.work / f"{size}.commands").read_text() for size in SHAPES), " " * 6),
        files=len(library), tests=len(tests), vocabulary=VOCABULARY, window=WINDOW,
    ))  # fmt: skip


CARD = """# Base models of the quickstart

Two Llama models with one tokenizer, small enough to ship and to tune while one waits. They know a little Python and
nothing else: they are there to show the pipeline on real input, offline, not to write code.

| model | parameters | tokens seen | steps | bits per byte, held out |
|---|---|---|---|---|
{table}

For comparison, on the same {bytes:,} held-out bytes: unigram bytes {unigram:.3f}, gzip -9 {gzip:.3f}.

- **Training text**: the standard library of CPython {python} (no packages from elsewhere): {files} library files,
  {tests} files of its test suite, and `pydoc_data/topics.py`. SHA-256 over (name, SHA-256 of the content) of the files:
  `{fingerprint}`.
- **Held out**: the modules that `mtft.quickstart.stdlib_corpus.is_eval` names, with their tests; files that share six
lines of
  code with them are not trained on either. They are measured, never trained on. Fingerprint:
  `{held_out}`.
- **Tokenizer**: byte-level BPE, {vocabulary:,} entries, trained on the library files and the topics. `<|endoftext|>`
  separates the documents in training; it is the end of a turn and the padding. The chat template is plain text.
- **Lineage**: with `--grow`, strong starts as the checkpoint of weak before its decay, at twice the width and with the
  same function (HyperCloning, arXiv 2409.12903); its tokens count weak's up to there, its steps are its own.
- **Training**: windows of {window} tokens, Muon for the matrices and AdamW for the rest, warm-up, constant rate, linear
  decay; seed {seed}; stored in bfloat16. Training stops by the clock, so another machine gets other weights. What was
  run, on two CPU cores that other work shared (`tokenizer` before it, `card` after it; a run that is broken off goes on
  with `--resume`):

{commands}
- **Licence**: the code of this repository is under Apache-2.0. These weights were trained on the standard library of
  Python {python}, which is under the PSF License Agreement (Copyright © Python Software Foundation), on nothing else.
"""

if __name__ == "__main__":
    main()
