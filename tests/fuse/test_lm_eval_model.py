"""Two of lm-eval's task types on a fused model, from local files; HFLM around the object gives the same numbers."""

import json

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.fused_model import FusedCausalLM
from mtft.fuse.lm_eval_model import FusedLM
from tests.fuse import tiny

CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
UNTIL = """
task: toy_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: " fox"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tiny.folders_with_text(tmp_path_factory.mktemp("lm_eval"))


@pytest.fixture(scope="module")
def fused(places):
    return FusedCausalLM.load(places["strong"], places["small"], [places["expert"]], dtype="fp32", device="cpu")


def requests():
    pairs = [
        ("the quick", " brown fox"),
        ("the quick", " dog"),
        ("over", " the lazy dog jumps"),
        ("", "fox"),
        ("a", "b"),
    ]
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_equal_to_hflm_around_the_object(fused, batch_size):
    """The harness's own code, right-padded without a mask and with a whole log-softmax."""
    ours = FusedLM(fused=fused, batch_size=batch_size)
    theirs = HFLM(pretrained=fused, tokenizer=fused.tokenizer, batch_size=2)
    for (a, greedy), (b, expected) in zip(
        ours.loglikelihood(requests()), theirs.loglikelihood(requests()), strict=True
    ):
        assert a == pytest.approx(b, abs=1e-4)
        assert greedy == expected
    rolling = [Instance("loglikelihood_rolling", {}, ("the quick brown fox jumps over the lazy dog " * 9,), 0)]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-3)


def test_generate_until(fused):
    arguments = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = ["the quick", "jumps over the lazy", "dog"]
    found = FusedLM(fused=fused, batch_size=2).generate_until(
        [Instance("generate_until", {}, (prompt, dict(arguments)), 0) for prompt in prompts]
    )
    for prompt, text in zip(prompts, found, strict=True):
        ids = fused.tokenizer(prompt, return_tensors="pt").input_ids
        out = fused.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert text == fused.tokenizer.decode(out, skip_special_tokens=True).split("\n")[0]


def test_two_task_types_from_local_files(fused, tmp_path):
    rows = [{"question": "the quick brown", "choices": [" fox", " dog"], "answer": i % 2} for i in range(4)]
    data = tmp_path / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "choice.yaml").write_text(CHOICE.format(data=data))
    (tmp_path / "until.yaml").write_text(UNTIL.format(data=data))
    results = simple_evaluate(
        model=FusedLM(fused=fused, batch_size=8),
        tasks=["toy_choice", "toy_until"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    assert results["toy_choice"]["acc,none"] == 0.5  # the same question, the answers half and half
    assert results["toy_until"]["exact_match,none"] in (0.0, 1.0)


def test_by_name_with_model_args(places, fused):
    from lm_eval.api.registry import get_model

    arguments = f"strong={places['strong']},base={places['small']},adapter={places['expert']},alpha_rule=fixed,alpha=0"
    arguments += ",dtype=fp32"
    model = get_model("mtft_fused").create_from_arg_string(arguments, {"device": "cpu", "batch_size": "auto"})
    answer, _ = model.loglikelihood(requests()[:1])[0]
    ids = torch.tensor([model.tok_encode("the quick brown fox")])
    count = len(model.tok_encode(" brown fox", add_special_tokens=False))
    logits = fused.strong(ids).logits[0, :, : fused.vocab_size].log_softmax(-1)[:-1]
    expected = logits.gather(-1, ids[0, 1:, None])[-count:].sum()
    assert answer == pytest.approx(float(expected), abs=1e-4)


def test_missing_arguments():
    with pytest.raises(FusionError, match="needs strong, base and adapter"):
        FusedLM(strong="x")
