"""Small models and batches of several tasks, and the K task gradients in the plain way: K forwards and backwards."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mtft.data.batching.batch import IGNORE
from mtft.data.batching.batches import collate
from mtft.data.tokenize.encode import Example
from mtft.gradients.capture.task_gradients import TaskGradients
from mtft.losses.task_reduction import coefficients, step_counts, task_coefficients
from mtft.losses.token_nll import token_nll

VOCABULARY, K = 61, 4
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
# task and length of every example, row by row, of two micro-batches; task 3 is absent
ROWS = [[[(0, 9), (1, 7), (0, 5)], [(2, 12), (1, 6)]], [[(1, 11)], [(2, 4), (0, 8), (2, 5)]]]


def base(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def lora(model=None, seed=0, **changes):
    """LoRA whose B is not zero, so that every factor has a gradient."""
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    torch.manual_seed(seed)
    return get_peft_model(base() if model is None else model, LoraConfig(**(settings | changes)))


def batches(rows=ROWS, seed=0):
    """One Batch a micro-batch; the first two tokens of an example are its prompt."""
    rng = np.random.default_rng(seed)

    def example(task, length):
        return Example(rng.integers(3, VOCABULARY, length).astype(np.int32), np.arange(length) > 1), task

    return [collate([[example(*of) for of in row] for row in part], 0) for part in rows]


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def captured(
    model, parts, *, w_K=WEIGHTS, normalise="task_token", dtype=None, seed=5, scale=1.0, path="gather", **options
):
    """(the taps after the step, coefficients of the tasks, gradients that the step itself left in .grad)."""
    counts = step_counts(parts, K)
    taps = options.pop("taps", None) or TaskGradients(model, K, **({"isolated": True} | options))
    model.zero_grad()
    torch.manual_seed(seed)
    with taps:
        for index, batch in enumerate(parts):
            taps.begin(batch.task_ids_BT, batch.labels_BT != IGNORE, last=index == len(parts) - 1)
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                nll_BT = token_nll(model, batch, path=path)
            loss = taps.watch((coefficients(batch, counts, w_K, normalise) * nll_BT).sum())
            (scale * loss).backward()
    own = {name: parameter.grad.clone() for name, parameter in trained(model).items() if parameter.grad is not None}
    return taps, task_coefficients(counts, w_K, normalise), own


def k_backwards(model, parts, *, normalise="task_token", dtype=None, seed=5):
    """{parameter: [K, *shape]}, task by task: only its own tokens count. Absent: zeros."""
    counts = step_counts(parts, K)
    J = {name: torch.zeros(K, *parameter.shape) for name, parameter in trained(model).items()}
    for k in range(K):
        if counts.tokens_K[k] == 0:
            continue
        alone_K = torch.nn.functional.one_hot(torch.tensor(k), K).double()
        model.zero_grad()
        torch.manual_seed(seed)
        for batch in parts:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                nll_BT = token_nll(model, batch)
            (coefficients(batch, counts, alone_K, normalise) * nll_BT).sum().backward()
        for name, parameter in trained(model).items():
            if parameter.grad is not None:
                J[name][k] = parameter.grad
    model.zero_grad()
    return J


def distance(found, expected):
    """Largest relative difference |found_k - expected_k| / |expected_k| of a task, over all parameters together."""
    names = found.keys()
    off_K = sum((found[name].float() - expected[name]).flatten(1).square().sum(1) for name in names)
    size_K = sum(expected[name].flatten(1).square().sum(1) for name in names)
    assert bool((off_K[size_K == 0] == 0).all()), "an absent task has a gradient"
    return float((off_K[size_K > 0] / size_K[size_K > 0]).max().sqrt())
