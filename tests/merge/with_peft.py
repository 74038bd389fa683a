"""Adapters written by PEFT itself, and PEFT's own merges of them."""

import numpy as np
import peft
import torch

from mtft.adapters.lora_factors import read_adapter


def expert(base, folder, seed, **config):
    """A random adapter, written by PEFT itself."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **config)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def peft_merge(base, paths, kind, **options):
    """PEFT's add_weighted_adapter on the same files: {module: delta}."""
    from transformers import LlamaForCausalLM

    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), paths[0], adapter_name="0")
    for i, path in enumerate(paths[1:], 1):
        model.load_adapter(path, str(i))
    names = [str(i) for i in range(len(paths))]
    model.add_weighted_adapter(names, [1.0] * len(paths), "merged", combination_type=kind, **options)
    return {
        name: layer.get_delta_weight("merged").detach().double().numpy()
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


def relative(ours, theirs):
    return max(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name]) for name in theirs)


def deltas(folder):
    adapter = read_adapter(folder)
    return {name: (f := adapter.factors(name)).scale * f.B_MR @ f.A_RN for name in adapter.modules}
