"""Histories of other providers: text is read, provider-specific blocks are skipped, images are refused."""

import contextlib
import json
import logging
import re
import sys

import pytest
from langchain_core.messages import AIMessage, ChatMessage, FunctionMessage, HumanMessage, SystemMessage, ToolMessage

from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.chat.turns import to_template
from s2t_agents.errors import InputError
from s2t_agents.testing import tiny_tokenizer

ENCODER = PromptEncoder(tiny_tokenizer())
READ = {
    "refusal": ({"type": "refusal", "refusal": "I cannot."}, "I cannot."),
    "responses output": ({"type": "output_text", "text": "Yes.", "annotations": [{"type": "url_citation"}]}, "Yes."),
    "cited": ({"type": "text", "text": "Yes.", "citations": [{"type": "char_location", "cited_text": "no"}]}, "Yes."),
    "wrapped text": ({"type": "text", "text": {"value": "Yes.", "annotations": []}}, "Yes."),
    "untyped": ({"text": "Yes."}, "Yes."),
    "plain document": ({"type": "text-plain", "text": "Yes.", "mime_type": "text/plain"}, "Yes."),
    "code output": (
        {"type": "code_interpreter_call", "id": "c", "code": "print(6)", "outputs": [{"type": "logs", "logs": "6"}]},
        "6",
    ),
    "code execution": ({"type": "code_execution_result", "code_execution_result": "6", "outcome": 1}, "6"),
    "bash": (
        {"type": "bash_code_execution_tool_result", "tool_use_id": "b",
         "content": {"type": "bash_code_execution_result", "stdout": "6", "stderr": "", "return_code": 0}},
        "6",
    ),
    "found text": ({"type": "file_search_call", "id": "f", "queries": ["q"], "results": [{"text": "a"}, {"text": "b"}]},
                   "a\nb"),
    "mcp": ({"type": "mcp_call", "id": "m", "name": "f", "arguments": "{}", "output": "6"}, "6"),
    "web search": (
        {"type": "web_search_tool_result", "tool_use_id": "s1", "content": [
            {"type": "web_search_result", "url": "u", "title": "t", "encrypted_content": "xyz"},
            {"type": "web_search_result", "url": "v", "title": "w", "encrypted_content": "xyz"}]},
        "t\nw",
    ),
    "web fetch": (
        {"type": "web_fetch_tool_result", "tool_use_id": "f1", "content": {
            "type": "web_fetch_result", "url": "u", "content": {
                "type": "document", "title": "t", "source": {"type": "text", "data": "x"}}}},
        "t\nx",
    ),
    "fetched file": (
        {"type": "web_fetch_tool_result", "tool_use_id": "f1", "content": {
            "type": "web_fetch_result", "url": "u", "content": {
                "type": "document", "title": "t", "source": {"type": "base64", "data": "x"}}}},
        "t",
    ),
    "v1 result": ({"type": "server_tool_result", "tool_call_id": "s", "output": "6"}, "6"),
    "wrapped": ({"type": "non_standard", "value": {"type": "refusal", "refusal": "No."}}, "No."),
}  # fmt: skip
SKIPPED = [
    {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
    {"type": "web_search_tool_result", "tool_use_id": "s1", "content": [
        {"type": "web_search_result", "url": "u", "encrypted_content": "xyz"}]},
    {"type": "web_search_call", "id": "w1", "status": "completed", "action": {"query": "q", "sources": []}},
    {"type": "server_tool_call", "id": "x", "name": "search", "args": {}},
    {"type": "server_tool_call_chunk", "id": "x", "args": "{"},
    {"type": "server_tool_result", "tool_call_id": "x", "output": {"sources": []}},
    {"type": "non_standard", "value": {"a": 1}},
    {"type": "mcp_list_tools", "tools": [{"name": "x"}]},
    {"type": "executable_code", "executable_code": "print(6)", "language": "PYTHON"},
    {"type": "of_next_year", "id": "1"},
]  # fmt: skip
MEDIA = [
    {"type": "image", "base64": "x", "mime_type": "image/png"},
    {"type": "image_url", "image_url": {"url": "x"}},
    {"type": "input_image", "image_url": "x"},
    {"type": "image_generation_call", "result": "x"},
    {"type": "audio", "base64": "x"},
    {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}},
    {"type": "video", "url": "x"},
    {"type": "file", "file_id": "x"},
    {"type": "document", "source": {"type": "base64", "data": "x", "media_type": "application/pdf"}},
    {"type": "document", "source": {"type": "url", "url": "x"}},
    {"type": "document", "source": {"type": "content", "content": [{"type": "image", "base64": "x"}]}},
    {"type": "text-plain", "url": "x", "mime_type": "text/plain"},
    {"type": "text-plain", "file_id": "x", "title": "t", "mime_type": "text/plain"},
    {"type": "media", "data": "x", "mime_type": "video/mp4"},
    {"image": {"format": "png", "source": {"bytes": "x"}}},
    {"type": "non_standard", "value": {"type": "input_image", "image_url": "x"}},
]


def said(*messages):
    return to_template(messages)[-1]


@pytest.mark.parametrize(("block", "text"), READ.values(), ids=READ)
def test_what_holds_text_is_read(block, text):
    assert said(HumanMessage("q"), AIMessage([block]))["content"] == text
    assert said(HumanMessage("q"), AIMessage([block, {"type": "text", "text": " Ok."}]))["content"] == f"{text} Ok."


@pytest.mark.parametrize("block", SKIPPED, ids=lambda block: block["type"])
def test_what_holds_nothing_is_skipped_with_one_line_in_the_log(block, caplog):
    with caplog.at_level(logging.DEBUG, logger="s2t_agents"):
        assert said(HumanMessage("q"), AIMessage([block, block, {"type": "text", "text": "Ok."}]))["content"] == "Ok."
    [line] = caplog.messages
    assert "Message 1 (AIMessage)" in line
    assert block["type"] in line


@pytest.mark.parametrize("block", MEDIA, ids=lambda block: block.get("type", "untyped"))
@pytest.mark.parametrize("kind", [HumanMessage, AIMessage, SystemMessage])
def test_pictures_sound_and_files_are_refused_by_name(block, kind):
    with pytest.raises(InputError, match="This model reads text alone"):
        said(HumanMessage("q"), kind([{"type": "text", "text": "Look:"}, block]))


@pytest.mark.parametrize(
    "block", [{"type": "of_next_year"}, {"type": "non_standard", "value": {"a": 1}}, {"toolUse": {}}]
)
def test_what_a_user_gave_is_never_skipped(block):
    with pytest.raises(InputError, match="content block"):
        said(HumanMessage([block]))


def test_documents_of_text_are_read_with_their_titles():
    plain = {"type": "text", "media_type": "text/plain", "data": "Lamps: 85."}
    parts = {"type": "content", "content": [{"type": "text", "text": "Kites: 7."}]}
    blocks = [
        {"type": "document", "source": plain, "title": "Stock"},
        {"type": "text", "text": "\n"},
        {"type": "document", "source": parts},
    ]
    assert said(HumanMessage(blocks))["content"] == "Stock\nLamps: 85.\nKites: 7."


@pytest.mark.parametrize("kind", [HumanMessage, AIMessage, SystemMessage])
@pytest.mark.parametrize("content", [{"text": "Lämpchen: 85."}, {"base64": "TMOkbXBjaGVuOiA4\nNS4="}], ids=list)
@pytest.mark.parametrize(
    ("beside", "before"), [({}, ""), ({"title": "Stock"}, "Stock\n"), ({"context": "May", "title": "S"}, "S\nMay\n")]
)
def test_plain_documents_are_read_by_text_or_base64_with_title_and_context(kind, content, beside, before):
    block = {"type": "text-plain", "mime_type": "text/plain", "url": "x", **content, **beside}
    assert said(HumanMessage("q"), kind([block]))["content"] == f"{before}Lämpchen: 85."


@pytest.mark.parametrize("wrong", ["x", "====", "/w==", 5, ["eA=="]], ids=repr)
def test_a_plain_document_that_is_no_base64_of_utf8_is_refused(wrong):
    with pytest.raises(InputError, match=r"Message 0 .*'text-plain' content block.*base64"):
        said(HumanMessage([{"type": "text-plain", "base64": wrong}]))


EMPTY = [
    *({"type": kind} for kind in ("text", "text-plain", "input_text", "output_text", "summary_text", "refusal")),
    {"type": "text", "text": None},
    {"type": "text", "text": {"annotations": []}},
    {"type": "guard_content", "guard_content": {"text": "x"}},
    {"type": "document", "title": "t"},
    {"type": "document", "title": "t", "source": {"type": "text"}},
    {"type": "document", "document": {"name": "t", "source": {"bytes": "x"}}},
    {"document": {"name": "t", "source": {"bytes": "x"}}},
    {"type": "search_result", "title": "t", "source": "u"},
    {"type": "web_search_result", "url": "u"},
]
EMPTY_RESULTS = [
    {"type": "json"},
    {"type": "function_call_output"},
    {"type": "custom_tool_call_output", "output": None},
    {"type": "tool_result", "content": {"type": "image", "base64": "x"}},
]


@pytest.mark.parametrize("block", [*EMPTY, *EMPTY_RESULTS], ids=repr)
def test_a_block_without_its_content_does_not_vanish(block):
    call = AIMessage("", tool_calls=[{"id": "1", "name": "f", "args": {}}])
    with pytest.raises(InputError, match="Message 2 .*content block.*This model reads text alone"):
        said(HumanMessage("q"), call, ToolMessage([{"type": "text", "text": "x"}, block], tool_call_id="1"))
    if block in EMPTY:
        with pytest.raises(InputError, match="Message 0 .*content block.*This model reads text alone"):
            said(HumanMessage([{"type": "text", "text": "x"}, block]))


@pytest.mark.parametrize("block", [block for block in EMPTY if "title" not in block], ids=repr)
def test_a_models_own_block_without_its_content_is_named_in_the_log(block, caplog):
    with caplog.at_level(logging.DEBUG, logger="s2t_agents"):
        assert said(HumanMessage("q"), AIMessage([block, {"type": "text", "text": "Ok."}]))["content"] == "Ok."
    assert block.get("type", "document") in caplog.text


def test_results_are_read_as_blocks_too():
    call = AIMessage("", tool_calls=[{"id": "1", "name": "f", "args": {}}])
    found = {"type": "search_result", "title": "T", "source": "u", "content": [{"type": "text", "text": "x"}]}
    read = [
        ([{"type": "text", "text": "85"}, "12", {"text": "a\nb"}], "85\n12\na\nb"),
        ([{"type": "custom_tool_call_output", "output": "1"}], "1"),
        ([{"type": "function_call_output", "output": [{"type": "input_text", "text": "1"}, "2"]}], "1\n2"),
        ([{"type": "tool_result", "content": [{"type": "text", "text": "1"}], "tool_use_id": "1"}], "1"),
        ([{"type": "json", "json": {"a": 1}}], '{"a": 1}'),
        ([found], "T\nx"),
        ([{"text": "a"}], "a"),
    ]
    for content, text in read:
        assert said(HumanMessage("q"), call, ToolMessage(content, tool_call_id="1"))["content"] == text


ASKED = AIMessage([{"type": "tool_use", "id": each, "name": "f", "input": {}} for each in ("1", "2")])
FIRST = {"type": "tool_result", "tool_use_id": "1", "content": "85"}


@pytest.mark.parametrize(
    ("blocks", "read"),
    [
        ([FIRST], [("tool", "85")]),
        ([{**FIRST, "is_error": True}], [("tool", "85")]),
        ([{**FIRST, "content": []}], [("tool", "")]),
        ([{"type": "tool_result", "tool_use_id": "1"}], [("tool", "")]),
        ([{**FIRST, "content": [{"type": "text", "text": "8"}, {"type": "text", "text": "5"}]}], [("tool", "8\n5")]),
        ([{"type": "non_standard", "value": FIRST}], [("tool", "85")]),
        ([{"type": "function_call_output", "call_id": "1", "output": "85"}], [("tool", "85")]),
        ([FIRST, {**FIRST, "tool_use_id": "2", "content": "12"}], [("tool", "85"), ("tool", "12")]),
        ([FIRST, {"type": "text", "text": "And now?"}], [("tool", "85"), ("user", "And now?")]),
        (["See: ", FIRST, "and now?"], [("tool", "85"), ("user", "See: and now?")]),
    ],
)
@pytest.mark.parametrize("kind", [HumanMessage, lambda blocks: ChatMessage(role="user", content=blocks)])
def test_results_among_a_users_blocks_are_results_of_their_calls(blocks, read, kind):
    """Anthropic's own form: it has no messages of tools."""
    turns = to_template([HumanMessage("q"), ASKED, kind(blocks)])
    assert [(turn["role"], turn["content"]) for turn in turns[2:]] == read
    ids = [call["id"] for call in turns[1]["tool_calls"]]
    results = [turn for turn in turns if turn["role"] == "tool"]
    assert [(turn["tool_call_id"], turn["name"]) for turn in results] == [(each, "f") for each in ids[: len(results)]]


def test_they_are_rendered_as_messages_of_tools_are():
    native = [HumanMessage("q"), ASKED, HumanMessage([FIRST, {"type": "text", "text": "And now?"}]), AIMessage("12")]
    split = [HumanMessage("q"), ASKED, ToolMessage("85", tool_call_id="1"), HumanMessage("And now?"), AIMessage("12")]
    assert ENCODER.encode(native) == ENCODER.encode(split)


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ({**FIRST, "tool_use_id": "9"}, r"Message 2 \(HumanMessage\) answers tool call '9'"),
        ({"type": "tool_result", "content": "85"}, r"Message 2 \(HumanMessage\) answers"),
        *(
            ({**FIRST, "content": [media]}, r"Message 2 \(HumanMessage\) holds a '[\w-]+' content block")
            for media in MEDIA
        ),
    ],
)
def test_results_without_a_call_or_with_pictures_are_refused_by_the_message(block, named):
    with pytest.raises(InputError, match=named):
        ENCODER.render([HumanMessage("q"), ASKED, HumanMessage([block])])


@pytest.mark.parametrize(
    "block",
    [
        {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}},
        {"type": "tool_call", "id": "1", "name": "f", "args": {"x": 1}},
        {"type": "function_call", "call_id": "1", "id": "fc_9", "name": "f", "arguments": '{"x": 1}'},
    ],
)
def test_calls_that_stand_only_among_the_blocks_are_read_and_can_be_answered(block):
    message = AIMessage([{"type": "text", "text": "Let me see."}, block])
    made, answered = to_template([HumanMessage("q"), message, ToolMessage("2", tool_call_id="1")])[1:]
    assert [call["function"] for call in made["tool_calls"]] == [{"name": "f", "arguments": {"x": 1}}]
    assert answered["tool_call_id"] == made["tool_calls"][0]["id"]


def test_functions_of_the_older_kind_are_calls_and_results():
    older = AIMessage("", additional_kwargs={"function_call": {"name": "f", "arguments": '{"x": 1}'}})
    made, answered = to_template([HumanMessage("q"), older, FunctionMessage("2", name="f")])[1:]
    assert made["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert answered == {"role": "tool", "content": "2", "tool_call_id": made["tool_calls"][0]["id"], "name": "f"}
    with pytest.raises(InputError, match="'g', which no earlier AIMessage made"):
        to_template([HumanMessage("q"), older, FunctionMessage("2", name="g")])


@pytest.mark.parametrize(
    ("role", "read_as"),
    [("user", "user"), ("human", "user"), ("assistant", "assistant"), ("system", "system"), ("developer", "system")],
)
def test_chat_messages_are_read_by_their_role(role, read_as):
    assert said(ChatMessage("x", role=role)) == {"role": read_as, "content": "x"}


@pytest.mark.parametrize(
    "extra", [{"refusal": "I cannot."}, {"audio": {"id": "a", "data": "UklG", "transcript": "I cannot."}}]
)
def test_words_beside_an_empty_content_are_read(extra):
    assert said(HumanMessage("q"), AIMessage("", additional_kwargs=extra))["content"] == "I cannot."


def test_a_reply_schema_joins_a_system_message_of_blocks():
    from s2t_agents.chat.response_options import ResponseOptions

    request = ResponseOptions.of(
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}}
    )
    told = request.prompt([SystemMessage([{"type": "text", "text": "RULES"}]), HumanMessage("x")])
    text = PromptEncoder(tiny_tokenizer()).render(told)
    assert text.count("<|im_start|>system") == 1
    assert text.index("RULES") < text.index('{"type": "object"}')


@pytest.mark.parametrize("depth", [1000, 20_000])
@pytest.mark.parametrize("where", ["arguments", "tool"])
def test_what_is_nested_too_deep_to_be_rendered_is_refused_by_name(where, depth):
    nested = {}
    for _ in range(depth):
        nested = {"a": nested}
    calls = [{"name": "f", "args": nested if where == "arguments" else {}, "id": "1"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": nested}}] if where == "tool" else []
    with pytest.raises(InputError, match="nested too deep"):
        PromptEncoder(tiny_tokenizer()).render([HumanMessage("a"), AIMessage("", tool_calls=calls)], tools)


CALL = {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}
BLOCKS = [
    {"type": "text", "text": "a"},
    CALL,
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
    {"type": "reasoning", "reasoning": "a", "summary": [{"type": "summary_text", "text": "b"}]},
    {"type": "document", "source": {"type": "text", "data": "a"}, "title": "t"},
    {"type": "non_standard", "value": {"type": "text", "text": "a"}},
    {"type": "json", "json": {"a": 1}},
    {"type": "custom_tool_call_output", "output": "1"},
    {"type": "tool_result", "tool_use_id": "9", "content": "1"},
]


@pytest.mark.parametrize("wrong", [None, True, 5, 1.5, "", [], ["x"], [1], {}, {"a": 1}, {1, 2}, b"x"], ids=repr)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block["type"])
def test_a_field_of_a_wrong_type_is_read_skipped_or_refused(block, wrong):
    """Whatever another chat model or a program left in a block: text, or the one clear error."""
    answered = [AIMessage("", tool_calls=[{"id": "9", "name": "f", "args": {}}])]
    for key in block:
        for kind in (HumanMessage, AIMessage, lambda content: ToolMessage(content, tool_call_id="9")):
            message = kind("")
            message.content = [{**block, key: wrong}]
            with contextlib.suppress(InputError):
                ENCODER.render([HumanMessage("q"), *answered, message])


@pytest.mark.parametrize("wrong", [None, True, 5, ["x"], {"a": 1}, {1, 2}], ids=repr)
@pytest.mark.parametrize("key", ["reasoning_content", "function_call", "refusal", "audio"])
def test_a_wrong_type_beside_the_content_is_skipped(key, wrong):
    message = AIMessage("", additional_kwargs={key: wrong})
    ENCODER.render([HumanMessage("q"), message])
    assert said(HumanMessage("q"), message)["content"] == ""
    assert "reasoning_content" not in said(HumanMessage("q"), message)


def test_what_a_model_wrote_with_nul_characters_can_be_gone_on_from():
    call = {"id": "1", "name": "f", "args": {"a\0": ["x\0y", {"b": "\0"}]}}
    made = said(HumanMessage("q"), AIMessage("a\0b", tool_calls=[call], additional_kwargs={"reasoning_content": "\0h"}))
    assert (made["content"], made["reasoning_content"]) == ("ab", "h")
    assert made["tool_calls"][0]["function"]["arguments"] == {"a": ["xy", {"b": ""}]}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(float("inf"), sys.float_info.max), (-float("inf"), -sys.float_info.max), (float("nan"), None), (1e308, 1e308)],
)
def test_numbers_that_json_has_not_are_shown_as_json(value, shown):
    call = {"id": "1", "name": "f", "args": {"a": [value]}}
    told = ENCODER.render([HumanMessage("q"), AIMessage("", tool_calls=[call]), ToolMessage("", tool_call_id="1")])
    (arguments,) = re.findall(r'"arguments": (\{"a".*\})\}', told)
    assert json.loads(arguments, parse_constant=pytest.fail) == {"a": [shown]}


def test_a_huge_integer_in_a_call_is_refused_by_its_place():
    call = {"id": "1", "name": "f", "args": {"a": 10**5000}}
    with pytest.raises(InputError, match=r"A tool call of Message 1 .* integer of 16,610 bits; 4,096 fit. Give it as"):
        ENCODER.render([HumanMessage("q"), AIMessage("", tool_calls=[call])])
