"""What a run hands over: a plain PEFT adapter (or a whole model), and its card.

The folder appears under its name only when it is whole. It is refused if a tensor is missing or has no element (what
sharded engines leave when their weights were not gathered). That it can be loaded: mtft.training.export.proof.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mtft.adapters.base_identity import write_base
from mtft.common.atomic_folder import list_contents, unlisted
from mtft.common.atomic_io import let_read, write_text
from mtft.common.errors import UserError
from mtft.common.listing import listed
from mtft.evaluation.task_scores import TaskScores
from mtft.models.adapters import base_of
from mtft.models.loading import expand_quickstart
from mtft.recipe.load import dump_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.checkpoint.checkpoint_files import atomic_checkpoint_dir
from mtft.training.export.chat_files import how_to_prompt, save_chat_files
from mtft.training.run_files.run_dir import environment

ADAPTER, MODEL, INITIAL, CARD = "adapter", "model", "initial_adapter", "README.md"
CHANGE_THE_BASE = ("pissa", "olora")  # initialisations that move a part of the base weights into the adapter


def export_model(model: Any, run_dir: Path, *, tokenizer: Any, state: Mapping[str, Tensor] | None = None) -> Path:
    """Writes run_dir/adapter (PEFT) or run_dir/model (full fine-tuning) and returns the folder.

    `state`: the weights, gathered, where the engine shards them (FSDP, ZeRO-3). An adapter that started from a changed
    base (PiSSA, OLoRA) is converted to one for the unchanged base, by PEFT, with twice the rank. A former export
    is replaced; if it holds files that no export wrote, it stays under another name.
    """
    from peft import PeftModel

    target = run_dir / (ADAPTER if isinstance(model, PeftModel) else MODEL)
    with atomic_checkpoint_dir(target, manifest=False) as folder:
        write_weights(model, folder, initial=run_dir / INITIAL, tokenizer=tokenizer, state=state)
        list_contents(folder)
        _keep_others(target)
    return target


def _keep_others(target: Path) -> None:
    """Moves a former export aside that holds what no export wrote (a user's notes, another tool's files)."""
    if not target.is_dir() or not (others := unlisted(target, besides=[CARD])):
        return
    number = next(k for k in itertools.count(1) if not os.path.lexists(target.with_name(f"{target.name}.before-{k}")))
    kept = target.with_name(f"{target.name}.before-{number}")
    target.rename(kept)
    warnings.warn(
        f"{target} held {listed(map(repr, others))}, which no export wrote: it is kept as {kept.name}", stacklevel=2
    )


def write_weights(
    model: Any, folder: Path, *, initial: Path, tokenizer: Any, state: Mapping[str, Tensor] | None = None
) -> None:
    """What `export_model` puts into the folder."""
    from peft import PeftModel

    lora = isinstance(model, PeftModel)
    options: dict[str, Any] = {} if state is None else {"state_dict": dict(state)}
    if lora and initial.is_dir():
        options["path_initial_model_for_weight_conversion"] = str(initial)
    model.save_pretrained(folder, **options)
    if lora:
        write_base(folder, base_of(model))
    save_chat_files(folder, tokenizer, model.generation_config)
    check_tensors(folder, must="lora_" if lora else "")
    let_read(folder)


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


def write_card(
    folder: Path,
    recipe: Recipe,
    plan: Any,
    scores: Mapping[str, TaskScores],
    *,
    tokenizer: Any,
    proof: float | None = None,
    unquantised: Mapping[str, float] | None = None,
    step: int | None = None,
    not_proved: str | None = None,
    harness: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """README.md of an export: how to load and prompt it, what it was trained on, what it scored, with which versions.

    `step`: the optimizer step that the weights are of; None = the plan's last. `not_proved`: why there is no proof.
    `harness`: scores by lm-eval's tasks.
    """
    lora = (folder / "adapter_config.json").is_file()
    base = recipe.model.path
    lines = ["---", f"base_model: {base}", f"library_name: {'peft' if lora else 'transformers'}"]
    lines += ["tags: [mtft, multi-task]", "---", "", f"# {recipe.name}", ""]
    kind = "LoRA adapter for" if lora else "Full fine-tuning of"
    lines += [f"{kind} `{base}`, trained by MTFT on {len(recipe.tasks)} tasks.", ""]
    if lora:
        lines += [
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig",
            "",
        ]
        lines += [f'base = AutoModelForCausalLM.from_pretrained("{expand_quickstart(base)}")']
        lines += [f'model = PeftModel.from_pretrained(base, "{folder}")']
        lines += [f'tokenizer = AutoTokenizer.from_pretrained("{folder}")  # with the chat template of the training']
        lines += ['question = [{"role": "user", "content": "What is the capital of Italy?"}]']
        lines += ['options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}']
        lines += ["inputs = tokenizer.apply_chat_template(question, **options)"]
        lines += [f'ends = GenerationConfig.from_pretrained("{folder}").eos_token_id']
        lines += ["answer = model.generate(**inputs, max_new_tokens=100, eos_token_id=ends)"]
        lines += ['print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :]))', "```", ""]
    lines += how_to_prompt(tokenizer, recipe.tasks)
    lines += ["## Mixture", "", "| task | asked | realised | rows seen | epochs |", "|---|---|---|---|---|"]
    for row in plan.table():
        lines.append(
            f"| {row['task']} | {row['asked']:.3f} | {row['realised']:.3f} | {row['rows']} | {row['epochs']:.2f} |"
        )
    of_step = "" if step in (None, plan.steps) else f" The weights are those of step {step}."
    lines += ["", f"{plan.steps} steps of {plan.batch} {plan.unit} were planned.{of_step}", ""]
    if scores:
        metrics = list(dict.fromkeys(metric for of_task in scores.values() for metric in of_task.metrics))
        lines += ["## Held-out results", "", f"| task | {' | '.join(metrics)} | examples |"]
        lines.append("|---" * (len(metrics) + 2) + "|")
        for task, task_scores in scores.items():
            summary = task_scores.summary()
            cells = " | ".join(f"{summary[metric]:.4f}" if metric in summary else "" for metric in metrics)
            name = f"{task} (auxiliary)" if task in recipe.auxiliary_tasks else task
            lines.append(f"| {name} | {cells} | {summary['examples']} |")
        lines.append("")
    if harness:
        lines += ["## lm-evaluation-harness", "", "| task | metric | score |", "|---|---|---|"]
        lines += [f"| {task} | {name} | {x:.4f} |" for task, row in harness.items() for name, x in row.items()]
        lines.append("")
    if told := told_in_card(proof, not_proved):
        lines += [told, ""]
    if recipe.model.quantise != "none":
        lines += [f"Trained on the base quantised to {recipe.model.quantise}. {_on_the_unquantised(unquantised)}", ""]
    versions = ", ".join(f"{name} {number}" for name, number in environment()["versions"].items())
    lines += ["## Versions", "", versions, "", "## Recipe", "", "```yaml", dump_recipe(recipe).rstrip(), "```", ""]
    write_text(folder / CARD, "\n".join(lines))


def told_in_card(proof: float | None, not_proved: str | None) -> str:
    """What the card says about the proof."""
    if not_proved is not None:
        return f"Trained, not proved: {not_proved}"
    return "" if proof is None else f"Reloaded in a fresh process: logits equal to {proof:.1e} of the largest logit."


def _on_the_unquantised(unquantised: Mapping[str, float] | None) -> str:
    if unquantised is None:
        return (
            "How it does on the unquantised base was not measured: evaluate it there before merging or serving it so."
        )
    return (
        f"On the unquantised base its logits differ by up to {unquantised['logits']:.1e} of the largest logit, and "
        f"the most likely token is the same at {unquantised['same_top_token']:.0%} of the positions of the probe."
    )
