"""Runs on every rank of test_cpu_precision.py: python in_fp16.py RECIPE.yaml. DeepSpeed's fp16 mode on CPUs.

DeepSpeed and our own check take it for granted that fp16 needs a GPU; torch's CPU kernels compute it, slowly.
"""

import sys

import deepspeed
from deepspeed.accelerator import get_accelerator

from mtft.recipe.load import load_recipe
from mtft.training import preflight, training_arguments
from mtft.training.run_training import train

# Its first use would compile it, for 90 CPU-seconds.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

if __name__ == "__main__":
    type(get_accelerator()).is_fp16_supported = lambda self: True
    preflight.refuse_precision = training_arguments.refuse_precision = lambda section: None
    train(load_recipe(sys.argv[1]), prove=False, quiet=True)
