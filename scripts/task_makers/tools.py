"""Calls of tools: a wish and three tools → the call with its arguments, or no call where no tool fits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scripts.task_makers.base import MadeRow, TaskMaker, Wordings, on_side, words

CITIES = words(
    "Athens Berlin Cairo Delhi Dublin Geneva Hanoi Kyoto Lagos Lima Madrid Milan Nairobi Oslo Perth Quito Rome Sydney"
)
CURRENCIES = ("EUR", "USD", "GBP", "JPY", "CHF", "SEK")
LABELS = words("bread dentist laundry medicine meeting train workout yoga")
ROOMS = words("bathroom bedroom cellar garage hall kitchen")
NONE_FITS = "None of the tools can do that."

SLOTS: dict[str, Callable[[random.Random], Any]] = {
    "city": lambda rng: rng.choice(CITIES),
    "unit": lambda rng: rng.choice(("celsius", "fahrenheit")),
    "amount": lambda rng: rng.randint(5, 5000),
    "source": lambda rng: rng.choice(CURRENCIES[:3]),
    "target": lambda rng: rng.choice(CURRENCIES[3:]),
    "time": lambda rng: f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}",
    "label": lambda rng: rng.choice(LABELS),
    "room": lambda rng: rng.choice(ROOMS),
    "level": lambda rng: rng.randint(0, 100),
    "people": lambda rng: rng.randint(1, 12),
    "minutes": lambda rng: rng.randint(1, 240),
}
TYPES: dict[str, dict[str, Any]] = {
    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    "amount": {"type": "integer", "minimum": 1},
    "source": {"type": "string", "enum": list(CURRENCIES)},
    "target": {"type": "string", "enum": list(CURRENCIES)},
    "time": {"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"},
    "level": {"type": "integer", "minimum": 0, "maximum": 100},
    "people": {"type": "integer", "minimum": 1},
    "minutes": {"type": "integer", "minimum": 1},
}


@dataclass(frozen=True)
class Tool:
    """arguments: slots, each in every wording."""

    description: str
    arguments: tuple[str, ...]
    wordings: Wordings

    def schema(self, name: str) -> dict[str, Any]:
        properties = {argument: TYPES.get(argument, {"type": "string"}) for argument in self.arguments}
        parameters = {"type": "object", "properties": properties, "required": list(self.arguments)}
        parameters["additionalProperties"] = False
        return {
            "type": "function",
            "function": {"name": name, "description": self.description, "parameters": parameters},
        }


TOOLS = {
    "get_weather": Tool(
        "Weather of a city",
        ("city", "unit"),
        Wordings(
            seen=("What's the weather in {city}, in {unit}?", "How warm is it in {city}? In {unit}."),
            unseen=("Do I need a coat in {city}? I think in {unit}.",),
        ),
    ),
    "convert_money": Tool(
        "Convert an amount of money",
        ("amount", "source", "target"),
        Wordings(
            seen=("Change {amount} {source} to {target}.", "How much is {amount} {source} in {target}?"),
            unseen=("I have {amount} {source}; what would that be worth as {target}?",),
        ),
    ),
    "set_alarm": Tool(
        "Set an alarm",
        ("time", "label"),
        Wordings(
            seen=("Wake me at {time} for {label}.", "Alarm at {time}, call it {label}."),
            unseen=("Make it ring at {time}: {label}.",),
        ),
    ),
    "set_light": Tool(
        "Set the light of a room, in percent",
        ("room", "level"),
        Wordings(
            seen=("Set the light in the {room} to {level} percent.", "Light, {room}: {level} percent."),
            unseen=("I want the {room} lit at {level} percent.",),
        ),
    ),
    "book_table": Tool(
        "Book a table in a restaurant",
        ("city", "people", "time"),
        Wordings(
            seen=("Book a table for {people} in {city} at {time}.", "Dinner in {city} at {time}, {people} people."),
            unseen=("At {time} we are {people} hungry people in {city}.",),
        ),
    ),
    "start_timer": Tool(
        "Start a timer",
        ("minutes", "label"),
        Wordings(
            seen=("Start a timer of {minutes} minutes for {label}.", "{minutes} minutes from now: {label}."),
            unseen=("Tell me when {minutes} minutes are over, for {label}.",),
        ),
    ),
}


@dataclass(frozen=True)
class Wish:
    tool: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.tool}({', '.join(map(str, self.arguments.values()))})"


def draw_wish(rng: random.Random) -> Wish:
    name = rng.choice(list(TOOLS))
    return Wish(name, {argument: SLOTS[argument](rng) for argument in TOOLS[name].arguments})


def draw(rng: random.Random, held_out: bool) -> MadeRow:
    wish = on_side(held_out, "wish", lambda: draw_wish(rng))
    wording = TOOLS[wish.tool].wordings.draw(rng, held_out)
    fits = rng.random() < 0.85
    others = [name for name in TOOLS if name != wish.tool]
    names = [*rng.sample(others, 2), wish.tool] if fits else rng.sample(others, 3)
    rng.shuffle(names)
    call = {"type": "function", "function": {"name": wish.tool, "arguments": wish.arguments}}
    answer: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    if not fits:
        answer = {"role": "assistant", "content": NONE_FITS}
    messages = [{"role": "user", "content": wording.format(**wish.arguments)}, answer]
    return MadeRow(str(wish), wording, {"messages": messages, "tools": [TOOLS[name].schema(name) for name in names]})


TASKS = (
    TaskMaker(
        "tool_call",
        draw,
        "a wish and three tools → the call with its arguments, or none",
        "the tool with these arguments (each tool, and each argument with others, is seen)",
        metrics=("loss", "tool_call_match"),
        format="messages",
        max_new_tokens=96,
        beside=("chat_template.jinja",),
    ),
)
