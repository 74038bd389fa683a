"""Runs on every rank of test_memory.py: python memory.py FOLDER KIND... Counts what a run's tensors hold at once.

FOLDER/KIND.yaml are the recipes; FOLDER/KIND.json gets [bytes of each rank], the highest of its steps. A step's is
what is alive when it begins, found among Python's objects, and what its allocations add at the highest point, by
torch's profiler, byte for byte. The profiler alone would not do: it misses what gloo's threads are the last to free.
What C++ holds alone (DDP's buckets) is the difference of both before the first step. DeepSpeed's collectives are kept
out of the count (unseen_collectives).
"""

import gc
import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from mtft.distributed.collectives import from_all_ranks
from mtft.distributed.launch import engine, is_main_process
from mtft.recipe.load import load_recipe
from tests.distributed.unseen_collectives import use_unseen_collectives

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from check_memory import make_stores, make_trainer

SHAPE = {"width": 384, "layers": 6, "mlp": 1024, "vocabulary": 8192, "max_length": 128}
BEGIN = "a step begins"


class Steps(TrainerCallback):
    def __init__(self):
        self.alive = []

    def on_step_begin(self, *args, **kwargs):
        self.alive.append(alive())
        with record_function(BEGIN):
            pass


def alive():
    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    storages = [
        value.untyped_storage() for value in tensors if type(value) is not DTensor and value.device.type == "cpu"
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def counted_peak(recipe):
    gc.collect()
    before = alive()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = make_trainer(recipe, SHAPE, make_stores(SHAPE))
        for tensor in (*trainer.model.parameters(), *trainer.model.buffers()):
            tensor.data = tensor.data.clone()  # files that are mapped, or read by other threads, were not seen
        steps = Steps()
        trainer.add_callback(steps)
        trainer.train()
    now, most, counted, peaks = 0, 0, [], []
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == BEGIN:
            counted.append(now)
            peaks.append(most)
            most = now
        elif event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    added = [peak - start for peak, start in zip([*peaks[1:], most], counted, strict=True)]
    hidden = counted[0] - (steps.alive[0] - before)
    return max(held - before + hidden + more for held, more in zip(steps.alive, added, strict=True))


def main(folder, *kinds):
    torch.set_num_threads(1)
    for kind in kinds:
        peaks = from_all_ranks(counted_peak(load_recipe(Path(folder) / f"{kind}.yaml", files=False)))
        if is_main_process():
            (Path(folder) / f"{kind}.json").write_text(json.dumps(peaks))


if __name__ == "__main__":
    # DeepSpeed's first use of it would compile it, for 90 CPU-seconds.
    if engine() == "deepspeed":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        use_unseen_collectives()
    main(*sys.argv[1:])
