"""Where the fresh process puts its copy of the model: on the device if there is room, else the CPU, else nowhere.

There is no GPU here, so what torch would say of one is planted.
"""

import json
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mtft.common.out_of_memory import is_out_of_memory
from mtft.models.loading import load_causal_lm
from mtft.recipe.schema.recipe import Recipe
from mtft.training.export.proof import PROBE, _without_flash, probe_logits, probe_settings, write_probe
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


def no_kernel(module, query, *_, **__):
    """Stands where transformers has flash attention, and refuses what its kernels refuse."""
    if query.dtype == torch.float32:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    raise NotImplementedError(f"no kernel for {query.device.type} tensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_asks_no_flash_kernel_for_what_it_has_not(model_folder, monkeypatch, dtype):
    """Full fine-tuning in bf16 keeps fp32 weights: bf16 in the autocast of training, fp32 in the probe."""
    model = load_causal_lm(model_folder, dtype=dtype, attention="eager")
    expected = probe_logits(model, torch.device("cpu"))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", no_kernel)
    model.config._attn_implementation = "flash_attention_2"
    assert torch.equal(probe_logits(model, torch.device("cpu")), expected)
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize(("dtype", "asked"), [(torch.bfloat16, "flash_attention_2"), (torch.float32, "eager")])
def test_on_a_gpu_the_kernel_is_asked_for_16_bit(model_folder, dtype, asked):
    model = load_causal_lm(model_folder, dtype=dtype)
    model.config._attn_implementation = "flash_attention_2"
    with _without_flash(model, torch.device("cuda")):
        assert model.config._attn_implementation == asked


def test_fp32_weights_are_checked_without_the_flash_kernel(model_folder, probe, gpu, capsys, monkeypatch):
    """On a GPU too."""
    settings, asked, load = probe.with_suffix(".json"), [], AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args, **options):
        asked.append(options["attn_implementation"])
        return load(*args, **options | {"attn_implementation": "eager"})

    settings.write_text(json.dumps({**json.loads(settings.read_text()), "attention": "flash_attention_2"}))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    moved = gpu(PLENTY)
    main(str(model_folder), str(probe), "cuda:0")
    assert len(moved) == 1
    assert asked == ["eager", "eager"]  # of the GPU, and of the CPU after it
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
