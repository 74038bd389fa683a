"""rank_pattern and alpha_pattern mean what they mean to PEFT, and take no time."""

import random
import re

import pytest
from peft.utils.other import get_pattern_key

from mtft.adapters.module_patterns import ModulePatterns, refuse_endless

SANE = [
    "q_proj",
    "layers.1.q_proj",
    "model.layers.0.self_attn.q_proj",
    "model",
    r".*\.layers\.[0-9]+\.q_proj",
    r"layers\.(0|1)\.self_attn\.(q|k)_proj",
    r"^model\.layers\.\d+\.mlp\.up_proj",
    r"(q|v)_proj",
    r"(?:model\.)?layers\.1\.mlp\.\w+",
    r".*_proj",
    "",
    "[0-9]",
]
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
MODULES = [f"model.layers.{n}.{part}" for n in range(3) for part in PARTS]
MODULES += ["lm_head", "q_proj", "model", "xq_proj", "7"]


def test_as_peft_has_it():
    rng = random.Random(0)
    for _ in range(300):
        keys = rng.sample(SANE, rng.randint(1, 5))
        numbers = {key: place + 1 for place, key in enumerate(keys)}
        patterns = ModulePatterns(numbers)
        for module in MODULES:
            assert patterns.first(module, 0) == numbers.get(get_pattern_key(keys, module), 0), (keys, module)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+", "(a*)*", "(a|aa)+", "(.*a){20}", "((a?b|c)x)*", ".*.*.*.*.*x", "(?:x+y){1,9}", r"(\d+\.)+x"),
        *("(", "[", "a**", "(" * 3000, "a" * 5000),
    ],
)
def test_what_could_take_for_ever_is_refused(pattern):
    with pytest.raises(ValueError, match=r"for ever|not a regular expression|characters"):
        refuse_endless(pattern)


@pytest.mark.parametrize("pattern", [*SANE, r"a\+\*\(b", "[+*(]x", "(a+)?", "(a|b)c", "a{2}"])
def test_what_is_harmless_is_not(pattern):
    assert refuse_endless(pattern) == pattern
    re.match(rf"(.*\.)?({pattern})$", "a" * 40 + "." + "a" * 40 + "!")  # comes to an end


def test_many_names_are_looked_up():
    names = {f"model.layers.{n}.experts.{e}.up_proj": n + e + 1 for n in range(50) for e in range(200)}
    patterns = ModulePatterns(names)
    assert [patterns.first(name, 0) for name in names] == list(names.values())
    with pytest.raises(ValueError, match="expressions"):
        ModulePatterns({f"x{n}.*": 1 for n in range(5000)})
