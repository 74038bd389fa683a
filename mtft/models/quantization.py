"""Quantized weights by bitsandbytes, as in QLoRA (Dettmers et al. 2023) and LLM.int8() (Dettmers et al. 2022)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from mtft.common.errors import UserError
from mtft.models.bitsandbytes_aside import know_bitsandbytes

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def bitsandbytes_config(quantise: str, dtype: torch.dtype, *, sharded: bool = False) -> BitsAndBytesConfig:
    """nf4: 4-bit NormalFloat with double quantization, computing in `dtype`; int8: LLM.int8().

    sharded: FSDP2 will cut the weights. It cuts tensors of floats only, and of one dtype in a layer, so the packed
    bytes are held in tensors of the compute dtype, and never computed with as such.
    """
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantise: {quantise} needs bitsandbytes", where="model.quantise", do='pip install "mtft[qlora]"'
        )
    know_bitsandbytes()
    if quantise == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if sharded else torch.uint8,
    )
