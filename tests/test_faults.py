"""Network faults of the LLM: the local pick stands within the deadline, and the hold is closed."""

import asyncio
import re
import shutil
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import cache
from typing import Any

import forked
import pytest
import servers
from langchain_core.messages import AIMessage
from servers import CompletionServer

from s2t_agents import Budget, ChatS2T, Ledger, TokenPrice
from s2t_agents.endpoints import retries
from s2t_agents.errors import EndpointBusy
from s2t_agents.escalation import Escalation
from s2t_agents.llms import CircuitBreaker, OpenAILLM, Question, openai_llm
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import always

PRICE = TokenPrice(Decimal(2), Decimal(10))
TIMEOUT_S = 0.4
"""No fault below ends by itself: who waited for one without a timeout would wait for ever."""


def dead_line(url: str, **settings: Any) -> OpenAILLM:
    options = {"timeout_s": TIMEOUT_S, "attempt_s": TIMEOUT_S, "connect_s": TIMEOUT_S, "price": PRICE, **settings}
    return OpenAILLM(url, "tiny-qwen3-5", **options)


def chat(llm: OpenAILLM, **settings: Any) -> ChatS2T:
    options: dict[str, Any] = {"model": tiny_model(), "max_tokens": 4, "trigger": always(), **settings}
    return ChatS2T(escalation=Escalation(llm, margin=1.0), **options)


@cache
def local_answer() -> Any:
    return ChatS2T(model=tiny_model(), max_tokens=4).invoke("hello").content


UNBILLED = {
    "429": servers.status(429),
    "500": servers.status(500),
    "503": servers.status(503, Retry_After="7"),
    "401": servers.status(401),
    "404": servers.status(404),
    "302": servers.status(302, Location="/v1/other"),
}
BILLED = {
    "hang in mid-body": servers.hangs,
    "hang before the headers": servers.hangs_before_headers,
    "slow drip of headers": servers.drips,
    "slow drip of body": servers.drips_body,
    "connection closed": servers.hangs_up,
    "connection closed in mid-body": servers.breaks_off,
    "connection closed in mid-chunk": servers.breaks_off_a_chunk,
    "no HTTP": servers.no_http,
    "compressed": servers.compressed,
    "truncated JSON": servers.says(b'{"choices": [{"logprobs": {"top_logp'),
    "no JSON": servers.says(b"<html>It works!</html>"),
    "empty body": servers.says(b""),
    "absurd JSON": servers.says([[["choices"]], 3]),
    "deep JSON": servers.says(b"[" * 100_000),
    "no choices": servers.says({"choices": []}),
    "no log-probabilities": servers.says({"choices": [{"logprobs": None}]}),
    "endless body": servers.endless,
    "NaN": servers.candidates_score("NaN"),
    "infinity": servers.candidates_score("-Infinity"),
    "numbers as text": servers.candidates_score('"-1.5"'),
    "positive log-probabilities": servers.candidates_score("2.5"),
    "more than all probability": servers.candidates_score("-0.1"),
    "wrong ids": servers.top({"token_id:999999": -0.1}),
    "no ids": servers.top({"token_id:x": -0.1}),
    "tokens as text": servers.top({" the": -0.1}),
    "a count beyond belief": servers.counts(10**12),
    "a count that flatters": servers.counts(1),
    "an answer beyond belief": servers.counts(completion_tokens=10**9),
    "an answer that no budget can count": servers.counts(completion_tokens=10**16),
}


def is_local_and_says_so(message: AIMessage) -> None:
    assert message.content == local_answer()
    s2t = message.response_metadata["s2t"]
    assert (s2t["degraded"], s2t["escalations"], s2t["flips"]) == (True, 0, 0)


PATIENT = {"timeout_s": 60.0, "attempt_s": 60.0, "connect_s": 60.0, "attempts": 1}
"""Where the server answers by itself, sooner or later: its time is this machine's."""

NEVER_ENDING = {"hang in mid-body", "hang before the headers", "slow drip of headers", "slow drip of body"}


def run(server: CompletionServer, name: str, how: str) -> tuple[Budget, Ledger, AIMessage]:
    server.fault = {**UNBILLED, **BILLED}[name]
    hurried: dict[str, Any] = {"timeout_s": 1.0, "attempt_s": 1.0, "connect_s": 60.0}
    hurried["breaker"] = CircuitBreaker(failures=1)
    llm = dead_line(server.url, **(hurried if name in NEVER_ENDING else PATIENT))
    budget, ledger = Budget(usd="1", escalations=50), Ledger()
    model = chat(llm, budget=budget, ledger=ledger)
    message = model.invoke("hello") if how == "sync" else asyncio.run(model.ainvoke("hello"))
    llm.close()
    return budget, ledger, message


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("name", UNBILLED)
def test_a_server_that_declines_costs_nothing(server: CompletionServer, name: str, how: str) -> None:
    budget, ledger, message = run(server, name, how)
    is_local_and_says_so(message)
    state = budget.state()
    assert (state.spent["usd"], state.spent["escalations"], state.holds) == (0, 0, 0)
    [record] = ledger.records()
    assert {receipt.outcome for receipt in record.receipts} == {"failed"}
    assert all(receipt.actual is None and receipt.reason for receipt in record.receipts)


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("name", BILLED)
def test_a_server_that_may_have_worked_is_billed_for_the_prefix(server: CompletionServer, name: str, how: str) -> None:
    budget, ledger, message = run(server, name, how)
    is_local_and_says_so(message)
    [record] = ledger.records()
    billed = [receipt for receipt in record.receipts if receipt.actual is not None]
    questions = 1 if name in NEVER_ENDING else 3  # then the breaker keeps it local
    assert len(billed) == len(server.asked) == questions
    assert all(receipt.actual == receipt.reserved for receipt in billed)
    state = budget.state()
    assert state.spent["usd"] == record.cost_usd.llm == sum(receipt.actual.usd for receipt in billed)
    assert (state.spent["escalations"], state.holds) == (questions, 0)


def answered(model: ChatS2T, how: str) -> AIMessage:
    return model.invoke("hello") if how == "sync" else asyncio.run(model.ainvoke("hello"))  # type: ignore[return-value]


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("where", ["http://127.0.0.1:{closed}/v1", "https://127.0.0.1:{plain}/v1"])
def test_a_refused_connection_and_a_tls_error_cost_nothing_and_are_tried_once(
    server: CompletionServer, where: str, how: str
) -> None:
    budget = Budget(usd="1", escalations=50)
    llm = dead_line(where.format(closed=servers.free_port(), plain=server.server_port))
    is_local_and_says_so(answered(chat(llm, budget=budget), how))
    assert budget.state().spent["usd"] == 0
    assert budget.state().holds == 0
    assert llm.breaker.state == "open"
    assert server.asked == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate for 127.0.0.1 that nobody vouches for, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    files = str(folder / "certificate.pem"), str(folder / "key.pem")
    order = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=127.0.0.1"
    subprocess.run(
        [*order.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]],
        check=True,
        capture_output=True,
    )
    return files


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_certificate_that_nobody_vouches_for_is_no_server(
    server: CompletionServer, certificate: tuple[str, str], how: str
) -> None:
    budget = Budget(usd="1", escalations=50)
    llm = dead_line(servers.with_certificate(server, *certificate), api_key="sk-2f9c")
    is_local_and_says_so(answered(chat(llm, budget=budget), how))
    assert (budget.state().spent["usd"], budget.state().holds) == (0, 0)
    assert llm.breaker.state == "open"
    assert server.asked == server.keys == []
    trusting = ssl.create_default_context(cafile=certificate[0])
    known = dead_line(str(llm.endpoint.url), verify=trusting, timeout_s=5.0, attempt_s=5.0, connect_s=5.0)
    assert answered(chat(known), how).response_metadata["s2t"]["escalations"] > 0


def test_a_host_that_swallows_connections_is_connected_to_once_in_all(connections: list[Any]) -> None:
    with servers.deaf() as port:
        llm = dead_line(f"http://127.0.0.1:{port}/v1", connect_s=0.5, timeout_s=9.0, attempt_s=9.0)
        message = chat(llm, max_tokens=12).invoke("hello")  # the tokenizer's check, 12 questions and all
        assert connections.count(("127.0.0.1", port)) == 1
    assert message.response_metadata["s2t"]["degraded"]
    assert llm.breaker.state == "open"


def test_the_second_answer_of_a_dead_endpoint_asks_nothing(connections: list[Any]) -> None:
    llm = dead_line(f"http://127.0.0.1:{servers.free_port()}/v1")
    model = chat(llm)
    model.invoke("hello")
    assert connections
    connections.clear()
    assert model.invoke("hello").response_metadata["s2t"]["degraded"]
    assert connections == []


def test_it_comes_back_when_the_endpoint_does(server: CompletionServer) -> None:
    now = [0.0]
    llm = dead_line(server.url, breaker=CircuitBreaker(failures=1, cooldown_s=30, clock=lambda: now[0]), timeout_s=5.0)
    llm.attempt_s = 5.0
    server.fault = servers.first(1, servers.status(401))
    model = chat(llm)
    assert model.invoke("hello").response_metadata["s2t"]["escalations"] == 0
    now[0] += 30
    back = model.invoke("hello").response_metadata["s2t"]
    assert (back["escalations"], back["degraded"]) == (4, False)


def test_what_cost_nothing_is_tried_again_within_the_same_question(server: CompletionServer) -> None:
    llm = dead_line(server.url, timeout_s=5.0, attempt_s=5.0)
    server.fault = servers.first(2, servers.status(503))
    budget = Budget(escalations=1)
    s2t = chat(llm, budget=budget).invoke("hello").response_metadata["s2t"]
    assert (s2t["escalations"], len(server.asked)) == (1, 3)
    assert budget.state().spent["escalations"] == 1


def test_retry_after_is_waited_for_when_it_fits_and_not_when_it_does_not(
    server: CompletionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[float] = []

    def soon(state: Any) -> float:
        wanted.append(retries.retry_wait(state))
        return wanted[-1] if wanted[-1] > 60 else 0.0

    monkeypatch.setattr(openai_llm, "retry_wait", soon)
    llm = dead_line(server.url, timeout_s=5.0, attempt_s=5.0)
    server.fault = servers.first(1, servers.status(429, Retry_After="3"))
    assert chat(llm).invoke("hello").response_metadata["s2t"]["escalations"] > 0
    assert 3 <= wanted.pop() <= 3.1  # and a random bit, so that clients do not come back together
    assert not wanted
    server.asked.clear()
    server.fault = servers.first(1, servers.status(429, Retry_After="3000"))
    assert chat(llm).invoke("hello").response_metadata["s2t"]["degraded"]
    assert (len(server.asked), len(wanted)) == (1, 1)
    assert wanted[0] >= 3000
    assert llm.breaker.state == "open"  # left alone for as long as it said


DATES = {
    "as HTTP has it": "%a, %d %b %Y %H:%M:%S GMT",
    "of RFC 850": "%A, %d-%b-%y %H:%M:%S GMT",
    "of C's asctime": "%a %b %d %H:%M:%S %Y",
    "of no zone that is known": "%a, %d %b %Y %H:%M:%S -0000",
    "of no zone": "%a, %d %b %Y %H:%M:%S",
    "with an offset": "%a, %d %b %Y %H:%M:%S +0000",
}


@pytest.mark.parametrize("zone", ["UTC0", "EST5", "JST-9"])
@pytest.mark.parametrize("date", DATES)
def test_retry_after_as_a_date_is_gmt_whatever_this_machines_zone(
    server: CompletionServer, date: str, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        llm = dead_line(server.url, timeout_s=30.0, attempt_s=30.0, connect_s=30.0, attempts=1)
        at = time.strftime(DATES[date], time.gmtime(time.time() + 1800))
        server.fault = servers.status(429, Retry_After=at)
        with pytest.raises(EndpointBusy) as caught:
            llm.open().ask(Question([1, 2, 3], [65, 66]))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert caught.value.wait_s == pytest.approx(1800, abs=300)


def test_what_may_have_cost_something_is_not_tried_again(server: CompletionServer) -> None:
    llm = dead_line(server.url, timeout_s=5.0)
    server.fault = servers.hangs_up
    chat(llm, budget=Budget(escalations=1)).invoke("hello")
    assert len(server.asked) == 1


def test_the_budgets_deadline_binds_the_question(server: CompletionServer) -> None:
    llm = dead_line(server.url, timeout_s=30.0, attempt_s=30.0)
    server.fault = servers.hangs
    model = chat(llm, max_tokens=6, ledger=(ledger := Ledger()))
    model.engine  # noqa: B018 - loading is not on the clock
    s2t = model.invoke("hello", s2t_budget=Budget(seconds=0.5)).response_metadata["s2t"]
    assert s2t["degraded"]
    [receipt] = ledger.records()[0].receipts
    assert re.search(r"no answer within 0\.[0-5]\d* s", receipt.reason)
    assert (s2t["tokens"], s2t["stopped_by"]["unit"]) == (1, "seconds")  # one hung, then the deadline ended the answer


async def test_64_calls_at_once_meet_every_kind_of_fault_and_all_answer(server: CompletionServer) -> None:
    kinds = [servers.hangs, servers.status(500), servers.says(b"{"), servers.hangs_up, servers.drips, None]
    turn, lock = [0], threading.Lock()

    def mixed(handler: servers.Handler, body: dict[str, Any]) -> None:
        with lock:
            turn[0] += 1
            fault = kinds[turn[0] % len(kinds)]
        fault(handler, body) if fault else handler.complete(body)

    server.fault = mixed
    llm = dead_line(server.url, breaker=CircuitBreaker(failures=10**6), timeout_s=1.5, attempt_s=1.5, attempts=1)
    budget, ledger = Budget(usd="1", escalations=1000, llm_tokens=10**6), Ledger()
    model = chat(llm, budget=budget, ledger=ledger, max_tokens=2)
    messages = await asyncio.gather(*(model.ainvoke("hello") for _ in range(64)))
    assert len(messages) == 64
    assert all(message.content for message in messages)
    s2t = [message.response_metadata["s2t"] for message in messages]
    assert any(part["degraded"] for part in s2t)
    assert any(part["escalations"] for part in s2t)
    state = budget.state()
    billed = [r.actual for record in ledger.records() for r in record.receipts if r.actual is not None]
    assert state.holds == 0
    assert (state.spent["escalations"], state.spent["usd"]) == (len(billed), sum(charge.usd for charge in billed))


@pytest.mark.parametrize("how", ["threads", "tasks"])
@pytest.mark.parametrize("name", ["dead", "429", "hang in mid-body", "NaN", "wrong ids"])
def test_64_calls_at_once_each_end_in_the_local_pick_and_close_their_hold(
    server: CompletionServer, name: str, how: str
) -> None:
    server.fault = {**UNBILLED, **BILLED}.get(name)
    url = server.url if name != "dead" else f"http://127.0.0.1:{servers.free_port()}/v1"
    budget, ledger = Budget(usd="1", escalations=10**4), Ledger()
    model = chat(dead_line(url, **({} if "hang" in name else PATIENT)), budget=budget, ledger=ledger)
    model.engine  # noqa: B018 - loading is not on the clock
    messages = in_threads(model) if how == "threads" else asyncio.run(in_tasks(model))
    assert len(messages) == 64
    for message in messages:
        assert message.content == local_answer()
        s2t = message.response_metadata["s2t"]
        assert (s2t["degraded"], s2t["escalations"], s2t["flips"]) == (True, 0, 0)
    billed = [r.actual for record in ledger.records() for r in record.receipts if r.actual is not None]
    state = budget.state()
    assert (state.holds, state.spent["usd"]) == (0, sum(charge.usd for charge in billed))
    assert bool(billed) == (name in BILLED)


def in_threads(model: ChatS2T) -> list[AIMessage]:
    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(model.invoke, ["hello"] * 64))  # type: ignore[arg-type]


async def in_tasks(model: ChatS2T) -> list[AIMessage]:
    return list(await asyncio.gather(*(model.ainvoke("hello") for _ in range(64))))  # type: ignore[arg-type]


def test_64_threads_share_one_pool_and_all_are_heard(server: CompletionServer) -> None:
    llm = dead_line(server.url, timeout_s=60.0, attempt_s=60.0, connect_s=60.0)
    model = chat(llm, max_tokens=2)
    escalations: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: escalations.append(model.invoke("hello").response_metadata["s2t"]["escalations"])
        )
        for _ in range(64)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(escalations) == 64
    assert min(escalations) > 0
    assert len(server.asked) == sum(escalations)


def test_an_interrupted_question_is_billed_for_what_may_have_been_done(
    server: CompletionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s2t_agents.endpoints import event_loop

    real = event_loop.asyncio.run_coroutine_threadsafe

    class Interrupted:
        def __init__(self, future: Any) -> None:
            self.future = future

        def result(self, seconds: float) -> None:
            deadline = time.monotonic() + 5
            while not server.asked and time.monotonic() < deadline:
                time.sleep(0.01)
            raise KeyboardInterrupt

        def cancel(self) -> None:
            self.future.cancel()

    server.fault = servers.hangs
    llm, budget, ledger = dead_line(server.url, timeout_s=30.0), Budget(usd="1"), Ledger()
    model = chat(llm, budget=budget, ledger=ledger)
    model.engine  # noqa: B018 - its checks come before the interruption
    monkeypatch.setattr(
        event_loop.asyncio, "run_coroutine_threadsafe", lambda work, loop: Interrupted(real(work, loop))
    )
    with pytest.raises(KeyboardInterrupt):
        model.invoke("hello")
    assert budget.state().holds == 0
    assert budget.state().spent["escalations"] == 1
    [receipt] = ledger.records()[0].receipts
    assert (receipt.outcome, receipt.actual) == ("interrupted", receipt.reserved)
    assert receipt.actual.usd == budget.state().spent["usd"]  # type: ignore[union-attr]


def test_a_hung_server_does_not_keep_the_process_from_ending(server: CompletionServer) -> None:
    server.fault = servers.hangs
    code = f"""
import threading
from s2t_agents.llms import OpenAILLM, Question
llm = OpenAILLM({server.url!r}, "m", timeout_s=60, attempt_s=60)
threading.Thread(target=lambda: llm.open().ask(Question([1, 2], [3])), daemon=True).start()
import time; time.sleep(0.3)
"""
    assert forked.run("-c", code, timeout_s=60).returncode == 0
