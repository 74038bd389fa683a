"""`mtft mix relevance RECIPE`: which tasks' rows pull the model where a target's held-out rows want it.

For each task the gradient of its mean loss over a few training rows, and for each target that over a few held-out rows,
on a LoRA adapter of the base; each is sketched (mtft/gradients/sketch.py) before the next one is measured, so memory
holds one gradient of the adapter, whatever the number of tasks. Then the Lasso of the target's sketch on the other
tasks' (data_mixers/design/task_relevance.py), with weights >= 0: rows can be drawn, but not drawn negatively.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_mixers.common.errors import MixError
from data_mixers.design.task_relevance import Relevance, relevance
from mtft.common.errors import UserError
from mtft.data.batching.batch import IGNORE
from mtft.data.batching.batches import eval_batches
from mtft.data.batching.packed_attention import packing_refusal
from mtft.data.store.token_store import open_stores
from mtft.evaluation.evaluation_mode import evaluation_mode
from mtft.gradients.capture.task_gradients import TaskGradients
from mtft.gradients.sketch import sketch
from mtft.losses.task_reduction import coefficients, step_counts, task_coefficients
from mtft.losses.token_nll import token_nll
from mtft.models.adapters import load_adapter
from mtft.models.loading import load_base, load_tokenizer, pad_id
from mtft.models.lora import add_lora
from mtft.recipe.schema.lora import LoraSection
from mtft.recipe.schema.recipe import Recipe


@dataclass(frozen=True)
class TargetRelevance:
    """What helps `target`. found: None where no source does, because of `why`. cosine [M]: of each source's sketch with
    the target's. held_out: whether the target's gradient is of held-out rows (else of its training rows)."""

    target: str
    sources: tuple[str, ...]
    cosine: np.ndarray
    held_out: bool
    found: Relevance | None
    why: str | None = None

    def text(self, rows: int | None = None) -> str:
        """A table for a terminal; `rows` to draw in all."""
        lines = [f"target {self.target} ({'held-out' if self.held_out else 'training'} rows)"]
        if self.found is None:
            return "\n".join([*lines, f"  {self.why}"])
        counts = None if rows is None else self.found.rows(rows)
        lines.append(
            f"{'task':<24}{'cosine':>10}{'weight':>10}{'share':>8}" + ("" if rows is None else f"{'rows':>10}")
        )
        for place, name in enumerate(self.sources):
            tail = "" if counts is None else f"{int(counts[place]):10d}"
            figures = f"{self.cosine[place]:10.4f}{self.found.nu[place]:10.4f}{self.found.shares[place]:8.4f}"
            lines.append(f"{name:<24}{figures}{tail}")
        return "\n".join([*lines, f"residual {self.found.residual:.3g} of the target's size"])


class _SomeRows:
    """`examples` of a token store, drawn without replacement by `seed`; in the store's order."""

    def __init__(self, store: Any, examples: int, seed: int) -> None:
        count = store.num_examples
        self._rows = np.sort(np.random.default_rng(seed).choice(count, min(examples, count), replace=False))
        self._store, self.task, self.lengths = store, store.task, np.asarray(store.lengths)[self._rows]
        self.ids = [str(store.ids[int(row)]) for row in self._rows]

    def example(self, i: int) -> Any:
        return self._store.example(int(self._rows[i]))


def task_relevance(
    recipe: Recipe,
    targets: Sequence[str] | None = None,
    *,
    adapter: Path | None = None,
    examples: int = 64,
    size: int = 4096,
    say: Callable[[str], None] = lambda text: None,
) -> list[TargetRelevance]:
    """Relevance of all other tasks of the recipe for each of `targets` (None: for every task).

    adapter   measured on this LoRA adapter; None: on a fresh one, the base's own behaviour
    examples  of each task;  size  of a sketch
    Raises UserError for an unknown target, and for fewer than two tasks.
    """
    names = recipe.task_names
    unknown = [target for target in targets or () if target not in names]
    if unknown or len(names) < 2:
        what = f"no task of the recipe is called {unknown[0]!r}" if unknown else "one task has no others to look at"
        raise UserError(what, where="--target" if unknown else "tasks", do=f"tasks: {', '.join(names)}")
    tokenizer = load_tokenizer(recipe.model)
    train, held_out = open_stores(recipe, tokenizer, "train"), open_stores(recipe, tokenizer, "eval")
    base = load_base(recipe.model)
    model: Any = (
        load_adapter(base, adapter) if adapter else add_lora(base, recipe.lora or LoraSection(), seed=recipe.seed)
    )
    if torch.cuda.is_available() and recipe.model.quantise == "none":
        model = model.to(torch.device("cuda"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)

    def measured(store: Any) -> np.ndarray:
        say(f"{store.task}: gradient of {min(examples, store.num_examples)} rows")
        gradient = _gradient(recipe, model, _SomeRows(store, examples, recipe.seed), pad_id(tokenizer))
        return sketch(gradient, size, seed=recipe.seed).numpy()

    wanted = list(dict.fromkeys(targets or names))
    source_MD = {store.task: measured(store) for store in train}
    own = {task: store for task, store in zip(names, held_out, strict=True) if store is not None}
    target_D = {task: measured(own[task]) if task in own else source_MD[task] for task in wanted}
    return [_relevance_of(task, target_D[task], source_MD, task in own, recipe.seed) for task in wanted]


def _gradient(recipe: Recipe, model: Any, rows: _SomeRows, pad: int) -> dict[str, torch.Tensor]:
    """{parameter: gradient} of the mean loss per token of some rows, in evaluation mode."""
    section, device, one_K = recipe.train, next(model.parameters()).device, torch.ones(1, dtype=torch.float64)
    packing = section.packing and packing_refusal(model.config, model.config._attn_implementation) is None
    pieces = [
        piece.batch.to(device)
        for piece in eval_batches(
            rows, 0, micro_batch_tokens=section.rows_at_once, max_length=section.max_length, packing=packing, pad_id=pad
        )
    ]
    counts = step_counts(pieces, 1, device=device)
    with evaluation_mode(model), TaskGradients(model, 1, isolated=True) as taps:
        for batch in pieces:
            taps.begin(batch.host.task_ids_BT, batch.host.labels_BT != IGNORE)
            c_BT = coefficients(batch, counts, one_K, "task_token")
            taps.watch((c_BT * token_nll(model, batch, path="gather")).sum()).backward()
            model.zero_grad(set_to_none=True)
    return {name: block[0] for name, block in taps.jacobian(task_coefficients(counts, one_K, "task_token")).items()}


def _relevance_of(
    target: str, target_D: np.ndarray, source_MD: dict[str, np.ndarray], held_out: bool, seed: int
) -> TargetRelevance:
    sources = tuple(name for name in source_MD if name != target)
    W = np.stack([source_MD[name] for name in sources], axis=1)
    length = np.linalg.norm(W, axis=0) * np.linalg.norm(target_D)
    cosine = np.divide(W.T @ target_D, length, out=np.zeros(len(sources)), where=length > 0)
    try:
        found = relevance(W, target_D, noise=True, positive=True, seed=seed)
    except MixError as error:
        return TargetRelevance(target, sources, cosine, held_out, None, error.what)
    return TargetRelevance(target, sources, cosine, held_out, found)
