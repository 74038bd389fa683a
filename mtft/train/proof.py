"""Loads an exported adapter or model in a process of its own, and compares its logits with those of the trained model.

    python proof.py FOLDER PROBE.safetensors DEVICE    ->    one JSON line: largest difference, largest logit

Run as a file, not as a module: nothing of mtft is imported, so what is proved is what a user's own script gets.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


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
    if config.is_file():
        from peft import PeftModel

        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
        model = AutoModelForCausalLM.from_pretrained(base, revision=settings["revision"], **options)
        model = PeftModel.from_pretrained(model, folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if not settings["quantisation"]:
        model.to(torch.device(device))  # pyright: ignore[reportArgumentType]  (its stub has no self)
    model.eval()
    with torch.inference_mode():
        logits = model(input_ids=probe["input_ids"].to(device), use_cache=False).logits.float().cpu()
    expected = probe["logits"]
    found = {"difference": float((logits - expected).abs().max()), "largest": float(expected.abs().max())}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
