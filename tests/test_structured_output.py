"""Structured output and forced tool calls: always valid against the schema."""

import json
from typing import Any, TypedDict
from urllib.parse import quote

import pytest
import torch
from langchain_core.messages import (
    HumanMessage,
    SystemMessage,
)
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from pydantic.v1 import BaseModel as OldBaseModel

from s2t_agents import ChatS2T, Ledger
from s2t_agents.chat.response_options import ResponseOptions
from s2t_agents.errors import BadSchema, ConfigError
from s2t_agents.grammar.vocabulary import cached_vocabulary
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import tiny_model, tiny_tokenizer


def chat(**settings: Any) -> ChatS2T:
    return ChatS2T(**{"model": tiny_model(max_position_embeddings=4096), "max_tokens": 12, **settings})


class Trip(BaseModel):
    """Where to go."""

    city: str = Field(max_length=12)
    days: int = Field(ge=1, le=9)


class TripDict(TypedDict):
    """Where to go."""

    city: str
    days: int


class OldTrip(OldBaseModel):
    """Where to go."""

    city: str
    days: int


SCHEMAS = {"pydantic": Trip, "typeddict": TripDict, "json schema": Trip.model_json_schema(), "pydantic.v1": OldTrip}


# ---------------------------------------------------------------------- structured output


@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_method_gives_an_object_of_every_kind_of_schema(method: Any, schema: Any) -> None:
    room = 96 if method == "function_calling" else 40  # the shortest answer of each takes most of it
    model = chat(max_tokens=room).with_structured_output(schema, method=method)
    answers = [model.invoke("hello"), list(model.stream("hello"))[-1]]
    for answer in answers:
        if isinstance(schema, type) and schema is not TripDict:
            assert isinstance(answer, schema)
        else:
            assert set(answer) == {"city", "days"}
            assert isinstance(answer["days"], int)


@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
async def test_structured_output_is_one_call_of_the_model(method: Any) -> None:
    model = chat(max_tokens=96, ledger=Ledger())
    structured = model.with_structured_output(Trip, method=method, include_raw=True)
    answer = await structured.ainvoke("hello")
    assert isinstance(answer["parsed"], Trip)
    assert answer["parsing_error"] is None
    assert len(answer["raw"].tool_calls) == (method == "function_calling")
    assert len(model.ledger.records()) == 1


def test_include_raw_reports_what_does_not_parse() -> None:
    class Picky(BaseModel):
        """No number is good enough."""

        number: int

        def __init__(self, **data: Any) -> None:
            raise ValueError("not that one")

    answer = chat(max_tokens=96).with_structured_output(Picky, include_raw=True).invoke("hello")
    assert answer["parsed"] is None
    assert "not that one" in str(answer["parsing_error"])
    with pytest.raises(ValueError, match="not that one"):
        chat(max_tokens=96).with_structured_output(Picky).invoke("hello")


def test_json_mode_without_a_schema_is_any_object() -> None:
    assert isinstance(chat(max_tokens=64).with_structured_output(method="json_mode").invoke("hello"), dict)


def test_json_that_takes_all_its_tokens_is_whole() -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Bern"]}}, "required": ["city"]}
    reply = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    roomy = chat(max_tokens=200).bind(response_format=reply).invoke("hello")
    exact = chat(max_tokens=roomy.usage_metadata["output_tokens"]).bind(response_format=reply).invoke("hello")
    for answer in (roomy, exact):
        assert json.loads(answer.text) == {"city": "Bern"}
        assert answer.response_metadata["finish_reason"] == "stop"
    assert chat().invoke("hello").response_metadata["finish_reason"] == "length"


def test_json_schema_shows_the_schema_to_the_model_and_json_mode_does_not() -> None:
    model = chat(max_tokens=64)
    tokens = {}
    for method in ("json_schema", "json_mode"):
        raw = model.with_structured_output(Trip, method=method, include_raw=True).invoke([SystemMessage("a")])
        tokens[method] = raw["raw"].usage_metadata["input_tokens"]
    assert tokens["json_schema"] > tokens["json_mode"] + 100


def test_strict_requires_what_is_optional() -> None:
    class Maybe(BaseModel):
        """Perhaps."""

        note: str | None = None

    model = chat(max_tokens=64)
    for method in ("function_calling", "json_schema"):
        raw = model.with_structured_output(Maybe, method=method, strict=True, include_raw=True).invoke("hello")
        assert "note" in (raw["raw"].text or str(raw["raw"].tool_calls[0]["args"]))


def pointer(*names: str) -> str:
    """A JSON pointer to these names, one in the other, below ``$defs``."""
    return "".join(f"/{name.replace('~', '~0').replace('/', '~1')}" for name in ("$defs", *names))


@pytest.mark.parametrize("write", [str, quote], ids=["plain", "in percent"])
@pytest.mark.parametrize("name", ["a/b", "a~b", "a%b", "a b", "größe", 'a"b', "a~1b", "a%2Fb", "0"])
def test_a_definition_that_is_no_object_is_found_however_it_is_named(name: str, write: Any) -> None:
    digit = {"type": "integer", "minimum": 3, "maximum": 9}
    defs = {
        name: digit,
        f"{name} again": {"$ref": f"#{write(pointer(name))}"},
        "in": {"type": "object", "properties": {name: digit}},
        "list": {"prefixItems": [{}, {"$ref": f"#{write(pointer(f'{name} again'))}"}]},
    }
    for path in ([name], [f"{name} again"], ["in", "properties", name], ["list", "prefixItems", "1"]):
        schema = {"title": "digit", "$ref": f"#{write(pointer(*path))}", "$defs": defs}
        assert chat(max_tokens=48).with_structured_output(schema).invoke("hello") in range(3, 10), path


@pytest.mark.parametrize(
    "root",
    [
        {"$ref": "#digit", "$defs": {"n": {"$anchor": "digit", "type": "integer", "minimum": 3, "maximum": 9}}},
        {"$id": "https://example.com/s.json", "$ref": "s.json#/$defs/n", "$defs": {"n": {"enum": [3, 4]}}},
        {"$ref": "#/%24defs/n", "$defs": {"n": {"enum": [3, 4]}}},
        {"anyOf": [{"$ref": "#/$defs/n~1m"}, {"type": "null"}], "$defs": {"n/m": {"enum": [3, 4]}}},
        {"prefixItems": [{"enum": [3]}], "items": False, "minItems": 1},
    ],
    ids=["anchor", "identifier", "keyword in percent", "alternatives", "prefixItems"],
)
def test_a_value_that_is_no_object_is_found_behind_references_of_every_kind(root: dict[str, Any]) -> None:
    answer = chat(max_tokens=48).with_structured_output({"title": "digit", **root}).invoke("hello")
    assert answer is None or answer == [3] or answer in range(3, 10)


def test_alternatives_in_a_circle_bind() -> None:
    defs = {"n": {"anyOf": [{"$ref": "#/$defs/n"}, {"enum": [3, 4]}]}}
    chat().with_structured_output({"title": "digit", "anyOf": [{"$ref": "#/$defs/n"}], "$defs": defs})


# ---------------------------------------------------------------------- tools


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def now() -> str:
    """Tell the time."""
    return "noon"


@pytest.mark.parametrize("choice", ["any", "required", True, "add", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_choice_is_exactly_one_call(choice: Any) -> None:
    answer = chat(max_tokens=400).bind_tools([add, now], tool_choice=choice).invoke("hello")
    assert len(answer.tool_calls) == 1
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    assert answer.text == ""


@pytest.mark.parametrize("choice", ["add", {"type": "function", "function": {"name": "add"}}])
@pytest.mark.parametrize("parallel", [None, False, True])
def test_a_tool_that_is_named_is_called_once_whatever_else_is_said(choice: Any, parallel: bool | None) -> None:
    """OpenAI's "call exactly one specific function"."""
    bound = chat(max_tokens=400).bind_tools([add, now], tool_choice=choice, parallel_tool_calls=parallel)
    once = chat().bind_tools([add, now], tool_choice="add")
    vocabulary = cached_vocabulary(tiny_tokenizer())
    grammars = [ResponseOptions.of(each.kwargs).compile(vocabulary).source for each in (bound, once)]
    assert grammars[0] == grammars[1]
    assert len(bound.invoke("hello").tool_calls) == 1


def auto(x: int) -> int:
    """Drive a car."""
    return x


@pytest.mark.parametrize(
    ("choice", "mode", "only"),
    [
        (None, "auto", None),
        ("auto", "auto", None),
        ("any", "any", None),
        ({"type": "auto"}, "auto", None),
        ("add", "any", "add"),
        ({"type": "function", "function": {"name": "auto"}}, "any", "auto"),
        ({"type": "tool", "name": "auto"}, "any", "auto"),
    ],
)
def test_a_tool_may_be_called_like_a_choice(choice: Any, mode: str, only: str | None) -> None:
    """A bare word is the choice; only OpenAI's mapping can name such a tool."""
    request = ResponseOptions.of(chat().bind_tools([auto, add], tool_choice=choice).kwargs)
    assert (request.tool_choice, request.tool) == (mode, only)
    grammar = request.compile(cached_vocabulary(tiny_tokenizer())).source
    legal = [name for name in ("auto", "add") if f'\\"name\\": \\"{name}\\"' in grammar]
    assert legal == ([only] if only else ["auto", "add"])


@pytest.mark.parametrize("name", ["auto", "any", "none", "required"])
def test_a_schema_may_be_called_like_a_choice(name: str) -> None:
    schema = {"title": name, "description": "d", "type": "object", "properties": {"x": {"type": "boolean"}}}
    schema["required"] = ["x"]
    assert set(chat(max_tokens=64).with_structured_output(schema).invoke("hello")) == {"x"}


DESCRIBED = {"type": "object", "description": "OF THE SCHEMA", "properties": {"x": {"type": "boolean"}}}
PLAIN = {"type": "object", "properties": {"x": {"type": "boolean"}}}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"description": "OF THE FORMAT", "schema": PLAIN}, ["OF THE FORMAT"]),
        ({"description": "OF THE FORMAT", "schema": DESCRIBED}, ["OF THE FORMAT", "OF THE SCHEMA"]),
        ({"description": "OF THE SCHEMA", "schema": DESCRIBED}, ["OF THE SCHEMA"]),
        ({"schema": DESCRIBED}, ["OF THE SCHEMA"]),
        ({"description": "", "schema": PLAIN}, []),
        ({"description": None, "schema": PLAIN}, []),
    ],
)
def test_the_description_of_a_response_format_is_shown_with_its_schema(given: Any, shown: list[str]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, **given}}
    [system, _] = ResponseOptions.of({"response_format": wanted}).prompt([HumanMessage("hello")])
    for text in ("OF THE FORMAT", "OF THE SCHEMA"):
        assert system.text.count(text) == shown.count(text)
    schema = json.loads(system.text[system.text.index("{") :])
    assert {key: schema[key] for key in PLAIN} == PLAIN
    assert "description" in schema or not shown


def test_a_named_tool_that_is_not_there_is_refused() -> None:
    for choice in ("auto", "subtract"):
        named = {"type": "function", "function": {"name": choice}}
        with pytest.raises(ConfigError, match=f"tool_choice='{choice}' fits no tool \\(tools: 'add'\\)"):
            chat().bind_tools([add], tool_choice=named)


@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
def test_what_is_no_schema_is_told_in_one_line(method: Any) -> None:
    with pytest.raises(BadSchema, match='with a "title"') as refused:
        chat().with_structured_output({"type": "object", "properties": {"x": {"type": "integer"}}}, method=method)
    assert "\n" not in str(refused.value)


def test_several_forced_calls_are_for_those_who_ask() -> None:
    model = chat(max_tokens=200)
    several = model.bind_tools([now], tool_choice="any", parallel_tool_calls=True)
    assert ResponseOptions.of(several.kwargs).parallel
    assert not ResponseOptions.of(model.bind_tools([now], tool_choice="any").kwargs).parallel
    assert ResponseOptions.of(model.bind_tools([now]).kwargs).parallel
    assert not ResponseOptions.of(model.bind_tools([now], parallel_tool_calls=False).kwargs).parallel


def test_none_is_text_and_a_model_without_tools_can_not_call() -> None:
    for model in (chat().bind_tools([add], tool_choice="none"), chat()):
        answer = model.invoke("hello")
        assert answer.text.strip()
        assert not answer.tool_calls
        assert not answer.invalid_tool_calls


def test_a_tool_without_arguments_is_called_with_none() -> None:
    assert chat(max_tokens=64).bind_tools([now], tool_choice="any").invoke("hello").tool_calls[0]["args"] == {}


def test_tools_and_a_reply_schema_together_are_a_call_or_that_json() -> None:
    reply = {"type": "json_schema", "json_schema": {"name": "trip", "schema": Trip.model_json_schema()}}
    model = chat(max_tokens=160)
    spoken = model.bind_tools([add], response_format=reply, tool_choice="none").invoke("hello")
    assert Trip.model_validate_json(spoken.text)
    called = model.bind_tools([add], response_format=reply, tool_choice="any").invoke("hello")
    assert called.tool_calls
    free = model.bind_tools([add], response_format=reply).invoke("hello")
    assert free.tool_calls or Trip.model_validate_json(free.text)


def longing_for(*texts: str) -> LanguageModel:
    """A model that wants the first of these tokens always, then the second, whatever the prompt is."""
    slm = tiny_model()
    head = slm.model.get_output_embeddings()
    wishes = torch.zeros(head.weight.shape[0])
    for rank, text in enumerate(texts):
        wishes[slm.tokenizer.convert_tokens_to_ids(text)] = 100.0 - rank
    head.weight.zero_()
    head.bias = torch.nn.Parameter(wishes, requires_grad=False)
    return slm


@pytest.mark.parametrize("wishes", [("<|im_end|>",), ("Ġ", "<|im_end|>"), ("Ċ",), ("<tool_call>", "Ġ")])
@pytest.mark.parametrize("room", [1, 5])
@pytest.mark.parametrize("tools", [[], [now]])
def test_no_answer_is_empty_or_blank_or_a_call_out_of_nowhere(wishes: Any, room: int, tools: Any) -> None:
    model = ChatS2T(model=longing_for(*wishes), max_tokens=room)
    answer = model.bind_tools(tools, tool_choice="none").invoke("hello")
    assert answer.text.strip()
    assert not answer.tool_calls
    assert not answer.invalid_tool_calls
    assert answer.usage_metadata["output_tokens"] <= room
