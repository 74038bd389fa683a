"""Loads an exported adapter or model in a process of its own, and compares its logits with those of the trained model.

    python reload_check.py FOLDER PROBE.safetensors DEVICE    ->    one JSON line: largest difference, largest logit

An adapter of a quantised base is also loaded on that base as it was before, which people may serve it on or merge
it into: how far its logits are from those it was trained to give.

Run as a file, not as a module: nothing of mtft is imported, so what is proved is what a user's own script gets.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


def main(folder: str, probe_file: str, device: str) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    probe = load_file(probe_file)
    settings = json.loads(Path(probe_file).with_suffix(".json").read_text(encoding="utf-8"))
    options = {"dtype": getattr(torch, settings["dtype"]), "use_safetensors": True}
    options["attn_implementation"] = settings["attention"]
    if settings["quantisation"]:
        options |= {"quantization_config": BitsAndBytesConfig(**settings["quantisation"]), "device_map": {"": device}}
    config = Path(folder) / "adapter_config.json"

    def load(device: str, **options: Any) -> Any:
        if not config.is_file():
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
        else:
            from peft import PeftModel

            base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
            model = AutoModelForCausalLM.from_pretrained(base, revision=settings["revision"], **options)
            model = PeftModel.from_pretrained(model, folder)
        if "quantization_config" not in options:
            model.to(torch.device(device))  # pyright: ignore[reportArgumentType]  (its stub has no self)
        return model.eval()

    def logits_of(model: Any, device: str) -> Any:
        with torch.inference_mode():
            return model(input_ids=probe["input_ids"].to(device), use_cache=False).logits.float().cpu()

    expected = probe["logits"]
    model = load(device, **options)
    report: dict[str, Any] = {"difference": float((logits_of(model, device) - expected).abs().max())}
    report["largest"] = float(expected.abs().max())
    if settings["quantisation"]:
        needed = int(1.2 * model.num_parameters() * getattr(torch, settings["dtype"]).itemsize)
        del model, options["quantization_config"], options["device_map"]
        gc.collect()
        place = device_with(needed, device)
        report["unquantised"] = None
        if place is not None:
            logits = logits_of(load(place, **options), place)
            same = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
            report["unquantised"] = {"difference": float((logits - expected).abs().max()), "same_top": float(same)}
    print(json.dumps(report))


def device_with(needed: int, device: str) -> str | None:
    """Where `needed` bytes are free: `device`, the CPU, or nowhere."""
    import psutil
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(device)[0] >= needed:
            return device
    return "cpu" if psutil.virtual_memory().available >= needed else None


if __name__ == "__main__":
    main(*sys.argv[1:])
