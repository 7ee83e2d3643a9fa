"""``s2t serve``: OpenAI's API over ``ChatS2T``, answer for answer."""

from __future__ import annotations

import copy
import json
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import httpx
import pytest
from server_support import QUESTION, STOCK_QUESTION, STOCK_TOOL, demo_model, serving_chat
from tokenizers import processors

from s2t_agents import Budget, ChatS2T, Concurrency, Escalation, Ledger, errors
from s2t_agents.budget import Charge
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.server.error_responses import INTERNAL, error_body, shape_of
from s2t_agents.testing import ScriptedLLM, markov_model, tiny_model, tiny_tokenizer
from s2t_agents.triggers import when

ASK: dict[str, Any] = {"model": "s2t-demo", "messages": [{"role": "user", "content": QUESTION}]}
USE: dict[str, Any] = {
    "model": "s2t-demo",
    "messages": [{"role": "user", "content": STOCK_QUESTION}],
    "tools": [STOCK_TOOL],
}


@pytest.fixture(scope="module")
def model() -> ChatS2T:
    return demo_model(ledger=Ledger())


@pytest.fixture(scope="module")
def client(model: ChatS2T) -> Iterator[httpx.Client]:
    with serving_chat(model) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def posted(client: httpx.Client, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    response = client.post("/chat/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return dict(response.json())


def refused(client: httpx.Client, body: Any, status: int = 400) -> dict[str, Any]:
    response = client.post("/chat/completions", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def events_of(client: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, which ends with [DONE]."""
    with client.stream("POST", "/chat/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of a stream: a message, as one that is not streamed has it."""
    message: dict[str, Any] = {"content": "", "tool_calls": []}
    for event in events:
        for choice in event["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
                message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            message["finish_reason"] = choice["finish_reason"]
    return message


def whole(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer in the form of ``joined``."""
    [choice] = answer["choices"]
    calls = [each["function"] for each in choice["message"].get("tool_calls", ())]
    return {
        "content": choice["message"]["content"] or "",
        "tool_calls": calls,
        "finish_reason": choice["finish_reason"],
    }


def with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = [{**call, "arguments": json.loads(call["arguments"])} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def test_an_answer_is_the_chat_models_own(client: httpx.Client, model: ChatS2T) -> None:
    own = model.invoke(QUESTION)
    answer = posted(client, ASK)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "s2t-demo"
    assert whole(answer) == {"content": own.text, "tool_calls": [], "finish_reason": "stop"}
    assert own.usage_metadata is not None
    assert answer["usage"]["prompt_tokens"] == own.usage_metadata["input_tokens"]
    assert answer["usage"]["completion_tokens"] == own.usage_metadata["output_tokens"]
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == answer["s2t"]["reused_tokens"] > 0


@pytest.mark.parametrize(
    "body",
    [
        ASK,
        USE,
        {**USE, "tool_choice": "required"},
        {**USE, "tool_choice": {"type": "function", "function": {"name": "get_stock"}}},
        {**USE, "tool_choice": "none"},
        {**ASK, "max_tokens": 3},
        {**ASK, "max_completion_tokens": 3},
        {**ASK, "stop": "="},
        {**ASK, "stop": ["=", "shells"]},
        {**ASK, "temperature": 1.0, "seed": 7, "top_p": 0.9},
        {**ASK, "response_format": {"type": "text"}},
        {**ASK, "response_format": {"type": "json_object"}},
    ],
    ids=lambda body: " ".join(sorted(set(body) - {"model", "messages"})) or "plain",
)
def test_a_stream_says_what_the_answer_says(client: httpx.Client, body: dict[str, Any]) -> None:
    answer = posted(client, body)
    events = events_of(client, {**body, "stream_options": {"include_usage": True}})
    assert with_parsed_arguments(joined(events[:-1])) == with_parsed_arguments(whole(answer))
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-1]["choices"] == []
    for counted in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert events[-1]["usage"][counted] == answer["usage"][counted]
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert all(event["usage"] is None for event in events[:-1])
    assert "usage" not in events_of(client, body)[-1]


def test_a_limit_is_kept_and_told(client: httpx.Client) -> None:
    answer = posted(client, {**ASK, "max_tokens": 3})
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_tool_call_and_its_result_go_there_and_back(client: httpx.Client) -> None:
    called = posted(client, USE)["choices"][0]
    assert called["finish_reason"] == "tool_calls"
    [call] = called["message"]["tool_calls"]
    assert call["function"]["name"] == "get_stock"
    assert json.loads(call["function"]["arguments"]) == {"item": "lamps"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "85"}
    after = {**USE, "messages": [*USE["messages"], called["message"], result]}
    assert posted(client, after)["choices"][0]["message"]["content"].endswith("The answer is 94.")
    parts = [{"type": "text", "text": "8"}, {"type": "text", "text": "5"}]
    in_parts = {**USE, "messages": [*USE["messages"], called["message"], {**result, "content": parts}]}
    assert whole(posted(client, in_parts)) == whole(posted(client, after))


def test_a_schema_is_held(client: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"total": {"type": "integer"}, "unit": {"enum": ["shells", "lamps"]}},
        "required": ["total", "unit"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema, "strict": True}}
    found = json.loads(posted(client, {**ASK, "response_format": wanted})["choices"][0]["message"]["content"])
    assert isinstance(found["total"], int)
    assert found["unit"] in ("shells", "lamps")
    assert set(found) == {"total", "unit"}


@pytest.mark.parametrize(
    "hint",
    [
        {"user": "ann", "metadata": {"run": "1"}, "store": True, "service_tier": "auto"},
        {"prompt_cache_key": "k", "safety_identifier": "s", "prediction": {"type": "content", "content": "x"}},
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "modalities": ["text"]},
        {"temperature": None, "stop": None, "tools": None, "seed": None, "reasoning_effort": None, "audio": None},
        {"parallel_tool_calls": True, "stream_options": None},
    ],
)
def test_hints_and_neutral_values_change_nothing(client: httpx.Client, hint: dict[str, Any]) -> None:
    assert whole(posted(client, {**ASK, **hint})) == whole(posted(client, ASK))


@pytest.mark.parametrize(
    ("given", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"n": True}, "n", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"functions": []}, "functions", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"top_k": 5}, "top_k", "unsupported_parameter"),
        ({"top_a": 5}, "top_a", "unknown_parameter"),
        ({"temperature": "0"}, "temperature", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": 5}, "stop", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stop": ["a", ""]}, "stop.1", "invalid_value"),
        ({"stop": [None]}, "stop.0", "invalid_value"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", None),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"tool_choice": "any"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice.type", "invalid_value"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "missing_required_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type", "invalid_value"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "missing_required_parameter"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "invalid_value"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
            "messages.0.content.0.type",
            "missing_required_parameter",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}] * 10_001}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages.0.tool_calls", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0",
            "unsupported_content",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        ({"chat_template_kwargs": {"x": "<|im_end|>"}}, "chat_template_kwargs.x", "invalid_value"),
        ({"chat_template_kwargs": {str(at): 1 for at in range(33)}}, "chat_template_kwargs", "invalid_value"),
        *(
            ({"chat_template_kwargs": {name: True}}, "chat_template_kwargs", "invalid_value")
            for name in ("add_generation_prompt", "continue_final_message", "tokenize", "messages", "tools")
        ),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(
    client: httpx.Client, given: dict[str, Any], param: str | None, code: str | None
) -> None:
    error = refused(client, {**ASK, **given})
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code
    assert error["param"] == param
    assert not any(word in error["message"] for word in ("{'", "Value error", "constrained", "NamedTool"))


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, "context_length_exceeded"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "none"}]}, None),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "string", "enum": []}},
                }
            },
            "invalid_schema",
        ),
        ({"tools": [STOCK_TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_model_refuses_is_a_status_for_streams_too(
    client: httpx.Client, given: dict[str, Any], code: str | None, stream: bool
) -> None:
    assert refused(client, {**ASK, **given, "stream": stream})["code"] == code


def test_log_probabilities_are_those_of_the_small_model(client: httpx.Client) -> None:
    body = {**ASK, "logprobs": True, "top_logprobs": 3}
    answer = posted(client, body)
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(each["token"] for each in content) == answer["choices"][0]["message"]["content"]
    for each in content:
        scores = {one["token"]: one["logprob"] for one in each["top_logprobs"]}
        assert len(scores) == 3
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        assert sum(map(math.exp, scores.values())) <= 1.001
        assert each["logprob"] <= max(scores.values()) + 1e-6
        assert each["logprob"] == pytest.approx(scores.get(each["token"], each["logprob"]))
        assert bytes(each["bytes"]).decode() == each["token"]
    assert answer["choices"][0]["logprobs"]["refusal"] is None
    parts = [event["choices"][0]["logprobs"] for event in events_of(client, body)]
    assert [each["token"] for part in parts if part for each in part["content"]] == [one["token"] for one in content]
    assert posted(client, ASK)["choices"][0]["logprobs"] is None
    forced = posted(client, {**USE, "logprobs": True, "tool_choice": "required"})["choices"][0]["logprobs"]["content"]
    assert any(each["logprob"] == 0.0 for each in forced)
    assert refused(client, {**ASK, "top_logprobs": 3})["param"] == "top_logprobs"
    assert refused(client, {**ASK, "logprobs": True, "top_logprobs": 21})["param"] == "top_logprobs"


def test_the_bytes_of_tokens_join_to_the_answer(client: httpx.Client) -> None:
    body = {**ASK, "temperature": 2.0, "seed": 3, "max_tokens": 200, "logprobs": True, "top_logprobs": 20}
    choice = posted(client, body)["choices"][0]
    content = choice["logprobs"]["content"]
    told = [each for one in content for each in one["top_logprobs"]]
    assert any("\N{REPLACEMENT CHARACTER}" in each["token"] for each in told)
    assert all(each["bytes"] for each in told if each["token"])
    assert b"".join(bytes(each["bytes"]) for each in content).decode(errors="replace") == choice["message"]["content"]


@pytest.mark.parametrize("small", [{"temperature": 1e-38}, {"temperature": 5e-324}, {"temperature": 1, "top_p": 1e-46}])
def test_the_smallest_temperature_and_top_p_answer_as_zero_does(client: httpx.Client, small: dict[str, Any]) -> None:
    for path, body in (("chat/completions", ASK), ("completions", {"model": "s2t-demo", "prompt": QUESTION})):
        cold, greedy = (client.post(path, json={**body, **given}) for given in (small, {"temperature": 0}))
        assert cold.status_code == 200, cold.text
        assert cold.json()["choices"] == greedy.json()["choices"]


@pytest.mark.parametrize("prompt", ["ab c" * 300_000, [1] * 500_000, [[1] * 500_000]])
def test_a_prompt_that_cannot_fit_is_refused_by_its_length(client: httpx.Client, prompt: Any) -> None:
    answer = client.post("completions", json={"model": "s2t-demo", "prompt": prompt})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert isinstance(prompt, list) or "at least" in answer.json()["error"]["message"]  # it was not encoded


def test_no_error_names_a_path_of_the_servers() -> None:
    model = tiny_model()
    model.backend.name = "/srv/models/hidden/tiny.gguf"
    long = [5] * 600
    with serving_chat(ChatS2T(model=model)) as url, httpx.Client(base_url=url, timeout=30) as client:
        assert client.get("models").json()["data"][0]["id"] != model.name
        for path, body in (
            ("completions", {"model": "tiny", "prompt": long}),
            ("completions", {"model": "tiny", "prompt": "word " * 6000}),
            ("completions", {"model": "tiny", "prompt": [10**6]}),
            ("completions", {"model": "tiny", "prompt": []}),
            ("completions", {"model": "other", "prompt": "x"}),
            ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "word " * 6000}]}),
        ):
            body["model"] = client.get("models").json()["data"][0]["id"] if body["model"] == "tiny" else body["model"]
            answer = client.post(path, json=body)
            assert 400 <= answer.status_code < 500
            assert "/srv" not in answer.text, answer.text


@pytest.mark.parametrize("end", ["\n", "\r", "\x1b[31m", "\u2028"])
def test_no_text_of_a_request_ends_a_line_of_the_log(
    client: httpx.Client, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    caplog.set_level("DEBUG", "s2t_agents")
    name = f"a{end}ERROR of mine"
    odd = {"type": "object", "properties": {name: {"type": "string", "pattern": f"(({end}x", "format": f"f{end}"}}}
    bodies: list[dict[str, Any]] = [
        {**ASK, "tools": [{"type": "function", "function": {"name": name, "parameters": odd}}]},
        {**ASK, "response_format": {"type": "json_schema", "json_schema": {"name": name, "schema": odd}}},
        {**ASK, "tools": [{"type": "function", "function": {"name": "f", "parameters": {**odd, "enum": [name]}}}]},
        {**ASK, name: 1},
        {**ASK, "messages": [{"role": "tool", "content": name, "tool_call_id": name}]},
    ]
    for body in bodies:
        assert client.post("chat/completions", json={**body, "max_tokens": 40}).status_code in (200, 400)
    told = [each.getMessage() for each in caplog.records if each.name.startswith("s2t_agents")]
    assert any("does not enforce" in each for each in told)
    assert [each for each in told if end in each] == []


def test_a_completion_continues_a_text_and_token_ids_alike(client: httpx.Client, model: ChatS2T) -> None:
    text = "Ann has 37 shells and finds 48"
    whole_body = {"model": "s2t-demo", "prompt": text, "logprobs": 2, "max_tokens": 5}

    def complete(**given: Any) -> dict[str, Any]:
        response = client.post("/completions", json={**whole_body, **given})
        assert response.status_code == 200, response.text
        return dict(response.json())

    answer = complete()
    [choice] = answer["choices"]
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] == 5
    assert choice["finish_reason"] == "length"
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    for token, top in zip(choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"], strict=True):
        assert token in top  # as OpenAI has it: the chosen one is there, too, where it is not one of the likeliest
        assert 2 <= len(top) <= 3
    for prompt in (model.get_token_ids(text), [text], [model.get_token_ids(text)]):
        again = complete(prompt=prompt)["choices"][0]
        assert (again["text"], again["logprobs"]["tokens"]) == (choice["text"], choice["logprobs"]["tokens"])
    with client.stream("POST", "/completions", json={**whole_body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert complete(stop=choice["text"][2:4])["choices"][0]["text"] == choice["text"][:2]
    assert model.ledger is not None
    assert model.ledger.records()[-1].completion_tokens <= 5
    for wrong in (
        {"prompt": [10**6]},
        {"prompt": []},
        {"prompt": ["a", "b"]},
        {"echo": True},
        {"n": 2},
        {"prompt": {}},
    ):
        response = client.post("/completions", json={**whole_body, **wrong})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"]


FRAMES: dict[str, list[str]] = {
    "nothing": ["$A"],
    "BOS": ["<|endoftext|>", "$A"],
    "EOS": ["$A", "<|im_end|>"],
    "both": ["<|endoftext|>", "$A", "<|im_end|>"],
    "several": ["<|endoftext|>", "<|im_start|>", "$A", "<|im_end|>", "<|im_end|>"],
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
def test_a_text_is_continued_within_the_special_tokens_that_its_tokenizer_adds(frame: list[str]) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in frame if token != "$A"}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=list(ids.items())
    )
    model = ChatS2T(model=LanguageModel(tiny_model().model, tokenizer, name="framed"), max_tokens=8)
    at = frame.index("$A")
    before, after = [ids[token] for token in frame[:at]], [ids[token] for token in frame[at + 1 :]]
    with serving_chat(model) as url, httpx.Client(base_url=url, timeout=60) as client:

        def asked(prompt: Any, **given: Any) -> tuple[Any, Any]:
            body = {"model": "framed", "prompt": prompt, "logprobs": 0, "max_tokens": 4, **given}
            answer = client.post("/completions", json={**body, "return_tokens_as_token_ids": True}).json()
            return answer["usage"]["prompt_tokens"], answer["choices"][0]["logprobs"]["tokens"]

        for text in ("The capital", "<|endoftext|>The capital", "a<|im_start|>b<|im_end|>", " é"):
            plain = model.get_token_ids(text)
            assert not {*plain} & {*ids.values()}
            assert asked(text) == asked(text, add_special_tokens=True) == asked([*before, *plain, *after])
            assert asked(text, add_special_tokens=False) == asked(plain)
            assert asked(plain, add_special_tokens=True) == asked(plain)  # ids are what they are
        told = client.post(url.replace("/v1", "/tokenize"), json={"model": "framed", "prompt": "The capital"}).json()
        assert told["count"] == asked("The capital")[0]
        room = model.engine.slm.context_window - 1 - len(before) - len(after)
        for length, status in ((room, 200), (room + 1, 400)):
            body = {"model": "framed", "prompt": "x" * length, "max_tokens": 1}
            assert client.post("/completions", json=body).status_code == status


def test_an_added_token_without_an_embedding_is_not_put_before_a_text() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=["<begin>", "$A"], special_tokens=[("<begin>", tokenizer.bos_token_id)]
    )
    model = ChatS2T(model=LanguageModel(tiny_model().model, tokenizer, name="larger"))
    with serving_chat(model) as url:
        answer = httpx.post(f"{url}/completions", json={"model": "larger", "prompt": "hello"}, timeout=60)
        assert answer.json()["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize(
    ("stop", "given", "text"),
    [
        ("de", {}, "abc"),
        (["de"], {}, "abc"),
        (["zz", "ef", "de"], {"stop": None}, "abc"),
        (["de"], {"stop": []}, "abcdefg"),
        (["de"], {"stop": "f"}, "abcde"),
        (["de"], {"stop": ["zz", "b"]}, "a"),
        ([], {}, "abcdefg"),
        (None, {}, "abcdefg"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_ends_at_the_stop_strings_of_the_model_unless_it_names_others(
    stop: Any, given: dict[str, Any], text: str, stream: bool
) -> None:
    chain = markov_model(tiny_tokenizer(), [*"0abcdefg"], name="chain")
    with serving_chat(ChatS2T(model=chain, stop=stop)) as url:
        body = {"model": "chain", "prompt": "0", "max_tokens": 7, "stream": stream, **given}
        told = httpx.post(f"{url}/completions", json=body, timeout=60).text
    events = [json.loads(line.removeprefix("data: ")) for line in told.split("\n\n") if line and "[DONE]" not in line]
    assert "".join(each["choices"][0]["text"] for each in events) == text
    assert events[-1]["choices"][0]["finish_reason"] == ("length" if len(text) == 7 else "stop")


def test_models_are_listed_and_others_are_not_found(client: httpx.Client) -> None:
    assert [each["id"] for each in client.get("/models").json()["data"]] == ["s2t-demo"]
    assert client.get("/models/s2t-demo").json()["object"] == "model"
    for answer in (client.get("/models/gpt"), client.post("/chat/completions", json={**ASK, "model": "/etc/passwd"})):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
    assert client.get("/nothing").json()["error"]["type"] == "invalid_request_error"
    assert client.get("/chat/completions").status_code == 405
    assert httpx.get(str(client.base_url).replace("/v1/", "/health")).json() == {"status": "ok"}


def test_aliases_are_the_names_that_are_served() -> None:
    with serving_chat(demo_model(), names=["gpt-4o-mini"]) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert posted(client, {**ASK, "model": "gpt-4o-mini"})["model"] == "gpt-4o-mini"
        assert refused(client, ASK, 404)["param"] == "model"


def test_the_header_names_the_agent_in_the_ledger(client: httpx.Client, model: ChatS2T) -> None:
    posted(client, ASK, **{"X-S2T-Agent": "writer"})
    assert model.ledger is not None
    assert model.ledger.records()[-1].agent == "writer"
    response = client.post("/chat/completions", json=ASK, headers={"X-S2T-Agent": "no such/../name"})
    assert response.json()["error"]["param"] == "X-S2T-Agent"


def always_asking(llm: ScriptedLLM, **settings: Any) -> ChatS2T:
    """Every step is put to the LLM."""
    triggered = when(lambda proposal: True)
    return demo_model(escalation=Escalation(llm, margin=1.0), trigger=triggered, **settings)


def scripted() -> ScriptedLLM:
    return ScriptedLLM(lambda ids, candidates: [-0.1 * at for at in range(len(candidates))])


def test_an_exhausted_budget_that_raises_is_a_quota_that_no_client_asks_for_again() -> None:
    llm = scripted()
    chat_model = always_asking(llm, budget=Budget(escalations=2, on_exhausted="raise"))
    with serving_chat(chat_model) as url, httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/chat/completions", json={**ASK, "stream": True}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "insufficient_quota"
        assert len(llm.asked) == 2
        for body in (ASK, {**ASK, "stream": True}):
            response = client.post("/chat/completions", json=body)
            assert response.status_code == 429
            assert response.json()["error"]["type"] == "insufficient_quota"
            assert response.headers["x-should-retry"] == "false"
            message = response.json()["error"]["message"]
            assert message.endswith(": limit 2, spent 2, held 0. Who runs the server can allow more.")
    assert len(llm.asked) == 2


def test_a_budget_that_degrades_answers_and_says_so() -> None:
    chat_model = always_asking(scripted(), budget=Budget(escalations=2))
    with serving_chat(chat_model) as url, httpx.Client(base_url=url, timeout=60) as client:
        found = posted(client, ASK)["s2t"]
    assert (found["escalations"], found["degraded"]) == (2, True)
    assert found["budget"]["left"] == {"escalations": 0}


@pytest.mark.parametrize("body", [("/chat/completions", ASK), ("/completions", {"model": "s2t-demo", "prompt": "Ann"})])
def test_an_answer_that_is_late_is_told_so(body: tuple[str, dict[str, Any]]) -> None:
    chat_model = demo_model(timeout=0.5, on_step=lambda trace, step: time.sleep(0.3), ledger=(ledger := Ledger()))
    with serving_chat(chat_model) as url, httpx.Client(base_url=url, timeout=60) as client:
        path, asked = body
        response = client.post(path, json=asked)
        told = response.json()["error"]
        assert (response.status_code, told["code"]) == (504, "timeout")
        assert told["message"].endswith("Ask for a shorter answer (max_tokens), or try again later.")
        with client.stream("POST", path, json={**asked, "stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    assert [(record.error or "").split(":")[0] for record in ledger.records()] == ["AnswerTimeout"] * 2


def _refused(unit: str, mode: Any) -> errors.BudgetExceeded:
    budget = Budget(**{unit: 0}, name="run", on_exhausted=mode)
    with pytest.raises(errors.BudgetExceeded) as refused:
        budget.reserve(Charge(Decimal(1), 1, escalations=1, answers=1, answer_tokens=1))
    return refused.value


def test_every_error_of_this_package_has_a_shape_and_the_servers_own_are_not_shown() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.S2TError)} - {
        errors.S2TError,
        errors.BudgetError,
    }
    for kind in kinds:
        error = kind.__new__(kind, "/srv/secret/place")
        shape = shape_of(error)
        assert shape is not INTERNAL or "secret" not in str(error_body(error, "r1"))
        assert 400 <= shape.status < 600
        assert bool(shape.headers.get("Retry-After")) == kind.retryable or shape is INTERNAL, kind
    for unit in ("usd", "escalations", "llm_tokens", "answers", "answer_tokens", "seconds"):
        for mode in ("degrade", "raise", "ask"):
            refused = error_body(_refused(unit, mode), "r1")["error"]["message"]
            assert "budget 'run'" in refused.lower()
            assert not any(word in refused for word in ("extend", "BudgetMiddleware", "on_exhausted"))
    unexpected = error_body(KeyError("/srv/secret/place"), "r1")["error"]
    assert "secret" not in str(unexpected)
    assert "r1" in unexpected["message"]


def test_who_finds_no_room_is_told_when_to_come_again() -> None:
    asked, may_answer = threading.Event(), threading.Event()

    def answer(ids: Any, candidates: Any) -> list[float]:
        asked.set()
        assert may_answer.wait(20)
        return [-0.1 * at for at in range(len(candidates))]

    slow = ChatS2T(
        model=tiny_model(max_position_embeddings=4096, seed=8),
        max_tokens=3,
        concurrency=Concurrency(running=1, waiting=0),
        escalation=Escalation(ScriptedLLM(answer), margin=1.0),
        trigger=when(lambda proposal: True),
    )
    with (
        serving_chat(slow, names=["tiny"]) as url,
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(client.post, "/chat/completions", json={**ASK, "model": "tiny"})
        try:
            assert asked.wait(20)
            response = client.post("/chat/completions", json={**ASK, "model": "tiny"})
            assert response.status_code == 429
            assert response.json()["error"]["code"] == "overloaded"
            assert int(response.headers["retry-after"]) >= 1
        finally:
            may_answer.set()
        assert first.result().status_code == 200


def test_a_fault_in_the_middle_is_an_error_event_and_before_it_a_status(caplog: pytest.LogCaptureFixture) -> None:
    def fail_later(trace_id: str, step: Any) -> None:
        if step.index >= 3:
            raise KeyError("/srv/secret/place")

    with serving_chat(demo_model(on_step=fail_later)) as url, httpx.Client(base_url=url, timeout=60) as client:
        response = client.post("/chat/completions", json={**ASK, "stream": True})
        assert response.status_code == 200
        last = response.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
        answer = client.post("/chat/completions", json=ASK)
        assert answer.status_code == 500
        assert "secret" not in response.text + answer.text
        assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
        assert answer.headers["x-request-id"] in caplog.text
