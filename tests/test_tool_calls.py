"""The streaming parser of tool calls: chunks join to the result, malformed calls are invalid calls, no text is lost."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, AIMessageChunk
from templates import family

from s2t_agents import ChatS2T
from s2t_agents.chat.accounting import Account
from s2t_agents.chat.attribution import Caller
from s2t_agents.chat.generation import Generation, GenerationRequest
from s2t_agents.chat.response_options import ResponseOptions
from s2t_agents.formats.tool_calls import CLOSE, OPEN, MessageDelta, ToolCallParser, as_written, tag_ids
from s2t_agents.server.chat_answers import chat_completion, chat_events
from s2t_agents.testing import tiny_model
from s2t_agents.types import Step

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(), JSON_VALUES, max_size=3)
NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name.encode("utf-8", "ignore").decode() == name)
WORDS = st.text(alphabet="ab<> é", max_size=12)


def spelt(text, cuts=()):
    """The text as steps of a vocabulary that spells the tags out."""
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [(None, text[a:b]) for a, b in itertools.pairwise(edges)]


def tagged(text):
    """The text as steps, one character each, of a vocabulary where each tag is one token: 1 and 2."""
    steps = []
    while text:
        tag = next((tag for tag in (OPEN, CLOSE) if text.startswith(tag)), None)
        steps.append(({OPEN: 1, CLOSE: 2}[tag], tag) if tag else (None, text[0]))
        text = text[len(tag or "x") :]
    return steps


def parse(steps, **ids):
    numbers = itertools.count()
    parser = ToolCallParser(**ids, new_id=lambda: f"call_{next(numbers)}")
    deltas = [parser.push(token, text) for token, text in steps]
    deltas.append(parser.finish())
    if parser.unparseable:
        deltas.append(MessageDelta(tool_call_chunks=parser.unparseable))
    return parser, deltas


def joined(deltas):
    """What LangChain makes of the stream."""
    chunks = [AIMessageChunk(content=d.text, tool_call_chunks=d.tool_call_chunks) for d in deltas]
    message = chunks[0]
    for chunk in chunks[1:]:
        message += chunk
    return message


def body(name, args, **more):
    return json.dumps({"name": name, "arguments": args, **more}, ensure_ascii=False)


def call(name, args):
    return f"{OPEN}\n{body(name, args)}\n{CLOSE}"


@settings(max_examples=150, deadline=None)
@given(NAMES, ARGUMENTS, st.lists(st.integers(0, 200), max_size=20), st.booleans())
def test_a_call_comes_through_whole_however_it_is_split(name, args, cuts, ascii_only):
    text = f"{OPEN}\n{json.dumps({'name': name, 'arguments': args}, ensure_ascii=ascii_only)}\n{CLOSE}"
    parser, deltas = parse(spelt(text, cuts))
    assert [(c["name"], c["args"]) for c in parser.tool_calls] == [(name, args)]
    assert (parser.text, parser.invalid_tool_calls) == ("", [])
    pieces = [chunk for delta in deltas for chunk in delta.tool_call_chunks]
    assert json.loads("".join(piece["args"] for piece in pieces)) == args
    assert (pieces[0]["name"], pieces[0]["id"], pieces[0]["index"]) == (name, "call_0", 0)
    assert all((p["name"], p["id"], p["index"]) == (None, None, 0) for p in pieces[1:])


PARTS = WORDS | st.just(call("f", {"a": "</tool_call>"})) | st.text(alphabet='{}[]":, \nae\\', max_size=9)


@settings(max_examples=150, deadline=None)
@given(st.lists(PARTS, max_size=5), st.lists(st.integers(0, 300), max_size=20), st.booleans())
def test_the_stream_joined_by_langchain_says_what_the_parser_says(parts, cuts, as_tokens):
    text = "".join(part + (OPEN if i % 2 else "") for i, part in enumerate(parts))
    parser, deltas = parse(tagged(text), open_id=1, close_id=2) if as_tokens else parse(spelt(text, cuts))
    message = joined(deltas)
    assert message.content == parser.text
    assert [(c["name"], c["args"], c["id"]) for c in message.tool_calls] == [
        (c["name"], c["args"], c["id"]) for c in parser.tool_calls
    ]
    assert [(c["name"], c["args"], c["id"]) for c in message.invalid_tool_calls] == [
        (c["name"], c["args"], c["id"]) for c in parser.invalid_tool_calls
    ]


@given(st.text(alphabet="<tool_cal>/ \né{", max_size=40), st.lists(st.integers(0, 40), max_size=8))
def test_text_without_a_tag_is_shown_as_it_is(text, cuts):
    text = text.replace(OPEN, "")
    parser, deltas = parse(spelt(text, cuts))
    assert parser.text == text == "".join(delta.text for delta in deltas)
    assert not parser.tool_calls
    assert not parser.invalid_tool_calls


def test_arguments_stream_before_the_call_is_whole():
    steps = [(1, OPEN), (None, '{"name": "f", "arguments": {"city": "Par'), (None, 'is"}}'), (2, CLOSE)]
    _, deltas = parse(steps, open_id=1, close_id=2)
    shown = [[(c["name"], c["args"]) for c in delta.tool_call_chunks] for delta in deltas]
    assert shown == [[], [("f", '{"city": "Par')], [(None, 'is"}')], [], []]


def test_text_round_calls_stays_and_the_space_next_to_them_goes():
    parser, deltas = parse(spelt(f"Let me see. \n{call('f', {})}\n{call('g', {'x': 1})}\n \n"))
    assert parser.text == "Let me see."
    assert [c["name"] for c in parser.tool_calls] == ["f", "g"]
    assert [c["index"] for d in deltas for c in d.tool_call_chunks if c["name"]] == [0, 1]
    parser, _ = parse(spelt(f"\n{call('f', {})}\nThere."))
    assert parser.text == "There."
    parser, _ = parse(spelt(f"One {call('f', {})}\nTwo"))
    assert parser.text == "One \nTwo"


def test_a_tag_that_is_one_token_is_only_that_token():
    letters = f'{OPEN}{{"name": "f"}}{CLOSE}'
    parser, _ = parse([(None, c) for c in letters], open_id=1, close_id=2)
    assert parser.text == letters
    assert not parser.tool_calls


@pytest.mark.parametrize("silent", [True, False])
def test_a_tag_token_counts_whether_or_not_its_text_is_shown(silent):
    steps = [(1, "" if silent else OPEN), (None, body("f", {})), (2, "" if silent else CLOSE)]
    parser, _ = parse(steps, open_id=1, close_id=2)
    assert [(c["name"], c["args"]) for c in parser.tool_calls] == [("f", {})]
    assert parser.text == ""


def test_the_letters_of_a_tag_inside_a_string_are_the_strings():
    parser, _ = parse(spelt(call("f", {"html": f"{CLOSE} {OPEN}"})))
    assert parser.tool_calls[0]["args"] == {"html": f"{CLOSE} {OPEN}"}


def test_arguments_before_the_name_wait_for_it():
    steps = [(1, ""), (None, '{"arguments": {"a": 1}'), (None, ', "name": "f"}'), (2, "")]
    parser, deltas = parse(steps, open_id=1, close_id=2)
    assert not deltas[1]
    (chunk,) = deltas[2].tool_call_chunks
    assert (chunk["name"], chunk["args"], chunk["id"], chunk["index"]) == ("f", '{"a": 1}', "call_0", 0)
    assert parser.tool_calls[0]["args"] == {"a": 1}


@pytest.mark.parametrize("text", ['{"name": "f"}', '{"name": "f", "arguments": {}}', '{ "id" : 3 , "name":"f" }'])
def test_a_call_without_arguments_has_empty_ones(text):
    parser, deltas = parse(spelt(f"{OPEN}{text}{CLOSE}"))
    assert parser.tool_calls == joined(deltas).tool_calls
    assert parser.tool_calls[0]["args"] == {}


MALFORMED = [
    "", "no json", "[]", '"f"', "{", '{"name": "f"', '{"name": 3, "arguments": {}}', '{"arguments": {}}', "{}",
    '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "{}"}', '{"name": "f", "arguments": {"a": 1',
    '{"name": "f", "arguments": {"a": "cut', '{"name": "f", "arguments": {"a": tru}}', '{"name": "", "arguments": {}}',
    '{"name": "f", "arguments": {"a": "\\', '{"name": "f", "name": "g"}',
    '{"name": "f", "arguments": {"a": "\\ud800"}}', '{"name": "f", "arguments": {"a": [1, -1e999]}}',
    '{"name": "f", "arguments": {"a": {"b": NaN}}}', '{"name": "f", "arguments": {"a": 1' + "0" * 5000 + "}}",
    '{"name": "f", "arguments": ' + '{"a": ' * 5000, '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:40])
def test_what_is_no_call_is_an_invalid_one_with_its_text_and_the_reason(text):
    size = 1 + len(text) // 500  # what joins the stream reads all of it again at every piece
    pieces = [(None, text[at : at + size]) for at in range(0, len(text), size)]
    parser, deltas = parse([(1, ""), *pieces, (2, "")], open_id=1, close_id=2)
    assert parser.tool_calls == joined(deltas).tool_calls == []
    (invalid,) = parser.invalid_tool_calls
    assert invalid["error"]
    assert invalid["id"] == "call_0"
    assert invalid["name"] or invalid["args"].startswith(text)


def test_a_call_that_was_cut_off_is_never_a_sound_one():
    parser, deltas = parse(spelt(f'{OPEN}{{"name": "pay", "arguments": {{"amount": 10'))
    assert parser.tool_calls == joined(deltas).tool_calls == []
    (invalid,) = parser.invalid_tool_calls
    assert invalid["name"] == "pay"
    assert "cut off" in invalid["error"]
    assert invalid["args"].startswith('{"amount": 10')
    assert as_written(invalid["args"]) == '{"amount": 10'


@pytest.mark.parametrize("text", ['{"amount": 10', '{"of": "a', '{"of": [1, ', "{"])
async def test_an_http_client_gets_a_call_that_was_cut_off_as_it_was_written(text):
    parser, deltas = parse(spelt(f'{OPEN}{{"name": "pay", "arguments": {text}'))
    answer = AIMessage("", invalid_tool_calls=parser.invalid_tool_calls)
    (shown,) = chat_completion(answer, answer_id="1", model="m")["choices"][0]["message"]["tool_calls"]
    assert shown["function"] == {"name": "pay", "arguments": text}

    async def chunks():
        for delta in deltas:
            metadata = {"finish_reason": "length"} if delta is deltas[-1] and parser.unparseable else {}
            yield AIMessageChunk("", tool_call_chunks=delta.tool_call_chunks, response_metadata=metadata)

    events = [event async for event in chat_events(chunks(), answer_id="1", model="m", with_usage=False)]
    told = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    calls = [call for event in told for call in event["choices"][0]["delta"].get("tool_calls", ())]
    assert "".join(call["function"]["arguments"] for call in calls) == text


def test_text_after_a_whole_call_is_kept_as_an_invalid_call():
    parser, _ = parse(spelt(f"{OPEN}{body('f', {})} {body('g', {})}{CLOSE}"))
    assert [c["name"] for c in parser.tool_calls] == ["f"]
    (rest,) = parser.invalid_tool_calls
    assert rest["args"].startswith(body("g", {}))


def test_an_unclosed_quote_does_not_swallow_what_follows_the_call():
    parser, _ = parse(spelt(f'{OPEN}\n{{"name": "f\n{CLOSE}\nDone.'))
    assert parser.text == "Done."
    assert len(parser.invalid_tool_calls) == 1


@pytest.mark.parametrize(("name", "known"), [("qwen2_5", True), ("llama3", False)])
def test_tags_are_looked_up_in_the_vocabulary(name, known):
    tokenizer = family(name)
    expected = tuple(tokenizer.convert_tokens_to_ids([OPEN, CLOSE])) if known else (None, None)
    assert tag_ids(tokenizer) == expected


PAY = {"type": "function", "function": {"name": "pay", "parameters": {"type": "object", "properties": {}}}}


def answered(request, text, name="llama3"):
    """A generation under the request that wrote this text, in a vocabulary that spells the tags out by default."""
    tokenizer = family(name)
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    generation = Generation(
        (Step(at, at, i, i, "slm") for at, i in enumerate(ids)),
        Account("m", 1, Caller()),
        GenerationRequest([1], None, 400, request.parser(tokenizer), frozenset([tokenizer.eos_token_id])),
        tokenizer,
    )
    deltas = list(generation.deltas())
    assert "".join(delta.text for delta in deltas) == generation.parser.text
    return generation


@pytest.mark.parametrize("name", ["llama3", "qwen2_5"])
@pytest.mark.parametrize(
    "request_", [ResponseOptions(), ResponseOptions(tools=(PAY,), tool_choice="none")], ids=["no tools", "none"]
)
def test_where_no_call_is_legal_a_spelt_one_is_text(request_, name):
    text = f"First.\n{call('pay', {})} \n{OPEN} and so on"
    generation = answered(request_, text, name)
    assert generation.parser.text == text
    assert (generation.parser.tool_calls, generation.parser.invalid_tool_calls) == ([], [])
    assert generation.finish_reason == "stop"
    assert [c["name"] for c in answered(ResponseOptions(tools=(PAY,)), text).parser.tool_calls] == ["pay"]


@pytest.mark.parametrize("tools", [(), (PAY,)], ids=["no tools", "tools"])
def test_a_json_reply_may_speak_of_the_tags(tools):
    text = json.dumps({"text": f"wrap it in {OPEN}{body('pay', {})}{CLOSE}"})
    request = ResponseOptions(tools=tools, reply={"type": "object"})
    assert answered(request, text).parser.text == text
    calls = answered(
        ResponseOptions(tools=(PAY,), reply={"type": "object"}), f"{call('pay', {})}\n{call('pay', {})}"
    ).parser
    assert [c["name"] for c in calls.tool_calls] == ["pay", "pay"]


@pytest.mark.parametrize("stop", ["harb", '"', "}", "call"])
def test_a_stop_string_does_not_apply_inside_a_call(stop):
    function = {"name": "sail", "parameters": {"type": "object", "properties": {"to": {"enum": ["harbour"]}}}}
    function["parameters"]["required"] = ["to"]
    model = ChatS2T(model=tiny_model(), max_tokens=120).bind_tools([function], tool_choice="any")
    for message in (model.invoke("hello"), model.invoke("hello", stop=[stop])):
        assert [(made["name"], made["args"]) for made in message.tool_calls] == [("sail", {"to": "harbour"})]
        assert message.invalid_tool_calls == []
        assert message.response_metadata["finish_reason"] == "tool_calls"
