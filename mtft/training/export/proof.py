"""The proof of an export: a fresh process loads it, and its logits are those of the model that was trained.

What the trained model said is kept in <run>/proof until the proof holds, so that it can be made again after the model
is gone: where there was no memory for a second copy of the base, or the base could not be reached (`mtft export RUN`).
errors.txt beside it is what the fresh process said.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mtft.adapters.base_identity import recorded_base
from mtft.common.atomic_io import write_text
from mtft.common.own_files import read_own, write_own
from mtft.distributed.launch import engine
from mtft.evaluation.evaluation_mode import evaluation_mode
from mtft.models.loading import compute_dtype
from mtft.models.segment_attention import NAME as SEGMENTS
from mtft.recipe.schema.recipe import Recipe

PROOF, PROBE = "proof", "probe.safetensors"
# Largest logit difference allowed, relative to the largest logit: rounding in the order of sums, nothing more.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_PROBE_TOKENS = 24
_AGAIN = "delete the folder proof/: `mtft export` then makes the end of the run again from its last checkpoint"


class NotProved(RuntimeError):
    """An export that a fresh process could not load, or that is not what was trained."""


class NoRoom(NotProved):
    """No memory for a second copy of the base, on the device or the CPU: nothing is known to be wrong."""


def _probe(model: nn.Module) -> Tensor:
    """Random token ids [1, 24], always the same."""
    vocabulary = int(model.config.get_text_config().vocab_size)  # pyright: ignore
    return torch.randint(0, vocabulary, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))


def probe_logits(model: nn.Module, device: torch.device) -> Tensor:
    """fp32 [1, 24, V] on the CPU: what the trained model says. Ranks of a sharded model all call it."""
    with evaluation_mode(model), torch.no_grad(), _without_flash(model, device):
        return model(input_ids=_probe(model).to(device), use_cache=False).logits.float().cpu()


@contextmanager
def _without_flash(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Flash attention has no kernel for the CPU, nor for fp32: what full fine-tuning keeps, and autocast only hides."""
    configs: list[Any] = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    if before[0].startswith("flash") and (device.type == "cpu" or _base_dtype(model) == torch.float32):
        for config in configs:
            config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, attention in zip(configs, before, strict=True):
            config._attn_implementation = attention


def _base_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.uint8)


def write_probe(model: Any, logits: Tensor, recipe: Recipe, folder: Path) -> None:
    """What a proof compares with, into `folder`: it can be made again when the trained model is gone.

    logits: of the trained model, from `probe_logits`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({"input_ids": _probe(model), "logits": logits.contiguous()}, folder / PROBE)
    write_own((folder / PROBE).with_suffix(".json"), probe_settings(model, recipe))


def probe_settings(model: Any, recipe: Recipe) -> dict[str, Any]:
    """How the fresh process loads the base, and how far its logits may be from the trained model's."""
    config: Any = model.config
    base_dtype = _base_dtype(model)
    if engine() == "fsdp":  # which gathers the weights in the precision of the forward pass, whatever it keeps
        base_dtype = compute_dtype(recipe.model)
    quantisation = getattr(config, "quantization_config", None)
    return {
        "dtype": str(base_dtype).removeprefix("torch."),
        # Ours is not known to a process without mtft, and one example is the same to both.
        "attention": "sdpa" if config._attn_implementation == SEGMENTS else config._attn_implementation,
        "revision": recipe.model.revision,
        "quantisation": None if quantisation is None else _plain(quantisation.to_dict()),
        "tolerance": _TOLERANCE[base_dtype] if quantisation is None else 3e-2,
    }


class ReloadResult:
    """Reloads an export in a fresh process, at the same time as the caller goes on; `result` waits and compares.

    A context manager: the process is gone at the end of the block.
    After `result`, `unquantised` says how an adapter of a quantised base does on the base as it was: {"logits": largest
    difference relative to the largest logit, "same_top_token": share of positions}; None: another base, or no memory.
    """

    unquantised: dict[str, float] | None = None

    def __init__(self, folder: Path, probe: Path, device: torch.device | str) -> None:
        """folder: of the export; probe: the folder that `write_probe` wrote; device: where the base goes."""
        self._folder, self._probe = folder, probe
        self._settings = read_own((probe / PROBE).with_suffix(".json"), {"tolerance": float}, do=_AGAIN)
        script = Path(__file__).with_name("reload_check.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(folder), str(probe / PROBE), str(device)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def runs(self, seconds: float) -> bool:
        """Whether it still runs after so long; returns at once where it doesn't."""
        try:
            self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def result(self) -> float:
        """Largest logit difference relative to the largest logit. NotProved if it can't be loaded, or differs."""
        out, errors = self._process.communicate()
        code = self._process.returncode
        if code < 0:
            name = signal.Signals(-code).name
            why = ": the machine had no memory left for a second copy of the base" if name == "SIGKILL" else ""
            raise NotProved(f"the fresh process that loaded {self._folder} was ended by {name}{why}")
        if code != 0:
            write_text(self._probe / "errors.txt", errors)
            last = (errors.strip().splitlines() or [f"exit code {code}"])[-1]
            if (
                (base := recorded_base(self._folder)) is not None
                and Path(base.model).is_absolute()
                and not Path(base.model).exists()
            ):
                raise NotProved(f"the base model is no longer at {base.model}: put it back, and the proof can be made")
            raise NotProved(f"{self._folder} can't be loaded in a fresh process: {last}")
        report = json.loads(out.strip().splitlines()[-1])
        if (needed := report.get("no_memory")) is not None:
            raise NoRoom(
                f"there was no memory for a second copy of the base ({needed / 2**30:.1f} GiB on a GPU or the CPU)"
            )
        largest, tolerance = max(report["largest"], 1e-9), self._settings["tolerance"]
        relative = report["difference"] / largest
        if not relative <= tolerance:
            raise NotProved(
                f"{self._folder}: logits of the reloaded export differ from the trained model's by {relative:.2g} "
                f"of the largest logit ({tolerance:.0e} allowed)"
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


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Quantisation settings as keyword arguments that survive JSON."""
    of_4_bit = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
    return {key: settings[key] for key in ("load_in_4bit", "load_in_8bit", *of_4_bit) if key in settings}
