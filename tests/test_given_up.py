"""Receipts of escalations whose answer was never finished."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from s2t_agents import Budget, ChatS2T, Ledger, TokenPrice
from s2t_agents.budget import Charge
from s2t_agents.engine import decode_loop
from s2t_agents.errors import BudgetExceeded
from s2t_agents.escalation import Escalation
from s2t_agents.ledger import GenerationRecord, Receipt
from s2t_agents.llms.question import Answer, Question
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always
from s2t_agents.types import RefusedBy

PRICE = TokenPrice(Decimal(1), Decimal(5))  # USD per million tokens
AT = 2  # the question that is given up, counted from 0: two were answered before it


class GivenUp(ScriptedLLM):
    """Ends with an error at its third question, once it has worked for it, or before."""

    def __init__(self, error: BaseException, *, worked: bool = True, price: TokenPrice | None = PRICE) -> None:
        super().__init__(last_candidate, price=price)
        self.error, self.worked = error, worked

    def ask(self, question: Question) -> Answer:
        if len(self.asked) < AT:
            return super().ask(question)
        if self.worked:
            question.owe(self.quote(question))
        raise self.error


def chat(llm: ScriptedLLM, **settings: Any) -> ChatS2T:
    given = {"budget": Budget(escalations=9), "ledger": Ledger(), "max_tokens": 6, **settings}
    return ChatS2T(model=tiny_model(), trigger=always(), escalation=Escalation(llm, margin=1.0), **given)


def given_up(model: ChatS2T, error: type[BaseException]) -> GenerationRecord:
    """The record of an answer that ends with an error."""
    with pytest.raises(error):
        model.invoke("hello")
    assert model.ledger is not None
    [record] = model.ledger.records()
    assert (record.finish_reason, record.completion_tokens) == ("aborted", AT)
    return record


INTERRUPTIONS = (KeyboardInterrupt, SystemExit, asyncio.CancelledError)


@pytest.mark.parametrize("kind", INTERRUPTIONS)
def test_an_interrupted_question_has_a_receipt_of_what_was_sent(kind: type[BaseException]) -> None:
    model = chat(GivenUp(kind()))
    record = given_up(model, kind)
    assert [receipt.outcome for receipt in record.receipts] == ["picked", "picked", "interrupted"]
    before, receipt = record.receipts[1:]
    assert (receipt.step, receipt.prefix_tokens) == (AT, before.prefix_tokens + 1)
    one_token_more = Charge(before.actual.usd + Decimal("0.000001"), before.actual.llm_tokens + 1)
    assert receipt.actual == receipt.reserved == one_token_more
    assert (receipt.wanted, receipt.pick, receipt.refused_by) == (None, None, None)
    assert [(c.slm is None, c.llm) for c in receipt.candidates] == [(False, None)] * 8
    assert receipt.wait_ms > 0
    assert kind.__name__ in receipt.reason


def test_the_record_of_an_interrupted_answer_agrees_with_the_budget() -> None:
    model = chat(GivenUp(KeyboardInterrupt()), budget=Budget(usd="1", escalations=9))
    record = given_up(model, KeyboardInterrupt)
    state = model.budget.state()
    assert (state.holds, state.spent["escalations"]) == (0, AT + 1)
    assert record.cost_usd.llm == state.spent["usd"] == sum(receipt.actual.usd for receipt in record.receipts)
    assert record.latency_ms.escalate >= sum(receipt.wait_ms for receipt in record.receipts)
    assert (record.escalations, record.refused, record.degraded, record.error) == (AT, 0, False, None)


def test_what_an_interrupted_question_costs_is_unknown_where_the_price_is() -> None:
    record = given_up(chat(GivenUp(KeyboardInterrupt(), price=None)), KeyboardInterrupt)
    receipt = record.receipts[AT]
    assert (receipt.actual.usd, receipt.reserved.usd, record.cost_usd.llm) == (None, None, None)
    assert receipt.actual.llm_tokens == receipt.prefix_tokens + 1


def test_a_question_interrupted_before_the_llm_worked_says_what_was_held_and_no_cost() -> None:
    model = chat(GivenUp(KeyboardInterrupt(), worked=False))
    record = given_up(model, KeyboardInterrupt)
    receipt = record.receipts[AT]
    assert (receipt.outcome, receipt.actual) == ("interrupted", None)
    assert receipt.reserved == Charge(Decimal(receipt.prefix_tokens + 5).scaleb(-6), receipt.prefix_tokens + 1)
    assert model.budget.state().spent["escalations"] == AT


def test_an_answer_that_came_and_was_never_used_is_on_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = decode_loop.decisive, []

    def interrupted(answer: Answer) -> Any:
        calls.append(answer)
        if len(calls) > AT:
            raise KeyboardInterrupt
        return real(answer)

    model = chat(ScriptedLLM(last_candidate, price=PRICE))
    monkeypatch.setattr(decode_loop, "decisive", interrupted)
    record = given_up(model, KeyboardInterrupt)
    receipt = record.receipts[AT]
    assert (receipt.outcome, receipt.pick, receipt.actual) == ("picked", None, receipt.reserved)
    assert [candidate.llm for candidate in receipt.candidates] == list(calls[AT].scores)
    assert record.escalations == model.budget.state().spent["escalations"] == AT + 1


def test_an_llm_that_breaks_with_an_error_of_its_own_has_failed_and_the_answer_goes_on() -> None:
    model = chat(GivenUp(ZeroDivisionError("sk-secret")))
    assert model.invoke("Hi").response_metadata["s2t"]["degraded"]
    receipt = model.ledger.records()[-1].receipts[AT]
    assert (receipt.outcome, receipt.actual) == ("failed", receipt.reserved)
    assert "ZeroDivisionError" in receipt.reason
    assert "sk-secret" not in receipt.reason


def test_a_refusal_that_is_raised_has_a_receipt() -> None:
    budget = Budget(escalations=AT, on_exhausted="raise")
    model = chat(ScriptedLLM(last_candidate, price=PRICE), budget=budget)
    record = given_up(model, BudgetExceeded)
    receipt = record.receipts[AT]
    assert (receipt.outcome, receipt.actual, record.refused) == ("refused", None, 1)
    assert receipt.refused_by == RefusedBy("run", "escalations", AT)
    assert receipt.reserved.llm_tokens == receipt.prefix_tokens + 1


# ---------------------------------------------------------------------- left by an async caller


async def whole(model: ChatS2T) -> None:
    await model.ainvoke("hello")


async def streamed(model: ChatS2T) -> None:
    async for _ in model.astream("hello"):
        pass


@pytest.mark.parametrize("use", [whole, streamed])
async def test_a_question_whose_task_is_cancelled_has_its_receipt(use: Callable[[ChatS2T], Any]) -> None:
    asked, go = threading.Event(), threading.Event()

    def stuck(ids: Sequence[int], candidates: Sequence[int]) -> list[float]:
        asked.set()
        go.wait(5)
        return last_candidate(ids, candidates)

    model = chat(ScriptedLLM(stuck, price=PRICE))
    task = asyncio.create_task(use(model))
    await asyncio.to_thread(asked.wait)
    task.cancel()
    await asyncio.sleep(0.05)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    [record] = model.ledger.records()
    [receipt] = record.receipts  # a thread cannot be cancelled: the LLM answered, and its token was counted
    assert (receipt.outcome, receipt.actual) == ("picked", receipt.reserved)
    assert record.finish_reason == "aborted"


# ---------------------------------------------------------------------- what is made of the receipts


@pytest.mark.parametrize("file", ["costs.jsonl", "costs.db"])
def test_interrupted_questions_are_counted_and_replayed_at_what_they_cost(file: str, tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / file)
    cost = Charge(Decimal("0.1"), 10)
    sent = Receipt(step=0, prefix_tokens=9, outcome="interrupted", reserved=cost, actual=cost)
    unsent = sent.model_copy(update={"actual": None})
    ledger.record(GenerationRecord(receipts=(sent,)))
    ledger.record(GenerationRecord(receipts=(unsent,)))
    assert (ledger.total().interrupted, ledger.total().failed) == (2, 0)
    again = ledger.what_if(Budget(usd=1))
    assert (again.allowed, again.exact, again.spent) == (2, True, cost)
    assert ledger.what_if(Budget(usd=0)).exact  # no token came of them, so none would be another
