"""Loads an exported adapter or model in a process of its own, and compares its logits with those of the trained model.

    python reload_check.py FOLDER PROBE.safetensors DEVICE    ->    one JSON line: largest difference, largest logit

DEVICE is only the first choice: the trained model still lies there, and if it is a part of one (FSDP, ZeRO-3) the whole
may not fit. Without room for a second copy there, or when it runs out, the CPU does it; without room anywhere the
line says how many bytes that would have taken.

An adapter of a quantised base is also loaded on that base as it was before, which people may serve it on or merge
it into: how far its logits are from those it was trained to give.

Run as a file, not as a module: nothing of mtft is imported, so what is proved is what a user's own script gets.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# How CUDA, cuBLAS, cuDNN and torch's CPU allocator say it where they raise a plain RuntimeError.
REFUSED = re.compile(r"out of memory|_ALLOC(ATION)?_FAILED|can.?t allocate memory|not enough memory", re.IGNORECASE)


def main(folder: str, probe_file: str, device: str) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    probe = load_file(probe_file)
    settings = json.loads(Path(probe_file).with_suffix(".json").read_text(encoding="utf-8"))
    dtype, config = getattr(torch, settings["dtype"]), Path(folder) / "adapter_config.json"
    base, of_base = folder, {}
    if config.is_file():
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
        of_base = {"revision": settings["revision"]}

    def load(device: str, quantisation: dict[str, Any] | None) -> Any:
        # Which has no kernel for the CPU, nor for fp32.
        flash = settings["attention"].startswith("flash") and (device == "cpu" or dtype == torch.float32)
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, **of_base}
        options["attn_implementation"] = "eager" if flash else settings["attention"]
        if quantisation:
            options |= {"quantization_config": BitsAndBytesConfig(**quantisation), "device_map": {"": device}}
        model = AutoModelForCausalLM.from_pretrained(base, **options)
        if config.is_file():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, folder)
        if not quantisation:
            model.to(torch.device(device))  # pyright: ignore[reportArgumentType]  (its stub has no self)
        return model.eval()

    def logits_of(model: Any, device: str) -> Any:
        with torch.inference_mode():
            return model(input_ids=probe["input_ids"].to(device), use_cache=False).logits.float().cpu()

    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, **of_base))
    whole = int(1.2 * sum(parameter.numel() for parameter in shapes.parameters()) * dtype.itemsize)

    def ask(quantisation: dict[str, Any] | None, needed: int) -> Any:
        """Logits of the first place that has room; None: none has."""
        for place in places(needed, device):
            try:
                return logits_of(load(place, quantisation), place)
            except (MemoryError, RuntimeError) as error:  # the trained model goes on working there
                if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or REFUSED.search(str(error))):
                    raise
                gc.collect()
        return None

    expected, quantisation = probe["logits"], settings["quantisation"]
    report: dict[str, Any] = {"largest": float(expected.abs().max()), "unquantised": None}
    logits = ask(quantisation, whole // 2 if quantisation else whole)  # embeddings and norms are not quantised
    if logits is None:
        report["no_memory"] = whole
    else:
        report["difference"] = float((logits - expected).abs().max())
        if quantisation and (logits := ask(None, whole)) is not None:
            same = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
            report["unquantised"] = {"difference": float((logits - expected).abs().max()), "same_top": float(same)}
    print(json.dumps(report))


def places(needed: int, device: str) -> Iterator[str]:
    """Where `needed` bytes are free, one after the other: `device`, the CPU."""
    import psutil
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(device)[0] >= needed:
            yield device
    if psutil.virtual_memory().available >= needed:
        yield "cpu"


if __name__ == "__main__":
    main(*sys.argv[1:])
