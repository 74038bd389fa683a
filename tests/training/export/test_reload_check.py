"""Where the fresh process puts its copy of the model: on the device if there is room, else the CPU, else nowhere.

There is no GPU here, so what torch would say of one is planted.
"""

import json
from types import SimpleNamespace

import psutil
import pytest
import torch

from mtft.common.out_of_memory import is_out_of_memory
from mtft.models.loading import load_causal_lm
from mtft.recipe.schema.recipe import Recipe
from mtft.training.export.proof import PROBE, probe_logits, probe_settings, write_probe
from mtft.training.export.reload_check import main

NOTHING, PLENTY = 0, 1 << 40
REFUSALS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.50 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    MemoryError(),
]


@pytest.fixture
def probe(recipe, model_folder, tmp_path):
    model = load_causal_lm(model_folder, dtype=torch.float32)
    write_probe(model, probe_logits(model, torch.device("cpu")), Recipe.model_validate(recipe), tmp_path / "proof")
    return tmp_path / "proof" / PROBE


@pytest.fixture
def gpu(monkeypatch):
    """gpu(free bytes, refusal): torch believes in a GPU; what is moved there is out of memory, and noted."""
    moved, to = [], torch.nn.Module.to

    def plant(free, refusal=REFUSALS[0]):
        def move(module, device):
            if torch.device(device).type == "cuda":
                moved.append(module)
                raise refusal
            return to(module, device)

        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, PLENTY))
        monkeypatch.setattr(torch.nn.Module, "to", move)
        return moved

    return plant


def said(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("free", [NOTHING, PLENTY])
def test_a_device_without_room_leaves_it_to_the_cpu(model_folder, probe, gpu, capsys, free):
    """Also where the room is gone when the model comes: the trained one goes on working there."""
    moved = gpu(free)
    main(str(model_folder), str(probe), "cuda:0")
    assert len(moved) == (free == PLENTY)
    assert said(capsys)["difference"] == 0


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda error: type(error).__name__)
def test_every_refusal_of_memory_leaves_it_to_the_cpu(model_folder, probe, gpu, capsys, refusal):
    assert is_out_of_memory(refusal)
    gpu(PLENTY, refusal)
    main(str(model_folder), str(probe), "cuda:0")
    assert said(capsys)["difference"] == 0


def test_another_failure_of_the_device_is_no_lack_of_memory(model_folder, probe, gpu):
    gpu(PLENTY, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        main(str(model_folder), str(probe), "cuda:0")


def test_no_room_anywhere_is_said(model_folder, probe, gpu, capsys, monkeypatch):
    gpu(NOTHING)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    main(str(model_folder), str(probe), "cuda:0")
    report = said(capsys)
    weights = sum(p.numel() for p in load_causal_lm(model_folder, dtype=torch.float32).parameters())
    assert report["no_memory"] == int(1.2 * 4 * weights)
    assert "difference" not in report


def test_flash_attention_has_no_kernel_on_the_cpu(model_folder, probe, gpu, capsys):
    settings = probe.with_suffix(".json")
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "attention": "flash_attention_2"}))
    gpu(NOTHING)
    main(str(model_folder), str(probe), "cuda:0")
    assert said(capsys)["difference"] < 1e-6


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fsdp_answers_in_the_precision_of_the_forward_pass(recipe, model_folder, monkeypatch, dtype):
    """Its weights are fp32 in full fine-tuning, and gathered in bf16: compared in fp32 they'd differ by 6e-3."""
    whole = Recipe.model_validate({**recipe, "model": {**recipe["model"], "dtype": dtype}, "lora": None})
    model = load_causal_lm(model_folder, dtype=torch.float32)
    assert probe_settings(model, whole)["dtype"] == "float32"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    found = probe_settings(model, whole)
    assert (found["dtype"], found["tolerance"]) == {"fp32": ("float32", 1e-4), "bf16": ("bfloat16", 3e-2)}[dtype]
