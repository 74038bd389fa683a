"""Every row of the table is hit by a recipe, and the good recipe by none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mtft.common.errors import UserError
from mtft.distributed.launch import LaunchConfig
from mtft.recipe.compatibility import TABLE, check_compatibility

ZERO_3 = LaunchConfig(zero=3, ranks=2)
FSDP = LaunchConfig(fsdp=2, ranks=2)
READS_VALIDATION = SimpleNamespace(valid_every=10)
PLAIN = LaunchConfig()

# row -> (stage, overrides, engine, needs of the balancer)
CASES = {
    "tasks.*.shots + tasks.*.format: text": (
        "check",
        ["tasks.sum.shots={n: 2, from: sql.v1}", "tasks.sql.v1.format=text"],
    ),
    "tasks.*.system, chat_template_kwargs + tasks.*.format: text": (
        "train",
        ["tasks.sum.system=be brief", "tasks.sum.format={text: article}"],
    ),
    "tasks.*.auxiliary": ("merge", ["tasks.sum.auxiliary=true", "tasks.sql.v1.auxiliary=true"]),
    "sweep": ("mix", ["sweep=null"]),
    "merge": ("merge", ["merge=null"]),
    "fuse": ("fuse", ["fuse=null"]),
    "merge.adapters": ("merge", ["tasks=[{name: sum, data: data/sum.jsonl}]", "mixture={}", "sweep=null"]),
    "merge.adapters + run.singles": ("run", ["run.singles=false"]),
    "tasks.*.eval_data": ("eval", ["tasks.sum.eval_data=", "tasks.sql.v1.eval_data="]),
    "sweep + tasks.*.eval_data": ("mix", ["tasks.sum.eval_data="]),
    "loss.balancer + tasks.*.eval_data": ("train", ["tasks.sum.eval_data="], PLAIN, READS_VALIDATION),
    "lora: null + model.quantise": ("train", ["lora=null", "model.quantise=nf4"]),
    "sweep.resources + sweep.backend": ("mix", ["sweep.resources={gpus: 1}"]),
    "sweep.resources.gpus": ("mix", ["sweep.backend=ray", "sweep.resources={gpus: 1.5}"]),
    "sweep.lora: full + quantise": ("mix", ["sweep.lora=full", "model.quantise=int8"]),
    "lora.start + lora.init": ("train", ["lora.start=runs/a/adapter", "lora.init=pissa"]),
    "lora.init + model.quantise": ("train", ["lora.init=pissa", "model.quantise=nf4"]),
    "model.quantise + DeepSpeed": ("check", ["model.quantise=nf4"], ZERO_3),
    "model.quantise: int8 + FSDP": ("check", ["model.quantise=int8"], FSDP),
    "parallelism_config_cp_size, parallelism_config_sp_size": (
        "train",
        [],
        LaunchConfig(fsdp=2, ranks=2, sequence_ranks=2),
    ),
    "parallelism_config_tp_size": ("check", [], LaunchConfig(fsdp=2, ranks=4, tensor_ranks=2)),
    "fsdp_version: 1": ("train", [], LaunchConfig(fsdp=1, ranks=2)),
    "model.dtype: fp16 + FSDP": ("train", ["model.dtype=fp16"], FSDP),
    "model.attention: flash_attention_2 + model.dtype: fp32": (
        "train",
        ["model.attention=flash_attention_2", "model.dtype=fp32"],
    ),
    "train.optimizer + FSDP": ("train", ["train.optimizer=adafactor"], FSDP),
    "lora.init + sharded weights": ("train", ["lora.init=pissa"], ZERO_3),
    "loss.orthogonal + sharded weights": ("train", ["loss.orthogonal=0.1"], FSDP),
    "loss.path: fused + sharded weights": ("train", ["loss.path=fused"], FSDP),
    "train.max_length + train.micro_batch_tokens": (
        "train",
        ["train.max_length=4096", "train.micro_batch_tokens=1024"],
    ),
    "loss.label_smoothing, loss.z_loss + loss.path: fused": ("train", ["loss.z_loss=1e-4", "loss.path=fused"]),
    "loss.orthogonal + lora: null": ("train", ["loss.orthogonal=0.1", "lora=null"]),
    "loss.gradients.split + aggregator or flat": ("train", ["loss.gradients={split: true, aggregator: upgrad}"]),
    "lora.targets + loss.path: fused, chunked": ("train", ["lora.targets=[q_proj, lm_head]", "loss.path=chunked"]),
    "mixture.shares.schedule + sweep": (
        "mix",
        ["mixture.shares={schedule: [{at: 0, shares: uniform}, {at: 1, shares: natural}]}"],
    ),
    "mixture.online + mixture.shares.schedule": (
        "train",
        ["mixture.online={name: bandit}", "mixture.shares={schedule: [{at: 0, shares: uniform}]}"],
    ),
    "mixture.online + sweep": ("run", ["mixture.online={name: bandit}", "run.tune_strong=false"]),
    "mixture.online + one task": (
        "train",
        ["tasks=[{name: sum, data: data/sum.jsonl}]", "mixture={online: {name: bandit}}", "sweep=null"],
    ),
    "mixture.online + mixture.unit: tokens + max_epochs, alternating": (
        "train",
        ["mixture.online={name: bandit}", "mixture.unit=tokens"],
    ),
    "mixture.online + train.task_patience, weight 0": (
        "train",
        ["mixture.online={name: bandit}", "tasks.sum.weight=0"],
    ),
    "mixture.online.* + mixture.online.name": ("train", ["mixture.online={name: bandit, eta: 1}"]),
    "mixture.online: linear_law + tasks.*.eval_data": (
        "train",
        ["mixture.online={name: linear_law}", "tasks.sum.eval_data="],
    ),
    "mixture.online: linear_law + every": ("train", ["mixture.online={name: linear_law, every: 10}"]),
    "mixture.online: linear_law + train.batch_style: alternating": (
        "train",
        ["mixture.online={name: linear_law}", "train.batch_style=alternating"],
    ),
    "mixture.online + run.tune_strong": ("run", ["mixture.online={name: bandit}", "sweep=null"]),
    "train.batch_style: alternating + weight 0": ("train", ["train.batch_style=alternating", "tasks.sum.weight=0"]),
    "train.batch_style: alternating + task gradients": (
        "train",
        ["train.batch_style=alternating", "loss.gradients={aggregator: upgrad}"],
    ),
    "loss.gradients.aggregator + sharded gradients": ("train", ["loss.gradients={aggregator: upgrad}"], FSDP),
    "loss.gradients.flat + sharded weights": ("train", ["loss.gradients={flat: {name: f_mtl}}"], FSDP),
    "loss.gradients.flat + loss.sample_weights": (
        "train",
        ["loss.gradients={flat: {name: f_mtl}}", "loss.sample_weights={rule: focal}"],
    ),
    "loss.orthogonal + task gradients": ("train", ["loss.orthogonal=0.1", "loss.gradients={every: 20}"]),
    "lora.dora + task gradients": ("train", ["lora.dora=true", "loss.balancer.name=lagged"]),
    "lora: null + task gradients": ("train", ["lora=null", "loss.gradients={every: 20}"]),
    "lora.dora + merge": ("run", ["lora.dora=true"]),
    "lora: null + merge": ("merge", ["lora=null"]),
    "output.export: best + sharded weights": ("train", ["output.export=best"], ZERO_3),
    "train.micro_batch_tokens: auto + sharded weights": ("train", ["train.micro_batch_tokens=auto"], ZERO_3),
    "train.optimizer: muon + lora": ("train", ["train.optimizer=muon"]),
    "train.optimizer + DeepSpeed": ("train", ["train.optimizer=muon", "lora=null", "merge=null", "fuse=null"], ZERO_3),
    "train.optimizer: schedule_free + train.schedule": ("train", ["train.optimizer=schedule_free"]),
    "train.mezo + lora: null": ("train", ["train.mezo=1e-3", "lora=null"]),
    "train.mezo + task gradients, DeepSpeed, FSDP, fp16": ("train", ["train.mezo=1e-3", "loss.gradients={}"]),
    "lora.plus + one trained factor": ("train", ["lora.plus=16", "lora.freeze_a=true"]),
    "lora.freeze_a, lora.init: mica + sharded weights": ("train", ["lora.freeze_a=true"], ZERO_3),
    "lora.freeze_a + lora.init: mica": ("train", ["lora.freeze_a=true", "lora.init=mica"]),
    "train.watch": ("train", ["train.watch=sum/loss", "tasks.sum.eval_data="]),
    "eval.lm_eval + tasks": (
        "eval",
        [
            "tasks=[{name: lm_eval, data: data/sum.jsonl, eval_data: data/sum.jsonl}]",
            "mixture={}",
            "sweep=null",
            "eval.lm_eval={tasks: [arc_easy]}",
        ],
    ),
    "sweep.objective": ("mix", ["sweep.objective=mean/rouge_l"]),
    "sweep.eval_limit + tasks.*.metrics": (
        "mix",
        ["tasks.sum.metrics=[label_accuracy]", "sweep.objective={sum/label_accuracy: 1}", "sweep.eval_limit=4"],
    ),
    "train.patience, train.task_patience, output.export: best + tasks.*.eval_data": (
        "train",
        ["output.export=best", "tasks.sum.eval_data="],
    ),
    "train.patience, train.task_patience + train.eval_every": ("train", ["train.patience=3"]),
    "train.task_patience + task gradients": (
        "train",
        ["train.task_patience=3", "train.eval_every=5", "loss.gradients={}"],
    ),
    "lora: null + fuse": ("run", ["lora=null", "merge=null"]),
    "fuse.weights: router + fuse.router": ("fuse", ["fuse.weights=router"]),
    "merge.search + merge.gates": (
        "merge",
        ["merge.search={by: grid}", "merge.gates={kind: atlas}", "merge.method=linear"],
    ),
    "merge.gates + merge.method": ("run", ["merge.gates={kind: atlas}", "merge.method=ties"]),
    "merge.gates + merge.experts": (
        "check",
        ["merge.gates={kind: atlas}", "merge.experts={kind: twin}", "merge.method=linear"],
    ),
    "merge.search + merge.average": ("merge", ["merge.search={by: grid}", "merge.average=true"]),
    "merge.experts: arrow + merge.method": ("merge", ["merge.experts={kind: arrow}", "merge.method=ties"]),
    "merge.search, gates, experts + tasks.*.eval_data": (
        "run",
        ["merge.experts={kind: twin}", "tasks.sum.eval_data=", "sweep=null"],
    ),
    "merge.base": ("merge", ["merge.base=model"]),
    "merge.base + mtft run": ("run", ["merge.base=model", "merge.adapters=[a, b]"]),
}
WARNINGS = {
    "mixture.online.every + train.steps": ("train", ["mixture.online={name: bandit, every: 100}"]),
    "mixture.online: group_dro + reference": ("train", ["mixture.online={name: group_dro}"]),
    "mixture.online.reference + loss.label_smoothing, loss.z_loss": (
        "train",
        ["mixture.online={name: group_dro, reference: {sum: 1.2, sql.v1: 0.8}}", "loss.label_smoothing=0.1"],
    ),
    "tasks.*.eval_data": ("train", ["tasks.sum.eval_data="]),
    "tasks.*.metrics + tasks.*.eval_data": ("eval", ["tasks.sum.eval_data=", "tasks.sum.metrics=[loss, f1]"]),
    "tasks.*.metrics + fuse, merge.experts": ("run", ["tasks.sum.metrics=[loss, f1]"]),
    "train.micro_batch_tokens + train.batch_tokens": ("train", [], LaunchConfig(ranks=64)),
    "train.min_lr + train.schedule": ("train", ["train.min_lr=0.1", "train.schedule=constant"]),
    "train.mezo + train.max_grad_norm": ("train", ["train.mezo=1e-3"]),
    "fuse.alpha": ("fuse", ["fuse.alpha=0.5"]),
    "fuse.top_p": ("fuse", ["fuse.top_p=0.9"]),
    "sweep.trials": ("mix", ["sweep.trials=8"]),
    "merge.weights + merge.search": ("merge", ["merge.search={by: grid}", "merge.weights=[1, 1]"]),
    "model.dtype: fp16 + lora: null": ("train", ["lora=null", "model.dtype=fp16"]),
}


@pytest.mark.parametrize("keys", CASES)
def test_refused(folder, keys):
    stage, overrides, *more = CASES[keys]
    engine, needs = (*more, *(PLAIN, None)[len(more) :])
    row = next(row for row in TABLE if row.keys == keys and row.fatal)
    with pytest.raises(UserError) as caught:
        check_compatibility(folder.load(*overrides), stage=stage, engine=engine, needs=needs)
    assert (caught.value.what, caught.value.where, caught.value.do) == (row.why, keys, row.do)


@pytest.mark.parametrize("keys", WARNINGS)
def test_warned(folder, keys):
    stage, overrides, *more = WARNINGS[keys]
    row = next(row for row in TABLE if row.keys == keys and not row.fatal)
    recipe = folder.load(*overrides)
    assert check_compatibility(recipe, stage=stage, engine=more[0] if more else PLAIN) == [
        f"{row.reason(recipe)} ({keys}): {row.do}"
    ]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["tasks.sum.metrics=[loss, exact_match]"], False),
        (["tasks.sum.metrics=[loss, f1]", "fuse=null"], False),
        (["tasks.sum.metrics=[loss, f1]", "fuse=null", "merge.experts={kind: twin}"], True),
    ],
)
def test_what_is_scored_by_its_forward_pass_alone_is_told(folder, overrides, told):
    lines = check_compatibility(folder.load(*overrides), stage="run")
    assert any("their forward pass alone" in line for line in lines) == told


@pytest.mark.parametrize("name", ["sum/exact_match", "mean/f1", "worst/f1"])
def test_a_metric_is_watched_on_held_out_rows(folder, name):
    """A task without them measures nothing, so `train.watch` would find nothing at the first evaluation."""
    overrides = [f"train.watch={name}", "tasks.sum.metrics=[loss, f1]"]
    check_compatibility(folder.load(*overrides), stage="train")
    with pytest.raises(UserError, match="a task without eval_data"):
        check_compatibility(folder.load(*overrides, "tasks.sum.eval_data="), stage="train")


def test_warnings_name_their_tasks(folder):
    overrides = ["tasks.sum.eval_data=", "tasks.sum.metrics=[loss, f1]", "sweep=null"]
    lines = check_compatibility(folder.load(*overrides), stage="check")
    why = "nothing held-out is measured for tasks that have no eval_data: sum"
    assert f"{why} (tasks.*.eval_data): give them eval_data" in lines
    asked = "metrics are asked for, and there is no eval_data to measure them on: sum"
    assert sum(line.startswith(asked) for line in lines) == 1
    lines = check_compatibility(folder.load(*overrides, "tasks.sum.metrics=[loss, exact_match]"), stage="check")
    assert not any(line.startswith("metrics are asked") for line in lines)  # the forward pass gives these


def test_named_labels_go_with_a_limit(folder):
    overrides = ["sweep.objective={sum/label_accuracy: 1}", "sweep.eval_limit=4"]
    named = "tasks.sum.metrics=[{name: label_accuracy, labels: [yes, no]}]"
    check_compatibility(folder.load(named, *overrides), stage="mix")


def test_every_row_has_its_case():
    assert {row.keys for row in TABLE if row.fatal} == CASES.keys()
    assert {row.keys for row in TABLE if not row.fatal} == WARNINGS.keys()


@pytest.mark.parametrize("stage", ["check", "train", "eval", "mix", "merge", "fuse", "run"])
def test_the_good_recipe_is_fine(folder, stage):
    assert check_compatibility(folder.load(), stage=stage, engine=PLAIN, needs=READS_VALIDATION) == []


def test_nf4_goes_with_fsdp(folder):
    assert check_compatibility(folder.load("model.quantise=nf4"), stage="check", engine=FSDP) == []


def test_several_at_once(folder):
    with pytest.raises(UserError) as caught:
        check_compatibility(
            folder.load("model.quantise=nf4", "lora.init=olora", "lora.dora=true"), stage="run", engine=ZERO_3
        )
    lines = caught.value.what.splitlines()
    assert lines[0] == "4 things in the recipe can't go together"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "lora.init + model.quantise",
        "model.quantise + DeepSpeed",
        "lora.init + sharded weights",
        "lora.dora + merge",
    ]
