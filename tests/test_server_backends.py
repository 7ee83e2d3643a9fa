"""``s2t serve`` over other backends and real weights: the server knows nothing of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import servers
from server_support import STOCK_TOOL, serving_chat
from servers import CompletionServer

from s2t_agents import ChatS2T

SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["color", "count"],
    "additionalProperties": False,
}


def asked(url: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(f"{url}/chat/completions", json={"model": "it", **body}, timeout=250)
    assert response.status_code == 200, response.text
    return dict(response.json())


def streamed(url: str, body: dict[str, Any]) -> str:
    with httpx.stream(
        "POST", f"{url}/chat/completions", json={"model": "it", "stream": True, **body}, timeout=250
    ) as got:
        lines = [line.removeprefix("data: ") for line in got.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1])


def test_a_gguf_file_is_served(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from gguf_files import write_gguf

    file = write_gguf(tmp_path / "tiny.gguf", metadata={"context_length": 2048})
    model = ChatS2T(model=str(file), max_tokens=8, model_kwargs={"n_ctx": 4096})
    with serving_chat(model, names=["it"]) as url:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
        answer = asked(url, {**body, "logprobs": True, "top_logprobs": 2})
        assert streamed(url, body) == answer["choices"][0]["message"]["content"] == model.invoke("hello").text
        assert len(answer["choices"][0]["logprobs"]["content"]) > 0
    with serving_chat(model) as url:
        [listed] = httpx.get(f"{url}/models").json()["data"]
        assert listed["id"] == "tiny.gguf"


def test_a_counter_of_the_users_own_enters_no_completion() -> None:
    body = {"model": "s2t-demo", "prompt": "Ann has 37 shells", "max_tokens": 3}
    usages = []
    for counter in (None, lambda text: [0]):
        with serving_chat(ChatS2T(model="s2t-demo", custom_get_token_ids=counter)) as url:
            usages.append(httpx.post(f"{url}/completions", json=body, timeout=250).json()["usage"])
    assert usages[0]["prompt_tokens"] == usages[1]["prompt_tokens"] > 1


@pytest.fixture
def front(server: CompletionServer) -> Iterator[str]:
    """``s2t serve`` over a model that is itself on a server."""
    address = f"vllm://127.0.0.1:{server.server_port}/{server.model.name}"
    with serving_chat(ChatS2T(model=address, model_kwargs={"tokenizer": server.model.tokenizer}), names=["it"]) as url:
        yield url


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": [10, 20, 30]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    ],
)
def test_what_another_servers_cache_had_is_not_said(front: str, path: str, body: dict[str, Any], stream: bool) -> None:
    asked = {"model": "it", "max_tokens": 3, **body}
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    for _ in range(2):
        text = httpx.post(f"{front}/{path}", json=asked, timeout=60).text
        assert '"prompt_tokens":' in text
        assert "cached_tokens" not in text


@pytest.mark.parametrize("given", [[5], [5, 100, 260]])
def test_log_probabilities_of_tokens_that_the_other_server_may_not_name_are_refused(
    front: str, server: CompletionServer, given: list[int]
) -> None:
    asked = len(server.asked)
    body = {"model": "it", "prompt": [10, 20, 30], "max_tokens": 1, "logprobs": 2, "logprob_token_ids": given}
    refused = httpx.post(f"{front}/completions", json=body, timeout=60)
    assert refused.status_code == 400
    assert "logprob_token_ids cannot be told" in refused.json()["error"]["message"]
    assert len(server.asked) == asked


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("fault", "status", "least_s"),
    [
        (servers.status(503, Retry_After="7200"), 503, 3600),
        (servers.status(429, Retry_After="0"), 503, 1),
        (servers.hangs_up, 502, 1),
        (None, 502, 25),
    ],
    ids=["busy for long", "busy", "broken", "down"],
)
def test_who_asks_again_is_told_when_and_the_log_has_one_line(
    front: str,
    server: CompletionServer,
    caplog: pytest.LogCaptureFixture,
    fault: servers.Fault | None,
    status: int,
    least_s: int,
    path: str,
) -> None:
    said = {"messages": [{"role": "user", "content": "hello"}]} if path != "completions" else {"prompt": "hello"}
    body = {"model": "it", "max_tokens": 2, **said}
    assert httpx.post(f"{front}/{path}", json=body, timeout=60).status_code == 200
    server.fault = fault or servers.hangs_up
    if fault is None:
        server.shutdown()
        server.server_close()
        for _ in range(3):  # over connections that were open
            httpx.post(f"{front}/{path}", json=body, timeout=60)
    caplog.clear()
    for _ in range(2):
        refused = httpx.post(f"{front}/{path}", json=body, timeout=60)
        assert refused.status_code in (status, 502)  # after the first it may be left alone
        assert int(refused.headers["retry-after"]) >= least_s
    logged = [record for record in caplog.records if record.name.startswith("s2t_agents.server")]
    assert len(logged) == 2
    assert not any(record.exc_info for record in logged)


@pytest.mark.real
def test_real_weights_answer_call_and_fill_in_a_form(smollm2: Path) -> None:
    with serving_chat(ChatS2T(model=smollm2, max_tokens=48), names=["it"]) as url:
        greeting = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
        answer = asked(url, {"messages": greeting})["choices"][0]["message"]["content"]
        assert "Paris" in answer
        assert streamed(url, {"messages": greeting}) == answer
        stock = [{"role": "user", "content": "How many lamps are in stock?"}]
        called = asked(url, {"messages": stock, "tools": [STOCK_TOOL], "tool_choice": "required"})["choices"][0]
        assert called["finish_reason"] == "tool_calls"
        assert "item" in json.loads(called["message"]["tool_calls"][0]["function"]["arguments"])
        wanted = {"type": "json_schema", "json_schema": {"name": "form", "schema": SCHEMA}}
        form = json.loads(
            asked(url, {"messages": stock, "response_format": wanted})["choices"][0]["message"]["content"]
        )
        assert form["color"] in ("red", "green", "blue")
        assert 0 <= form["count"] <= 9
