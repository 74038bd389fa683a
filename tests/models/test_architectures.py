"""Every architecture, from `check` to `fuse`, on a model of its own config class made tiny: each step works, or the
recipe is refused before anything is trained.

The oracles: `check` counts the parameters that training trains; a resumed run has the weights of an unbroken one; the
proof; the scores of the exported adapter are the run's own; a merge of one adapter gives its scores; the fused model
with alpha 1 whose strong model is the base gives the expert's own log-probabilities.
"""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mtft.cli.main import app
from mtft.common.errors import UserError
from mtft.evaluation.evaluate_recipe import evaluate
from mtft.fuse import FusedCausalLM, FusionSpec
from mtft.merge.engine.merge import merge_adapters
from mtft.models.adapters import load_adapter
from mtft.models.loading import load_base, load_without_weights
from mtft.models.lora import add_lora
from mtft.models.lora_targets import describe_adapter
from mtft.pipeline.check import check_recipe
from mtft.recipe.schema.lora import LoraSection
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.recipe import Recipe
from mtft.training.build_model import load_for_training
from mtft.training.run_training import train
from tests.models.tiny_architectures import ARCHITECTURES, write_architecture
from tests.slow import slow
from tests.warm_python.fixture import warm_proofs  # noqa: F401  (a fixture)

STEPS = 4
REFUSED = {"llama4": "for which Llama4ForCausalLM has no place"}  # its vision part would be lost
FUSED_EXPERTS = ("qwen3_moe", "deepseek_v3")  # PEFT adapts tensors there, and no modules: not for `mtft merge`
EXPERTS = {"qwen3_moe": "trains 8 experts in 2 layers and 2 routers", "deepseek_v3": "trains 4 experts in 1 layer"}
EXPERTS |= dict.fromkeys(("gpt_oss", "llama4_text"), "leaves the")
SEES = {"gemma3": "model.vision_tower", "gemma4": "model.vision_tower"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{architecture: its folder}, written when asked for."""
    root, written = tmp_path_factory.mktemp("architectures"), {}

    def folder(name):
        if name not in written:
            written[name] = write_architecture(root / name, name)
        return written[name]

    return folder


def section(folder):
    return ModelSection(path=str(folder), dtype="fp32")


def asked(recipe, folder, run, **changes):
    steps = {**recipe["train"], "steps": STEPS, "warmup": 0, "learning_rate": 1e-2, "micro_batch_tokens": 160}
    values = {**recipe, "model": {"path": str(folder), "dtype": "fp32"}, "lora": {"r": 4, "alpha": 8}, "train": steps}
    return Recipe.model_validate({**values, "output": {"dir": str(run), "save_every": 2}, **changes})


def adapter_weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def losses(scores):
    return {task: of_task.summary()["loss"] for task, of_task in scores.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_check_knows_what_an_adapter_would_be_on(folders, name):
    """Before any weight is read: the same adapter as on the loaded model, and what is worth saying about it."""
    folder = folders(name)
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            load_without_weights(section(folder), dtype=torch.float32)
        return
    with torch.device("meta"):
        here = add_lora(load_without_weights(section(folder), dtype=torch.float32), LoraSection(r=4), seed=1)
    there = add_lora(load_base(section(folder)), LoraSection(r=4), seed=1)
    shapes = [{n: p.shape for n, p in model.named_parameters() if p.requires_grad} for model in (here, there)]
    assert shapes[0] == shapes[1]
    assert not any("vision" in n or "multi_modal" in n for n in shapes[0])
    notes = describe_adapter(here)
    assert notes == describe_adapter(there)
    for told in (EXPERTS.get(name), SEES.get(name), "can't be merged" if name in FUSED_EXPERTS else None):
        assert told is None or any(told in note for note in notes)
    if name not in EXPERTS and name not in SEES:
        assert notes == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:expert .* runs as a model of its own")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.filterwarnings("ignore:strong model and base have the same favourite")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_from_check_to_fuse(recipe, folders, tmp_path, name):
    folder, run = folders(name), tmp_path / "run"
    whole = asked(recipe, folder, run)
    if name in REFUSED:
        for command in (lambda: check_recipe(whole), lambda: train(whole, quiet=True)):
            with pytest.raises(UserError, match=REFUSED[name]):
                command()
        assert not (run / "metrics.jsonl").exists()
        return
    checked = check_recipe(whole)

    # train: proved, and the losses of a fresh adapter's run go down
    result = train(whole, quiet=True)
    assert result.not_proved is None
    assert sum(value.numel() for value in adapter_weights(run).values()) == checked.memory.trainable
    before, after = losses(evaluate(whole)), losses(result.scores)
    assert sum(after.values()) < sum(before.values())

    # resume: from the checkpoint in the middle, the same weights to the bit
    again = shutil.copytree(run, tmp_path / "again")
    for gone in ("adapter", f"checkpoint-{STEPS}"):
        shutil.rmtree(again / gone)
    (again / "result.json").unlink()
    train(asked(recipe, folder, again), quiet=True, prove=False)
    one, two = adapter_weights(run), adapter_weights(again)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)

    # export: once more from the last checkpoint, the same weights again; and the command has nothing to do after that
    shutil.rmtree(run / "adapter")
    assert CliRunner().invoke(app, ["export", str(run)]).exit_code == 0
    assert json.loads((run / "result.json").read_text())["state"] == "trained and proved"
    assert all(torch.equal(one[key], value) for key, value in adapter_weights(run).items())

    # eval
    assert losses(evaluate(whole, result.adapter_dir)) == pytest.approx(after, rel=1e-5)

    # merge: of one adapter with itself in half is that adapter
    def merge():
        merge_adapters([result.adapter_dir], tmp_path / "merged")

    if name in FUSED_EXPERTS:
        with pytest.raises(UserError, match="parameters are not read"):
            merge()
        with pytest.raises(UserError, match="can't be merged"):  # and check has said so
            check_recipe(asked(recipe, folder, run, merge={"method": "linear"}))
    else:
        merge()
        assert losses(evaluate(whole, tmp_path / "merged")) == pytest.approx(after, rel=1e-4)

    # fuse
    fused = FusedCausalLM.load(
        folder, folder, [result.adapter_dir], FusionSpec(alpha_rule="fixed", alpha=1.0, d_max=80.0), dtype="fp32"
    )
    ids = torch.arange(3, 40)[None]
    expert = load_adapter(load_base(section(folder)), result.adapter_dir).eval()
    with torch.no_grad():
        expected = expert(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        torch.testing.assert_close(fused(input_ids=ids).logits, expected, atol=2e-4, rtol=1e-3)
    out = fused.generate(input_ids=ids[:, :8], max_new_tokens=6, do_sample=False)
    assert out.shape[1] <= 14


@pytest.mark.parametrize(
    "lora", [{"dropout": 0.1}, {"dora": True}, *({"init": init} for init in ("orthogonal", "pissa", "olora", "mica"))]
)
@pytest.mark.parametrize("name", [FUSED_EXPERTS[0], *slow(*FUSED_EXPERTS[1:])])
def test_what_fused_experts_cannot_have_is_refused_by_check_and_by_training(recipe, folders, tmp_path, name, lora):
    whole = asked(recipe, folders(name), tmp_path / "run", lora={"r": 4, **lora})
    for command in (lambda: check_recipe(whole), lambda: train(whole, quiet=True)):
        with pytest.raises(UserError, match="experts of this model are fused") as caught:
            command()
        assert caught.value.where == f"lora.{next(iter(lora))}"
        assert "q_b_proj" in caught.value.do or "q_proj" in caught.value.do
    without = asked(recipe, folders(name), tmp_path / "run", lora={"r": 4, "targets": ["o_proj"], **lora})
    check_recipe(without)


MEASURES = {
    "balancer": {"balancer": {"name": "gradnorm"}},
    "aggregator": {"gradients": {"aggregator": "upgrad"}},
    "affinity": {"gradients": {"every": 1}},
}


@pytest.mark.parametrize("loss", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("name", [FUSED_EXPERTS[0], *slow(*FUSED_EXPERTS[1:])])
def test_task_gradients_of_fused_experts_are_refused_by_check_and_by_training(recipe, folders, tmp_path, name, loss):
    whole = asked(recipe, folders(name), tmp_path / "run", loss=loss)
    said = []
    for command in (lambda: check_recipe(whole), lambda: train(whole, quiet=True)):
        with pytest.raises(
            UserError, match=r"(?s)gradients of single tasks can't be captured.*fused experts"
        ) as caught:
            command()
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert caught.value.where == "lora.targets"
    # what it names to be done can be done
    targets = re.search(r"targets: \[([a-z_, ]+)\]", caught.value.do)[1].split(", ")
    check_recipe(asked(recipe, folders(name), tmp_path / "run", loss=loss, lora={"r": 4, "targets": targets}))
    assert "loss.gradients.partial: true" in caught.value.do
    loss = {**loss, "gradients": {**loss.get("gradients", {}), "partial": True}}
    checked = check_recipe(asked(recipe, folders(name), tmp_path / "run", loss=loss))
    assert any("task gradients leave out" in line and "fused experts" in line for line in checked.warnings)


def test_check_knows_the_adapter_that_is_trained_on(recipe, folders, tmp_path):
    """Its modules, whatever lora.targets says, which is all-linear here: the experts are not among them."""
    start = tmp_path / "start"
    targets = LoraSection(r=4, alpha=8, targets=("q_proj",))
    add_lora(load_base(section(folders("qwen3_moe"))), targets, seed=1).save_pretrained(start)
    lora, loss = {"r": 4, "alpha": 8, "start": str(start)}, {"gradients": {"aggregator": "upgrad"}}
    whole = asked(recipe, folders("qwen3_moe"), tmp_path / "run", lora=lora, loss=loss)
    trained = load_for_training(whole).get_nb_trainable_parameters()[0]
    assert check_recipe(whole).memory.trainable == trained
    elsewhere = asked(recipe, folders("gpt2"), tmp_path / "run", lora=lora)
    with pytest.raises(UserError, match="does not fit the model"):
        check_recipe(elsewhere)


def test_task_gradients_of_experts_that_get_no_adapter_are_taken(recipe, folders, tmp_path):
    """all-linear leaves the experts of gpt-oss as they are."""
    loss = {"gradients": {"aggregator": "upgrad"}}
    checked = check_recipe(asked(recipe, folders("gpt_oss"), tmp_path / "run", loss=loss))
    assert not any("leave out" in line for line in checked.warnings)


@pytest.mark.parametrize(
    ("name", "targets", "what", "do"),
    [
        ("phi3", ["qkv_proj", "o_prj"], "no module of the model is called 'o_prj'", "o_prj: did you mean o_proj?"),
        ("phi3", ["q_proj"], "'q_proj'", "qkv_proj"),
        ("gpt2", ["c_attn", "c_atn", "nothing"], "'c_atn', 'nothing'", "c_atn: did you mean c_attn?"),
        ("gemma3", ["fc1"], "'fc1'", "up_proj"),  # of its vision part only
        ("qwen3_moe", ["q_proj", "gate_proj"], "without also targeting up_proj", "all-linear"),
        ("qwen3_moe", ["q_proj", "experts_proj"], "'experts_proj'", "q_proj"),
        ("llama4_text", ["router"], "'router'", "q_proj"),
        ("phi3", ["mlp"], "can't be put on this model: Target module Phi3MLP", "all-linear"),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_targets_that_match_nothing_are_refused(recipe, folders, tmp_path, name, targets, what, do):
    whole = asked(recipe, folders(name), tmp_path / "run", lora={"r": 4, "targets": targets})
    for command in (lambda: check_recipe(whole), lambda: train(whole, quiet=True)):
        with pytest.raises(UserError) as caught:
            command()
        assert what in caught.value.what
        assert caught.value.where == "lora.targets"
        assert do in caught.value.do


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(
    ("name", "targets"),
    [("phi3", ["qkv_proj", "layers.1.mlp.down_proj"]), ("qwen3_moe", ["gate_proj", "up_proj", "down_proj", "gate"])],
)
def test_targets_that_match_are_taken(folders, name, targets):
    add_lora(load_base(section(folders(name))), LoraSection(r=4, targets=tuple(targets)), seed=1)


def test_check_refuses_weights_that_training_would_refuse(recipe, folders, tmp_path):
    from tests.models.test_whole_weights import changed, drop

    broken = changed(folders("phi3"), tmp_path / "broken", drop("layers.1.mlp.down_proj"))
    with pytest.raises(UserError, match=r"lack 1 weight \(model\.layers\.1\.mlp\.down_proj"):
        check_recipe(asked(recipe, broken, tmp_path / "run"))
