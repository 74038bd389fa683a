"""500 broken adapters: each is refused with one clear block or merged soundly; nothing else is written."""

import json
import os
import random
import shutil
import struct

import numpy as np
import pytest

from mtft.adapters.lora_config import CONFIG
from mtft.adapters.lora_factors import WEIGHTS, LoraFactors, read_adapter
from mtft.common.atomic_folder import CONTENTS
from mtft.common.errors import MergeError, UserError
from mtft.merge.engine.merge import merge_adapters
from mtft.merge.full_models.merge_checkpoints import merge_checkpoints
from tests.merge import golden as g

MODULES = {"layers.0.q": 0, "layers.1.q": 1}


def pristine(folder):
    return g.write(folder, {name: g.factors()[0] for name in MODULES})


def header_of(data):
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rebuilt(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def flip_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 40)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def cut(rng, data):
    return data[: rng.randrange(len(data))]


def huge_header(rng, data):
    return struct.pack("<Q", rng.choice([2**63, 2**40, len(data) * 2, 10**8])) + data[8:]


def deep_header(rng, data):
    text = b'{"a":' * 20000 + b"1" + b"}" * 20000
    return struct.pack("<Q", len(text)) + text


def edit_entry(rng, data):
    header, body = header_of(data)
    key = rng.choice([key for key in header if key != "__metadata__"])
    header[key] = {**header[key], **rng.choice(EDITS)(rng, header[key])}
    return rebuilt(header, body)


EDITS = [
    lambda rng, entry: {"shape": [rng.randrange(50) for _ in range(rng.randrange(5))]},
    lambda rng, entry: {"shape": entry["shape"][::-1]},
    lambda rng, entry: {"shape": [-1, 2**62]},
    lambda rng, entry: {"dtype": rng.choice(["F8_E4M3", "I32", "BOOL", "F64", "BF16", "X"])},
    lambda rng, entry: {"data_offsets": [rng.randrange(500), rng.randrange(500)]},
    lambda rng, entry: {"data_offsets": [0, 2**60]},
]


def rename_key(rng, data):
    header, body = header_of(data)
    key = rng.choice([key for key in header if key != "__metadata__"])
    other = rng.choice(
        ["../../../../tmp/x.lora_A.weight", "", "a" * 100000, "\x00\n", "base_model.model.", key + ".weight"]
    )
    header[other] = header.pop(key)
    return rebuilt(header, body)


def drop_key(rng, data):
    header, body = header_of(data)
    del header[rng.choice([key for key in header if key != "__metadata__"])]
    return rebuilt(header, body)


def poison(rng, data):
    header, body = header_of(data)
    values = np.frombuffer(body, np.float32).copy()
    values[rng.randrange(len(values))] = rng.choice([np.nan, np.inf, -np.inf])
    return rebuilt(header, values.tobytes())


def empty(rng, data):
    return b""


BREAK_WEIGHTS = [flip_bytes, cut, huge_header, deep_header, edit_entry, rename_key, drop_key, poison, empty]
JUNK = [None, -1, 0, 1e308, float("nan"), "x", "", [], ["x"], {"(": 1}, {"(a+)+$": 3}, {"q": -2}, True, 2**70, "pissa"]


def break_config(rng, text):
    config = json.loads(text)
    choice = rng.randrange(5)
    if choice == 0:
        return text[: rng.randrange(len(text))]
    if choice == 1:
        return "[" * 100000
    if choice == 2:
        return json.dumps(rng.choice(JUNK))
    fields = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "bias", "use_dora"]
    fields += ["init_lora_weights", "base_model_name_or_path", "revision", "fan_in_fan_out", "peft_type", "new_field"]
    for field in rng.sample(fields, rng.randint(1, 3)):
        config[field] = rng.choice(JUNK)
    return json.dumps(config)


def mutate(rng, folder):
    if rng.random() < 0.65:
        file = folder / WEIGHTS
        file.write_bytes(rng.choice(BREAK_WEIGHTS)(rng, file.read_bytes()))
    else:
        file = folder / CONFIG
        file.write_text(break_config(rng, file.read_text()))


@pytest.mark.parametrize("batch", range(10))
def test_fifty_mutants(tmp_path, batch):
    good = pristine(tmp_path / "good")
    refused = 0
    for number in range(50):
        rng = random.Random(50 * batch + number)
        bad = pristine(tmp_path / f"bad{number}")
        mutate(rng, bad)
        before = sorted(path for path in tmp_path.rglob("*"))
        error = None
        try:
            merge_adapters([good, bad], tmp_path / "out", rank=4, min_energy=0)
        except MergeError as caught:
            error = caught
        if error is not None:
            refused += 1
            assert error.do, error
            assert error.where, error
            assert len(str(error)) < 2000
            assert sorted(path for path in tmp_path.rglob("*")) == before
            continue
        out = read_adapter(tmp_path / "out")  # the mutation was harmless: what came out is whole
        assert all(np.isfinite(out.factors(name).B_MR).all() for name in out.modules)
        written = {WEIGHTS, CONFIG, "README.md", "merge.json", CONTENTS}
        assert {path.name for path in (tmp_path / "out").iterdir()} == written
        shutil.rmtree(tmp_path / "out")
    assert refused >= 30


def test_names_from_folders_cannot_break_the_card(tmp_path):
    one = g.factors()[0]
    evil = "x|y\n---\nlicense: mit <script>"
    paths = [g.write(tmp_path / "a", {"q": one}, base_model_name_or_path='b"\n---\nevil: yes')]
    merge_adapters([read_adapter(paths[0], name=evil)], tmp_path / "out")
    head = (tmp_path / "out" / "README.md").read_text().split("---\n")[1]
    assert head.count("\n") == 3
    body = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in body


def test_values_too_large_for_the_output_are_refused(tmp_path):
    one = g.factors()[0]
    big = g.write(tmp_path / "a", {"q": LoraFactors(1e5 * one.A_RN, 1e10 * one.B_MR, 1.0)})
    with pytest.raises(MergeError, match="do not fit F16"):
        merge_adapters([big], tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["linear", "tsv", "ties", "knots_ties"])
def test_products_that_overflow_are_refused(tmp_path, method):
    one = g.factors()[0]
    paths = [
        g.write(tmp_path / n, {"q": LoraFactors(1e30 * one.A_RN, 1e30 * one.B_MR, 1.0)}, lora_alpha=1e300) for n in "ab"
    ]
    with np.errstate(all="ignore"), pytest.raises(MergeError, match="overflow"):
        merge_adapters(paths, tmp_path / "out", method)


def test_links_are_not_followed_out(tmp_path):
    good = pristine(tmp_path / "good")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="link"):
        merge_adapters([good], tmp_path / "out", overwrite=True)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_shard_that_is_a_pipe_is_not_waited_for(tmp_path):
    good = pristine(tmp_path / "good")
    (good / WEIGHTS).unlink()
    os.mkfifo(good / "a.safetensors")
    (good / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    with pytest.raises(MergeError, match="a named pipe"):
        merge_adapters([good], tmp_path / "out")


def test_a_model_whose_name_is_too_long(tmp_path):
    with pytest.raises(MergeError, match=r"no model\.safetensors"):
        merge_checkpoints("x" * 300, [tmp_path], tmp_path / "out")
