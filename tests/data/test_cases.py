"""Small files that tools get wrong without a word (tests/data/cases), on stock templates: what is right for each."""

import json
from pathlib import Path

import pytest

from mtft.common.errors import UserError
from mtft.data.store.token_store import TokenStore, open_store
from mtft.data.tokenize.encode import runs
from mtft.recipe.schema.task import TaskSection
from tests.data.tokenize.stock import STOCK, stock
from tests.data.toy_examples import tokenizer

CASES = Path(__file__).parent / "cases"
CHATML = ("qwen2_5", "qwen3", "llama3", "lfm2")


class Learnt:
    """What became of a file: whole texts, learnt parts, ids, notes."""

    def __init__(self, store: TokenStore, made) -> None:
        self.store = store
        parts = [runs(made, store.example(i)) for i in range(len(store))]
        self.texts = ["".join(part for part, _ in example) for example in parts]
        self.learnt = ["".join(part for part, learnt in example if learnt) for example in parts]
        self.warnings = "\n".join(store.warnings())


def read(folder: Path, file: str | Path, made, **options) -> Learnt:
    task = TaskSection(name="t", data=str(CASES / file), **options)
    return Learnt(open_store(task, "train", made, max_length=2000, cache_dir=folder / "cache"), made)


def refusal(folder: Path, file: str | Path, made, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, file, made, **options)
    return str(caught.value)


def other_files(folder: Path, name: str) -> list[Path]:
    """The rows of a JSONL case as Parquet and as a saved dataset too."""
    from datasets import Dataset

    rows = [json.loads(line) for line in (CASES / name).read_text().splitlines()]
    columns = dict.fromkeys(column for row in rows for column in row)
    dataset = Dataset.from_list([{column: row.get(column) for column in columns} for row in rows])
    dataset.to_parquet(folder / "rows.parquet")
    dataset.save_to_disk(folder / "saved")
    return [CASES / name, folder / "rows.parquet", folder / "saved"]


@pytest.mark.parametrize("name", ["turn-weight-zero.jsonl", "turn-train-false.jsonl"])
@pytest.mark.parametrize("template", [*CHATML, "gptoss", "deepseekv3", "gemma"])
def test_a_turn_of_weight_zero_is_context(tmp_path, name, template):
    found = read(tmp_path, name, stock(template))
    assert all("WRONG" in text for text in found.texts)
    assert all("RIGHT" in part and "WRONG" not in part for part in found.learnt)
    assert len(found.texts) == 2


@pytest.mark.parametrize("template", STOCK)
def test_a_developer_message_takes_the_place_of_the_system(tmp_path, template):
    found = read(tmp_path, "developer-role.jsonl", stock(template))
    assert all("Answer in rhymes only." in text for text in found.texts)
    assert all("rhymes" not in part and "My, oh my" in part for part in found.learnt)


@pytest.mark.parametrize(
    "template", ["phi3", "phi3_5", "gemma", "deepseekv3", "deepseek_r1_distill", "qwen3", "llama3"]
)
def test_a_tool_result_is_shown_or_refused(tmp_path, template):
    if template in ("phi3", "phi3_5"):
        said = refusal(tmp_path, "tool-role-plain.jsonl", stock(template))
        assert "tool-role-plain.jsonl:1: the chat template shows nothing of message 3 (tool): 'SUNNY17'" in said
    elif template == "gemma":
        assert "message 3 (tool)" in refusal(tmp_path, "tool-role-plain.jsonl", stock(template))
    else:
        found = read(tmp_path, "tool-role-plain.jsonl", stock(template))
        assert any("SUNNY17" in text for text in found.texts)
        assert "SUNNY17" not in "".join(found.learnt)


@pytest.mark.parametrize("template", ["phi3", "phi3_5"])
def test_a_short_text_is_missed_too(tmp_path, template):
    """An "a" stands somewhere in any rendering; that the tool's message is left out shows by a marker in its place."""
    turns = [("user", "a"), ("assistant", "a"), ("tool", "a"), ("assistant", "a")]
    rows = json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
    (tmp_path / "rows.jsonl").write_text(rows)
    assert "nothing of message 3 (tool): 'a'" in refusal(tmp_path, tmp_path / "rows.jsonl", stock(template))


@pytest.mark.parametrize("template", ["gptoss", "qwen3_vl", "qwen3", "qwen2_5"])
def test_a_system_message_in_the_middle_is_shown_or_refused(tmp_path, template):
    if template in ("gptoss", "qwen3_vl"):
        said = refusal(tmp_path, "system-in-the-middle.jsonl", stock(template))
        assert "shows nothing of message 3 (system): 'MIDDLE'" in said
    else:
        assert any("MIDDLE" in text for text in read(tmp_path, "system-in-the-middle.jsonl", stock(template)).texts)


@pytest.mark.parametrize("template", STOCK)
def test_an_empty_list_of_calls_is_none(tmp_path, template):
    found = read(tmp_path, "empty-tool-calls.jsonl", stock(template))
    assert len(found.texts) == 2
    assert all("ANSWER" in part for part in found.learnt)


@pytest.mark.parametrize("template", ["llama3_1", "llama3_2", "muse_glimmer", "qwen3", "qwen2_5", "nemotron_3_nano"])
def test_the_text_beside_a_call_is_learnt_or_refused(tmp_path, template):
    if template in ("llama3_1", "llama3_2", "muse_glimmer"):
        said = refusal(tmp_path, "text-beside-a-call.jsonl", stock(template))
        assert "shows nothing of message 2 (assistant): 'I look it up.'" in said
    else:
        learnt = "".join(read(tmp_path, "text-beside-a-call.jsonl", stock(template)).learnt)
        assert learnt.count("I look it up.") == learnt.count("Go to Rimini.") == 2


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "nemotron_3_nano", "lfm2_v2", "deepseekv3"])
def test_the_first_spelling_of_function_calls(tmp_path, template):
    found = read(tmp_path, "legacy-function-call.jsonl", stock(template))
    learnt = "".join(found.learnt)
    assert learnt.count("calling") == 1
    assert learnt.count("f") >= 2
    assert any("R" in text for text in found.texts)
    assert sum("A" in part for part in found.learnt) >= 2
    call = {"qwen2_5": '{"name": "f", "arguments": {"a": 1}}', "deepseekv3": 'f\\n```json\\n{"a": 1}'}.get(
        template, "f"
    )
    assert learnt.count(call.encode().decode("unicode_escape")) >= 2


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3_1"])
def test_calls_of_sharegpt_are_calls(tmp_path, template):
    found = read(tmp_path, "sharegpt-function-call.jsonl", stock(template))
    called = {"llama3_1": '{"name": "get_news", "parameters": {"country": "IT"}}'}
    qwen = '<tool_call>\n{"name": "get_news", "arguments": {"country": "IT"}}\n</tool_call>'
    learnt = "".join(found.learnt)
    assert learnt.count(called.get(template, qwen)) == learnt.count("None today.") == 2
    assert "headlines" not in learnt
    assert all('"country"' in text for text in found.texts)  # the tools are shown


@pytest.mark.parametrize("template", ["deepseek_r1_distill", "deepseekv3", "qwen3", "gptoss", "nemotron_3_nano"])
def test_thinking_inside_an_answer_is_learnt(tmp_path, template):
    learnt = read(tmp_path, "thinking-inline.jsonl", stock(template)).learnt
    assert len(learnt) == 2
    for part in learnt:
        assert part.count("I add two and two.") == part.count("It is 4.") == 1
        assert part.index("I add two and two.") < part.index("It is 4.")
        if template == "gptoss":  # it has a place of its own for thinking
            assert "<|channel|>analysis<|message|>I add two and two.<|end|>" in part
            assert "<think>" not in part


@pytest.mark.parametrize("template", ["gptoss", "deepseekv3", "qwen3"])
def test_turns_that_rewrite_earlier_ones_are_examples_of_their_own(tmp_path, template):
    learnt = read(tmp_path, "thinking-then-call-then-answer.jsonl", stock(template)).learnt
    for word in ("FIRST", "SECOND", "Go to Rimini."):
        assert "".join(learnt).count(word) == 2, word
    learnt = "".join(read(tmp_path, "two-calls-in-a-row.jsonl", stock(template)).learnt)
    assert learnt.count("beach") == learnt.count("Go to Rimini.") == 2
    assert "R1" not in learnt


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "nemotron_3_nano", "gptoss"])
def test_nulls_of_arrow_are_no_arguments(tmp_path, template):
    made = stock(template)
    found = [read(tmp_path, file, made) for file in other_files(tmp_path, "two-tools-other-arguments.jsonl")]
    for one in found:
        assert one.texts == found[0].texts
        assert one.learnt == found[0].learnt
        assert "null" not in "".join(one.texts)
        assert "None" not in "".join(one.texts)
        assert "Rome" in one.learnt[0]


@pytest.mark.parametrize("template", [*CHATML, "gemma"])
def test_a_column_counts_wherever_it_begins(tmp_path, template):
    made = stock(template)
    for file in other_files(tmp_path, "late-system-column.jsonl"):
        texts = read(tmp_path, file, made).texts
        said = [
            json.loads(line).get("system") for line in (CASES / "late-system-column.jsonl").read_text().splitlines()
        ]
        assert sum(map(bool, said)) == 60
        assert all(not system or system in text for text, system in zip(texts, said, strict=True))


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3_1"])
def test_tools_count_wherever_they_begin(tmp_path, template):
    for file in other_files(tmp_path, "late-tools-column.jsonl"):
        rows = [json.loads(line) for line in (CASES / "late-tools-column.jsonl").read_text().splitlines()]
        texts = read(tmp_path, file, stock(template)).texts
        with_tools = [row for row in rows if row.get("tools")]
        assert 0 < len(with_tools) < len(rows)
        for row, text in zip(rows, texts, strict=True):
            for tool in row.get("tools") or ():
                assert tool["function"]["description"] in text


@pytest.mark.parametrize("template", CHATML)
def test_a_history_is_earlier_turns(tmp_path, template):
    found = read(tmp_path, "history-column.jsonl", stock(template))
    for word in ("first", "second", "third"):
        assert any(word in text for text in found.texts)
        assert word not in "".join(found.learnt)
    assert all("".join(found.learnt).count(answer) == 2 for answer in ("O1", "O2", "O3"))


@pytest.mark.parametrize("template", CHATML)
def test_pictures_are_refused(tmp_path, template):
    said = refusal(tmp_path, "images-column.jsonl", stock(template))
    assert "images-column.jsonl:1: column 'images': is not read, and would change what is learnt: only text" in said
    # whoever names the columns leaves the others out on purpose
    found = read(tmp_path, "images-column.jsonl", stock(template), format={"messages": "messages"})
    assert "column images (2 of 2 rows) is not read" in found.warnings


def test_an_optional_column_that_no_row_has_is_refused(tmp_path):
    """A misspelt system column would be left out in silence."""
    made, columns = tokenizer(), {"prompt": "prompt", "response": "response"}
    said = refusal(tmp_path, "late-system-column.jsonl", made, format={**columns, "system": "sistem"})
    assert "no row has the column 'sistem'" in said
    assert "did you mean 'system'?" in said
    found = read(tmp_path, "late-system-column.jsonl", made, format={**columns, "system": "system"})
    assert sum("SYS" in text for text in found.texts) == 60


def test_a_column_that_nobody_reads_is_named_once(tmp_path):
    found = read(tmp_path, "score-beside-text.jsonl", tokenizer())
    assert found.warnings.count("column score (2 of 2 rows) is not read") == 1


@pytest.mark.parametrize("adds_bos", [False, True])
def test_text_has_one_bos_and_one_eos(tmp_path, adds_bos):
    made = tokenizer(adds_bos=adds_bos)
    text = (CASES / "text-with-bos-and-eos.jsonl").read_text()
    path = tmp_path / "rows.jsonl"
    path.write_text(text.replace("<s>", made.bos_token).replace("</s>", made.eos_token))
    found = read(tmp_path, path, made, format="text")
    assert found.texts == [f"{made.bos_token}the quick brown fox{made.eos_token}"] * 2


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "gptoss"])
def test_repeated_ids_are_told_apart(tmp_path, template):
    found = read(tmp_path, "repeated-ids.jsonl", stock(template))
    ids = list(found.store.ids)
    assert len(set(ids)) == len(ids)
    assert ids[0] == "conv-1"
    assert ids[-1] == "repeated-ids.jsonl:2"
    assert "'conv-1' at repeated-ids.jsonl:1 and repeated-ids.jsonl:2" in found.warnings
    assert found.store.row_numbers.tolist() == ([0, 1] if template == "qwen2_5" else [0, 0, 1])


def test_a_key_or_a_column_that_stands_twice_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    made = tokenizer()
    assert "one-key-twice.jsonl:1: JSON that cannot be read: the key 'response' stands twice" in refusal(
        tmp_path, "one-key-twice.jsonl", made
    )
    lines = (CASES / "one-key-twice.jsonl").read_text().splitlines()
    (tmp_path / "rows.json").write_text(f"[{lines[0]},\n{lines[1]}]")
    assert "rows.json:1: broken JSON: the key 'response' stands twice" in refusal(
        tmp_path, tmp_path / "rows.json", made
    )
    assert "one-column-twice.csv:1: two columns are called 'response'" in refusal(
        tmp_path, "one-column-twice.csv", made
    )
    columns = [pyarrow.array([text]) for text in ("Q", "GOOD", "BAD")]
    twice = pyarrow.Table.from_arrays(columns, names=["prompt", "response", "response"])
    pyarrow.parquet.write_table(twice, tmp_path / "rows.parquet")
    assert "two columns are called 'response'" in refusal(tmp_path, tmp_path / "rows.parquet", made)


def test_every_case_has_a_test():
    own = Path(__file__).read_text()
    elsewhere = {"prompts-with-line-separators", "prompts-with-bom", "prompt-with-half-a-surrogate"}
    assert {path.stem for path in CASES.iterdir() if path.stem not in own} <= elsewhere
