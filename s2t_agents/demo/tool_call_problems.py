"""Single tool calls with all kinds of names and arguments, and a plain answer that reads what the tool returned."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from .lexicon import ITEMS, LANGUAGES, NAMES, PLACES, district, foreign, made_up, span
from .lookups import TOPICS, draw_lookup
from .problem import Call
from .record_problems import RecordProblem, documented
from .schemas import ParameterType, function_tool

Value = str | int


@dataclass(frozen=True)
class ToolCallProblem:
    """One call to be made: the tool, the question, the right call and the answer that reads its result."""

    tool: dict[str, Any]
    question: str
    call: Call
    said: str
    """What the answer must name."""

    @property
    def answer(self) -> str:
        """The plain answer: numbers are results, anything else is what the tool says."""
        return f"The {'result is' if self.said.isdigit() else 'tool says'} {self.said}."


_FORMS: tuple[tuple[str, str, dict[str, str], tuple[str, ...]], ...] = (
    ("add_note save_note write_note", "Save a note.", {"text": "span"},
     ('Save the note "{text}".', 'Write down "{text}".', 'Add a note: "{text}".')),
    ("send_message send_mail tell_person", "Send a message to a person.", {"person": "name", "text": "span"},
     ('Tell {person} "{text}".', 'Send {person} the message "{text}".', 'Write "{text}" to {person}.')),
    ("set_timer start_timer set_alarm", "Start a timer.", {"minutes": "int"},
     ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes.")),
    ("book_table reserve_table", "Book a table.", {"name": "name", "guests": "int"},
     ("Book a table for {guests} guests, for {name}.", "Reserve a table of {guests} for {name}.")),
    ("translate translate_text", "Translate a text.", {"text": "span", "language": "language"},
     ('Translate "{text}" to {language}.', 'How do you say "{text}" in {language}?')),
    ("buy order_item add_to_cart", "Buy some items.", {"item": "item", "count": "int"},
     ("Buy {count} {item}.", "Order {count} {item} for me.", "Please get {count} {item}.")),
    ("search find_text web_search", "Search for a text.", {"query": "span"},
     ('Search for "{query}".', 'Find "{query}" for me.', 'Look for "{query}".')),
    ("get_time local_time", "Get the time in a city.", {"city": "place"},
     ("What time is it in {city}?", "Tell me the time in {city}.")),
    ("call_person phone", "Call a person.", {"name": "name"}, ("Call {name}.", "Ring {name} please.")),
    ("city_weather weather_now forecast", "Get the weather of a place.", {"place": "district"},
     ("How is the weather in {place}?", "Will it rain in {place}?", "What will the weather be in {place}?")),
    ("local_weather read_weather", "Tell the weather.", {"city": "place"},
     ("How is the weather in {city}?", "Is it warm in {city}?")),
    ("new_client add_client open_account", "Make a new client.", {"client_name": "foreign", "about": "span"},
     ("Make a client named '{client_name}' - {about}.", "Add the client '{client_name}', about: {about}.",
      "A new client: '{client_name}' ({about}).")),
    ("register_client new_account add_company", "Register a client.", {"client": "foreign", "_note": "span"},
     ("Register the client '{client}' ({_note}).", "Open an account for '{client}' - {_note}.",
      "There is a new company, '{client}' ({_note}), please add it.")),
    ("save_customer add_person store_user", "Store a person.", {"name": "name", "age": "int"},
     ("{name} is {age} years old.", "Store {name}, who is {age}.", "The customer {name} is {age}.")),
)  # fmt: skip


_KEYS = ("x", "y", "a", "b", "value", "number", "key", "input", "data", "n")
_DESCRIPTIONS = (
    "Apply a function.",
    "Run a function.",
    "Compute a value.",
    "The {0} function.",
    "Apply {0} to an input.",
)
_CALLS = (
    "Call {0}({1}).",
    "Run {0}({1}) please.",
    "Use the tool: {0}({1}).",
    "What does {0}({1}) give?",
    "Find {0}({1}). Use the tool.",
    "I want the value of {0}({1}).",
)


def _value(rng: Random, kind: str) -> Value:
    if kind == "int":
        return rng.randint(1, 99) if rng.random() < 0.7 else rng.randint(100, 999)
    if kind in ("span", "foreign", "district"):
        return {"span": span, "foreign": foreign, "district": district}[kind](rng)
    return rng.choice({"name": NAMES, "item": ITEMS, "place": PLACES, "language": LANGUAGES}[kind])


def _everyday(rng: Random) -> ToolCallProblem:
    names, description, kinds, asks = rng.choice(_FORMS)
    name = rng.choice(names.split())
    values = {key: _value(rng, kind) for key, kind in kinds.items()}
    question = rng.choice(asks).format(**values)
    values = {key: value for key, value in values.items() if not key.startswith("_")}  # the others are only mentioned
    types: dict[str, ParameterType] = {key: "integer" if kinds[key] == "int" else "string" for key in values}
    said = rng.choice((rng.choice(("ok", "done", "saved", "yes")), span(rng))) if rng.random() < 0.6 else _number(rng)
    description = documented(rng, description, types)
    return ToolCallProblem(
        function_tool(name, description, types), question, Call(name, values, _result(rng, said)), said
    )


def _number(rng: Random) -> str:
    return str(rng.randint(1, 999))


def _result(rng: Random, said: str) -> str:
    """What a tool returns: the bare text or number, or a small JSON object around it."""
    value: Value = int(said) if said.isdigit() else said
    if rng.random() < 0.5:
        return said
    return json.dumps({rng.choice(("result", "value", "status")): value}, ensure_ascii=False)


def _lookup(rng: Random) -> ToolCallProblem:
    lookup = draw_lookup(rng, rng.choice(TOPICS))
    said = _number(rng)
    return ToolCallProblem(lookup.tool, lookup.ask, Call(lookup.name, lookup.arguments, _result(rng, said)), said)


def _made_up(rng: Random) -> ToolCallProblem:
    """A function of made-up name on made-up arguments: nothing but copying helps here."""
    first, last = made_up(rng), rng.choice(("tool", "value", "function", "result", "helper", made_up(rng)))
    name = rng.choice((first, f"{first}_{last}", f"{rng.choice(('my', 'the', 'do', 'no'))}_{first}_{last}"))
    keys = rng.sample((*_KEYS, made_up(rng)), k=rng.choice((0, 1, 1, 1, 2)))
    values: list[Value] = [rng.randint(1, 999) if rng.random() < 0.7 else _short_text(rng) for _ in keys]
    types: dict[str, ParameterType] = {
        k: "integer" if isinstance(v, int) else "string" for k, v in zip(keys, values, strict=True)
    }
    limits = {"maximum": 1000, "minimum": rng.choice((0, 1))}
    told = {k: limits for k, kind in types.items() if kind == "integer" and rng.random() < 0.2}
    inside = ", ".join(str(v) if isinstance(v, int) else f'"{v}"' for v in values)
    said = _number(rng)
    call = Call(name, dict(zip(keys, values, strict=True)), _result(rng, said))
    tool = function_tool(name, rng.choice(_DESCRIPTIONS).format(name), types, told)
    return ToolCallProblem(tool, rng.choice(_CALLS).format(name, inside), call, said)


def _record(rng: Random) -> ToolCallProblem:
    """Somebody with a quoted name is to be registered."""
    made = RecordProblem(rng)
    types: dict[str, ParameterType] = dict.fromkeys(made.values, "string")
    said = rng.choice(("ok", "done", "saved", _number(rng)))
    tool = function_tool(made.name, documented(rng, made.description, types), types)
    return ToolCallProblem(tool, made.question, Call(made.name, made.values, _result(rng, said)), said)


def _short_text(rng: Random) -> str:
    return rng.choice((span, made_up, foreign))(rng)


def draw_tool_call_problem(rng: Random) -> ToolCallProblem:
    """An everyday call, a lookup without arithmetic, a call of a function nobody has heard of, or a new name."""
    return rng.choice((_everyday, _everyday, _everyday, _lookup, _lookup, _made_up, _made_up, _record, _record))(rng)
