"""Clients of ``s2t serve`` that leave, stall, send too much, or come from elsewhere."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked
import httpx
import pytest
from server_support import QUESTION, demo_model, serving_chat, until

from s2t_agents import Budget, ChatS2T, Concurrency, Escalation, Ledger
from s2t_agents.budget import SQLiteStore
from s2t_agents.errors import ExposedServer
from s2t_agents.server import Tenants, listening, serve
from s2t_agents.server.app import ServerLimits
from s2t_agents.server.request_bodies import BodyLimits
from s2t_agents.testing import ScriptedLLM, tiny_model
from s2t_agents.triggers import when

LONG: dict[str, Any] = {"model": "long", "messages": [{"role": "user", "content": "hello"}]}
LIMITS = ServerLimits(BodyLimits(size=100_000, seconds=0.5, brackets=4_000), send_s=0.5)


class Steps:
    """Counts the steps of a chat model."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, trace_id: str, step: Any) -> None:
        self.count += 1


@pytest.fixture(scope="module")
def steps() -> Steps:
    return Steps()


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture(scope="module")
def url(steps: Steps, ledger: Ledger) -> Iterator[str]:
    model = tiny_model(max_position_embeddings=1 << 16, seed=8)
    chat_model = ChatS2T(model=model, max_tokens=60_000, ledger=ledger, on_step=steps)
    with serving_chat(chat_model, names=["long"], limits=LIMITS) as url:
        yield url


@contextmanager
def stops(steps: Steps, ledger: Ledger) -> Iterator[None]:
    """The block leaves a generation, which then stops: its record is there, and no further step comes."""
    known = len(ledger.records())
    yield
    until(lambda: len(ledger.records()) > known)
    assert ledger.records()[-1].finish_reason == "aborted"
    at = steps.count
    time.sleep(0.1)
    assert steps.count == at


def test_a_stream_that_is_closed_stops_the_model(url: str, steps: Steps, ledger: Ledger) -> None:
    with stops(steps, ledger), httpx.stream("POST", f"{url}/chat/completions", json={**LONG, "stream": True}) as got:
        lines = got.iter_lines()
        for _ in range(6):
            next(lines)
    assert 3 <= ledger.records()[-1].completion_tokens < 60_000


def test_a_client_that_does_not_wait_for_its_answer_stops_the_model(url: str, steps: Steps, ledger: Ledger) -> None:
    before = steps.count
    with stops(steps, ledger), pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/chat/completions", json=LONG, timeout=httpx.Timeout(5, read=0.3))
    assert steps.count > before


def raw(url: str) -> socket.socket:
    """A connection with a small window."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.settimeout(10)
    client.connect((host, int(port)))
    return client


def request_bytes(body: dict[str, Any], *, length: int | None = None) -> bytes:
    data = json.dumps(body).encode()
    head = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": length or len(data)}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode() + data


def test_a_client_that_reads_nothing_does_not_keep_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "SEND_BYTES", 2048)
    model = tiny_model(max_position_embeddings=1 << 16, seed=8)
    steps, ledger = Steps(), Ledger()
    chat_model = ChatS2T(model=model, max_tokens=60_000, ledger=ledger, on_step=steps)
    with serving_chat(chat_model, names=["long"], limits=LIMITS) as url, raw(url) as client:
        client.sendall(request_bytes({**LONG, "stream": True}))
        until(lambda: len(ledger.records()) == 1, 60)
        at = steps.count
        time.sleep(0.1)
        assert steps.count == at < 60_000


def test_a_body_that_does_not_come_ends_in_408(url: str) -> None:
    with raw(url) as client:
        client.sendall(request_bytes(LONG, length=5000))
        answer = b"".join(iter(lambda: client.recv(4096), b""))  # until the connection is closed
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"error"' in answer


@pytest.mark.parametrize("before", [False, True])
def test_headers_that_never_end_close_the_connection(url: str, monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    monkeypatch.setattr(listening, "HEADER_S", 0.3)
    with raw(url) as client:
        if before:  # the connection has served a request, and has been idle for longer
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
            time.sleep(0.6)
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(4096)
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nX-Slow: ")
        started = time.monotonic()
        ended = False
        while time.monotonic() - started < 5 and not ended:
            try:
                client.sendall(b"x")
                client.settimeout(0.05)
                ended = client.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
        assert ended


def test_large_bodies_headers_and_other_forms_are_refused(url: str) -> None:
    def post(**request: Any) -> httpx.Response:
        return httpx.post(f"{url}/chat/completions", **request)

    def endless() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 10_000

    as_json = {"Content-Type": "application/json"}
    for response, status in (
        (post(content=b" " * 150_000, headers=as_json), 413),
        (post(content=endless(), headers=as_json), 413),
        (post(content=b"{}"), 415),
        (post(data={"model": "long"}), 415),
        (post(content=b"x", headers={**as_json, "Content-Encoding": "gzip"}), 415),
        (post(content=b"[" * 5000, headers=as_json), 400),
        (post(content=b"[]", headers=as_json), 400),
        (post(content=b"", headers=as_json), 400),
        (post(content=b'{"model": "long", "temperature": 1e999}', headers=as_json), 400),
        (post(content=b'{"model": "long", "seed": NaN}', headers=as_json), 400),
        (post(content=b'{"model": "\\ud800"}', headers=as_json), 400),
    ):
        assert response.status_code == status, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"
    many = post(json={**LONG, "metadata": [[]] * 5000})
    assert many.status_code == 400
    assert "brackets" in many.json()["error"]["message"]
    with raw(url) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Much: " + b"x" * 40_000)
        assert client.recv(100).startswith(b"HTTP/1.1 4")


def test_a_web_page_cannot_reach_it_by_a_name_of_its_own(url: str) -> None:
    elsewhere = httpx.get(f"{url}/models", headers={"Host": "evil.example.com"})
    assert elsewhere.status_code == 421
    assert elsewhere.json()["error"]["type"] == "invalid_request_error"
    for name in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert httpx.get(f"{url}/models", headers={"Host": name}).status_code == 200
    for name in ("localhost.evil.example.com", "127.0.0.1.evil.example.com", ""):
        assert httpx.get(f"{url}/models", headers={"Host": name}).status_code == 421


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
def test_other_addresses_need_keys(host: str) -> None:
    with pytest.raises(ExposedServer, match="--keys"):
        serve(demo_model(), host=host)
    with pytest.raises(ExposedServer):
        listening.check_exposure(host, Tenants())


def test_a_hold_is_settled_when_its_client_leaves() -> None:
    asked, may_answer = threading.Event(), threading.Event()

    def answer(ids: Any, candidates: Any) -> list[float]:
        asked.set()
        assert may_answer.wait(20)
        return [-0.1 * at for at in range(len(candidates))]

    llm, budget, ledger = ScriptedLLM(answer), Budget(escalations=5), Ledger()
    always = when(lambda proposal: True)
    chat_model = demo_model(escalation=Escalation(llm, margin=1.0), trigger=always, budget=budget, ledger=ledger)
    body = {"model": "s2t-demo", "messages": [{"role": "user", "content": QUESTION}]}
    with serving_chat(chat_model) as url:
        with raw(url) as client:
            client.sendall(request_bytes(body))
            assert asked.wait(20)
            assert budget.state().holds == 1
        may_answer.set()
        until(lambda: len(ledger.records()) == 1)
    assert budget.state().holds == 0
    assert budget.state().spent["escalations"] == len(llm.asked) < 5  # a step or two later it has stopped
    assert {receipt.outcome for receipt in ledger.records()[0].receipts} == {"picked"}


def test_answers_that_run_when_the_server_closes_end_with_an_error_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "CLOSING_S", 1)
    model = tiny_model(max_position_embeddings=1 << 16, seed=8)
    ledger, lines = Ledger(), list[str]()
    opened = threading.Event()

    def read(url: str) -> None:
        with httpx.stream("POST", f"{url}/chat/completions", json={**LONG, "stream": True}, timeout=30) as got:
            for line in got.iter_lines():
                opened.set()
                lines.append(line)

    with serving_chat(ChatS2T(model=model, max_tokens=60_000, ledger=ledger), names=["long"]) as url:
        reader = threading.Thread(target=read, args=(url,))
        reader.start()
        assert opened.wait(20)
    reader.join(20)
    [*_, last] = [line for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_closing"
    assert ledger.records()[0].finish_reason == "aborted"


SOON = {"GET": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", "CRLF": b"\r\n", "much": b"x" * 200_000, "none": b""}


@pytest.mark.parametrize("then", SOON)
def test_a_client_that_sends_more_and_leaves_stops_the_model(url: str, steps: Steps, ledger: Ledger, then: str) -> None:
    with stops(steps, ledger), raw(url) as client:
        before = steps.count
        client.sendall(request_bytes(LONG))
        until(lambda: steps.count > before)
        client.sendall(SOON[then])
        time.sleep(0.1)
    assert ledger.records()[-1].completion_tokens < 60_000


HEADS = {
    415: b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n",
    404: b"POST /nothing HTTP/1.1\r\nHost: localhost\r\n",
    421: b"POST /v1/models HTTP/1.1\r\nHost: evil.example\r\n",
    200: b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
}


@pytest.mark.parametrize("rest", [b"", b"x", b"x" * 100])
@pytest.mark.parametrize("status", HEADS)
def test_what_was_answered_before_its_body_came_keeps_no_connection(
    url: str, monkeypatch: pytest.MonkeyPatch, status: int, rest: bytes
) -> None:
    monkeypatch.setattr(listening, "HEADER_S", 0.3)
    with raw(url) as client:
        client.sendall(HEADS[status] + b"Content-Length: 100\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 %d" % status)
        client.sendall(rest)
        while client.recv(4096):  # a body or the end; the client's timeout fails
            pass


@pytest.mark.parametrize("before", [b"", HEADS[404] + b"Transfer-Encoding: chunked\r\n\r\n"])
@pytest.mark.parametrize("malformed", [b"ZZZ\r\n\r\n", b"\x16\x03\x01\r\n\r\n"])
def test_malformed_http_is_refused_in_the_same_shape_and_no_fault_of_ours(
    url: str, caplog: pytest.LogCaptureFixture, before: bytes, malformed: bytes
) -> None:
    with raw(url) as client:
        if before:
            client.sendall(before)
            assert client.recv(4096).startswith(b"HTTP/1.1 404")
        client.sendall(malformed)
        answer = b"".join(iter(lambda: client.recv(4096), b""))
        if not before:
            assert answer.startswith(b"HTTP/1.1 400")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert not [each for each in caplog.records if each.name == "asyncio"]


def test_small_packets_go_out_at_once() -> None:
    async def without_delay() -> bool:
        accepted: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()

        class Taking(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                accepted.set_result(transport.get_extra_info("socket"))

        with listening.listen("127.0.0.1", 0) as bound:
            async with await asyncio.get_running_loop().create_server(Taking, sock=bound):
                _, writer = await asyncio.open_connection(*bound.getsockname())
                found = (await accepted).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                writer.close()
        return bool(found)

    assert asyncio.run(without_delay())


def test_the_address_is_told_when_clients_can_connect() -> None:
    class Told(Exception):
        pass

    def connect(host: str, port: int) -> None:
        with socket.create_connection((host, port)):
            raise Told

    with pytest.raises(Told):
        serve(ChatS2T(model=tiny_model()), port=0, on_listening=connect)


def test_answers_that_have_not_begun_when_the_server_closes_are_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "CLOSING_S", 1)
    steps, ledger, responses = Steps(), Ledger(), list[httpx.Response]()
    model = tiny_model(max_position_embeddings=1 << 16, seed=8)
    chat_model = ChatS2T(
        model=model, max_tokens=60_000, ledger=ledger, on_step=steps, concurrency=Concurrency(1, waiting=8)
    )
    prompt = {"model": "long", "prompt": "hello", "max_tokens": 60_000, "ignore_eos": True}

    def post(url: str, path: str, body: dict[str, Any]) -> None:
        responses.append(httpx.post(f"{url}/{path}", json=body, timeout=60))

    asked = [
        ("chat/completions", LONG),
        ("completions", prompt),
        *(2 * [("chat/completions", {**LONG, "stream": True})]),
    ]
    with serving_chat(chat_model, names=["long"]) as url:
        threads = [threading.Thread(target=post, args=(url, "completions", prompt))]
        threads[0].start()
        until(lambda: steps.count > 0)
        threads += [threading.Thread(target=post, args=(url, *each)) for each in asked]
        for thread in threads[1:]:
            thread.start()
        until(lambda: chat_model.engine.admission.queued == len(asked))
    for thread in threads:
        thread.join(30)
    assert [each.status_code for each in responses] == [503] * 5
    for each in responses:
        assert each.json()["error"]["code"] == "server_closing"
        assert each.headers["retry-after"]
        assert each.headers["x-request-id"]


STOPPED = """
import sys
from s2t_agents import Budget, ChatS2T, Ledger
from s2t_agents.budget import SQLiteStore
from s2t_agents.server import listening, serve
from s2t_agents.testing import tiny_model
listening.CLOSING_S = 1
folder = sys.argv[1]
serve(
    ChatS2T(
        model=tiny_model(max_position_embeddings=1 << 16, seed=8),
        max_tokens=60_000,
        ledger=Ledger.open(folder + sys.argv[2]),
        budget=Budget(name="server", answer_tokens=1_000_000, store=SQLiteStore(folder + "/budget.db")),
    ),
    port=0,
    names=["long"],
    on_listening=lambda host, port: print(port, flush=True),
)
"""


@pytest.mark.parametrize("ledger", ["/ledger.jsonl", "/ledger.db"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_running_answers_with_their_event_record_and_budget(
    tmp_path: Path, number: int, ledger: str
) -> None:
    out = tmp_path / "out"
    process = forked.start("-c", STOPPED, str(tmp_path), ledger, out=str(out), error=str(tmp_path / "error"))
    try:
        until(lambda: out.exists() and out.read_text().endswith("\n"), 120)
        url = f"http://127.0.0.1:{out.read_text().strip()}/v1/chat/completions"
        with httpx.stream("POST", url, json={**LONG, "stream": True}, timeout=60) as got:
            lines = got.iter_lines()
            next(lines)
            assert process.pid is not None
            os.kill(process.pid, number)
            last = [line for line in lines if line][-1]
        process.join(60)
        assert process.exitcode is not None
    finally:
        process.kill()
        process.join()
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_closing"
    (tmp_path / "elsewhere").mkdir()  # all is in the file
    [record] = Ledger.reading(shutil.copy(f"{tmp_path}{ledger}", tmp_path / "elsewhere")).records()
    assert record.finish_reason == "aborted"
    state = Budget(name="server", answer_tokens=1_000_000, store=SQLiteStore(tmp_path / "budget.db")).state()
    assert state.holds == 0
    assert state.spent["answer_tokens"] == record.completion_tokens > 0
