"""Every place in mtft that reads weights goes through the loaders that refuse what is missing or unused, and every
size of a model is read from its text config: read from the source of all files, so that the next place is found.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "mtft"
# What reads or places weights by name, in transformers and PEFT.
LOADS = {
    *("from_pretrained", "load_adapter", "add_weighted_adapter", "load_peft_weights", "set_peft_model_state_dict"),
    *("load_checkpoint_and_dispatch", "load_checkpoint_in_model", "load_sharded_checkpoint", "load_state_dict_from"),
}
LOADERS = {
    "models/loading.py": {"from_pretrained"},  # checks the loading report of transformers
    "models/adapters.py": {"from_pretrained", "load_adapter"},  # the config; checks what PEFT could not place
}
# Free of mtft on purpose: it does what a user's script does, and compares the logits with the trained model's.
PROOF = "training/export/reload_check.py"

# Of a model that also sees or hears these stand in the config of its text part, not in its own.
SIZES = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "max_position_embeddings", "layer_types", "sliding_window", "rope_parameters"),
    *("rope_scaling", "num_experts", "num_local_experts", "n_routed_experts", "router_aux_loss_coef"),
    *("output_router_logits", "tie_word_embeddings", "num_experts_per_tok"),
}
# fused_model.py gives FusedCausalLM a config of its own, which has no parts.
OWN_CONFIGS = {"fuse/fusion_core.py": {"self.config"}}


def sources():
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sorted(ROOT.rglob("*.py"))}


def strangers(files):
    """(file, line, call) of each call by a name of LOADS that is neither a loader's own nor to one of our loaders."""
    found = []
    for name, text in files.items():
        if name == PROOF:
            continue
        tree = ast.parse(text)
        ours = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module in ("mtft.models.loading", "mtft.models.adapters")
            for alias in node.names
        }
        allowed = LOADERS.get(name, set())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            word = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
            mine = isinstance(called, ast.Name) and (word in ours or name in LOADERS)
            if word in LOADS and word not in allowed and not mine:
                found.append((name, node.lineno, ast.unparse(called)))
    return found


def direct_reads(files):
    """(file, line, expression) where a size is read from a config itself: `model.config.vocab_size` and the like."""
    found = []
    for name, text in files.items():
        tree = ast.parse(text)
        for node in ast.walk(tree):
            owner, key = None, None
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner, key = node.value, node.attr
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
                owner, key = node.args[0], getattr(node.args[1], "value", None)
            if owner is None or key not in SIZES:
                continue
            spelt = ast.unparse(owner)
            whole = spelt.rsplit(".", 1)[-1] == "config" and spelt not in OWN_CONFIGS.get(name, ())
            # `config = config.get_text_config()` before the line: the name stands for the text part then
            if whole and not any(first < node.lineno <= last for first, last in _renamed(tree, spelt)):
                found.append((name, node.lineno, f"{spelt}.{key}"))
    return found


def _renamed(tree, name):
    """(first, last line) of the part of each function in which `name` is a text config."""
    for function in ast.walk(tree):
        for node in getattr(function, "body", ()) if isinstance(function, ast.FunctionDef) else ():
            is_text = isinstance(node, ast.Assign) and ast.unparse(node).endswith(".get_text_config()")
            if is_text and ast.unparse(node.targets[0]) == name:
                yield node.lineno, function.end_lineno


def test_weights_are_read_by_the_loaders_only():
    assert strangers(sources()) == []


def test_sizes_are_read_from_the_text_config():
    assert direct_reads(sources()) == []


@pytest.mark.parametrize(
    "text",
    [
        "from peft import PeftModel\nPeftModel.from_pretrained(model, folder)",
        "AutoModelForCausalLM.from_pretrained(path)",
        "model.load_adapter(folder)",
        "from peft import set_peft_model_state_dict\nset_peft_model_state_dict(model, state)",
    ],
)
def test_a_new_place_is_found(text):
    assert len(strangers({"fuse/new.py": text})) == 1
    assert (
        strangers({"fuse/new.py": "from mtft.models.adapters import load_adapter\nload_adapter(model, folder)"}) == []
    )


@pytest.mark.parametrize("text", ["model.config.vocab_size", "getattr(config, 'num_experts', 0)", "config.hidden_size"])
def test_a_direct_read_is_found(text):
    assert len(direct_reads({"fuse/new.py": text})) == 1
    assert direct_reads({"fuse/new.py": "model.config.get_text_config().vocab_size"}) == []
