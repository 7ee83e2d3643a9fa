"""Whatever is posted: an answer, or a refusal in OpenAI's shape; never a 500, never silence."""

from __future__ import annotations

import asyncio
import copy
import json
import sys
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from server_support import STOCK_TOOL
from starlette.requests import Request

from s2t_agents import ChatS2T
from s2t_agents.errors import BadRequest
from s2t_agents.server import create_app
from s2t_agents.server.chat_requests import ChatRequest, chat_request
from s2t_agents.server.completions import CompletionRequest, completion_request
from s2t_agents.server.request_bodies import BodyLimits, json_object
from s2t_agents.testing import tiny_model

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
VALID: dict[str, Any] = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "get_stock", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "1"},
        {"role": "user", "content": "u"},
    ],
    "tools": [STOCK_TOOL],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    "temperature": 0.5,
    "top_p": 0.5,
    "seed": 1,
    "stop": ["x"],
    "max_tokens": 4,
    "max_completion_tokens": 4,
    "stream": True,
    "stream_options": {"include_usage": True},
    "logprobs": True,
    "top_logprobs": 2,
    "n": 1,
    "user": "u",
    "chat_template_kwargs": {"enable_thinking": False},
}


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A valid request with a few places changed, removed or added."""
    body = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        here: Any = body
        while True:
            at = draw(st.sampled_from(sorted(here))) if isinstance(here, dict) else draw(st.integers(0, len(here) - 1))
            inner = here[at]
            if isinstance(inner, (dict, list)) and inner and draw(st.booleans()):
                here = inner
                continue
            break
        action = draw(st.sampled_from(["change", "remove", "swap"]))
        if action == "remove":
            del here[at]
        elif action == "swap":
            here[at] = copy.deepcopy(draw(st.sampled_from([VALID, *VALID.values(), "x" * 3000, -1, 10**400, [], {}])))
        else:
            here[at] = draw(values)
        if not body:
            break
    return dict(body)


@pytest.fixture(scope="module")
def app() -> Any:
    return create_app(ChatS2T(model=tiny_model(), max_tokens=4), names=["tiny"])


def post(app: Any, data: bytes) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            headers = {"Content-Type": "application/json"}
            return await asyncio.wait_for(client.post("/v1/chat/completions", content=data, headers=headers), 30)

    return asyncio.run(ask())


def check(response: httpx.Response) -> None:
    if response.status_code == 200:
        if response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("data: [DONE]\n\n"), response.text
        else:
            assert response.json()["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")
        return
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error["message"]
    assert error["type"] == "invalid_request_error"


relaxed = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@relaxed
@given(body=mutated())
@example(body=VALID)
@example(body={**VALID, "messages": [{"role": "user", "content": "\x00\x1b<|im_end|>"}]})
def test_requests_that_are_nearly_right(app: Any, body: dict[str, Any]) -> None:
    if body.get("max_tokens") is None or not isinstance(body["max_tokens"], int) or body["max_tokens"] > 64:
        body.pop("max_tokens", None)
    if isinstance(body.get("max_completion_tokens"), int) and body["max_completion_tokens"] > 64:
        body.pop("max_completion_tokens", None)
    check(post(app, json.dumps(body).encode()))


@relaxed
@given(data=st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
@example(data=b"\xef\xbb\xbf{}")
@example(data=b'{"model": "tiny", "model": 1}')
@example(data=b'{"messages": [{"role": "user", "content": "\\udc00"}], "model": "tiny"}')
def test_bodies_of_any_kind(app: Any, data: bytes) -> None:
    check(post(app, data))


MANY = 5000
PLAIN: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "u"}]}


@pytest.mark.parametrize(
    "body",
    [
        {**PLAIN, "stop": [1] * MANY},
        {**PLAIN, "tools": [{}] * MANY},
        {**PLAIN, "messages": [{}] * MANY},
        {**PLAIN, "messages": [{"role": "user", "content": [0] * MANY}]},
        {**PLAIN, "messages": [{"role": "assistant", "tool_calls": [{}] * MANY}]},
        {**PLAIN, "messages": [{"role": "user", "content": "u", **{f"x{at}": 0 for at in range(MANY)}}]},
        {**PLAIN, "chat_template_kwargs": {f"x{at}": "" for at in range(MANY)}},
        {**PLAIN, "response_format": {f"x{at}": 0 for at in range(MANY)}},
        {**PLAIN, **{f"x{at}": 0 for at in range(MANY)}},
        {"model": "tiny", "prompt": [1.5] * MANY},
        {"model": "tiny", "prompt": [[1.5] * MANY]},
        {"model": "tiny", "prompt": [[]] + [0] * MANY},
        {"model": "tiny", "prompt": "x", "allowed_token_ids": ["x"] * MANY},
    ],
)
def test_many_faults_are_one_refusal_and_few_errors(body: dict[str, Any]) -> None:
    kind = CompletionRequest if "prompt" in body else ChatRequest
    with pytest.raises(ValidationError) as found:
        kind.model_validate(body)
    assert found.value.error_count() < 40
    with pytest.raises(BadRequest) as refused:
        (completion_request if "prompt" in body else chat_request)(body)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("depth", [1, 190])
def test_each_number_of_a_body_is_looked_at_once(depth: int) -> None:
    numbers = 10_000
    data = b'{"metadata":' + b"[" * depth + b"0.5," * numbers + b"0" + b"]" * depth + b"}"

    async def receive() -> Any:
        return {"type": "http.request", "body": data, "more_body": False}

    request = Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        found = asyncio.run(json_object(request, BodyLimits()))
    finally:
        sys.setprofile(before)
    assert list(found) == ["metadata"]
    assert calls < 10 * numbers
    data = data.replace(b"[0.5", b"[1e999", 1)
    with pytest.raises(BadRequest, match="beyond"):
        asyncio.run(json_object(Request(request.scope, receive), BodyLimits()))
