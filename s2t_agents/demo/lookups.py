"""Problems which need a tool first: a question about something that only the tool knows, then arithmetic with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from .lexicon import ITEMS, NAMES, PLACES
from .problem import Call
from .schemas import ParameterType, function_tool

VERBS = ("get", "find", "read", "check", "fetch", "load", "look_up", "query")
UNSEEN_VERBS = ("request", "tell", "search")


@dataclass(frozen=True)
class ArgumentKind:
    """One argument: names it may have in a schema, its JSON type, and what fills it."""

    names: tuple[str, ...]
    type: ParameterType
    values: tuple[str, ...] | tuple[int, int]

    def draw(self, rng: Random) -> str | int:
        """A value: a word from the list, or an integer from the range."""
        if self.type == "integer":
            low, high = self.values
            return rng.randint(int(low), int(high))
        return str(rng.choice(self.values))


ITEM = ArgumentKind(("item", "product", "thing", "name"), "string", ITEMS)
PLACE = ArgumentKind(("city", "place", "town", "shop"), "string", PLACES)
PERSON = ArgumentKind(("person", "name", "user", "player"), "string", NAMES)
NUMBER = ArgumentKind(("number", "id", "code", "index"), "integer", (2, 999))


@dataclass(frozen=True)
class Topic:
    """Something to look up: nouns for the tool's name, its description, its arguments and how people ask for it.

    In `asks`, ``{0}`` and ``{1}`` are the arguments' values; `unit` is what the looked-up number counts.
    """

    nouns: tuple[str, ...]
    description: str
    slots: tuple[ArgumentKind, ...]
    asks: tuple[str, ...]
    unit: str


TOPICS = (
    Topic(("stock", "count", "amount"), "the number of items in stock", (ITEM,),
          ("Look up the stock of {0}.", "How many {0} are in stock?", "Find the stock of {0}."), "pieces"),
    Topic(("stock", "store", "shelf"), "the stock of an item in a city", (ITEM, PLACE),
          ("Look up the stock of {0} in {1}.", "How many {0} are there in {1}?", "Find the {0} stock in {1}."),
          "pieces"),
    Topic(("price", "cost", "value"), "the price of an item", (ITEM,),
          ("Look up the price of {0}.", "What do {0} cost?", "Find the price of {0}."), "coins"),
    Topic(("score", "points", "level"), "the score of a player", (PERSON,),
          ("Look up the score of {0}.", "How many points has {0}?", "What is the score of {0}?"), "points"),
    Topic(("balance", "account", "savings"), "the savings of a person", (PERSON,),
          ("Look up the savings of {0}.", "How much has {0} saved?", "What is the balance of {0}?"), "coins"),
    Topic(("order", "parcel", "box"), "the size of an order", (NUMBER,),
          ("Look up order {0}.", "How many pieces are in order {0}?", "Open order number {0}."), "pieces"),
    Topic(("seats", "room", "hall"), "the number of seats in a room", (NUMBER,),
          ("Look up room {0}.", "How many seats has room {0}?", "Find the seats of room {0}."), "seats"),
    Topic(("distance", "road", "route"), "the distance of two cities", (PLACE, PLACE),
          ("Look up the way from {0} to {1}.", "How far is it from {0} to {1}?", "Find the distance of {0} and {1}."),
          "miles"),
    Topic(("guests", "visitors", "people"), "the number of visitors of a city", (PLACE,),
          ("Look up the visitors of {0}.", "How many people visit {0}?", "Find the visitors of {0}."), "visitors"),
)  # fmt: skip

ADD = ("Then {n} more come.", "Add {n} to it.", "{n} are added.", "{p} brings {n} more.")
TAKE = ("Then {n} go.", "Take {n} away.", "{n} are taken.", "{p} takes {n} of it.")
ADD_GROUPS = ("Add {k} times {n}.", "Then {k} lots of {n} come.")
TAKE_GROUPS = ("Take away {k} times {n}.", "Then {k} lots of {n} go.")
TIMES = ("Make it {k} times as much.", "Multiply it by {k}.")
ASK = ("How many {u} is that?", "How many {u} in the end?", "What is the result?", "What number is left?")
UNSEEN_ASK = ("Report the final number of {u}.",)

SYSTEMS = (
    "You are a helpful assistant.",
    "Use the tools.",
    "You help with numbers.",
    "Look things up, then work step by step.",
    "Answer with the tools you have.",
    "You are a careful clerk.",
)
UNSEEN_SYSTEMS = ("You keep the books of a small company.",)


@dataclass(frozen=True)
class Lookup:
    """A topic made concrete: its tool, the right call without its result, the sentence that asks for it."""

    tool: dict[str, Any]
    name: str
    arguments: dict[str, str | int]
    ask: str
    unit: str


def _parameters(rng: Random, topic: Topic) -> list[str]:
    if len({slot.names for slot in topic.slots}) < len(topic.slots):
        return rng.choice([["start", "end"], ["city_a", "city_b"], ["origin", "target"]])
    return [rng.choice(slot.names) for slot in topic.slots]


def draw_lookup(rng: Random, topic: Topic, *, unseen: bool = False, verb: str | None = None) -> Lookup:
    """One tool for `topic`, and a question that it answers; its name begins with `verb`, if given."""
    verb = verb or rng.choice(UNSEEN_VERBS if unseen else VERBS)
    name, keys = f"{verb}_{rng.choice(topic.nouns)}", _parameters(rng, topic)
    values = [slot.draw(rng) for slot in topic.slots]
    while len(set(values)) < len(values):
        values = [slot.draw(rng) for slot in topic.slots]
    description = f"{rng.choice(('Get', 'Find', 'Return', 'Look up'))} {topic.description}."
    told = {keys[0]: {"description": f"The {keys[0]}."}} if rng.random() < 0.15 else None
    parameters: dict[str, ParameterType] = {key: slot.type for key, slot in zip(keys, topic.slots, strict=True)}
    return Lookup(
        tool=function_tool(name, description, parameters, told),
        name=name,
        arguments=dict(zip(keys, values, strict=True)),
        ask=rng.choice(topic.asks).format(*values),
        unit=topic.unit,
    )


def draw_tools(rng: Random, needed: dict[str, Any], *, unseen: bool = False) -> tuple[dict[str, Any], ...]:
    """The needed tool among none to two lookups of other topics, in any order.

    The lookups of one conversation share their verb, as the functions of one API do.
    """
    tools = [needed]
    own_verb, _, noun = needed["function"]["name"].rpartition("_")
    verbs = UNSEEN_VERBS if unseen else VERBS
    verb = own_verb if own_verb in verbs else rng.choice(verbs)
    used = {noun}
    for topic in rng.sample(TOPICS, k=rng.choice((0, 0, 0, 1, 1, 2))):
        other = draw_lookup(rng, topic, unseen=unseen, verb=verb).tool
        if used.isdisjoint(topic.nouns):
            tools.append(other)
            used.update(topic.nouns)
    rng.shuffle(tools)
    return tuple(tools)


def draw_call(rng: Random, lookup: Lookup, number: int) -> Call:
    """The right call with its result: the bare number, or a small JSON object around it."""
    key = rng.choice(("result", "value", lookup.unit))
    return Call(lookup.name, lookup.arguments, str(number) if rng.random() < 0.5 else json.dumps({key: number}))
