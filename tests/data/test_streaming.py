"""Memory does not grow with the data: the bound of issue size (5 GB in 2 GB) at less than a hundredth of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = """
import resource, sys
from pathlib import Path
from mtft.data.store.token_store import open_store
from mtft.recipe.schema.task import TaskSection
from tests.data.toy_examples import TEMPLATES, tokenizer
path, cache = Path(sys.argv[1]), Path(sys.argv[2])
store = open_store(TaskSection(name="big", data=str(path)), "train", tokenizer(TEMPLATES["chatml"]),
                   max_length=2048, cache_dir=cache)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
total = 0
for i in range(0, store.num_examples, 7):  # read all over the store, as training does
    total += int(store.example(i).input_ids[0])
own = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))  # mapped pages can be dropped
print(store.stats["tokens"], peak, int(own.split()[1]) // 1024)
"""


def peak(tmp_path, megabytes, kind):
    """(tokens, peak resident MB of the build, own MB after reading) of a process that builds and reads a store."""
    row = json.dumps({"prompt": "the quick brown fox jumps over the lazy dog " * 20, "response": "forest " * 20})
    first, between, last = {"jsonl": ("", "\n", "\n"), "json": ("[", ",\n", "]")}[kind]
    path = tmp_path / f"{megabytes}.{kind}"
    with path.open("w") as file:
        file.write(first + row)
        for _ in range(megabytes * 1_000_000 // len(row)):
            file.write(between + row)
        file.write(last)
    command = [sys.executable, "-c", BUILD, str(path), str(tmp_path / "cache")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=os.getcwd())
    return tuple(map(int, run.stdout.split()))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_memory_does_not_grow_with_the_data(tmp_path, kind):
    few, *small = peak(tmp_path, 5, kind)
    many, *large = peak(tmp_path, 35, kind)
    assert many > 6.5 * few
    growth = [after - before for before, after in zip(small, large)]
    assert max(growth) < 0.4 * 30, (small, large)  # 30 MB more text; the bound is that of 2 GB for 5 GB
