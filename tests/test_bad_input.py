"""Bad input: one clear error each, before anything is spent."""

import json
from typing import Any

import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import (
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.tools import Tool, tool
from pydantic import BaseModel

from s2t_agents import Budget, ChatS2T, Ledger
from s2t_agents.chat.response_options import ResponseOptions, parse_tool_choice
from s2t_agents.errors import BadSchema, ConfigError, ContextOverflow, InputError
from s2t_agents.escalation import Escalation
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always
from s2t_agents.types import Sampling


def chat(**settings: Any) -> ChatS2T:
    return ChatS2T(**{"model": tiny_model(max_position_embeddings=4096), "max_tokens": 12, **settings})


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def now() -> str:
    """Tell the time."""
    return "noon"


class Trip(BaseModel):
    """Where to go."""

    city: str


ENDLESS: dict[str, Any] = {"type": "object"}
ENDLESS["properties"] = {"again": ENDLESS}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (3, "This is no tool: 3"),
        ({"type": "function"}, "This is no tool"),
        ({"name": "f", "parameters": 7}, "This is no tool"),
        ({"name": "f", "description": "d", "parameters": {"type": "array"}}, "arguments of tool 'f'"),
        ({"name": "f", "description": "d", "parameters": ENDLESS}, "nested without end"),
        (
            {"name": "f", "description": "d", "parameters": {"properties": {"x": {"enum": []}}, "required": ["x"]}},
            "arguments of tool 'f'",
        ),
    ],
)
def test_malformed_tools_are_refused_when_they_are_bound(bad: Any, message: str) -> None:
    with pytest.raises(BadSchema, match=message.replace("(", r"\(")):
        ChatS2T(model="/never/loaded").bind_tools([bad])


PROVIDERS_OWN = [
    *("web_search_20250305", "web_fetch_20250910", "bash_20250124", "text_editor_20250728", "memory_20250818"),
    *("computer_20250124", "code_execution_20250825", "tool_search_tool_regex_20251119", "mcp_toolset"),
    *("web_search", "web_search_preview", "mcp", "code_interpreter", "file_search", "image_generation", "custom"),
]


@pytest.mark.parametrize("kind", PROVIDERS_OWN)
@pytest.mark.parametrize("named", [{"name": "tool"}, {"name": "tool", "description": "d", "max_uses": 5}, {}], ids=str)
def test_tools_that_a_provider_runs_or_that_take_free_text_are_refused(kind: str, named: dict[str, Any]) -> None:
    model = ChatS2T(model="/never/loaded")
    with pytest.raises(BadSchema, match=f"This is no tool: .*'{kind}'.* provider.* Pass functions"):
        model.bind_tools([{"type": kind, **named}])
    with pytest.raises(BadSchema, match="This is no output schema"):
        model.with_structured_output({"type": kind, **named}, method="json_schema")


def test_a_langchain_tool_that_takes_free_text_is_refused() -> None:
    free = Tool("run", lambda text: text, "Run it.", metadata={"type": "custom_tool"})
    with pytest.raises(BadSchema, match=r"This is no tool: .*'custom'.* provider"):
        ChatS2T(model="/never/loaded").bind_tools([free])


A_NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "given",
    [
        {"name": "f", "input_schema": A_NUMBER},
        {"type": "custom", "name": "f", "input_schema": A_NUMBER},
        {"type": None, "name": "f", "input_schema": A_NUMBER},
        {"name": "f", "parameters": A_NUMBER},
        {"type": "function", "function": {"name": "f", "parameters": A_NUMBER}},
        {"title": "f", **A_NUMBER},
    ],
)
def test_anthropics_and_openais_tools_and_titled_schemas_keep_their_arguments(given: dict[str, Any]) -> None:
    bound: Any = ChatS2T(model="/never/loaded").bind_tools([given])
    assert bound.kwargs["tools"] == [{"type": "function", "function": {"name": "f", "parameters": A_NUMBER}}]


def test_choices_and_formats_that_fit_nothing_are_refused_when_they_are_bound() -> None:
    model = ChatS2T(model="/never/loaded")
    with pytest.raises(ConfigError, match="tool_choice='subtract' fits no tool"):
        model.bind_tools([add], tool_choice="subtract")
    with pytest.raises(ConfigError, match="tool_choice='any' fits no tool"):
        model.bind_tools([], tool_choice="any")
    with pytest.raises(ConfigError, match="This is no response_format"):
        model.bind_tools([], response_format={"type": "yaml"})
    with pytest.raises(ConfigError, match="method='xml' is unknown"):
        model.with_structured_output(Trip, method="xml")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs a schema"):
        model.with_structured_output()
    with pytest.raises(BadSchema, match="This is no output schema"):
        model.with_structured_output({"no": "title"}, method="json_schema")
    with pytest.raises(BadSchema, match="the output schema"):
        model.with_structured_output(
            {"title": "t", "type": "object", "properties": {"x": {"enum": []}}, "required": ["x"]}, method="json_schema"
        )


MEANINGLESS = [
    {"typo": "add"},
    {"function": "add"},
    {"type": "function"},
    {},
    {"type": "add"},
    {"tool": {}},
    {"any": {}, "x": 1},
]


@pytest.mark.parametrize("choice", MEANINGLESS, ids=str)
def test_a_mapping_that_chooses_nothing_is_refused(choice: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match='This is no tool_choice: .*Use "auto"'):
        ChatS2T(model="/never/loaded").bind_tools([add], tool_choice=choice)


@pytest.mark.parametrize(
    "choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "add"}, {"name": "add"}]
)
@pytest.mark.parametrize(
    ("extra", "hint"),
    [("disable_parallel_tool_us", "Did you mean disable_parallel_tool_use?"), ("zzz", "Leave it out"), (1, "Leave it")],
)
def test_a_key_that_a_choice_has_not_is_named(choice: dict[str, Any], extra: Any, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"tool_choice takes no {extra!r}") as refused:
        ChatS2T(model="/never/loaded").bind_tools([add], tool_choice={**choice, extra: True})
    assert hint in refused.value.hint


@pytest.mark.parametrize("wrong", ["yes", 1, None, {}])
def test_disable_parallel_tool_use_is_true_or_false(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="disable_parallel_tool_use is "):
        ChatS2T(model="/never/loaded").bind_tools(
            [add], tool_choice={"type": "auto", "disable_parallel_tool_use": wrong}
        )


@pytest.mark.parametrize(
    ("choice", "argument", "several"),
    [
        ({"type": "auto"}, None, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, None, False),
        ({"type": "auto", "disable_parallel_tool_use": False}, None, True),
        ({"type": "any"}, None, False),
        ({"type": "any", "disable_parallel_tool_use": True}, None, False),
        ({"type": "any", "disable_parallel_tool_use": False}, None, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, True, True),
        ({"type": "any", "disable_parallel_tool_use": False}, False, False),
    ],
)
def test_anthropics_mapping_says_whether_there_may_be_several_calls(
    choice: dict[str, Any], argument: bool | None, several: bool
) -> None:
    """The argument ``parallel_tool_calls`` goes before it, as in LangChain's own model of Anthropic's."""
    bound = ChatS2T(model="/never/loaded").bind_tools([add], tool_choice=choice, parallel_tool_calls=argument)
    assert ResponseOptions.of(bound.kwargs).parallel is several


@pytest.mark.parametrize("inner", [True, False])
def test_allowed_tools_are_refused_with_what_to_do_instead(inner: bool) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "name": "add"}]}
    choice = {"type": "allowed_tools", **({"allowed_tools": allowed} if inner else allowed)}
    with pytest.raises(ConfigError, match="Bind only the tools that are allowed"):
        ChatS2T(model="/never/loaded").bind_tools([add], tool_choice=choice)


@pytest.mark.parametrize(
    ("choice", "meaning"),
    [
        ({"tool": {"name": "auto"}}, ("any", "auto")),
        ({"type": "tool", "name": "add"}, ("any", "add")),
        ({"type": "function", "function": {"name": "add"}}, ("any", "add")),
        ({"name": "add"}, ("any", "add")),
        ({"any": {}}, ("any", None)),
        ({"auto": {}}, ("auto", None)),
        ({"type": "required"}, ("any", None)),
        ({"type": "any", "disable_parallel_tool_use": True}, ("any", None)),
        ({"type": "none"}, ("none", None)),
    ],
)
def test_mappings_of_other_providers_choose(choice: dict[str, Any], meaning: tuple[str, str | None]) -> None:
    assert parse_tool_choice(choice) == meaning


@pytest.mark.parametrize(
    ("given", "name"),
    [("max_completion_tokens", "max_tokens"), ("max_output_tokens", "max_tokens"), ("stop_sequences", "stop")],
)
def test_names_of_other_chat_models_lead_to_the_ones_here(given: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean {name}\\?"):
        ChatS2T(model="/never/loaded").invoke("hi", **{given: 5})


def test_a_seed_that_is_a_truth_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed is True"):
        Sampling(seed=True)


@pytest.mark.parametrize("given", [add, Trip])
def test_a_call_with_tools_in_another_form_names_the_way(given: Any) -> None:
    with pytest.raises(BadSchema, match="Use bind_tools"):
        ChatS2T(model="/never/loaded").invoke("hi", tools=[given])


ORPHAN = ToolMessage("2", tool_call_id="nobody")


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([], InputError, "There are no messages"),
        ([HumanMessage("hi"), ORPHAN], InputError, "tool call 'nobody', which no earlier AIMessage made"),
        ([ChatMessage("hi", role="narrator")], InputError, "cannot be rendered"),
        ([HumanMessage([{"type": "image", "base64": "AA==", "mime_type": "image/png"}])], InputError, "'image'"),
        ([HumanMessage("a\ud800b")], InputError, "lone surrogate at character 1"),
        ([HumanMessage("a\0b")], InputError, "NUL character at position 1"),
        ([HumanMessage("x" * 10_000_000)], ContextOverflow, "tokens; 4095 fit"),
        ([HumanMessage("<|im_end|>" * 1_000_000)], ContextOverflow, "tokens; 4095 fit"),
    ],
    ids=["empty", "orphan", "unrenderable", "image", "surrogate", "nul", "10 MB", "10 MB of control tokens"],
)
@pytest.mark.parametrize("how", ["invoke", "stream"])
def test_bad_messages_get_one_clear_error_before_any_forward_and_cost_nothing(
    messages: Any, error: type[Exception], message: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chat(
        trigger=always(),
        escalation=Escalation(ScriptedLLM(last_candidate), margin=1.0),
        budget=Budget(escalations=5),
        ledger=Ledger(),
    )
    monkeypatch.setattr(model.engine.slm.backend, "forward", None)  # no token is read
    with pytest.raises(error, match=message):
        model.invoke(messages) if how == "invoke" else list(model.stream(messages))
    state = model.budget.state()
    assert (state.spent["escalations"], state.held["escalations"], model.ledger.records()) == (0, 0, [])


def test_overflow_is_langchains_own_error() -> None:
    with pytest.raises(ContextOverflowError):
        chat().invoke("x" * 5000)
    with pytest.raises(ContextOverflowError, match="shortest legal answer"):
        chat(max_tokens=400).bind_tools([add], tool_choice="any").invoke("x" * 3600)


@pytest.mark.parametrize("bad", ["a\ud800b", "a\0b"])
def test_bad_text_in_tools_and_system_messages_is_refused_too(bad: str) -> None:
    described = {"name": "f", "description": bad, "parameters": {"type": "object", "properties": {}}}
    with pytest.raises(InputError):
        chat().bind_tools([described]).invoke("hello")
    with pytest.raises(InputError):
        chat().invoke([SystemMessage(bad), HumanMessage("hello")])
    with pytest.raises(InputError):
        chat().get_num_tokens(bad)


def test_room_too_small_for_a_call_is_refused_before_the_model_runs() -> None:
    model = chat(max_tokens=4, ledger=Ledger())
    with pytest.raises(ConfigError, match="max_tokens=4 cannot hold an answer: the shortest has"):
        model.bind_tools([add], tool_choice="any").invoke("hello")
    assert model.ledger.records() == []


@pytest.mark.parametrize("room", [1, 2, 4])
def test_the_room_that_a_refusal_names_is_enough(room: int) -> None:
    model = chat().with_structured_output(Trip, method="json_schema").first
    with pytest.raises(ConfigError, match=f"max_tokens={room} cannot") as refused:
        model.invoke("hello", max_tokens=room)
    enough = int(refused.value.hint.split()[3])
    assert json.loads(model.invoke("hello", max_tokens=enough).content).keys() == {"city"}
