"""Budgets that interrupt for more: nothing is paid twice, and a grant counts once."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRetryMiddleware, dynamic_prompt
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from s2t_agents.integrations.langgraph import BudgetMiddleware

from s2t_agents import Budget, ChatS2T, Escalation, Ledger, TokenPrice
from s2t_agents.budget import SQLiteStore
from s2t_agents.chat.unfinished_answers import Unfinished
from s2t_agents.errors import BudgetExceeded, ConfigError, EscalationFailed
from s2t_agents.llms.question import Answer, Question
from s2t_agents.testing import ScriptedLLM, last_candidate
from s2t_agents.triggers import when
from tests.thinking_models import model_of

QUESTION = "Ann has 37 shells and finds 48 more. How many are there now?"
TOKENS = 8
PRICE = TokenPrice(Decimal(1), Decimal(1))


def scripted() -> ScriptedLLM:
    return ScriptedLLM(lambda ids, c: [-0.1 * i for i in range(1, len(c) + 1)], price=PRICE)


def chat(llm: ScriptedLLM, **options: Any) -> ChatS2T:
    options = {"max_tokens": TOKENS, "trigger": when(lambda proposal: True), **options}
    return ChatS2T(selector="s2t-demo", escalation=Escalation(llm, margin=1.0), **options)


def agent_on(model: Any, budget: Budget, saver: Any, *more: Any, name: str = "a", **limits: Any) -> Any:
    middleware = [*more, BudgetMiddleware(budget, **limits)]
    return create_agent(model, [], name=name, middleware=middleware, checkpointer=saver)


def thread(name: str) -> Any:
    return {"configurable": {"thread_id": name}}


def questions(llm: ScriptedLLM) -> list[Any]:
    return [(tuple(ids), frozenset(candidates)) for ids, candidates in llm.asked]


def ask_until_done(agent: Any, where: Any, grant: Any, first: Any = QUESTION, most: int = 40) -> tuple[Any, int]:
    run, asked = agent.invoke({"messages": first}, where), 0
    while "__interrupt__" in run:
        asked += 1
        assert asked <= most, "it never ends"
        run = agent.invoke(Command(resume=grant), where)
    return run, asked


@pytest.fixture(scope="module")
def whole() -> str:
    """The answer of an agent that never has to ask."""
    return chat(scripted()).invoke(QUESTION).text


@pytest.mark.parametrize("grant", [1, 2, 3, 100])
@pytest.mark.parametrize("start", [0, 1, 5])
def test_grants_of_any_size_end_and_every_question_is_paid_for_once(grant: int, start: int, whole: str) -> None:
    llm, budget = scripted(), Budget(escalations=start, on_exhausted="ask")
    run, asked = ask_until_done(agent_on(chat(llm), budget, InMemorySaver()), thread("1"), grant)
    assert run["messages"][-1].text == whole
    assert len(llm.asked) == len(set(questions(llm))) == budget.state().spent["escalations"] == TOKENS
    assert asked == -(-(TOKENS - start) // grant)
    assert (
        Decimal(run["s2t_cost_usd"]["llm"])
        == budget.state().spent["usd"]
        == PRICE.cost(input_tokens=sum(len(ids) for ids, _ in llm.asked), output_tokens=TOKENS)
    )


def test_the_ledger_adds_up_to_what_was_spent_and_says_what_was_free(whole: str) -> None:
    ledger, llm, budget = Ledger(), scripted(), Budget(escalations=3, on_exhausted="ask")
    ask_until_done(agent_on(chat(llm, ledger=ledger), budget, InMemorySaver()), thread("1"), 2)
    total = ledger.total()
    assert total.escalations == TOKENS
    assert total.cost_usd.llm.usd == budget.state().spent["usd"]
    last = ledger.records()[-1]
    free = [receipt for receipt in last.receipts if "paid for before" in receipt.reason]
    assert [receipt.step for receipt in free] == list(range(TOKENS - last.escalations))
    assert all(receipt.outcome == "picked" and receipt.actual is not None for receipt in free)
    assert all((r.actual.usd, r.actual.escalations, r.actual.llm_tokens) == (0, 0, 0) for r in free if r.actual)
    assert ledger.what_if(Budget(escalations=TOKENS)).spent.escalations == TOKENS
    assert json.loads(last.model_dump_json())["escalations"] == last.escalations


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_sampled_answers_end_too(temperature: float) -> None:
    llm, budget = scripted(), Budget(escalations=1, on_exhausted="ask")
    run, asked = ask_until_done(agent_on(chat(llm, temperature=temperature), budget, InMemorySaver()), thread("1"), 1)
    assert len(llm.asked) == len(set(questions(llm))) == budget.state().spent["escalations"] == asked + 1
    assert run["messages"][-1].response_metadata["finish_reason"] in ("stop", "length")


def test_a_system_message_that_changes_with_every_try_does_not_make_it_pay_again() -> None:
    tries: list[int] = []

    @dynamic_prompt
    def clock(request: Any) -> str:
        tries.append(1)
        return f"It is {len(tries)} o'clock."

    llm, budget = scripted(), Budget(escalations=1, on_exhausted="ask")
    agent = agent_on(chat(llm), budget, InMemorySaver(), clock, tell_model=True)
    _, asked = ask_until_done(agent, thread("1"), 1)
    assert len(tries) == asked + 1
    assert len(llm.asked) == budget.state().spent["escalations"] == TOKENS


def test_a_new_process_goes_on_from_the_checkpoint_with_a_budget_in_memory(whole: str) -> None:
    llm, saver = scripted(), InMemorySaver()
    where, run, grants = thread("1"), None, 0
    for _ in range(40):
        budget = Budget(escalations=1, on_exhausted="ask")  # everything but the checkpoint is new
        agent = agent_on(chat(llm), budget, saver)
        run = agent.invoke({"messages": QUESTION} if run is None else Command(resume=1), where)
        if "__interrupt__" not in run:
            break
        grants += 1
    assert run is not None
    assert run["messages"][-1].text == whole
    assert len(llm.asked) == len(set(questions(llm))) == TOKENS == grants + 1
    assert run["s2t_budget"]["spent"]["escalations"] == TOKENS
    assert Decimal(run["s2t_cost_usd"]["llm"]) == budget.state().spent["usd"]
    json.dumps(agent.get_state(where).values, default=lambda message: message.model_dump(mode="json"))


def test_a_new_process_goes_on_from_a_shared_store(tmp_path: Path, whole: str) -> None:
    llm, saver, where, run = scripted(), InMemorySaver(), thread("1"), None
    for _ in range(40):
        budget = Budget(escalations=2, on_exhausted="ask", store=SQLiteStore(tmp_path / "budget.db"))
        run = agent_on(chat(llm), budget, saver).invoke(
            {"messages": QUESTION} if run is None else Command(resume=2), where
        )
        if "__interrupt__" not in run:
            break
    assert run is not None
    assert run["messages"][-1].text == whole
    assert len(llm.asked) == TOKENS == budget.state().spent["escalations"]
    assert budget.state().limit == {"escalations": TOKENS}


@pytest.mark.parametrize("second", [2, 50, "no"])
def test_one_interrupt_grants_once_and_the_first_grant_counts(second: Any, caplog: Any) -> None:
    llm, budget = scripted(), Budget(escalations=3, on_exhausted="ask")
    agent = agent_on(chat(llm), budget, InMemorySaver())
    agent.invoke({"messages": QUESTION}, thread("1"))
    same = agent.get_state(thread("1")).config
    for resume in (2, second, second):
        agent.invoke(Command(resume=resume), same)
        assert budget.state().limit == {"escalations": 5}
    assert len(llm.asked) == len(set(questions(llm))) == 5
    assert "answered before" in caplog.text


def test_two_processes_that_resume_one_interrupt_grant_once(tmp_path: Path) -> None:
    llm, saver = scripted(), InMemorySaver()

    def process() -> tuple[Budget, Any]:
        budget = Budget(escalations=3, on_exhausted="ask", store=SQLiteStore(tmp_path / "budget.db"))
        return budget, agent_on(chat(llm), budget, saver)

    budget, agent = process()
    agent.invoke({"messages": QUESTION}, thread("1"))
    same = agent.get_state(thread("1")).config
    for _ in range(3):
        process()[1].invoke(Command(resume=2), same)
    assert budget.state().limit == {"escalations": 5}
    assert len(llm.asked) == budget.state().spent["escalations"] == 5


def test_a_finished_answer_resumed_again_from_its_interrupt_costs_nothing(whole: str) -> None:
    llm, budget = scripted(), Budget(escalations=3, on_exhausted="ask")
    agent = agent_on(chat(llm), budget, InMemorySaver())
    agent.invoke({"messages": QUESTION}, thread("1"))
    same = agent.get_state(thread("1")).config
    for _ in range(2):
        assert agent.invoke(Command(resume=100), same)["messages"][-1].text == whole
    assert len(llm.asked) == TOKENS


def test_a_no_keeps_what_was_paid_for_and_is_the_answer_however_often_it_is_given(whole: str) -> None:
    llm, budget = scripted(), Budget(escalations=3, on_exhausted="ask")
    agent = agent_on(chat(llm), budget, InMemorySaver())
    agent.invoke({"messages": QUESTION}, thread("1"))
    same = agent.get_state(thread("1")).config
    for resume in ("no", 100):  # a checkpoint keeps its first answer
        declined = agent.invoke(Command(resume=resume), same)["messages"][-1]
        assert declined.response_metadata["s2t"]["degraded"]
        assert len(llm.asked) == 3
        assert budget.state().limit == {"escalations": 3}


async def test_async_and_streamed_answers_do_the_same(whole: str) -> None:
    llm, budget = scripted(), Budget(escalations=2, on_exhausted="ask")
    agent = agent_on(chat(llm), budget, InMemorySaver())
    await agent.ainvoke({"messages": QUESTION}, thread("1"))
    texts: list[str] = []
    for _ in range(40):
        texts.append("")
        async for message, _ in agent.astream(Command(resume=3), thread("1"), stream_mode="messages"):
            texts[-1] += message.text
        state = await agent.aget_state(thread("1"))
        if not state.interrupts:
            break
    assert texts == [texts[0], whole]
    assert whole.startswith(texts[0])
    assert len(llm.asked) == len(set(questions(llm))) == TOKENS


def test_a_retry_between_the_middleware_and_the_model_goes_on_where_it_stopped() -> None:
    llm, budget = scripted(), Budget(escalations=3, on_exhausted="ask")
    retry = ModelRetryMiddleware(max_retries=2, initial_delay=0.0, on_failure="error")
    agent = create_agent(
        chat(llm), [], name="a", middleware=[BudgetMiddleware(budget), retry], checkpointer=InMemorySaver()
    )
    run, _ = ask_until_done(agent, thread("1"), 2)
    assert len(llm.asked) == len(set(questions(llm))) == TOKENS
    assert Decimal(run["s2t_cost_usd"]["llm"]) == budget.state().spent["usd"]


def test_a_budget_that_raises_lets_the_thread_go_on_without_paying_again(whole: str) -> None:
    llm, budget = scripted(), Budget(escalations=3, on_exhausted="raise")
    agent = agent_on(chat(llm), budget, InMemorySaver())
    with pytest.raises(BudgetExceeded):
        agent.invoke({"messages": QUESTION}, thread("1"))
    budget.extend(escalations=100)
    run = agent.invoke(None, thread("1"))
    assert run["messages"][-1].text == whole
    assert len(llm.asked) == TOKENS
    assert Decimal(run["s2t_cost_usd"]["llm"]) == budget.state().spent["usd"]


STEPS = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 3), st.sampled_from(["latest", "twice", "old"])),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limit=st.integers(0, 4), steps=STEPS, temperature=st.sampled_from([0.0, 1.0]))
def test_any_grants_in_any_order_end_and_pay_for_every_question_once(
    limit: int, steps: Sequence[tuple[str, int, str]], temperature: float
) -> None:
    """Two agents on one budget; grants of 0 decline; interrupts are resumed twice, and again when they are old."""
    llms = {name: scripted() for name in "ab"}
    budget, saver = Budget(escalations=limit, on_exhausted="ask"), InMemorySaver()
    agents = {n: agent_on(chat(llms[n], max_tokens=5, temperature=temperature), budget, saver, name=n) for n in "ab"}
    marks: dict[str, list[Any]] = {"a": [], "b": []}
    said: dict[str, int] = {}  # by checkpoint, which keeps its first answer
    allowed = limit

    def resume(name: str, grant: int, at: Any) -> None:
        nonlocal allowed
        before, free = len(llms[name].asked), int(budget.available()["escalations"])
        where = at["configurable"]["checkpoint_id"]
        if where not in said:
            said[where] = grant
            allowed, free = allowed + grant, free + grant
        grant = said[where]
        run = agents[name].invoke(Command(resume=grant), at)
        assert budget.state().limit == {"escalations": allowed}
        if grant and "__interrupt__" in run:
            assert len(llms[name].asked) == before + free  # all that was allowed went into the answer

    for name in "ab":
        agents[name].invoke({"messages": f"{QUESTION} {name}"}, thread(name))
    for name, grant, how in steps:
        state = agents[name].get_state(thread(name))
        if state.interrupts:
            marks[name].append(state.config)
        if not marks[name]:
            continue
        at = marks[name][0] if how == "old" else marks[name][-1]
        for _ in range(2 if how == "twice" else 1):
            resume(name, grant, at)
    for name in "ab":
        for _ in range(10):
            state = agents[name].get_state(thread(name))
            if not state.interrupts:
                break
            resume(name, 1, state.config)
        else:
            pytest.fail("ten grants of one were not enough for five questions")
    for llm in llms.values():
        if temperature == 0:
            assert len(llm.asked) == len(set(questions(llm)))
    assert sum(len(llm.asked) for llm in llms.values()) == budget.state().spent["escalations"] <= allowed


# ---------------------------------------------------------------- without an agent


def test_a_caller_who_keeps_what_was_unfinished_pays_for_the_rest_alone(whole: str) -> None:
    llm, budget, unfinished = scripted(), Budget(escalations=3, on_exhausted="raise"), Unfinished()
    model = chat(llm, budget=budget)
    with pytest.raises(BudgetExceeded):
        model.invoke(QUESTION, s2t_unfinished=unfinished)
    budget.extend(escalations=100)
    again = Unfinished().resume(json.loads(json.dumps(unfinished.as_dict())))  # it may travel as JSON
    answer = model.invoke(QUESTION, s2t_unfinished=again)
    assert answer.text == whole
    assert len(llm.asked) == TOKENS
    assert answer.response_metadata["s2t"]["escalations"] == TOKENS - 3
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == TOKENS
    assert not again.as_dict()
    model.invoke(QUESTION, s2t_unfinished=again)  # finished: the next answer is a new one
    assert len(llm.asked) == 2 * TOKENS


def first(ids: Sequence[int], candidates: Sequence[int]) -> list[float]:
    return [-float(at) for at in range(len(candidates))]


def second(ids: Sequence[int], candidates: Sequence[int]) -> list[float]:
    return [-1.0, -0.1, *[-2.0] * (len(candidates) - 2)]


WRITERS: dict[str, dict[str, Any]] = {
    "LLM picks": {},
    "LLM picks every third token": {"trigger": when(lambda proposal: len(proposal.prefix) % 3 == 0)},
    "LLM and selector pick": {"margin": 0.9999},
    "thinks": {"model": model_of("special", False), "selector": None, "max_tokens": 60, "scores": first},
}
SUMMED = ("completion_tokens", "triggers", "selections", "flips", "escalations")
SUMMED += tuple(f"thought_{name.removeprefix('completion_')}" for name in SUMMED if name != "flips")


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "limits", [{"escalations": 0}, {"escalations": 1}, {"answer_tokens": 1}, {"answer_tokens": 3, "escalations": 2}]
)
def test_the_records_of_all_tries_add_up_to_the_answer_that_nothing_interrupts(
    writer: str, limits: dict[str, int]
) -> None:
    options = {"trigger": when(lambda proposal: True), "selector": "s2t-demo", "max_tokens": TOKENS, **WRITERS[writer]}
    llm = ScriptedLLM(options.pop("scores", second), price=PRICE)
    escalation = Escalation(llm, margin=options.pop("margin", 1.0))

    def answered(budget: Budget) -> tuple[Any, Ledger]:
        ledger, unfinished = Ledger(), Unfinished()
        model = ChatS2T(escalation=escalation, ledger=ledger, **options)
        for _ in range(100):
            try:
                return model.invoke(QUESTION, s2t_budget=budget, s2t_unfinished=unfinished), ledger
            except BudgetExceeded as refused:
                budget.extend(**{refused.unit: 1 if refused.unit == "escalations" else 7})
        raise AssertionError("it never ends")

    enough = {"escalations": 100, "answers": 1, "answer_tokens": 1000, "usd": "1", "on_exhausted": "raise"}
    whole, once = answered(Budget(**enough))
    message, tries = answered(budget := Budget(**enough | limits))
    assert message.content == whole.content
    assert message.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert len(tries.records()) > len(once.records()) == 1
    spent, total, wanted = budget.state().spent, tries.total(), once.total()
    assert {name: getattr(total, name) for name in SUMMED} == {name: getattr(wanted, name) for name in SUMMED}
    assert (total.completion_tokens, total.escalations) == (spent["answer_tokens"], spent["escalations"])
    assert total.cost_usd.llm.usd == wanted.cost_usd.llm.usd == spent["usd"]
    assert total.cost_usd.thought == wanted.cost_usd.thought
    told, last = message.response_metadata["s2t"], tries.records()[-1]
    assert told["tokens"] == whole.response_metadata["s2t"]["tokens"]
    assert {name: told[name] for name in SUMMED[1:5]} == {name: getattr(last, name) for name in SUMMED[1:5]}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (HumanMessage(QUESTION, name="ann"), HumanMessage(QUESTION, name="bob")),
        (HumanMessage(QUESTION, name="ann"), HumanMessage(QUESTION)),
        (HumanMessage(QUESTION), AIMessage(QUESTION)),
    ],
)
def test_a_try_whose_messages_say_who_spoke_otherwise_is_another_one(one: Any, other: Any) -> None:
    llm, budget, unfinished = scripted(), Budget(escalations=3, on_exhausted="raise"), Unfinished()
    model = chat(llm, budget=budget)
    for messages in ([one], [other]):
        with pytest.raises(BudgetExceeded):
            model.invoke([*messages, HumanMessage("Go on.")], s2t_unfinished=unfinished)
        budget.extend(escalations=3)
    assert len(unfinished.as_dict()) == 2
    assert [len(partial["paid"]) for partial in unfinished.as_dict().values()] == [3, 3]


def test_another_conversation_is_another_answer() -> None:
    llm, budget, unfinished = scripted(), Budget(escalations=3, on_exhausted="raise"), Unfinished()
    model = chat(llm, budget=budget)
    with pytest.raises(BudgetExceeded):
        model.invoke(QUESTION, s2t_unfinished=unfinished)
    budget.extend(escalations=100)
    other = model.invoke("How many lamps are in stock?", s2t_unfinished=unfinished)
    assert other.text == chat(scripted()).invoke("How many lamps are in stock?").text


@pytest.mark.parametrize(
    "stored",
    [
        "text",
        [1],
        {"x": 1},
        {"x": {"tokens": "many"}},
        {"x": {"tokens": [-1]}},
        {"x": {"tokens": [10**9]}},
        {"x": {"tokens": [1], "paid": [99]}},
        {1: {}},
        {"x": {"tokens": [1] * 100_000}},
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_an_answer_written_anew(stored: Any, whole: str) -> None:
    probe = Unfinished()
    model = chat(scripted(), budget=(budget := Budget(escalations=3, on_exhausted="raise")))
    with pytest.raises(BudgetExceeded):
        model.invoke(QUESTION, s2t_unfinished=probe)
    budget.extend(escalations=100)
    [key] = probe.as_dict()
    damaged = {key if name == "x" else name: data for name, data in stored.items()} if type(stored) is dict else stored
    answer = model.invoke(QUESTION, s2t_unfinished=Unfinished().resume(damaged))
    if damaged != {key: {"tokens": [1], "paid": [99]}}:
        assert answer.text == whole
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == TOKENS


@pytest.mark.parametrize(("asks", "picker"), [(True, "llm"), (False, "slm")])
def test_only_tokens_that_come_again_were_paid_for_before(asks: bool, picker: str) -> None:
    probe, seen = Unfinished(), []
    with pytest.raises(BudgetExceeded):
        chat(scripted()).invoke(QUESTION, s2t_budget=Budget(escalations=3, on_exhausted="raise"), s2t_unfinished=probe)
    [(key, partial)] = probe.as_dict().items()
    stored = {key: {**partial, "tokens": partial["tokens"][:1]}}  # of three that were paid for
    llm = scripted()
    model = chat(llm, trigger=when(lambda proposal: asks), on_step=lambda trace, step: seen.append(step))
    answer = model.invoke(QUESTION, s2t_unfinished=Unfinished().resume(stored))
    assert [step.picked_by for step in seen] == ["llm", *[picker] * (TOKENS - 1)]
    assert [bool(step.escalation and step.escalation.replayed) for step in seen] == [True, *[False] * (TOKENS - 1)]
    assert answer.response_metadata["s2t"]["escalations"] == len(llm.asked) == (TOKENS - 1 if asks else 0)


def test_something_else_in_its_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="s2t_unfinished"):
        chat(scripted()).invoke(QUESTION, s2t_unfinished={})


def test_a_failed_question_is_not_put_again_either(whole: str) -> None:
    def fails_once(ids: Sequence[int], candidates: Sequence[int]) -> list[float]:
        if len(llm.asked) == 2:
            raise EscalationFailed("down")
        return last_candidate(ids, candidates)

    llm = ScriptedLLM(fails_once, price=PRICE)
    budget = Budget(escalations=3, on_exhausted="ask")
    ask_until_done(agent_on(chat(llm), budget, InMemorySaver()), thread("1"), 1)
    assert len(llm.asked) == len(set(questions(llm))) == TOKENS


def test_nothing_of_an_unfinished_answer_is_logged(caplog: Any) -> None:
    caplog.set_level(logging.DEBUG, "s2t_agents")
    Unfinished().resume({"secret": {"tokens": "hunter2"}})
    assert "hunter2" not in caplog.text
    assert "written anew" in caplog.text


# ---------------------------------------------------------------- old checkpoints and other forms of answers


@pytest.mark.parametrize(("kept", "restarted"), [("store", True), ("store", False), ("memory", False)])
def test_rewinding_undoes_no_spending_while_the_budget_lives(tmp_path: Path, kept: str, restarted: bool) -> None:
    llm, saver, limits = scripted(), InMemorySaver(), {"per_thread": {"escalations": 20}}

    def budget() -> Budget:
        return Budget(escalations=50, store=SQLiteStore(tmp_path / "b.db") if kept == "store" else None)

    agent = agent_on(chat(llm), budget(), saver, **limits)
    for n in range(3):
        agent.invoke({"messages": f"Hi {n}"}, thread("1"))
    spent = len(llm.asked)
    old = [each for each in agent.get_state_history(thread("1")) if each.values.get("s2t_budget")][-1]
    again = agent_on(chat(llm), budget(), saver, **limits) if restarted else agent
    run = again.invoke({"messages": "again"}, old.config)
    assert len(llm.asked) <= 20
    assert run["s2t_budget"]["spent"]["escalations"] == len(llm.asked) >= spent


def test_a_budget_in_memory_that_died_knows_what_the_old_checkpoint_says(tmp_path: Path) -> None:
    llm, saver, limits = scripted(), InMemorySaver(), {"per_thread": {"escalations": 20}}
    agent = agent_on(chat(llm), Budget(), saver, **limits)
    for n in range(2):
        agent.invoke({"messages": f"Hi {n}"}, thread("1"))
    history = [each for each in agent.get_state_history(thread("1")) if not each.next]
    known = history[-1].values["s2t_budget"]["spent"]["escalations"]
    assert 0 < known < len(llm.asked)
    llm.asked.clear()
    run = agent_on(chat(llm), Budget(), saver, **limits).invoke({"messages": "again"}, history[-1].config)
    assert run["s2t_budget"]["spent"]["escalations"] == known + len(llm.asked)


def test_tool_calls_are_gone_on_with_too() -> None:
    calls: list[str] = []

    @tool
    def get_stock(item: str) -> int:
        """Look up the stock of an item."""
        calls.append(item)
        return 85

    def run(start: int, grant: int) -> tuple[Any, ScriptedLLM]:
        llm, budget = scripted(), Budget(escalations=start, on_exhausted="ask")
        agent = create_agent(
            chat(llm, max_tokens=80), [get_stock], middleware=[BudgetMiddleware(budget)], checkpointer=InMemorySaver()
        )
        done, _ = ask_until_done(agent, thread("1"), grant, "Look up the stock of lamps. How many are there?", 200)
        return done, llm

    free, llm = run(1000, 1)
    bit_by_bit, paid = run(0, 3)
    assert [m.type for m in bit_by_bit["messages"]] == [m.type for m in free["messages"]]
    assert [m.text for m in bit_by_bit["messages"]] == [m.text for m in free["messages"]]
    assert bit_by_bit["messages"][1].tool_calls[0]["args"] == free["messages"][1].tool_calls[0]["args"]
    assert len(paid.asked) == len(set(questions(paid))) == len(llm.asked)
    assert len(calls) == 2


class Sentences(ScriptedLLM):
    """Settles two tokens with every pick, as a judge does."""

    def ask(self, question: Question) -> Answer:
        answer = super().ask(question)
        return Answer(answer.scores, then=tuple(question.candidates[:2]))


def test_what_a_judge_settled_with_its_pick_is_gone_on_with() -> None:
    whole = chat(Sentences(last_candidate)).invoke(QUESTION).text
    llm, budget = Sentences(last_candidate), Budget(escalations=1, on_exhausted="ask")
    run, asked = ask_until_done(agent_on(chat(llm), budget, InMemorySaver()), thread("1"), 1)
    assert run["messages"][-1].text == whole
    assert len(llm.asked) == len(set(questions(llm))) == asked + 1 < TOKENS
