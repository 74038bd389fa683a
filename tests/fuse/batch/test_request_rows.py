"""Rows are read as training reads them, and no row, whatever it holds, ends a run."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mtft.cli import app
from mtft.fuse.batch import jsonl_commands
from mtft.fuse.batch.request_rows import read_requests
from mtft.fuse.from_recipe import load_fusion
from tests.fuse import tiny
from tests.fuse.batch.test_jsonl_commands import read, recipe_of

HALF = "\\ud83d"  # JSON's escape of the first half of a surrogate pair


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tiny.folders_with_text(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def fused(places, tmp_path_factory):
    return load_fusion(recipe_of(places, tmp_path_factory.mktemp("out")))


@pytest.fixture
def ask(places, fused, tmp_path):
    recipe = recipe_of(places, tmp_path, max_new_tokens=2)

    def run(data, name="x.jsonl", kind=jsonl_commands.generate):
        source = tmp_path / name
        source.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
        done = kind(recipe, source, tmp_path / "y.jsonl", fused=fused, overwrite=True)
        return done, read(tmp_path / "y.jsonl")

    return run


@pytest.mark.parametrize("kind", [jsonl_commands.generate, jsonl_commands.score])
def test_separators_and_byte_order_marks(ask, kind):
    """prompts-with-line-separators, prompts-with-bom: U+2028, U+0085 and U+001C are no ends of lines."""
    rows = [{"id": "a", "prompt": f"first{mark}second", "response": "b"} for mark in "\u2028\u2029\u0085\x1c\x0b"]
    if kind is jsonl_commands.generate:
        rows = [{key: row[key] for key in ("id", "prompt")} for row in rows]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    done, answers = ask("\ufeff" + lines, kind=kind)
    assert (done.rows, done.failed) == (len(rows), 0)
    assert [answer["id"] for answer in answers] == ["a"] * len(rows)


def test_rows_that_were_torn_or_refused(ask):
    """Files as users had them: marks of Unicode inside of rows, and Windows' mark at the start of the file."""
    separators = (
        b'{"id": "a", "prompt": "first\xe2\x80\xa8second"}\n'
        b'{"id": "b", "prompt": "x\xe2\x80\xa9y"}\n{"id": "c", "prompt": "plain"}\n'
    )
    assert [row["id"] for row in ask(separators)[1]] == ["a", "b", "c"]
    assert ask(b'\xef\xbb\xbf{"id": "a", "prompt": "plain"}\n')[0].failed == 0
    surrogate = b'{"id": "ok", "prompt": "def f(x):"}\n{"id": "cut", "prompt": "cut emoji \\ud83d"}\n'
    done, answers = ask(surrogate)
    assert ("text" in answers[0], answers[1]["id"], answers[1]["line"]) == (True, "cut", 2)
    assert done.reasons == ("line 2: prompt is no Unicode text: half a surrogate pair at character 11",)


def test_broken_rows_by_line(ask):
    """Half a surrogate pair, and its kin: each fails with its line, the others are answered."""
    lines = {
        '{"id": "ok", "prompt": "def f(x):"}': None,
        f'{{"id": "cut", "prompt": "cut emoji {HALF}"}}': "half a surrogate pair at character 11",
        f'{{"id": "{HALF}", "prompt": "a"}}': "id is no Unicode text",
        '{"id": NaN, "prompt": "a"}': "id is nan",
        f'{{"prompt": "a", "alpha": 1{"0" * 400}}}': "alpha is a number of more than 64 bits",
        f'{{"prompt": "a", "expert_weights": [1{"0" * 400}]}}': "expert_weights[0] is a number",
        f'{{"messages": [{{"role": "user", "content": "{HALF}"}}]}}': "messages[0].content is no Unicode",
        f'{{"{HALF}": 1, "prompt": "a"}}': "a key of the row",
        '{"prompt": "a", "expert_weights": ["x"]}': "expert_weights",
        '{"prompt": "a", "seed": 1.5}': "seed is 1.5",
        "\xff": "UTF-8",
        "": None,
        '{"id": "end", "prompt": "b", "seed": null, "alpha": null, "messages": null}': None,
    }
    data = b"\n".join(line.encode("latin-1") for line in lines)
    done, answers = ask(data)
    assert done.failed == sum(message is not None for message in lines.values())
    failed = [answer for answer in answers if "error" in answer]
    wanted = [(at, message) for at, message in enumerate(lines.values(), 1) if message]
    for answer, (line, message) in zip(failed, wanted, strict=True):
        assert answer["line"] == line
        assert message.replace("the row", "the request") in answer["error"] or message in answer["error"]
    assert done.reasons[0] == f"line 2: {failed[0]['error']}"
    assert [answers[0]["id"], answers[-1]["id"]] == ["ok", "end"]


def test_kinds_of_files_give_the_same_rows(ask, tmp_path):
    rows = [{"id": "a", "prompt": "the quick", "max_tokens": 1}, {"id": "b", "prompt": "dog", "seed": 3}]
    _, expected = ask("".join(json.dumps(row) + "\n" for row in rows))
    assert ask(json.dumps(rows), "x.json")[1] == expected
    assert ask("id,prompt,max_tokens,seed\na,the quick,1,\nb,dog,,3\n", "x.csv")[1] == expected
    table = [{"id": "a", "prompt": "the quick", "max_tokens": 1, "seed": None} | row for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "t.parquet")
    found = ask((tmp_path / "t.parquet").read_bytes(), "x.parquet")[1]
    assert found[0] == expected[0]
    with pytest.raises(Exception, match="are not read"):
        ask("a", "x.docx")


def json_values():
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud83d") | st.just(10**400)
    return st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*jsonl_commands.SCORE, *jsonl_commands.GENERATE]), json_values(), max_size=5))
def test_no_row_ends_a_run(fused, tmp_path, row):
    """Any JSON under any key, beside a good row: it is answered, or fails by itself, and the output is JSON."""
    from mtft.fuse.batch.answers_file import AnswersFile
    from mtft.fuse.batch.jsonl_commands import Row, _prompt_and_response, _row_spec
    from mtft.fuse.batch.resumable_jsonl import run_buckets

    def prepare(index: int, row: Row) -> int:
        _prompt_and_response(fused, row)
        _row_spec(fused, row)
        return 1

    source = tmp_path / "x.jsonl"
    good = {"prompt": "a", "response": "b"}
    source.write_text(f"{json.dumps(row)}\n{json.dumps(good)}\n{json.dumps(good | row)}\n")
    jobs = read_requests(source, prepare)
    answers = AnswersFile(tmp_path / "y.jsonl")
    answers.claim("x")
    done = run_buckets(jobs, answers, {}, lambda rows: [{} for _ in rows], bucket=1)
    answers = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "y.jsonl").open()]
    assert done.rows == len(answers) == 3
    assert "error" not in answers[1]


def test_a_row_that_is_too_long_for_anything(ask):
    rows = ['{"prompt": "a"}', f'{{"prompt": "{"x" * (1 << 24)}"}}', '{"prompt": "b"}']
    done, answers = ask("\n".join(rows))
    assert (done.failed, answers[1]["line"]) == (1, 2)
    assert answers[1]["error"] == "the row has 16,777,230 characters: at most 16,777,216"


def test_unknown_keys_tell_the_known_ones_and_errors_stay_short(ask):
    long = "k" * 100_000
    done, answers = ask(f'{{"wish": 1, "prompt": "a"}}\n{{"{long}": 1}}\n{{"prompt": "a", "alpha": "{long}"}}\n')
    assert done.failed == 3
    assert answers[0]["error"].startswith("unknown key 'wish'; a row may have prompt, messages, id, max_tokens, seed")
    assert all(len(answer["error"]) < 600 for answer in answers)


def test_columns_that_are_not_read_are_told_with_those_that_are(ask):
    row = {f"column{i}": i for i in range(1000)} | {"prompt": "a", "response": "b"}
    with pytest.warns(UserWarning, match=r"column9 \(1 rows\) and 990 more; read are prompt, response"):
        ask(json.dumps(row), kind=jsonl_commands.score)


@pytest.mark.parametrize("name", ["recipe", "input", "data", "router", "weights"])
def test_the_output_is_no_file_of_the_recipe(places, tmp_path, name):
    """Refused before a model is loaded, whatever path leads there."""
    recipe = recipe_of(places, tmp_path).model_dump(mode="json", exclude_unset=True)
    recipe["tasks"] = [{"name": "x", "data": "sub*/x.jsonl"}, {"name": "y", "data": "quickstart:naming"}]
    recipe["fuse"] |= {"router": str(tmp_path / "router.safetensors"), "weights": "router"}
    (tmp_path / "sub").mkdir()
    files = {"recipe": "r.yaml", "input": "in.jsonl", "data": "sub/x.jsonl", "router": "router.safetensors"}
    for file in files.values():
        (tmp_path / file).write_text("{}\n")
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    out = places["strong"] / "model.safetensors" if name == "weights" else tmp_path / "sub" / ".." / files[name]
    before = out.read_bytes()
    command = ["fuse", "generate", str(tmp_path / "r.yaml"), "--in", str(tmp_path / "in.jsonl"), "--out", str(out)]
    result = CliRunner().invoke(app, [*command, "--overwrite"])
    assert "the output is an input" in str(result.exception)
    assert out.read_bytes() == before


@pytest.mark.parametrize("fault", [RuntimeError("out of memory"), ValueError("bad"), OverflowError("large")])
def test_a_row_that_fails_in_its_bucket(ask, fault, monkeypatch):
    real = jsonl_commands.generate_bucket

    def failing(model, rows, sampling):
        if any(row.get("id") == "bad" for row in rows):
            raise fault
        return real(model, rows, sampling)

    monkeypatch.setattr(jsonl_commands, "generate_bucket", failing)
    done, answers = ask('{"prompt": "a"}\n{"prompt": "a", "id": "bad"}\n{"prompt": "b"}\n')
    assert (done.failed, answers[1]["line"]) == (1, 2)
    assert str(fault) in answers[1]["error"]


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 5e-324])
def test_a_temperature_whose_inverse_overflows_is_greedy(fused, places, tmp_path, temperature):
    (tmp_path / "x.jsonl").write_text('{"prompt": "the quick", "max_tokens": 6}\n')
    answers = []
    for t in (0.0, temperature):
        recipe = recipe_of(places, tmp_path, temperature=t)
        jsonl_commands.generate(recipe, tmp_path / "x.jsonl", tmp_path / "y.jsonl", fused=fused, overwrite=True)
        answers.append(read(tmp_path / "y.jsonl")[0]["text"])
    ids = fused.tokenizer("the quick", return_tensors="pt").input_ids
    for speculative in (None, 2):
        call = {"do_sample": True, "temperature": temperature, "max_new_tokens": 6, "speculative": speculative}
        out = fused.generate(input_ids=ids, **call)[0, ids.shape[1] :]
        answers.append(fused.tokenizer.decode(out, skip_special_tokens=True))
    assert len(set(answers)) == 1


def test_the_command_says_the_first_reasons(places, tmp_path):
    recipe = recipe_of(places, tmp_path).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    (tmp_path / "x.jsonl").write_text('{"prompt": ""}\n{"promt": "a"}\n' + '{"prompt": ["x"]}\n' * 9)
    command = ["fuse", "generate", "r.yaml", "--in", "x.jsonl", "--out", "y.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "line 1: the prompt is empty" in result.stderr
    assert "did you mean 'prompt'" in result.stderr
    assert "and 6 more" in result.stderr
