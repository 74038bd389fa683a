"""All chat templates that trl ships, with random conversations: each is shown whole, or refused with its message."""

import random
import re

import pytest

from mtft.data.formats.formats import FORMATS
from mtft.data.formats.messages import REASONING, Conversation, RowError
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.template import inline_thought
from tests.data.tokenize.stock import STOCK, random_row, stock

FAST, MANY = 13, 250  # conversations a template: 533 in the fast tests, 10,250 in the slow ones
NAMED = re.compile(r"\bmessage \d+|no assistant turn is learnt")


def words(value):
    """The texts of a value that mark their place: random_row writes each one once."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in words(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in words(item)]
    return re.findall(r"w\d+z", value) if isinstance(value, str) else []


def said(message):
    """What a message says, thinking apart from the rest."""
    thought = inline_thought(message["content"])
    thinking = [*words(thought.thinking if thought else ""), *words([message.get(key) for key in REASONING])]
    answer = words(thought.answer if thought else message["content"])
    return thinking, [*answer, *words([call["function"].get("arguments") for call in message.get("tool_calls", ())])]


def check(renderer: ChatRenderer, talk: Conversation) -> None:
    """The oracle looks at nothing but words: where each one stands in the rendered text, and where it is learnt."""
    examples = renderer.render(talk)
    shown = "".join(example.text for example in examples)
    learnt = ["".join(example.text[start:end] for start, end in example.spans) for example in examples]
    for i, message in enumerate(talk.messages):
        thinking, answer = said(message)
        is_learnt = message["role"] == "assistant" and i > 0 and message.get("train", True)
        for word in [*answer, *(thinking if is_learnt else [])]:
            assert word in shown, f"message {i + 1} ({message['role']}) has lost {word}"
            assert "".join(learnt).count(word) == is_learnt, f"{word} of message {i + 1} is not learnt once"
    for word in words(talk.tools) if renderer.template.shows_tools else ():
        assert word in shown, f"the tools have lost {word}"
    for example in examples:
        for turn, (start, end) in zip(example.turns, example.spans):
            asked = talk.tools if renderer.template.shows_tools else None
            prompt = renderer.prompt(talk.messages[:turn], asked)
            assert example.text[:start].startswith(prompt), f"message {turn + 1} is asked for in another way"
            assert not example.text[len(prompt) : start].strip() or turn != example.turns[-1]
            assert end > start


def run(name, seeds):
    renderer = ChatRenderer(stock(name))
    used, refused = 0, []
    for seed in seeds:
        row = random_row(random.Random(f"{name} {seed}"))
        try:
            talk = FORMATS["messages"].read(row)
            check(renderer, talk)
            used += 1
        except RowError as error:
            refused.append(error.what)
        except AssertionError as error:
            raise AssertionError(f"{name}, seed {seed}: {error}\n{row}") from error
    assert all(map(NAMED.search, refused)), refused
    return used, refused


@pytest.mark.parametrize("name", STOCK)
def test_some_conversations(name):
    used, _ = run(name, range(FAST))
    assert used >= FAST // 4


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_many_conversations(name):
    used, refused = run(name, range(1000, 1000 + MANY))
    assert used >= MANY // 4, refused[:5]


SIMPLE = [{"role": "user", "content": "w1z"}, {"role": "assistant", "content": "w2z"}]


@pytest.mark.parametrize("name", STOCK)
def test_plain_conversations_are_never_refused(name):
    renderer = ChatRenderer(stock(name))
    for messages in (SIMPLE, [*SIMPLE, *SIMPLE], [{"role": "system", "content": "w0z"}, *SIMPLE]):
        renamed = [m | {"content": f"w{i}z"} for i, m in enumerate(messages)]
        check(renderer, FORMATS["messages"].read({"messages": renamed}))


@pytest.mark.parametrize("name", STOCK)
def test_what_ends_a_turn_stands_at_its_end(name):
    renderer = ChatRenderer(stock(name))
    (example,) = renderer.render(Conversation(tuple(SIMPLE)))
    learnt = example.text[slice(*example.spans[-1])].split("w2z")[1]
    assert renderer.end_tokens
    assert any(token in learnt for token in renderer.end_tokens)
