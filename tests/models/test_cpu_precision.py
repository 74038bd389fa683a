"""What `dtype: auto` takes on a CPU is measured, once a machine, and a slow precision is named with its rate."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mtft.models import cpu_precision
from mtft.models.loading import resolve_dtype
from mtft.recipe.schema.model import ModelSection


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Lets a test say what the CPU does: {precision: GFLOP/s}; counts the measurements."""
    monkeypatch.setenv("MTFT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu_precision.cpu_gflops.cache_clear()
    calls = []

    def of(**rates):
        by_type = {cpu_precision.MEASURED[name]: rate for name, rate in rates.items()}
        monkeypatch.setattr(cpu_precision, "_measure", lambda dtype: calls.append(dtype) or by_type[dtype])
        return calls

    yield of
    cpu_precision.cpu_gflops.cache_clear()


@pytest.mark.parametrize(
    ("bf16", "dtype", "said"), [(1.2, torch.float32, True), (50, torch.float32, False), (300, torch.bfloat16, False)]
)
def test_auto_takes_what_is_fast_and_slow_bf16_is_said(measured, bf16, dtype, said):
    measured(fp32=54.0, bf16=bf16, fp16=1.0)
    assert resolve_dtype("auto") == dtype
    assert resolve_dtype("bf16") == torch.bfloat16  # what is asked for is done
    text = cpu_precision.slow_on_cpu("bf16")
    assert (text is not None) == said
    if said:
        assert "1.2 GFLOP/s, in fp32 at 54, so a step takes up to 45 times as long" in text
    assert cpu_precision.slow_on_cpu("fp32") is cpu_precision.slow_on_cpu("auto") is None


def test_it_is_measured_once_and_kept_for_other_processes(measured, tmp_path):
    calls = measured(fp32=54.0, bf16=1.2, fp16=1.0)
    for _ in range(3):
        cpu_precision.cpu_dtype()
    assert len(calls) == 3  # one a precision
    cpu_precision.cpu_gflops.cache_clear()  # another process
    measured(fp32=1.0, bf16=50.0, fp16=1.0)
    assert cpu_precision.cpu_dtype() == torch.float32
    assert len(calls) == 3
    (rates,) = json.loads((tmp_path / "cpu_precision.json").read_text()).values()
    assert rates == {"fp32": 54.0, "bf16": 1.2, "fp16": 1.0}


def test_a_broken_or_unwritable_cache_is_no_matter(measured, tmp_path, monkeypatch):
    measured(fp32=54.0, bf16=1.2, fp16=1.0)
    (tmp_path / "cpu_precision.json").write_text("{")
    assert cpu_precision.cpu_dtype() == torch.float32
    cpu_precision.cpu_gflops.cache_clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MTFT_CACHE", str(tmp_path / "file"))  # no folder
    assert cpu_precision.cpu_dtype() == torch.float32


@pytest.mark.slow
def test_a_cpu_without_units_for_bf16_is_found_out(tmp_path):
    """oneDNN can be kept from the units of the machine: then bf16 is slow, and auto is fp32."""
    code = "from mtft.models import cpu_precision as c; print(c.cpu_dtype(), c.slow_on_cpu('bf16'))"
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MTFT_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **limits}, capture_output=True, text=True)
    assert done.stdout.startswith("torch.float32"), done.stderr
    assert "no fast bf16" in done.stdout


def test_check_and_train_name_the_model_whose_precision_is_slow(measured):
    measured(fp32=54.0, bf16=1.2, fp16=1.0)
    models = {name: ModelSection(path="m", dtype=dtype) for name, dtype in (("model", "bf16"), ("fuse.strong", "auto"))}
    (said,) = cpu_precision.precision_warnings({**models, "sweep.model": None})
    assert "(model.dtype): set model.dtype: auto, or fp32" in said
