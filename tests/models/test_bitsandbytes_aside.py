"""PEFT brings no bitsandbytes along where nothing is quantised, and finds it in the same process as soon as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
import torch
from mtft.models.bitsandbytes_aside import bitsandbytes_aside, import_peft

import_peft()
from mtft.models.loading import load_causal_lm
from mtft.models.lora import add_lora
from mtft.recipe.schema.lora import LoraSection

def kinds(**options):
    model = load_causal_lm("quickstart:weak", dtype=torch.float32, **options)
    adapted = add_lora(model, LoraSection(r=2, targets=["q_proj"]), seed=0)
    return sorted({type(part).__module__ for part in adapted.modules() if hasattr(part, "lora_A")})

said = {"plain": kinds()}
said["then"] = "bitsandbytes" in sys.modules
try:
    with bitsandbytes_aside():
        raise KeyError
except KeyError:
    said["broken"] = "bitsandbytes" in sys.modules
said["nf4"] = kinds(quantise="nf4")
said["int8"] = kinds(quantise="int8")
said["again"] = kinds()
with bitsandbytes_aside():
    said["kept"] = sys.modules["bitsandbytes"] is not None
import bitsandbytes, peft.helpers, peft.import_utils
from transformers.utils import is_bitsandbytes_available
said["found"] = [peft.helpers.bnb is bitsandbytes, peft.import_utils.is_bnb_4bit_available()]
said["found"].append(is_bitsandbytes_available())
print(json.dumps(said))
"""


def test_quantised_models_of_the_same_process_get_their_layers():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plain, quantised = ["peft.tuners.lora.layer"], ["peft.tuners.lora.bnb"]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "plain": plain,
        "then": False,
        "broken": False,
        "nf4": quantised,
        "int8": quantised,
        "again": plain,
        "kept": True,
        "found": [True, True, True],
    }
