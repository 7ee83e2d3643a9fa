"""Costs in LangSmith: what its client really sends, to a server on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from langchain_core.messages.ai import add_usage
from langsmith import Client
from s2t_agents.integrations.langsmith import CostTracer

from s2t_agents import ChatS2T
from s2t_agents.budget import DevicePrice
from s2t_agents.testing import tiny_model


@pytest.fixture
def sent() -> Iterator[tuple[Client, list[dict[str, Any]]]]:
    runs: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            runs.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_PATCH = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    yield Client(api_url=url, api_key="none", auto_batch_tracing=False, info={}), runs
    server.shutdown()
    server.server_close()
    thread.join(10)


def usage_sent(runs: list[dict[str, Any]]) -> dict[str, Any]:
    [usage] = [
        found for run in runs if (found := run.get("extra", {}).get("metadata", {}).get("usage_metadata")) is not None
    ]
    return dict(usage)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_carries_its_cost_and_the_message_stays_addable(sent: Any, streamed: bool) -> None:
    client, runs = sent
    model = ChatS2T(model=tiny_model(), max_tokens=6, device_price=DevicePrice(Decimal("3.6")))
    config: Any = {"callbacks": [CostTracer(client=client, project_name="test")]}
    if streamed:
        chunks = list(model.stream("hello", config))
        answer: Any = sum(chunks[1:], chunks[0])
    else:
        answer = model.invoke("hello", config)
    usage = usage_sent(runs)
    assert usage["total_cost"] == pytest.approx(answer.response_metadata["s2t"]["cost_usd"]["total"])
    assert usage["output_tokens"] == answer.usage_metadata["output_tokens"] == 6
    assert "total_cost" not in answer.usage_metadata
    assert add_usage(answer.usage_metadata, answer.usage_metadata)["output_tokens"] == 12
    said = json.dumps(runs)
    assert answer.response_metadata["s2t"]["trace_id"] in said  # the route, in the outputs


def test_an_unknown_cost_is_not_sent(sent: Any) -> None:
    client, runs = sent
    tracer = CostTracer(client=client, project_name="test")
    ChatS2T(model=tiny_model(), max_tokens=6).invoke("hello", {"callbacks": [tracer]})
    assert "total_cost" not in usage_sent(runs)
