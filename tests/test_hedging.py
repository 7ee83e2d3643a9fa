"""Hedged requests: off by default; a slow request gets one copy; both reserved before and settled after."""

import asyncio
import decimal
import pickle
import threading
import time
from decimal import Decimal
from typing import Any

import pytest
import servers
from budget_support import CONTEXTS
from servers import CompletionServer

from s2t_agents import Budget, ChatS2T, Ledger, TokenPrice
from s2t_agents.endpoints import event_loop
from s2t_agents.errors import ConfigError, EscalationFailed
from s2t_agents.escalation import Escalation
from s2t_agents.llms import CircuitBreaker, LocalLLM, OpenAILLM, Question
from s2t_agents.llms.request_costs import total_charge
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import always, when
from s2t_agents.types import Charge

PROMPT = [10, 20, 30, 40, 50]
CANDIDATES = [1, 2, 3]
PRICE = TokenPrice(Decimal(2), Decimal(10))
ONE = Decimal("0.00002")  # 5 * 2 + 1 * 10, per million: the prefix and one token
HEDGE_S = 0.15


def hedging(server: CompletionServer, **settings: Any) -> OpenAILLM:
    options = {"timeout_s": 8.0, "attempt_s": 7.0, "hedge_after_s": HEDGE_S, "price": PRICE, **settings}
    return OpenAILLM(server.url, server.model.name, **options)


def question(**settings: Any) -> Question:
    return Question(PROMPT, CANDIDATES, **settings)


def truth(server: CompletionServer) -> tuple[float | None, ...]:
    return LocalLLM(server.model).open().ask(question()).scores


# ---------------------------------------------------------------------- which answer counts


def test_it_is_off_by_default(server: CompletionServer) -> None:
    server.fault = servers.in_turn(servers.slow(0.6))
    llm, asked = hedging(server, hedge_after_s=None), question()
    llm.open().ask(asked)
    assert OpenAILLM(server.url, "m").hedge_after_s is None
    assert len(server.asked) == 1
    assert asked.owed == llm.open().quote(asked)


def test_a_late_first_gets_a_twin_and_the_first_usable_answer_wins(server: CompletionServer) -> None:
    server.fault = servers.in_turn(servers.keeps_waiting)
    llm, asked = hedging(server), question()
    answer = llm.open().ask(asked)
    assert answer.scores == pytest.approx(truth(server), abs=1e-4)
    assert answer.note == "asked twice: the first request was late"
    assert server.asked[0] == server.asked[1]
    assert (len(server.asked), asked.owed.usd) == (2, 2 * ONE)  # type: ignore[union-attr]


def test_a_first_that_answers_in_time_has_no_twin_and_costs_one_request(server: CompletionServer) -> None:
    llm, asked = hedging(server, hedge_after_s=3.0), question()
    answer = llm.open().ask(asked)
    assert (len(server.asked), answer.note, asked.owed.usd) == (1, "", ONE)  # type: ignore[union-attr]


def test_a_late_first_that_answers_before_its_twin_wins(server: CompletionServer) -> None:
    server.fault = servers.in_turn(servers.slow(0.6), servers.keeps_waiting)
    asked = question()
    answer = hedging(server).open().ask(asked)
    assert answer.scores == pytest.approx(truth(server), abs=1e-4)
    assert asked.owed.usd == 2 * ONE  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("first", "requests"),
    [(servers.hangs_up, 1), (servers.says(b"{"), 1), (servers.status(401), 1)],
    ids=["hung up", "no JSON", "refused"],
)
def test_a_first_that_fails_in_time_has_failed_and_nothing_is_put_again(
    server: CompletionServer, first: servers.Fault, requests: int
) -> None:
    server.fault = servers.in_turn(first)
    with pytest.raises(EscalationFailed):
        hedging(server, hedge_after_s=3.0).open().ask(question())
    assert len(server.asked) == requests


@pytest.mark.parametrize("late", [servers.hangs_up, servers.says(b"{"), servers.status(503)])
def test_a_first_that_fails_late_leaves_the_answer_to_its_twin(server: CompletionServer, late: servers.Fault) -> None:
    server.fault = servers.in_turn(servers.slow(0.5, late), servers.slow(1.0))
    answer = hedging(server).open().ask(question())
    assert answer.scores == pytest.approx(truth(server), abs=1e-4)
    assert len(server.asked) == 2


def test_a_twin_that_fails_leaves_the_answer_to_the_first(server: CompletionServer) -> None:
    server.fault = servers.in_turn(servers.slow(0.8), servers.hangs_up)
    asked = question()
    assert hedging(server).open().ask(asked).scores == pytest.approx(truth(server), abs=1e-4)
    assert asked.owed.usd == 2 * ONE  # type: ignore[union-attr]


# ---------------------------------------------------------------------- money


def test_the_quote_covers_both_requests(server: CompletionServer) -> None:
    quote = hedging(server).open().quote(question())
    assert (quote.usd, quote.llm_tokens) == (2 * ONE, 12)
    assert hedging(server, price=None).open().quote(question()).usd is None


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_quote_covers_both_requests_in_any_decimal_context(server: CompletionServer, name: str) -> None:
    llm = hedging(server, price=TokenPrice(Decimal("123.456789"), Decimal("0.123456")))
    with decimal.localcontext(CONTEXTS[name]):
        one = total_charge([Charge(Decimal("0.123456789012"), 5)])
        two = total_charge([Charge(Decimal("0.123456789012"), 5)] * 2)
        quote = llm.open().quote(question())
    assert (one, two) == (Charge(Decimal("0.123456789012"), 5), Charge(Decimal("0.246913578024"), 10))
    assert quote == llm.open().quote(question())


@pytest.mark.parametrize(
    ("faults", "billed"),
    [
        ([servers.slow(0.5, servers.status(503)), servers.slow(1.0)], 1),  # declined: it did nothing
        ([servers.slow(0.8), servers.status(503)], 1),
        ([servers.slow(0.5, servers.hangs_up), servers.slow(1.0)], 2),
        ([servers.slow(0.5, servers.status(401)), servers.slow(1.0, servers.status(401))], 0),
        ([servers.slow(0.5, servers.status(401)), servers.slow(1.0, servers.hangs_up)], 1),
    ],
)
def test_each_request_is_settled_as_the_evidence_says(
    server: CompletionServer, faults: list[servers.Fault], billed: int
) -> None:
    server.fault = servers.in_turn(*faults)
    llm, asked = hedging(server), question()
    try:
        llm.open().ask(asked)
    except EscalationFailed:
        assert len(server.asked) == 2
    assert (asked.owed.usd if asked.owed else 0) == billed * ONE


def test_both_declined_late_is_put_again_since_it_cost_nothing(server: CompletionServer) -> None:
    declines = servers.slow(0.6, servers.status(503))
    server.fault = servers.in_turn(declines, declines)
    asked = question()
    assert hedging(server).open().ask(asked).scores == pytest.approx(truth(server), abs=1e-4)
    again = len(server.asked) - 2  # hedged, too, where this machine is slow
    assert again in (1, 2)
    assert asked.owed is not None
    assert asked.owed.usd == again * ONE


def once(llm: OpenAILLM, **settings: Any) -> ChatS2T:
    """One question an answer: right after the prompt."""
    start = when(lambda proposal: proposal.prefix.model.tokenizer.decode(proposal.prefix.ids).endswith("assistant"))
    options: dict[str, Any] = {"model": tiny_model(), "max_tokens": 4, "trigger": start, **settings}
    return ChatS2T(escalation=Escalation(llm, margin=1.0), **options)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_both_slow_ends_in_the_local_pick_inside_the_deadline_and_both_are_billed(
    server: CompletionServer, how: str
) -> None:
    server.fault = servers.keeps_waiting
    llm = hedging(server, timeout_s=0.6, attempt_s=0.6)
    budget, ledger = Budget(usd="1"), Ledger()
    model = once(llm, budget=budget, ledger=ledger)
    model.engine  # noqa: B018 - loading is not on the clock
    message = model.invoke("hello") if how == "sync" else asyncio.run(model.ainvoke("hello"))
    assert message.response_metadata["s2t"]["degraded"]
    assert message.content == ChatS2T(model=tiny_model(), max_tokens=4).invoke("hello").content
    [receipt] = ledger.records()[0].receipts
    assert receipt.actual == receipt.reserved
    assert (len(server.asked), budget.state().holds) == (2, 0)
    assert budget.state().spent["usd"] == receipt.reserved.usd  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_slow_first_and_a_fast_twin_settle_what_both_took(server: CompletionServer, how: str) -> None:
    server.fault = servers.in_turn(servers.keeps_waiting)
    budget, ledger = Budget(usd="1", escalations=1), Ledger()
    model = once(hedging(server), budget=budget, ledger=ledger)
    message = model.invoke("hello") if how == "sync" else asyncio.run(model.ainvoke("hello"))
    s2t = message.response_metadata["s2t"]
    assert (s2t["escalations"], s2t["degraded"]) == (1, False)
    [receipt] = ledger.records()[0].receipts
    assert (receipt.outcome, receipt.reason) == ("picked", "asked twice: the first request was late")
    state = budget.state()
    assert (state.spent["escalations"], state.holds) == (1, 0)  # one question, two requests
    assert state.spent["usd"] == receipt.actual.usd == receipt.reserved.usd  # type: ignore[union-attr]


def test_a_budget_that_does_not_hold_both_asks_nobody(server: CompletionServer) -> None:
    model = once(hedging(server, hedge_after_s=3.0))
    model.invoke("hello")
    both = 2 * (len(server.asked.pop()["prompt"]) + 1)
    for limit, asked in ((both - 1, 0), (both, 1)):
        s2t = model.invoke("hello", s2t_budget=Budget(llm_tokens=limit)).response_metadata["s2t"]
        assert (s2t["escalations"], s2t["refused"]) == (asked, 1 - asked)
        assert len(server.asked) == asked


def test_a_budget_is_never_exceeded_whoever_wins(server: CompletionServer) -> None:
    kinds = [servers.keeps_waiting, None, servers.slow(0.3), servers.hangs_up, servers.slow(0.3, servers.status(500))]
    server.fault = servers.in_turn(*(kinds * 40))
    llm = hedging(
        server, hedge_after_s=0.1, timeout_s=1.0, attempt_s=0.9, breaker=CircuitBreaker(failures=10**6, cooldown_s=0)
    )
    budget, ledger = Budget(llm_tokens=2500), Ledger()
    model = ChatS2T(
        model=tiny_model(),
        max_tokens=3,
        trigger=always(),
        escalation=Escalation(llm, margin=1.0),
        budget=budget,
        ledger=ledger,
    )
    threads = [threading.Thread(target=model.invoke, args=("hello",)) for _ in range(16)]
    for thread in threads:
        thread.start()
    over = False
    while any(thread.is_alive() for thread in threads):
        state = budget.state()
        over |= state.spent["llm_tokens"] + state.held["llm_tokens"] > 2500
        time.sleep(0.005)
    state = budget.state()
    billed = [r.actual for record in ledger.records() for r in record.receipts if r.actual is not None]
    assert not over
    assert state.holds == 0
    assert 0 < state.spent["llm_tokens"] == sum(charge.llm_tokens for charge in billed) <= 2500


# ---------------------------------------------------------------------- deadline, breaker, what is left behind


def test_where_the_deadline_comes_first_there_is_no_twin(server: CompletionServer) -> None:
    server.fault = servers.keeps_waiting
    llm, asked = hedging(server, hedge_after_s=1.0), question(seconds=0.4)
    with pytest.raises(EscalationFailed, match=r"no answer within 0\.4 s"):
        llm.open().ask(asked)
    assert (len(server.asked), asked.owed.usd) == (1, ONE)  # type: ignore[union-attr]


def test_a_host_that_swallows_connections_gets_no_twin(connections: list[Any]) -> None:
    with servers.deaf() as port:
        llm = OpenAILLM(f"http://127.0.0.1:{port}/v1", "m", connect_s=0.6, hedge_after_s=0.2, timeout_s=9.0)
        asked = question()
        with pytest.raises(EscalationFailed, match="cannot be reached"):
            llm.open().ask(asked)
        assert connections.count(("127.0.0.1", port)) == 1
    assert asked.owed is None
    assert llm.breaker.state == "open"


def test_an_endpoint_on_trial_is_asked_once(server: CompletionServer) -> None:
    now = [0.0]
    llm = hedging(server, breaker=CircuitBreaker(failures=1, cooldown_s=30, clock=lambda: now[0]))
    server.fault = servers.in_turn(servers.status(401), servers.slow(0.6))
    with pytest.raises(EscalationFailed):
        llm.open().ask(question())
    now[0] += 30
    assert llm.open().ask(question()).note == ""
    assert len(server.asked) == 2


def test_the_loser_is_hung_up_on_and_no_thread_stays(server: CompletionServer) -> None:
    llm = hedging(server, hedge_after_s=0.05)
    before = {thread.name for thread in threading.enumerate()} | {"s2t-network"}
    for _ in range(10):
        server.fault = servers.in_turn(servers.keeps_waiting)
        llm.open().ask(question())
    deadline = time.monotonic() + 5
    while server.dropped < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.dropped == 10
    server_side = {t.name for t in threading.enumerate() if "process_request_thread" in t.name}
    assert {thread.name for thread in threading.enumerate()} - server_side <= before
    tasks = asyncio.run_coroutine_threadsafe(_tasks(), event_loop.shared_loop()).result()
    assert tasks == 1  # the one that counts


async def _tasks() -> int:
    return len(asyncio.all_tasks())


def test_an_interrupted_pair_is_billed_and_hung_up_on(
    server: CompletionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = event_loop.asyncio.run_coroutine_threadsafe

    class Interrupted:
        def __init__(self, future: Any) -> None:
            self.future = future

        def result(self, seconds: float) -> None:
            deadline = time.monotonic() + 5
            while len(server.asked) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            raise KeyboardInterrupt

        def cancel(self) -> None:
            self.future.cancel()

    server.fault = servers.keeps_waiting
    budget = Budget(usd="1")
    model = once(hedging(server), budget=budget)
    model.engine  # noqa: B018 - its checks come before the interruption
    monkeypatch.setattr(
        event_loop.asyncio, "run_coroutine_threadsafe", lambda work, loop: Interrupted(real(work, loop))
    )
    with pytest.raises(KeyboardInterrupt):
        model.invoke("hello")
    monkeypatch.undo()
    assert budget.state().holds == 0
    assert budget.state().spent["escalations"] == 1
    deadline = time.monotonic() + 5
    while server.dropped < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.dropped == 2


def test_both_requests_carry_the_key_and_it_stays_one(server: CompletionServer) -> None:
    server.fault = servers.in_turn(servers.slow(0.5, servers.status(401, "no such key: sk-2f9c")), servers.status(401))
    llm = hedging(server, api_key="sk-2f9c")
    with pytest.raises(EscalationFailed) as caught:
        llm.open().ask(question())
    assert server.keys == ["Bearer sk-2f9c"] * 2
    assert "sk-2f9c" not in str(caught.value)
    again = pickle.loads(pickle.dumps(llm))
    assert again.hedge_after_s == HEDGE_S
    assert b"sk-2f9c" not in pickle.dumps(llm)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), 5.0, 60])
def test_a_hedge_that_could_never_be_sent_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="hedge_after_s"):
        OpenAILLM("https://llm.example.com/v1", "m", hedge_after_s=seconds)
