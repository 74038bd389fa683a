"""What a run hands over: a plain PEFT adapter (or a whole model), proved by loading it in a fresh process.

The folder appears under its name only when it is whole. It is refused if a tensor is missing or has no element (what
sharded engines leave when their weights were not gathered), and if the logits of the reloaded one differ from those of
the model that was trained.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtft.adapters.base_identity import write_base
from mtft.common.atomic_io import write_text
from mtft.common.errors import UserError
from mtft.evaluation.evaluation_mode import evaluation_mode
from mtft.evaluation.task_scores import METRICS, TaskScores
from mtft.models.adapters import base_of
from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.checkpoint.checkpoint_files import atomic_checkpoint_dir
from mtft.training.run_files.run_dir import environment

ADAPTER, MODEL, INITIAL = "adapter", "model", "initial_adapter"
CHANGE_THE_BASE = ("pissa", "olora")  # initialisations that move a part of the base weights into the adapter
# Largest logit difference allowed, relative to the largest logit: rounding in the order of sums, nothing more.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_PROBE_TOKENS = 24


def export_model(model: Any, run_dir: Path, *, tokenizer: Any, state: Mapping[str, Tensor] | None = None) -> Path:
    """Writes run_dir/adapter (PEFT) or run_dir/model (full fine-tuning) and returns the folder.

    `state`: the weights, gathered, where the engine shards them (FSDP, ZeRO-3). An adapter that started from a changed
    base (PiSSA, OLoRA) is converted to one for the unchanged base, by PEFT, with twice the rank.
    """
    from peft import PeftModel

    lora = isinstance(model, PeftModel)
    target = run_dir / (ADAPTER if lora else MODEL)
    with atomic_checkpoint_dir(target, manifest=False) as folder:
        options: dict[str, Any] = {} if state is None else {"state_dict": dict(state)}
        if lora and (run_dir / INITIAL).is_dir():
            options["path_initial_model_for_weight_conversion"] = str(run_dir / INITIAL)
        model.save_pretrained(folder, **options)
        if lora:
            write_base(folder, base_of(model))
        else:
            tokenizer.save_pretrained(folder)
        check_tensors(folder, must="lora_" if lora else "")
    return target


def save_initial(model: Any, run_dir: Path) -> None:
    """The untrained adapter, where the base was changed to fit it: export subtracts it (see `export_model`)."""
    if not (run_dir / INITIAL).is_dir():
        with atomic_checkpoint_dir(run_dir / INITIAL) as folder:
            model.save_pretrained(folder)


def check_tensors(folder: Path, *, must: str) -> None:
    """Refuses an export without tensors called like `must`, or with an empty or non-finite one."""
    from safetensors import safe_open

    names = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                tensor = file.get_tensor(name)
                if tensor.numel() == 0:
                    raise ValueError(f"{path.name}: tensor {name} is empty; the engine did not gather its weights")
                if not bool(tensor.isfinite().all()):
                    what = f"the trained weights are not finite (tensor {name}): nothing is exported"
                    do = "lower train.learning_rate and start over with --fresh"
                    raise UserError(what, where=str(folder.parent), do=do)
                names += must in name
    if names == 0:
        raise ValueError(f"{folder.name} holds no tensor {must!r}: nothing was saved")


def _probe(model: nn.Module) -> Tensor:
    """Random token ids [1, 24], always the same."""
    vocabulary = int(model.config.get_text_config().vocab_size)  # pyright: ignore
    return torch.randint(0, vocabulary, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))


def probe_logits(model: nn.Module, device: torch.device) -> Tensor:
    """fp32 [1, 24, V] on the CPU: what the trained model says, for `Proof`. Ranks of a sharded model all call it."""
    with evaluation_mode(model), torch.no_grad():
        return model(input_ids=_probe(model).to(device), use_cache=False).logits.float().cpu()


class ReloadResult:
    """Reloads an export in a fresh process, at the same time as the caller goes on; `result` waits and compares.

    A context manager: the process and its files are gone at the end of the block.
    After `result`, `unquantised` says how an adapter of a quantised base does on the base as it was: {"logits": largest
    difference relative to the largest logit, "same_top_token": share of positions}; None: another base, or no memory.
    """

    unquantised: dict[str, float] | None = None

    def __init__(self, model: nn.Module, logits: Tensor, folder: Path, recipe: Recipe, device: torch.device) -> None:
        """`logits`: of the trained model, from `probe_logits`."""
        from safetensors.torch import save_file

        self._folder = folder
        self._home = tempfile.TemporaryDirectory(prefix="mtft-proof-")
        config: Any = model.config
        base_dtype = next(p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.uint8)
        file = Path(self._home.name) / "probe.safetensors"
        save_file({"input_ids": _probe(model), "logits": logits.contiguous()}, file)
        quantisation = getattr(config, "quantization_config", None)
        settings = {
            "dtype": str(base_dtype).removeprefix("torch."),
            "attention": config._attn_implementation,
            "revision": recipe.model.revision,
            "quantisation": None if quantisation is None else _plain(quantisation.to_dict()),
        }
        file.with_suffix(".json").write_text(json.dumps(settings), encoding="utf-8")
        self._tolerance = _TOLERANCE[base_dtype] if quantisation is None else 3e-2
        script = Path(__file__).with_name("reload_check.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(folder), str(file), str(device)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> float:
        """Largest logit difference relative to the largest logit. RuntimeError if it can't be loaded, or differs."""
        out, errors = self._process.communicate()
        if self._process.returncode != 0:
            raise RuntimeError(f"{self._folder} can't be loaded in a fresh process:\n{errors[-2000:]}")
        report = json.loads(out.strip().splitlines()[-1])
        largest = max(report["largest"], 1e-9)
        relative = report["difference"] / largest
        if not relative <= self._tolerance:
            raise RuntimeError(
                f"{self._folder}: logits of the reloaded export differ from the trained model's by {relative:.2g} "
                f"of the largest logit ({self._tolerance:.0e} allowed)"
            )
        if (plain := report.get("unquantised")) is not None:
            self.unquantised = {"logits": plain["difference"] / largest, "same_top_token": plain["same_top"]}
        return relative

    def __enter__(self) -> ReloadResult:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing stays behind, also when nobody has waited for the result."""
        self._process.kill()
        self._process.wait()
        self._home.cleanup()


def write_card(
    folder: Path,
    recipe: Recipe,
    plan: Any,
    scores: Mapping[str, TaskScores],
    *,
    proof: float | None = None,
    unquantised: Mapping[str, float] | None = None,
    step: int | None = None,
) -> None:
    """README.md of an export: how to load it, what it was trained on, what it scored, with which versions.

    `step`: the optimizer step that the weights are of; None = the plan's last.
    """
    lora = (folder / "adapter_config.json").is_file()
    base = recipe.model.path
    lines = ["---", f"base_model: {base}", f"library_name: {'peft' if lora else 'transformers'}"]
    lines += ["tags: [mtft, multi-task]", "---", "", f"# {recipe.name}", ""]
    kind = "LoRA adapter for" if lora else "Full fine-tuning of"
    lines += [f"{kind} `{base}`, trained by MTFT on {len(recipe.tasks)} tasks.", ""]
    if lora:
        lines += ["```python", "from peft import PeftModel", "from transformers import AutoModelForCausalLM", ""]
        lines += [f'base = AutoModelForCausalLM.from_pretrained("{base}")']
        lines += [f'model = PeftModel.from_pretrained(base, "{folder}")', "```", ""]
    lines += ["## Mixture", "", "| task | asked | realised | rows seen | epochs |", "|---|---|---|---|---|"]
    for row in plan.table():
        lines.append(
            f"| {row['task']} | {row['asked']:.3f} | {row['realised']:.3f} | {row['rows']} | {row['epochs']:.2f} |"
        )
    of_step = "" if step in (None, plan.steps) else f" The weights are those of step {step}."
    lines += ["", f"{plan.steps} steps of {plan.batch} {plan.unit} were planned.{of_step}", ""]
    if scores:
        lines += ["## Held-out results", "", f"| task | {' | '.join(METRICS)} | examples |", "|---|---|---|---|---|"]
        for task, task_scores in scores.items():
            summary = task_scores.summary()
            cells = " | ".join(f"{summary[metric]:.4f}" for metric in METRICS)
            lines.append(f"| {task} | {cells} | {summary['examples']} |")
        lines.append("")
    if proof is not None:
        lines += [f"Reloaded in a fresh process: logits equal to {proof:.1e} of the largest logit.", ""]
    if recipe.model.quantise != "none":
        lines += [f"Trained on the base quantised to {recipe.model.quantise}. {_on_the_unquantised(unquantised)}", ""]
    versions = ", ".join(f"{name} {number}" for name, number in environment()["versions"].items())
    lines += ["## Versions", "", versions, "", "## Recipe", "", "```yaml", dump_recipe(recipe).rstrip(), "```", ""]
    write_text(folder / "README.md", "\n".join(lines))


def _on_the_unquantised(unquantised: Mapping[str, float] | None) -> str:
    if unquantised is None:
        return (
            "How it does on the unquantised base was not measured: evaluate it there before merging or serving it so."
        )
    return (
        f"On the unquantised base its logits differ by up to {unquantised['logits']:.1e} of the largest logit, and "
        f"the most likely token is the same at {unquantised['same_top_token']:.0%} of the positions of the probe."
    )


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Quantisation settings as keyword arguments that survive JSON."""
    of_4_bit = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
    return {key: settings[key] for key in ("load_in_4bit", "load_in_8bit", *of_4_bit) if key in settings}
