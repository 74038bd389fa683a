"""Calls against the schema that the row offers (jsonschema), and against what the words of the wish say."""

import re

import jsonschema

MEANT = {
    "get_weather": r"weather|warm|coat",
    "convert_money": r"[A-Z]{3}\b.* [A-Z]{3}\b",
    "set_alarm": r"Wake|Alarm|ring",
    "set_light": r"percent",
    "book_table": r"table|Dinner|hungry",
    "start_timer": r"minutes",
}


def tool_call(row):
    wish, answer = row["messages"]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row["tools"]}
    assert len(schemas) == 3
    (meant,) = (name for name, words in MEANT.items() if re.search(words, wish["content"]))
    if meant not in schemas:
        assert answer == {"role": "assistant", "content": "None of the tools can do that."}
        return
    (call,) = answer["tool_calls"]
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    assert name == meant
    jsonschema.Draft202012Validator.check_schema(schemas[name])
    jsonschema.validate(arguments, schemas[name])
    # Every number, name and code of the wish is an argument, and every argument stands in it.
    said = set(re.findall(r"\d\d:\d\d|\b\d+\b", wish["content"]))
    assert {str(value) for value in arguments.values() if re.match(r"\d", str(value))} == said
    assert all(re.search(rf"\b{value}\b", wish["content"]) for value in arguments.values())
    if name == "convert_money":
        assert re.findall(r"EUR|USD|GBP|JPY|CHF|SEK", wish["content"]) == [arguments["source"], arguments["target"]]


ORACLES = {"tool_call": tool_call}
