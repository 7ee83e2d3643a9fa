"""Validation of finished answers: what the grammar does not enforce is reported, streamed or not."""

import json
import time
from dataclasses import dataclass
from datetime import date
from enum import Enum
from functools import reduce
from operator import add
from typing import Any, Literal, NotRequired, Required

import pytest
import torch
from langchain_core.exceptions import OutputParserException
from langchain_core.tools import StructuredTool, tool
from pydantic import BaseModel, ConfigDict, RootModel, field_validator
from typing_extensions import TypedDict

from s2t_agents import Budget, ChatS2T, Ledger
from s2t_agents.chat.response_options import ResponseOptions
from s2t_agents.errors import BadSchema, ConfigError
from s2t_agents.grammar.canonical_schema import canonicalize
from s2t_agents.grammar.validation import SchemaValidator
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import tiny_model

METHODS = ("function_calling", "json_schema", "json_mode")


def longing_for(*texts: str) -> LanguageModel:
    """A model that wants the first of these tokens always, then the second, whatever the prompt is."""
    slm = tiny_model(max_position_embeddings=4096)
    head = slm.model.get_output_embeddings()
    wishes = torch.zeros(head.weight.shape[0])
    for rank, text in enumerate(texts):
        wishes[slm.tokenizer.convert_tokens_to_ids(text)] = 100.0 - rank
    head.weight.zero_()
    head.bias = torch.nn.Parameter(wishes, requires_grad=False)
    return slm


def chat(*wishes: str, **settings: Any) -> ChatS2T:
    return ChatS2T(model=longing_for(*wishes), **{"max_tokens": 200, **settings})


PICKY = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
PICKED = {"title": "picked", "description": "d", "type": "object", "properties": {"x": PICKY}, "required": ["x"]}


RELAXED = [
    (PICKED, ("a", '"'), "x", "uniqueItems"),
    ({**PICKED, "properties": {"x": {"type": "integer", "not": {"minimum": 0}}}}, ("0", "}"), "x", "not"),
]


@pytest.mark.parametrize(("schema", "wishes", "place", "keyword"), RELAXED, ids=["uniqueItems", "not"])
def test_a_call_that_does_not_fit_is_a_call_with_the_reason_and_streams_to_the_same(
    schema: dict[str, Any], wishes: tuple[str, ...], place: str, keyword: str
) -> None:
    """Its JSON is sound: whoever runs the tool answers with an error that the model can read."""
    bound = chat(*wishes).bind_tools([schema], tool_choice="any")
    answer = bound.invoke("hello")
    assert not answer.invalid_tool_calls
    assert [call["name"] for call in answer.tool_calls] == ["picked"]
    (reason,) = answer.response_metadata["s2t"]["invalid"]
    assert f"{place}: " in reason
    assert keyword in reason
    assert answer.response_metadata["s2t"]["relaxed"] == [f"picked.{place}: {keyword}"]
    assert answer.response_metadata["finish_reason"] == "tool_calls"
    streamed: Any = reduce(add, bound.stream("hello"))
    assert not streamed.invalid_tool_calls
    assert [call["args"] for call in streamed.tool_calls] == [call["args"] for call in answer.tool_calls]
    assert json.loads(streamed.tool_call_chunks[0]["args"]) == answer.tool_calls[0]["args"]
    assert streamed.response_metadata["s2t"]["invalid"] == [reason]


@pytest.mark.parametrize("field", [{"type": "number"}, {}, {"type": "number", "minimum": 0}, {"type": "array"}])
@pytest.mark.parametrize("wishes", [("e", "9"), ("9",)], ids=["exponent", "digits"])
def test_a_call_with_a_number_that_no_double_holds_is_no_call_and_streams_to_the_same(
    field: dict[str, Any], wishes: tuple[str, ...]
) -> None:
    """Its reader would make it infinite, and run the tool with that."""
    schema = {"title": "n", "description": "d", "type": "object", "properties": {"x": field}, "required": ["x"]}
    bound = chat(*wishes, "[", max_tokens=500).bind_tools([schema], tool_choice="any")
    streamed: Any = reduce(add, bound.stream("hello"))
    for answer in (bound.invoke("hello"), streamed):
        assert not answer.tool_calls
        (call,) = answer.invalid_tool_calls
        assert call["name"] == "n"
        (reason,) = answer.response_metadata["s2t"]["invalid"]
        assert "is no number up to 1.8e+308" in reason
        assert "Infinity" not in json.dumps(answer.model_dump())
    with pytest.raises(OutputParserException, match="no number up to"):
        chat(*wishes, "[", max_tokens=500).with_structured_output(schema).invoke("hello")


def test_a_call_that_fits_says_nothing_of_faults() -> None:
    answer = chat("b").bind_tools([{**PICKED, "properties": {"x": {"const": 1}}}], tool_choice="any").invoke("hello")
    assert answer.tool_calls
    assert not {"relaxed", "invalid"} & answer.response_metadata["s2t"].keys()


@pytest.mark.parametrize("method", METHODS)
async def test_structured_output_that_does_not_fit_is_langchains_parsing_error(method: Any) -> None:
    model = chat("a", '"').with_structured_output(PICKED, method=method)
    with pytest.raises(OutputParserException, match="uniqueItems"):
        model.invoke("hello")
    with pytest.raises(OutputParserException, match="uniqueItems"):
        await model.ainvoke("hello")
    with pytest.raises(OutputParserException, match="uniqueItems"):
        list(model.stream("hello"))
    told = chat("a", '"').with_structured_output(PICKED, method=method, include_raw=True).invoke("hello")
    assert told["parsed"] is None
    assert "uniqueItems" in str(told["parsing_error"])
    assert told["raw"].response_metadata["s2t"]["invalid"]


def test_a_plain_reply_that_does_not_fit_says_so_in_its_metadata() -> None:
    reply = {"type": "json_schema", "json_schema": {"name": "picked", "schema": PICKED}}
    told = chat("a", '"').invoke("hello", response_format=reply).response_metadata["s2t"]
    assert "uniqueItems" in told["invalid"][0]
    assert told["relaxed"] == ["x: uniqueItems"]


# ---------------------------------------------------------------------- what LangChain's conversion loses


class Node(BaseModel):
    """A tree."""

    name: str
    children: list["Node"] = []


class Numbers(RootModel[list[int]]):
    """Numbers."""


class Choice(RootModel[int | None]):
    """One or none."""


@dataclass
class Point:
    """A point."""

    x: int


class Linked(TypedDict):
    """A list."""

    v: int


def graft(tree: Node, times: int) -> str:
    """Graft a tree.

    Args:
        tree: the tree.
        times: how often.
    """
    return f"{tree.name} {times}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Node, Numbers, Choice])
def test_recursive_classes_and_other_roots_give_their_own_objects(method: Any, kind: Any) -> None:
    model = ChatS2T(model=tiny_model(max_position_embeddings=4096), max_tokens=300, temperature=1.0, seed=3)
    assert isinstance(model.with_structured_output(kind, method=method).invoke("hello"), kind)
    assert isinstance(list(model.with_structured_output(kind, method=method).stream("hello"))[-1], kind)


ROOTS: dict[str, tuple[dict[str, Any], Any]] = {
    "array": ({"type": "array", "items": {"type": "integer", "maximum": 9}, "minItems": 2, "maxItems": 3}, list),
    "enum": ({"enum": ["yes", "no"]}, str),
    "reference": ({"$ref": "#/$defs/N", "$defs": {"N": {"type": "object", "properties": {"a": {"const": 1}}}}}, dict),
    "anyOf": ({"anyOf": [{"type": "null"}, {"type": "boolean"}]}, (type(None), bool)),
    "recursive array": ({"type": "array", "items": {"$ref": "#"}, "maxItems": 1}, list),
    "string": ({"type": "string", "maxLength": 4}, str),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ROOTS)
def test_roots_that_are_no_objects_are_answered_with_their_values(method: Any, name: str) -> None:
    asked, kind = ROOTS[name]
    model = ChatS2T(model=tiny_model(max_position_embeddings=4096), max_tokens=120)
    bound = model.with_structured_output({"title": "Root", "description": "d", **asked}, method=method)
    assert isinstance(bound.invoke("hello"), kind)


@pytest.mark.parametrize("method", METHODS)
def test_dataclasses_and_typed_dicts_give_dicts(method: Any) -> None:
    model = ChatS2T(model=tiny_model(max_position_embeddings=4096), max_tokens=80)
    assert set(model.with_structured_output(Point, method=method).invoke("hello")) == {"x"}
    assert set(model.with_structured_output(Linked, method=method).invoke("hello")) == {"v"}


class Kept(TypedDict, total=False):
    """A record."""

    v: Required[int]
    note: str


class Chained(TypedDict):
    """A chain."""

    v: int
    rest: NotRequired[list["Chained"]]


class Color(Enum):
    """A color."""

    RED = "red"
    NONE = None


TYPES: dict[str, tuple[Any, Any]] = {
    "required key": (Kept, lambda answer: isinstance(answer["v"], int)),
    "recursive TypedDict": (Chained, lambda answer: isinstance(answer["v"], int)),
    "enum": (Color, lambda answer: answer in ("red", None)),
    "list": (list[Literal["a", "b"]], lambda answer: isinstance(answer, list) and set(answer) <= {"a", "b"}),
    "list of classes": (list[Chained], lambda answer: all("v" in each for each in answer)),
    "union": (Node | Point, lambda answer: "x" in answer or "name" in answer),
    "literal": (Literal[1, "b", None], lambda answer: answer in (1, "b", None)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TYPES)
def test_types_of_every_kind_are_answered_with_what_fits_them(method: Any, name: str) -> None:
    kind, fits = TYPES[name]
    model = ChatS2T(model=tiny_model(max_position_embeddings=4096), max_tokens=160)
    assert fits(model.with_structured_output(kind, method=method).invoke("hello"))


class Table(RootModel[dict[str, "Table"]]):
    """A table of tables; an empty one is one too."""


class Exact(BaseModel):
    """Takes no string for a date from Python, but does from JSON."""

    model_config = ConfigDict(strict=True)
    day: date
    both: tuple[bool, bool]


class Refusing(BaseModel):
    """Refuses for a reason that no schema tells."""

    size: int

    @field_validator("size")
    @classmethod
    def never(cls, value: int) -> int:
        raise ValueError("out of stock")


class RefusingWhole(RootModel[list[int]]):
    """The same, of a root that is no object."""

    @field_validator("root")
    @classmethod
    def never(cls, value: list[int]) -> list[int]:
        raise ValueError("out of stock")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Table, Exact])
def test_a_class_is_given_the_json_that_fits_it(method: Any, kind: Any) -> None:
    model = ChatS2T(model=tiny_model(max_position_embeddings=4096), max_tokens=160).with_structured_output(
        kind, method=method
    )
    assert isinstance(model.invoke("hello"), kind)
    assert isinstance(list(model.stream("hello"))[-1], kind)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Refusing, RefusingWhole])
def test_what_a_class_refuses_is_a_parsing_error_with_its_reason(method: Any, kind: Any) -> None:
    model = ChatS2T(model=tiny_model(max_position_embeddings=4096), max_tokens=160)
    with pytest.raises(OutputParserException, match="out of stock"):
        model.with_structured_output(kind, method=method).invoke("hello")
    answer = model.with_structured_output(kind, method=method, include_raw=True).invoke("hello")
    assert answer["parsed"] is None
    assert isinstance(answer["parsing_error"], OutputParserException)


def test_tools_keep_their_recursion_and_the_prompt_shows_it() -> None:
    for one in (graft, tool(graft)):
        bound: Any = chat().bind_tools([one])
        shown = bound.kwargs["tools"][0]["function"]["parameters"]
        assert shown["$defs"]["Node"]["properties"]["children"]["items"] == {"$ref": "#/$defs/Node"}
        assert shown["properties"]["tree"]["$ref"] == "#/$defs/Node"
        assert list(shown["properties"]) == ["tree", "times"]


LINK = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/L"}, {"type": "null"}]}},
    "required": ["v", "next"],
}
PLACES: dict[str, dict[str, Any]] = {
    "definition": {"properties": {"x": {"$ref": "#/$defs/L"}}, "required": ["x"], "$defs": {"L": LINK}},
    "root": {"properties": {"of": {"type": "array", "items": {"$ref": "#"}}}},
    "property": {"properties": {"a/b": {"type": "array", "items": {"$ref": "#/properties/a~1b"}}}},
    "each other": {
        "properties": {"x": {"$ref": "#/definitions/A"}},
        "definitions": {
            "A": {"type": "object", "properties": {"b": {"$ref": "#/definitions/B"}}},
            "B": {"type": "array", "items": {"$ref": "#/definitions/A"}},
        },
    },
    "anchor": {"properties": {"x": {"$ref": "#l"}}, "$defs": {"L": {"$anchor": "l", "items": {"$ref": "#l"}}}},
}


@pytest.mark.parametrize("name", PLACES)
def test_tools_of_servers_keep_their_recursion(name: str) -> None:
    """Their arguments are a JSON schema, not a class."""
    asked = {"type": "object", **PLACES[name]}
    served = StructuredTool(name="served", description="d", args_schema=asked, func=lambda **_: 1)
    bound: Any = chat().bind_tools([served])
    assert bound.kwargs["tools"][0]["function"]["parameters"] == asked


@pytest.mark.parametrize(
    "reference", ["https://example.com/x.json", "other.json#/A", "#/$defs/Missing", "#/properties/zz/0", "#/$defs/A/b"]
)
def test_a_reference_that_leads_out_of_a_servers_tool_or_nowhere_is_named_as_not_enforced(reference: str) -> None:
    """As in a tool of OpenAI's form; LangChain refuses to inline it."""
    asked = {"type": "object", "properties": {"x": {"$ref": reference}}, "$defs": {"A": {"type": "object"}}}
    served = StructuredTool(name="served", description="d", args_schema=asked, func=lambda **_: 1)
    bound: Any = chat().bind_tools([served])
    assert bound.kwargs["tools"][0]["function"]["parameters"] == asked
    (note,) = ResponseOptions.of(bound.kwargs).schemas.relaxed
    assert reference in note


def test_a_property_may_be_called_like_a_reference() -> None:
    asked = {"type": "object", "properties": {"$ref": {"type": "string"}}}
    served = StructuredTool(name="served", description="d", args_schema=asked, func=lambda **_: 1)
    bound: Any = chat().bind_tools([served])
    assert bound.kwargs["tools"][0]["function"]["parameters"]["properties"] == asked["properties"]
    assert not ResponseOptions.of(bound.kwargs).schemas.relaxed


def test_a_call_of_a_servers_tool_fits_its_schema_below_the_first_level() -> None:
    asked = {"type": "object", **PLACES["definition"]}
    served = StructuredTool(name="served", description="d", args_schema=asked, func=lambda **_: 1)
    model = ChatS2T(model=tiny_model(max_position_embeddings=4096), max_tokens=200, temperature=1.0)
    for seed in range(4):
        (call,) = model.bind_tools([served], tool_choice="any").invoke("hello", seed=seed).tool_calls
        assert not SchemaValidator(canonicalize(asked).schema).error_of(call["args"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strict", [None, True])
@pytest.mark.parametrize("root", [PICKED, {"type": "array", "items": {"const": 1}, "minItems": 1, "maxItems": 1}])
def test_openais_named_schemas_bind(method: Any, strict: bool | None, root: dict[str, Any]) -> None:
    named = {"name": "named", "description": "d", "schema": root, "strict": True}
    model = chat("b", '"') if root is PICKED else chat()
    for given in (named, {"type": "json_schema", "json_schema": named}):
        asked = model.with_structured_output(given, method=method, strict=strict, include_raw=True)
        answer = asked.invoke("hello")
        shown = answer["raw"].text or (answer["raw"].tool_calls + answer["raw"].invalid_tool_calls)[0]["name"]
        assert shown == "named" or "x" in shown or shown == "[1]"
        assert answer["parsed"] in ([1], None)
        assert answer["parsed"] or "uniqueItems" in str(answer["parsing_error"])


@pytest.mark.parametrize("name", ["array", "enum", "string"])
def test_a_tool_whose_arguments_are_no_object_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadSchema, match="tool 'Root'"):
        chat().bind_tools([{"title": "Root", "description": "d", **ROOTS[name][0]}])


# ---------------------------------------------------------------------- short answers


@pytest.mark.parametrize("question", ["Good morning", "Thanks", "Ann has 37 shells and finds 48 more. How many now?"])
def test_a_short_answer_is_the_beginning_of_the_long_one(question: str) -> None:
    for model in (ChatS2T(), ChatS2T().bind_tools([PICKED])):
        whole = model.invoke(question, max_tokens=40)
        for room in (1, 2, 3, 4, 7):
            short = model.invoke(question, max_tokens=room)
            assert short.text
            assert whole.text.startswith(short.text) or not whole.text  # a call that has no room is not begun
            assert not short.invalid_tool_calls
            assert short.response_metadata["finish_reason"] == "length" or short.text == whole.text


NAME = {"type": "string", "maxLength": 12}
NAMED = {"title": "named", "description": "d", "type": "object", "properties": {"name": NAME}, "required": ["name"]}
NAMED |= {"additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "named", "schema": NAMED}}


def test_json_and_calls_are_whole_under_any_limit_and_say_whether_it_shortened_them() -> None:
    ledger = Ledger()
    form = chat("a", ledger=ledger).bind(response_format=FORM)
    call = chat("a").bind_tools([NAMED], tool_choice="any")
    whole, called = form.invoke("hello"), call.invoke("hello").tool_calls[0]["args"]
    assert json.loads(whole.text) == called == {"name": "a" * 12}
    kept = {True: 0, False: 0}
    for room in (*range(8, 30), 60):
        try:
            answer = form.invoke("hello", max_tokens=room)
        except ConfigError:  # no answer is so short
            continue
        shortened = "shortened" in answer.response_metadata["s2t"]
        assert answer.response_metadata["finish_reason"] == "stop"
        assert set(json.loads(answer.text)) == {"name"}
        assert shortened == (answer.text != whole.text)
        streamed: Any = reduce(add, form.stream("hello", max_tokens=room))
        assert streamed.text == answer.text
        assert ("shortened" in streamed.response_metadata["s2t"]) == shortened
        kept[shortened] += 1
        assert {record.shortened for record in ledger.records()[-2:]} == {shortened or None}
    assert all(kept.values())
    short = call.invoke("hello", max_tokens=60)
    assert short.response_metadata["finish_reason"] == "tool_calls"
    assert ("shortened" in short.response_metadata["s2t"]) == (short.tool_calls[0]["args"] != called)


def test_json_that_is_interrupted_is_cut() -> None:
    slow = {**FORM["json_schema"]["schema"], "properties": {"name": {"type": "string"}}}
    model = chat("a", on_step=lambda trace_id, step: time.sleep(0.05))
    model.engine  # noqa: B018 - loading is not on the clock
    wanted = {"type": "json_object", "schema": slow}
    answer = model.invoke("hello", response_format=wanted, s2t_budget=Budget(seconds=0.4))
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["s2t"]["stopped_by"]["unit"] == "seconds"
    assert answer.response_metadata["s2t"]["invalid"]


def test_text_that_a_model_wants_is_not_withheld_at_the_limit() -> None:
    assert chat("a", max_tokens=1).invoke("hello").text == "a"
    assert chat("a", max_tokens=3).bind_tools([PICKED]).invoke("hello").text == "aaa"
