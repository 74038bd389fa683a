"""merge(): what fits together, policies, options, and a folder that is there as a whole or not at all."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from mtft.adapters.lora_factors import LoraFactors, read_adapter
from mtft.common.errors import MergeError, UserError
from mtft.merge.engine import merge as merge_api
from mtft.merge.engine.merge import merge_adapters
from tests.merge import golden as g

# the children that are killed touch files only: no thread of theirs holds a lock
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def paths(tmp_path):
    return g.write_golden(tmp_path / "in")


@pytest.mark.parametrize("rslora", [False, True])
def test_one_adapter_at_weight_one_is_itself(tmp_path, rslora):
    """PEFT 0.21.2 changes it under rsLoRA, patterns and lora_bias (https://github.com/huggingface/peft/issues/3761)."""
    rng = np.random.default_rng(0)
    modules = {
        f"layers.{i}.q": LoraFactors(rng.normal(size=(r, 8)), rng.normal(size=(6, r)), 1.0, rng.normal(size=6))
        for i, r in enumerate((4, 2))
    }
    source = g.write(
        tmp_path / "in", modules, use_rslora=rslora, lora_bias=True, alpha_pattern={"layers.1.q": 9}, lora_alpha=7
    )
    merge_adapters([source], tmp_path / "out", rank="lossless")
    before, after = read_adapter(source), read_adapter(tmp_path / "out")
    for name in modules:
        a, b = before.factors(name), after.factors(name)
        np.testing.assert_allclose(g.delta(b), g.delta(a), rtol=0, atol=1e-6 * np.abs(g.delta(a)).max())
        np.testing.assert_allclose(b.scale * b.bias_M, a.scale * a.bias_M, rtol=1e-6)


def test_biases_add_up(tmp_path):
    one, two, _ = g.factors()
    with_bias = LoraFactors(two.A_RN, two.B_MR, two.scale, np.arange(12.0))
    a = g.write(tmp_path / "a", {"q": one, "k": one})
    b = g.write(tmp_path / "b", {"q": with_bias, "k": with_bias}, lora_bias=True)
    merge_adapters([a, b], tmp_path / "out", weights=[1, 0.5], scale=3)
    np.testing.assert_allclose(
        read_adapter(tmp_path / "out").factors("q").bias_M, 3 * 0.5 * 2 * np.arange(12.0), rtol=1e-6
    )


def test_embeddings(tmp_path):
    rng = np.random.default_rng(0)
    f = LoraFactors(rng.normal(size=(2, 50)), rng.normal(size=(6, 2)), 0.5, kind="embedding")
    copy = {"base_model.model.embed.base_layer.weight": np.ones((50, 6), np.float32)}
    paths = [g.write(tmp_path / name, {"embed": f}, copy) for name in "ab"]
    merge_adapters(paths, tmp_path / "out")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert set(keys) == {"base_model.model.embed.lora_embedding_A", "base_model.model.embed.lora_embedding_B"}
    np.testing.assert_allclose(g.delta(read_adapter(tmp_path / "out").factors("embed")), 2 * g.delta(f), atol=1e-6)
    other = g.write(tmp_path / "c", {"embed": f}, {key: 2 * value for key, value in copy.items()})
    with pytest.raises(MergeError, match="different weights"):
        merge_adapters([paths[0], other], tmp_path / "out2")


def test_saved_tensors_follow_the_policy(tmp_path):
    one = g.factors()[0]
    key = "base_model.model.score.weight"
    heads = [np.full((2, 3), value, np.float32) for value in (1.0, 4.0)]
    a, b = (
        g.write(tmp_path / n, {"q": one}, {key: h}, modules_to_save=["score"]) for n, h in zip("ab", heads, strict=True)
    )
    with pytest.raises(MergeError, match="full tensors"):
        merge_adapters([a, b], tmp_path / "out")
    merge_adapters([a, b], tmp_path / "mean", weights=[2, 1], scale=5, saved="average")
    np.testing.assert_allclose(load_file(tmp_path / "mean" / "adapter_model.safetensors")[key], 2.0)
    merge_adapters([a, b], tmp_path / "take", saved="take: b")
    np.testing.assert_allclose(load_file(tmp_path / "take" / "adapter_model.safetensors")[key], 4.0)
    assert json.loads((tmp_path / "take" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    for policy in ("take: nobody", "sum"):
        with pytest.raises(MergeError, match=r"saved|nobody"):
            merge_adapters([a, b], tmp_path / "out", saved=policy)


def test_bases_must_agree(tmp_path):
    one = g.factors()[0]
    a, b = (g.write(tmp_path / n, {"q": one}, base_model_name_or_path=n) for n in "ab")
    with pytest.raises(MergeError, match="bases differ"):
        merge_adapters([a, b], tmp_path / "out")
    assert any(
        "bases differ" in text for text in merge_adapters([a, b], tmp_path / "out", allow_base_mismatch=True).warnings
    )
    c, d = (
        g.write(tmp_path / n[-4:], {"q": one}, base_model_name_or_path=n) for n in ("org/m-7b", "org/m-7b-bnb-4bit")
    )
    assert any("precision" in text for text in merge_adapters([c, d], tmp_path / "out2").warnings)
    wide = g.write(tmp_path / "wide", {"q": LoraFactors(np.ones((2, 11)), one.B_MR, 1.0)}, base_model_name_or_path="a")
    with pytest.raises(MergeError, match=r"12 x 10 .* 12 x 11"):
        merge_adapters([a, wide], tmp_path / "out3")


def test_untrained_adapter_warns_once(tmp_path):
    one = g.factors()[0]
    zero = LoraFactors(one.A_RN, np.zeros_like(one.B_MR), 1.0)
    a, b = g.write(tmp_path / "a", {"q": one, "k": one}), g.write(tmp_path / "b", {"q": zero, "k": zero})
    report = merge_adapters([a, b], tmp_path / "out")
    assert [text for text in report.warnings if "untrained" in text] == [
        "b: k is all zero (untrained?), and 1 more modules"
    ]
    np.testing.assert_allclose(g.delta(read_adapter(tmp_path / "out").factors("q")), g.delta(one), atol=1e-6)


MISTAKES = [
    ({"method": "tiess"}, "unknown merge method"),
    ({"options": {"density": 0.5}}, "no option 'density'"),
    ({"weights": [1, 2]}, "2 weights for 3 adapters"),
    ({"weights": [0, 0, 0]}, "all zero"),
    ({"weights": [1, float("nan"), 0]}, "not finite"),
    ({"weights": [1, -2, 1], "average": True}, "add up to 0"),
    ({"scale": 0.0}, "scale"),
    ({"rank": 0}, "rank"),
    ({"rank": "all"}, "rank"),
    ({"energy": 2}, "energy"),
    ({"dtype": "int8"}, "dtype"),
    ({"precision": "bf16"}, "precision"),
    ({"rank": 1, "min_energy": 0.9}, "keeps only"),
    ({"per_module": [("nothing", {"method": "tsv"})]}, "no module"),
    ({"per_module": [("q", {"ranks": 3})]}, "unknown key"),
]


@pytest.mark.parametrize(("mistake", "text"), MISTAKES)
def test_mistakes_are_named_and_leave_nothing(tmp_path, paths, mistake, text):
    with pytest.raises(MergeError, match=text) as caught:
        merge_adapters(paths, tmp_path / "out", **mistake)
    assert caught.value.do
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_too_low_energy_names_the_rank_that_would_do(tmp_path, paths):
    with pytest.raises(MergeError) as caught:
        merge_adapters(paths, tmp_path / "out", rank=1, min_energy=0.9, weights=g.W)
    assert caught.value.do == "rank 3 would keep 90%"


def test_per_module_rules(tmp_path):
    one, two, three = g.factors()
    a, b = (g.write(tmp_path / n, {"layers.0.q": one, "layers.1.q": x}) for n, x in (("a", two), ("b", three)))
    rules = [(r"layers\.1\.", {"weights": [0, 2], "rank": 1}), (r".", {"method": "tsv"})]
    report = merge_adapters([a, b], tmp_path / "out", per_module=rules)
    out = read_adapter(tmp_path / "out")
    np.testing.assert_allclose(g.delta(out.factors("layers.1.q")), 2 * g.delta(three), atol=1e-6)
    np.testing.assert_allclose(g.delta(out.factors("layers.0.q")), g.delta(one), atol=1e-6)  # tsv of equal ones
    assert report.modules["layers.1.q"]["rank"] == 1


def test_same_inputs_same_bytes_and_workers_do_not_matter(tmp_path, paths):
    for name, workers in (("x", 1), ("y", 1), ("z", 2)):
        merge_adapters(paths, tmp_path / name, rank=4, workers=workers, diagnostics=True)
    for file in ("adapter_model.safetensors", "adapter_config.json", "README.md", "merge.json"):
        assert (
            (tmp_path / "x" / file).read_bytes()
            == (tmp_path / "y" / file).read_bytes()
            == (tmp_path / "z" / file).read_bytes()
        )


def test_two_passes_give_what_one_pass_gives(tmp_path, paths, monkeypatch):
    merge_adapters(paths, tmp_path / "held")
    monkeypatch.setattr(merge_api, "KEEP_BYTES", 0)
    merge_adapters(paths, tmp_path / "again")
    file = "adapter_model.safetensors"
    assert (tmp_path / "held" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_the_output_folder_is_guarded(tmp_path, paths):
    out = tmp_path / "out"
    merge_adapters(paths, out)
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="something already"):
        merge_adapters(paths, out, method="tsv")
    assert (out / "adapter_model.safetensors").read_bytes() == before
    merge_adapters(paths, out, method="tsv", overwrite=True)
    assert json.loads((out / "merge.json").read_text())["method"] == "tsv"
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="thesis"):
        merge_adapters(paths, out, overwrite=True)
    with pytest.raises(UserError, match="is, or holds, an input"):
        merge_adapters(paths, paths[0], overwrite=True)
    with pytest.raises(UserError, match="is no folder"):
        merge_adapters(paths, paths[0] / "adapter_config.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_killed_merge_leaves_no_half_adapter(tmp_path, paths, monkeypatch):
    def die(*_):
        os._exit(9)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(merge_api, "write_merge_card", die)
        merge_adapters(paths, tmp_path / "out")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if ".part-" in path.name]  # what it had left
    merge_adapters(paths, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]  # is cleared by the next


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_moment_the_folder_is_whole_or_not_there(tmp_path, overwrite):
    """Twelve SIGKILLs spread over a merge that lasts some tenths of a second."""
    rng = np.random.default_rng(0)
    names = [f"layers.{i}.q" for i in range(40)]
    sources = [
        g.write(
            tmp_path / "in" / str(k),
            {name: LoraFactors(rng.normal(size=(8, 200)), rng.normal(size=(200, 8)), 1.0) for name in names},
        )
        for k in range(2)
    ]
    begin = time.perf_counter()
    merge_adapters(sources, tmp_path / "out", "tsv")
    lasts = time.perf_counter() - begin
    files = {path.name for path in (tmp_path / "out").iterdir()}
    wanted = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    if not overwrite:
        shutil.rmtree(tmp_path / "out")
    for number in range(12):
        child = os.fork()
        if child == 0:
            merge_adapters(sources, tmp_path / "out", "tsv", overwrite=True)
            os._exit(0)
        time.sleep(lasts * (number + 0.5) / 12)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (tmp_path / "out").exists():
            assert {path.name for path in (tmp_path / "out").iterdir()} == files
            assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == wanted
            if not overwrite:
                shutil.rmtree(tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} <= {"in", "out"}


def test_dtype_is_the_inputs(tmp_path, paths):
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    for path in paths:
        file = path / "adapter_model.safetensors"
        save({key: value.bfloat16() for key, value in load(file).items()}, file)
    merge_adapters(paths, tmp_path / "out")
    assert {x.dtype for x in load(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    merge_adapters(paths, tmp_path / "out32", dtype="fp32")
    assert {x.dtype for x in load(tmp_path / "out32" / "adapter_model.safetensors").values()} == {torch.float32}


def test_a_rank_that_is_given_is_obeyed_and_says_what_it_keeps(tmp_path):
    rng = np.random.default_rng(0)
    wide = LoraFactors(rng.normal(size=(8, 40)), rng.normal(size=(40, 8)), 1.0)
    path = g.write(tmp_path / "in", {"layers.0.q": wide})
    report = merge_adapters([path], tmp_path / "out", rank=1)
    assert report.rank == 1
    assert report.energy < 0.5
    assert "warning: rank 1 keeps only" in report.text()
    assert not merge_adapters([path], tmp_path / "all", rank=8).warnings
    with pytest.raises(MergeError, match="keeps only"):
        merge_adapters([path], tmp_path / "refused", rank=1, min_energy=0.5)
    with pytest.raises(MergeError, match="keeps only"):  # nobody asked for that rank
        merge_adapters([path], tmp_path / "refused", per_module=[("q", {"rank": 1})])
    assert not (tmp_path / "refused").exists()
