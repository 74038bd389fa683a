"""All task gradients from one backward equal K backwards of the single tasks, in every setting of a training step."""

import gc
import itertools

import pytest
import torch
from torch import nn

from mtft.common.errors import UserError
from mtft.data.batching.batch import IGNORE
from mtft.gradients.capture.task_gradients import TaskGradients
from mtft.gradients.capture.token_order import order_by_task
from mtft.gradients.gramian import gram
from mtft.losses.task_reduction import NORMALISATIONS
from mtft.losses.token_nll import token_nll
from tests.gradients.tiny import ROWS, WEIGHTS, K, base, batches, captured, distance, k_backwards, lora, trained

UNPACKED = [[[example] for row in part for example in row] for part in ROWS]
MANY = [[[(k % 3, 3 + k % 4) for k in range(j, j + 9)] for j in range(4)]]


def checkpointed(reentrant):
    model = lora().train()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    return model


SETTINGS = {
    "packed, two micro-batches": (lora, {}),
    "unpacked": (lora, {"rows": UNPACKED}),
    "many short runs: sorted first": (lora, {"rows": MANY}),
    "dropout": (lambda: lora(lora_dropout=0.3).train(), {}),
    "checkpointing, non-reentrant": (lambda: checkpointed(False), {}),
    "checkpointing, reentrant": (lambda: checkpointed(True), {}),
    "trained head, on supervised positions": (lambda: lora(target_modules=["lm_head", "q_proj"]), {}),
    "modules_to_save": (lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), {}),
    "full fine-tuning": (base, {"partial": True}),
    "head and embedding tied": (lambda: base(tie_word_embeddings=True), {"partial": True}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_k_backwards(setting):
    make, options = SETTINGS[setting]
    model, options = make(), dict(options)
    parts = batches(options.pop("rows", ROWS))
    taps, coef_K, own = captured(model, parts, **options)
    J = taps.jacobian(coef_K)
    expected = k_backwards(model, parts)
    assert set(J) == set(taps.covered)
    assert distance(J, expected) < 1e-5
    for name in J:  # what the optimizer sees is the weighted sum
        total = (coef_K.float() @ J[name].flatten(1)).view_as(own[name])
        assert float((total - own[name]).norm()) <= 1e-5 * float(own[name].norm())


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_every_normalisation(normalise):
    model, parts = lora(), batches()
    taps, coef_K, _ = captured(model, parts, normalise=normalise)
    assert distance(taps.jacobian(coef_K), k_backwards(model, parts, normalise=normalise)) < 1e-5


def test_bfloat16_autocast():
    """Against K backwards of the same precision. Weights so that coefficients are powers of 2: they round nothing."""
    model, parts = lora(), batches()
    taps, coef_K, _ = captured(model, parts, dtype=torch.bfloat16, w_K=torch.tensor([1.0, 2.0, 1.0, 1.0]))
    assert coef_K.tolist() == [0.25, 0.5, 0.25, 0.0]
    expected = k_backwards(model, parts, dtype=torch.bfloat16)
    found, exact = taps.jacobian(coef_K), k_backwards(model, parts)
    assert distance(found, expected) < 2**-8 < distance(expected, exact)  # slices of a task are rounded each


def test_blocks_in_bfloat16():
    model, parts = lora(), batches()
    taps, coef_K, _ = captured(model, parts, dtype=None)
    half, _, _ = captured(model, parts, taps=TaskGradients(model, K, isolated=True, dtype=torch.bfloat16))
    found = half.jacobian(coef_K)
    assert {block.dtype for block in found.values()} == {torch.bfloat16}
    assert distance(found, {name: block.clone() for name, block in taps.jacobian(coef_K).items()}) < 1e-2


@pytest.mark.parametrize("make", [lora, lambda: lora(lora_dropout=0.2).train(), lambda: checkpointed(False)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_measuring_leaves_the_step_bit_equal(make, dtype):
    model, parts = make(), batches()
    _, _, watched = captured(model, parts, dtype=dtype)

    class Nothing:
        def __enter__(self): ...
        def __exit__(self, *_): ...
        def begin(self, *_, **__): ...
        def watch(self, loss):
            return loss

    _, _, plain = captured(model, parts, dtype=dtype, taps=Nothing())
    assert watched.keys() == plain.keys()
    assert all(torch.equal(watched[name], plain[name]) for name in plain)


class Twice(nn.Module):
    """One weight in two layers, and one layer used twice in a forward; a third is not used at all."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.unused = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.two.weight = self.one.weight

    def forward(self, x_BTD):
        return self.one(torch.tanh(self.two(torch.tanh(self.one(x_BTD)))))


def test_weight_that_is_used_several_times():
    torch.manual_seed(0)
    model, task_BT = Twice(), torch.tensor([[0, 0, 1], [2, 1, -1]])
    x_BTD, c_BT = torch.randn(2, 3, 6), torch.tensor([[0.2, 0.3, 0.1], [0.4, 0.5, 0.0]])
    taps = TaskGradients(model, 3, isolated=True)
    taps.self_check()
    with taps:
        taps.begin(task_BT)
        (c_BT * model(x_BTD).square().sum(-1)).sum().backward()
    assert taps.check()
    J = taps.jacobian(torch.ones(3))
    for k in range(3):
        loss = (c_BT * model(x_BTD).square().sum(-1))[task_BT == k].sum()
        torch.testing.assert_close(J["one.weight"][k], torch.autograd.grad(loss, model.one.weight)[0])
    assert list(J) == ["one.weight", "unused.weight"]
    assert not J["unused.weight"].any()


def test_what_the_engine_multiplies_is_divided_out():
    model, parts = lora(), batches()
    taps, coef_K, _ = captured(model, parts, scale=2.0**10)
    assert taps.factor == 2.0**10
    assert distance(taps.jacobian(coef_K), k_backwards(model, parts)) < 1e-5


def test_gram_and_absent_tasks():
    model, parts = lora(), batches()
    taps, coef_K, _ = captured(model, parts)
    G_KK = taps.gram(coef_K)
    expected = gram(k_backwards(model, parts))
    assert G_KK.dtype == expected.dtype == torch.float64
    assert G_KK[3].isnan().all()
    assert G_KK[:, 3].isnan().all()
    torch.testing.assert_close(G_KK[:3, :3], expected[:3, :3], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(gram(taps.jacobian(coef_K))[:3, :3], G_KK[:3, :3], rtol=1e-6, atol=1e-12)


def test_a_task_of_weight_0_is_absent():
    taps, coef_K, _ = captured(lora(), batches(), w_K=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    found = taps.gram(coef_K)
    assert found[1].isnan().all()
    assert found[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["two micro-batches", "one"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gram_only_drops_blocks_and_finds_the_same(rows, reentrant):
    model, parts = lora() if reentrant is None else checkpointed(reentrant), batches(rows)
    taps, coef_K, _ = captured(model, parts)
    expected = taps.gram(coef_K)
    lean = TaskGradients(model, K, isolated=True, gram_only=True)
    for step in range(3):  # in the first micro-batch it learns how often each layer is used
        captured(model, parts, taps=lean)
        assert (len(lean._blocks._blocks) == 0) == (step > 0 or len(parts) > 1)
        assert torch.equal(lean.gram(coef_K).nan_to_num(), expected.nan_to_num())
        assert not lean._blocks._blocks
    with pytest.raises(ValueError, match="gram_only"):
        lean.jacobian(coef_K)


def test_gram_only_notices_a_layer_that_is_used_more_often_than_before():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False)
    lean = TaskGradients(layer, 2, isolated=True, gram_only=True)
    x_BTD, task_BT = torch.randn(1, 2, 4), torch.tensor([[0, 1]])
    with lean:
        lean.begin(task_BT, last=True)
        layer(x_BTD).sum().backward()
    with lean:
        lean.begin(task_BT, last=True)
        loss = layer(layer(x_BTD)).sum()
        with pytest.raises(RuntimeError, match="more often"):
            loss.backward()


class Held(nn.Module):
    """Layers of a wide input each; what a checkpointed segment holds between forward and backward can be counted."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(
                lambda x, layer=layer: torch.tanh(layer(x * 1.5)), x, use_reentrant=False
            )
        return x


def held_megabytes(taps, model):
    """float32 tensors of the activations' size that are alive after the forward."""
    x_BTD, task_BT = torch.randn(4, 256, 64, requires_grad=True), torch.zeros(4, 256, dtype=torch.long)
    with taps:
        taps.begin(task_BT)
        out = model(x_BTD)
        gc.collect()
        alive = {
            thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
            for thing in gc.get_objects()
            if type(thing) is torch.Tensor and thing.shape == x_BTD.shape
        }
        out.sum().backward()
    return sum(alive.values()) / 2**20


def test_checkpointing_still_lets_the_activations_go():
    """save_for_backward beside a closure over x, which is as exact and holds every layer's input."""
    torch.manual_seed(0)
    model = Held()
    taps = TaskGradients(model, 1, isolated=True)

    class Closure(TaskGradients):
        def _tap(self, name, module, args, out):
            x, order = args[0].detach(), next(iter(self._orders.values()))
            if not out.requires_grad:
                return None
            out.register_hook(lambda delta: self._add(name, order, delta, x))
            return out

    ours, closure = held_megabytes(taps, model), held_megabytes(Closure(model, 1, isolated=True), model)
    one = 4 * 256 * 64 * 4 / 2**20
    assert closure >= ours + 5 * one
    assert ours <= 9 * one  # the segments' inputs, and the output


# ---- refusals


def left_out(**changes):
    with pytest.raises(UserError) as caught:
        TaskGradients(lora(**changes), K, isolated=True)
    return caught.value


REFUSED = {
    "DoRA": (lambda: lora(use_dora=True), "DoraLinearVariant"),
    "LoRA on embeddings": (lambda: lora(target_modules=["q_proj", "embed_tokens"]), "embed_tokens.lora_embedding_A"),
    "LoRA on parameters": (
        lambda: lora(target_modules=["q_proj"], target_parameters=["mlp.gate_proj.weight"]),
        "ParamWrapper",
    ),
    "biases": (lambda: lora(base(attention_bias=True), bias="all"), "the bias of a linear layer"),
    "norms": (lambda: lora(target_modules=["q_proj"], modules_to_save=["norm"]), "LlamaRMSNorm"),
    "embeddings": (base, "Embedding"),
    "tied head": (lambda: base(tie_word_embeddings=True), "Embedding"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_captured_is_listed(what):
    make, named = REFUSED[what]
    model = make()
    with pytest.raises(UserError, match="can't be captured") as caught:
        TaskGradients(model, K, isolated=True)
    assert named in caught.value.what
    if what != "DoRA":  # nothing is left there
        assert "partial" in caught.value.do
        taps = TaskGradients(model, K, isolated=True, partial=True)
        assert taps.left_out
        assert set(taps.covered) | set(taps.left_out) == set(trained(model))


def test_fused_experts_are_refused():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=31, num_key_value_heads=1, num_local_experts=2, **sizes))
    with pytest.raises(UserError, match="MixtralExperts"):
        TaskGradients(model, K, isolated=True)


class Routed(nn.Module):
    """A mixture of experts of the old kind: a list of linear layers, each for some of the tokens."""

    def __init__(self):
        super().__init__()
        self.inner, self.experts = nn.Linear(4, 4, bias=False), nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in "ab")


def test_experts_in_a_list_are_refused():
    taps = TaskGradients(Routed(), K, isolated=True, partial=True)
    assert taps.covered == ("inner.weight",)
    assert all("routed" in reason for reason in taps.left_out.values())


@pytest.mark.parametrize("shape", [(3, 4), (4, 2, 4), (2, 2, 2, 4)], ids=["too few", "T before B", "heads"])
def test_layer_whose_rows_are_not_the_tokens_is_named(shape):
    layer = nn.Linear(4, 4, bias=False)
    taps = TaskGradients(nn.Sequential(layer), K, isolated=True)
    with taps:
        taps.begin(torch.zeros(2, 4, dtype=torch.long))
        with pytest.raises(UserError, match=r"0\.weight: its layer sees rows of shape"):
            layer(torch.randn(shape))
        for fine in ((2, 4, 4), (8, 4), (1, 8, 4)):
            layer(torch.randn(fine))


def test_rows_of_several_tasks_need_proven_isolation():
    model, parts = lora(), batches()
    taps = TaskGradients(model, K, isolated=False)
    with pytest.raises(UserError, match="several tasks"):
        taps.begin(parts[0].task_ids_BT)
    unpacked = batches(UNPACKED)
    taps, coef_K, _ = captured(model, unpacked, isolated=False)
    assert distance(taps.jacobian(coef_K), k_backwards(model, unpacked)) < 1e-5


def test_crossing_attention_would_be_wrong():
    """Why isolation is asked for: with an all-ones mask a row's examples see each other, and no sum shows it."""
    model, batch = lora(), batches(ROWS[:1])[0]
    inputs = {"input_ids": batch.input_ids_BT, "attention_mask": torch.ones_like(batch.input_ids_BT)}
    taps = TaskGradients(model, K, isolated=True)  # a lie
    taps.self_check()
    with taps:
        taps.begin(batch.task_ids_BT, batch.labels_BT != IGNORE)
        token_nll(model, batch, inputs=inputs).sum().backward()
    assert taps.check()
    J = taps.jacobian(torch.ones(K))
    expected = {name: torch.zeros_like(block) for name, block in J.items()}
    for k in range(K):
        loss = token_nll(model, batch, inputs=inputs)[batch.task_ids_BT == k].sum()
        found = torch.autograd.grad(loss, list(trained(model).values()))
        for name, gradient in zip(trained(model), found, strict=True):
            expected[name][k] = gradient
    assert distance(J, expected) > 0.05


class Aside(nn.Module):
    """A weight that is used in its layer's forward, and once more beside it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.layer(x) + x @ self.layer.weight


def test_self_check_finds_a_weight_that_is_used_elsewhere():
    torch.manual_seed(0)
    model = Aside()
    taps = TaskGradients(model, 2, isolated=True)
    taps.self_check()
    with taps:
        taps.begin(torch.tensor([[0, 1]]))
        model(torch.randn(1, 2, 4)).sum().backward()
    with pytest.raises(UserError, match="do not add up"):
        taps.check()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_self_check_passes_on_real_steps(dtype):
    model, parts = lora(lora_dropout=0.1).train(), batches()
    taps = TaskGradients(model, K, isolated=True)
    check = taps.self_check()
    captured(model, parts, taps=taps, dtype=dtype)
    assert taps.check()
    assert check.worst < (1e-5 if dtype is None else 1e-2)
    assert not taps.check(), "it is done once"


def test_misuse_is_named():
    model, parts = lora(), batches()
    taps = TaskGradients(model, K, isolated=True)
    with taps, pytest.raises(ValueError, match="begin"):
        token_nll(model, parts[0])
    with pytest.raises(ValueError, match="nothing was captured"):
        taps.gram(WEIGHTS)
    with pytest.raises(ValueError, match="task ids"):
        taps.begin(torch.full((1, 3), K))
    taps, coef_K, _ = captured(model, parts)
    with pytest.raises(ValueError, match="shape"):
        taps.gram(coef_K[:2])
    taps.jacobian(coef_K)
    with pytest.raises(ValueError, match="handed over"):
        taps.jacobian(coef_K)


def test_order_of_tokens():
    assert order_by_task(torch.tensor([[0, 0, 2], [2, -1, 1]]), 3) == (6, None, [(0, 0, 2), (2, 2, 4), (1, 5, 6)])
    mixed = torch.tensor(list(itertools.islice(itertools.cycle([2, 0, -1, 1]), 40)))
    rows, index_N, parts = order_by_task(mixed, 3)
    assert rows == 40
    assert parts == [(0, 0, 10), (1, 10, 20), (2, 20, 30)]
    assert mixed[index_N].tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert order_by_task(torch.zeros(0, dtype=torch.long), 3) == (0, None, [])
