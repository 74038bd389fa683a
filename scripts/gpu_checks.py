"""What scripts/check_gpu.py checks, line by line, and what its checks share: sizes, tiny models, tasks, recipes.

Nothing here imports torch before a check runs: the process that starts the workers stays small. A check is a generator
of lines; the checks themselves stand in gpu_checks_train.py, gpu_checks_steps.py, gpu_checks_fuse.py and
gpu_checks_speed.py.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("red", "green", "blue", "cat", "dog", "bird", "sun", "moon", "star", "one", "two", "six")
TASKS = ("copy", "twice", "shout")
VERDICTS = ("PASS", "MISS", "SKIP", "INFO")


@dataclass(frozen=True)
class Line:
    """One line of the page. A MISS or a SKIP says why in `note`."""

    what: str
    verdict: str
    figure: float | None = None
    bar: float | None = None
    note: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


Lines = Iterator[Line]


@dataclass(frozen=True)
class Check:
    """A group of lines that are found together.

    seconds  (without a GPU, with one): about what it takes on a quiet machine; the time budget is kept with it
    gpus     how many it needs
    """

    name: str
    about: str
    run: Callable[[Bench], Lines]
    seconds: tuple[float, float]
    gpus: int = 0


def at_most(what: str, figure: float, bar: float, note: str = "", **extra: Any) -> Line:
    """PASS if figure <= bar. A figure that is no number misses."""
    return Line(what, "PASS" if figure <= bar else "MISS", float(figure), bar, note, extra)


def at_least(what: str, figure: float, bar: float, note: str = "", **extra: Any) -> Line:
    """PASS if figure >= bar."""
    return Line(what, "PASS" if figure >= bar else "MISS", float(figure), bar, note, extra)


def holds(what: str, true: bool, note: str = "", **extra: Any) -> Line:
    """PASS if it holds; `note` is what was found."""
    return Line(what, "PASS" if true else "MISS", note=note, extra=extra)


def skip(what: str, why: str) -> Line:
    return Line(what, "SKIP", note=why)


def info(what: str, note: str = "", figure: float | None = None, **extra: Any) -> Line:
    return Line(what, "INFO", figure, note=note, extra=extra)


@dataclass(frozen=True)
class Sizes:
    """Shapes of the models and steps: a machine without a GPU gets the smallest that still show what is checked."""

    width: int
    layers: int
    heads: int
    vocabulary: int  # of the model; its tokenizer has 259
    words: int  # in the longest prompt
    batch_tokens: int
    max_length: int
    rows: int  # of the batched fusion
    new_tokens: int
    fuse_width: int


ON_CPU = Sizes(64, 2, 4, 512, 3, 320, 128, 2, 5, 32)
ON_GPU = Sizes(256, 4, 4, 4096, 24, 2048, 512, 8, 32, 256)
FUSE_VOCABULARY = 152_064


class Bench:
    """The machine that is checked, and a folder for what the checks write.

    device  "cuda" or "cpu";  gpus  every visible one, of which this process sees the first
    """

    def __init__(self, device: str, scratch: Path, gpus: tuple[str, ...] = ()) -> None:
        self.device, self.scratch, self.gpus = device, scratch, gpus
        self.sizes = ON_GPU if device == "cuda" else ON_CPU
        self._count = 0

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def folder(self, name: str) -> Path:
        """A new one."""
        self._count += 1
        made = self.scratch / f"{os.getpid()}-{self._count}-{name}"
        made.mkdir(parents=True)
        return made

    def model(self, seed: int = 0, **changes: Any) -> Path:
        """Folder of a random model with its tokenizer; the same one for the same arguments."""
        key = "-".join(["model", str(seed), *(f"{name}={value}" for name, value in sorted(changes.items()))])
        folder = self.scratch / f"{os.getpid()}-{key}"
        if not folder.is_dir():
            write_model(folder, self.sizes, seed=seed, **changes)
        return folder

    def tasks(self) -> list[dict[str, str]]:
        """The recipe's tasks; their files are written once."""
        folder = self.scratch / f"{os.getpid()}-tasks"
        if not folder.is_dir():
            write_tasks(folder, self.sizes.words)
        return [
            {"name": name, "data": str(folder / f"{name}.train.jsonl"), "eval_data": str(folder / f"{name}.eval.jsonl")}
            for name in TASKS
        ]

    def content(self, name: str, **changes: Any) -> dict[str, Any]:
        """A whole recipe; sections in `changes` are laid over its own. output.dir is a new folder."""
        size = self.sizes
        whole: dict[str, Any] = {
            "name": name,
            "model": {"path": str(self.model()), "dtype": "fp32"},
            "tasks": self.tasks(),
            "mixture": {"shares": {"copy": 0.5, "twice": 0.3, "shout": 0.2}},
            "lora": {"r": 4, "alpha": 8},
            "train": {
                "steps": 4,
                "batch_tokens": size.batch_tokens,
                "micro_batch_tokens": size.batch_tokens,
                "max_length": size.max_length,
                "learning_rate": 1e-3,
                "warmup": 0,
                "eval_on_start": False,
            },
            "output": {"dir": str(self.folder(name) / "run")},
        }
        for section, change in changes.items():
            before = whole.get(section)
            whole[section] = {**before, **change} if isinstance(before, dict) and isinstance(change, dict) else change
        return whole

    def recipe(self, name: str, **changes: Any) -> Any:
        from mtft.recipe.schema.recipe import Recipe

        return Recipe.model_validate(self.content(name, **changes))

    def sound(self) -> bool:
        """Whether the device still answers: a CUDA error stays with its process."""
        if not self.on_gpu:
            return True
        import torch

        try:
            torch.cuda.synchronize()
            return float(torch.ones(2, device=self.device).sum()) == 2
        except Exception:  # noqa: BLE001  every one is the answer
            return False

    def guarded(self, what: str, find: Callable[[], Line]) -> Line:
        """`find()`, or MISS with the error: the other lines of a check are found all the same."""
        try:
            return find()
        except Exception as error:
            if not self.sound():
                raise
            traceback.print_exc()
            return Line(what, "MISS", note=reason(error))
        finally:
            self.free()

    def free(self) -> None:
        """Gives memory back between checks."""
        gc.collect()
        if self.on_gpu:
            import torch

            torch.cuda.empty_cache()


def write_model(folder: Path, size: Sizes, *, seed: int = 0, std: float = 0.05, **changes: Any) -> None:
    """A Llama with random weights, fp32, and a tokenizer of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "intermediate_size": 2 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "initializer_range": std,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    LlamaForCausalLM(LlamaConfig(**(shape | changes))).save_pretrained(folder)


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ("<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=8192
    )


def write_tasks(folder: Path, words: int, rows: int = 200, held_out: int = 12) -> None:
    """Copy some words, say them twice, say them loud."""
    folder.mkdir(parents=True)
    rules: dict[str, Callable[[str], str]] = {
        "copy": lambda text: text,
        "twice": lambda text: f"{text} {text}",
        "shout": str.upper,
    }
    draw = random.Random(0)
    for task in TASKS:
        for part, count in (("train", rows), ("eval", held_out)):
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, words))) for _ in range(count)]
            lines = [json.dumps({"prompt": f"{task}: {text}", "response": rules[task](text)}) for text in texts]
            (folder / f"{task}.{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_adapters(base: Path, folder: Path, count: int = 2, std: float = 0.1) -> list[Path]:
    """PEFT adapters with random factors on all linears of the model in `base`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    made = []
    for number in range(count):
        torch.manual_seed(100 + number)
        model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=std)
        made.append(folder / TASKS[number])
        tuned.save_pretrained(str(made[-1]))
    return made


def step_lines(run: Path) -> list[dict[str, Any]]:
    """What a run has logged, step by step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def exported(run: Path) -> dict[str, Any]:
    """The weights that a run has exported."""
    from safetensors.torch import load_file

    name = "model/model.safetensors" if (run / "model").is_dir() else "adapter/adapter_model.safetensors"
    return load_file(run / name)


def distance(left: Mapping[str, Any], right: Mapping[str, Any]) -> float:
    """Largest difference of two sets of tensors, by the largest number in `left`."""
    if left.keys() != right.keys():
        raise ValueError(f"other names: {sorted(left.keys() ^ right.keys())[:3]}")
    pairs = [(left[name].detach().double().cpu(), right[name].detach().double().cpu()) for name in left]
    largest = max(float(one.abs().max()) for one, _ in pairs)
    return max(float((one - other).abs().max()) for one, other in pairs) / largest


def write_recipe(content: Mapping[str, Any], path: Path) -> Path:
    """JSON is YAML."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def command(*words: str | Path) -> list[str]:
    """`mtft ...` with this interpreter."""
    return [sys.executable, "-m", "mtft", *map(str, words)]


def train_apart(content: Mapping[str, Any], *, cpu: bool) -> Path:
    """Trains a recipe in a process of its own, on the CPU if asked; returns its folder."""
    run = Path(content["output"]["dir"])
    file = write_recipe(content, run.with_name("recipe.yaml"))
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
    done = subprocess.run(command("train", file), env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"mtft train ended with {done.returncode}: {last_line(done.stderr)}")
    return run


def reason(error: BaseException) -> str:
    """In one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def last_line(text: str) -> str:
    """The last line of what a process said that names an error, or that says anything: launchers end with a frame."""
    said = [line.strip() for line in text.splitlines() if any(letter.isalpha() for letter in line)]
    named = [line for line in said if re.match(r"(error|[\w.]*(Error|Exception|Exit))\b", line)]
    return (named or said or ["it said nothing"])[-1]


def all_checks() -> dict[str, Check]:
    """Every check, in the order of the page."""
    from gpu_checks_fuse import FUSE
    from gpu_checks_merge import MERGE
    from gpu_checks_speed import SPEED
    from gpu_checks_steps import STEPS
    from gpu_checks_train import TRAIN

    return {check.name: check for check in (*TRAIN, *STEPS, *MERGE, *FUSE, *SPEED)}
