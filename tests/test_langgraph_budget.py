"""The middleware: every agent and thread its own budget, reported, resumed, asked about and ended."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
from budget_support import FakeClock
from langchain.agents import create_agent
from langchain.agents.middleware import ModelFallbackMiddleware, wrap_model_call
from langchain.agents.structured_output import ToolStrategy
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from pydantic import BaseModel, Field
from s2t_agents.integrations.langgraph import BudgetMiddleware

from s2t_agents import ChatS2T, Ledger
from s2t_agents.budget import Budget, Charge, SQLiteStore
from s2t_agents.chat.attribution import configurable
from s2t_agents.errors import BadLimit, BudgetExceeded
from s2t_agents.escalation import Escalation
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always

ASK_LLM = Charge(Decimal("0.01"), 50)


class Spender(BaseChatModel):
    """Escalates ``each`` times per answer on its call's budget; degrades, or lets the refusal out, as told."""

    each: int = 1
    seen: list[dict[str, Any]] = Field(default_factory=list)
    script: list[AIMessage] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "spender"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Any:
        return self.bind(tools=tools, **kwargs)

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **call: Any
    ) -> ChatResult:
        own = {key: configurable(key) for key in ("s2t_budget", "s2t_agent")}
        budget: Budget = own["s2t_budget"]
        self.seen.append({**call, **own, "messages": messages})
        asked = 0
        for _ in range(self.each):
            try:
                with budget.reserve(ASK_LLM) as hold:
                    hold.settle(ASK_LLM)
                    asked += 1
            except BudgetExceeded:
                if budget.on_exhausted != "degrade":
                    raise
        answer = self.script.pop(0) if self.script else AIMessage(f"asked {asked}")
        cost = {
            "local": "0.001",
            "llm": str(asked * Decimal("0.01")),
            "total": str(asked * Decimal("0.01") + Decimal("0.001")),
        }
        answer = answer.model_copy(update={"response_metadata": {"s2t": {"cost_usd": cost}}})
        return ChatResult(generations=[ChatGeneration(message=answer)])


class Foreign(BaseChatModel):
    """A model of other makers: it knows none of our arguments."""

    @property
    def _llm_type(self) -> str:
        return "foreign"

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage("from elsewhere"))])


@tool
def look(what: str) -> str:
    """Look something up."""
    return f"{what}: 7"


def call_look() -> AIMessage:
    return AIMessage("", tool_calls=[{"name": "look", "args": {"what": "x"}, "id": "1"}])


def agent_on(model: Spender, middleware: BudgetMiddleware, **settings: Any) -> Any:
    settings.setdefault("checkpointer", InMemorySaver())
    return create_agent(model, [look], middleware=[middleware], name="helper", **settings)


def in_thread(name: str) -> dict[str, Any]:
    return {"configurable": {"thread_id": name}}


HI = {"messages": [("user", "hi")]}


def test_each_thread_and_agent_spends_its_own_child() -> None:
    budget = Budget(escalations=10, name="fleet")
    model = Spender(each=3)
    agent = agent_on(model, BudgetMiddleware(budget, per_thread={"escalations": 2}))
    first = agent.invoke(HI, in_thread("a"))
    agent.invoke(HI, in_thread("b/1"))
    assert first["messages"][-1].text == "asked 2"
    assert model.seen[0]["s2t_agent"] == "helper"
    assert model.seen[0]["s2t_budget"].path == "fleet/thread a/helper"
    assert model.seen[1]["s2t_budget"].path == "fleet/thread b%2F1/helper"
    assert budget.state().spent["escalations"] == 4


def test_agents_have_limits_by_their_names_within_each_thread() -> None:
    limits = BudgetMiddleware(
        Budget(escalations=10), per_thread={"escalations": 5}, per_agent={"one": {"escalations": 1}, "two": {}}
    )
    said = {}
    for name in ("one", "two", "nobody's"):
        agent = create_agent(Spender(each=3), [], name=name, middleware=[limits], checkpointer=InMemorySaver())
        said[name] = agent.invoke(HI, in_thread("a"))["messages"][-1].text
    assert said == {"one": "asked 1", "two": "asked 3", "nobody's": "asked 1"}  # the thread has five
    for wrong in ({"one": {"escalations": -1}}, {"one": {"euros": 1}}, {"one": {}, "escalations": 1}, {3: {}}, ["one"]):
        with pytest.raises(BadLimit):
            BudgetMiddleware(Budget(), per_agent=wrong)  # type: ignore[arg-type]


def test_cost_and_what_is_left_are_in_the_state_as_plain_json() -> None:
    budget = Budget(usd="0.05", escalations=10)
    model = Spender(script=[call_look()])
    state = agent_on(model, BudgetMiddleware(budget)).invoke(HI, in_thread("a"))
    assert state["s2t_cost_usd"] == {"local": "0.002", "llm": "0.02", "total": "0.022"}
    assert state["s2t_budget"]["spent"]["usd"] == "0.02"
    assert state["s2t_budget"]["available"] == {"usd": "0.03", "escalations": 8}
    json.dumps({key: value for key, value in state.items() if key.startswith("s2t_")})


def test_a_resumed_thread_keeps_what_it_spent(tmp_path: Any) -> None:
    saver = InMemorySaver()
    limits = {"per_thread": {"escalations": 3}}
    agent = agent_on(Spender(each=2), BudgetMiddleware(Budget(), **limits), checkpointer=saver)
    agent.invoke(HI, in_thread("a"))
    after_restart = agent_on(Spender(each=2), BudgetMiddleware(Budget(), **limits), checkpointer=saver)
    assert after_restart.invoke(HI, in_thread("a"))["messages"][-1].text == "asked 1"
    assert after_restart.invoke(HI, in_thread("other"))["messages"][-1].text == "asked 2"

    path = tmp_path / "budget.db"
    for expected in ("asked 2", "asked 1"):  # a store that lasts needs no checkpoint to remember, nor counts twice
        stored = BudgetMiddleware(Budget(store=SQLiteStore(path)), **limits)
        state = agent_on(Spender(each=2), stored, checkpointer=saver).invoke(HI, in_thread("stored"))
        assert state["messages"][-1].text == expected


def test_a_thread_resumed_after_its_deadline_goes_on_and_its_spending_is_not_forgotten() -> None:
    saver = InMemorySaver()
    limits: Any = {"per_thread": {"escalations": 3}}
    agent = agent_on(Spender(each=2), BudgetMiddleware(Budget(seconds=60), **limits), checkpointer=saver)
    agent.invoke(HI, in_thread("a"))
    budget = Budget(seconds=60, clock=(clock := FakeClock()))
    clock.advance(61)
    after_restart = agent_on(Spender(each=2), BudgetMiddleware(budget, **limits), checkpointer=saver)
    late = after_restart.invoke(HI, in_thread("a"))
    assert late["messages"][-1].text == "asked 0"
    assert late["s2t_budget"]["spent"]["escalations"] == 2
    budget.extend(seconds=60)
    assert after_restart.invoke(HI, in_thread("a"))["messages"][-1].text == "asked 1"
    assert budget.state().spent["escalations"] == 3


def test_more_seconds_bring_the_spending_back_before_the_model_goes_on() -> None:
    saver = InMemorySaver()
    limits: Any = {"per_thread": {"escalations": 3}}
    agent = agent_on(Spender(each=2), BudgetMiddleware(Budget(seconds=60), **limits), checkpointer=saver)
    agent.invoke(HI, in_thread("a"))
    budget = Budget(seconds=60, on_exhausted="ask", clock=(clock := FakeClock()))
    clock.advance(61)
    after_restart = agent_on(Spender(each=1), BudgetMiddleware(budget, **limits), checkpointer=saver)
    assert after_restart.invoke(HI, in_thread("a"))["__interrupt__"][0].value["unit"] == "seconds"
    done = after_restart.invoke(Command(resume={"seconds": 60}), in_thread("a"))
    assert done["messages"][-1].text == "asked 1"
    assert done["s2t_budget"]["spent"]["escalations"] == 3


def test_dollars_that_nobody_knew_stay_unknown_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ASK_LLM", Charge(None, 50))
    saver = InMemorySaver()
    agent_on(Spender(), BudgetMiddleware(Budget()), checkpointer=saver).invoke(HI, in_thread("a"))
    for _ in range(2):  # twice in one process: it is brought back once
        resumed = agent_on(Spender(each=0), BudgetMiddleware(budget := Budget()), checkpointer=saver)
        resumed.invoke(HI, in_thread("a"))
        state = resumed.invoke(HI, in_thread("a"))
        assert state["s2t_budget"]["spent"] == {"usd": None, "escalations": 1, "llm_tokens": 50}
        assert budget.state().unpriced == 1


class Verdict(BaseModel):
    """What was found."""

    x: int


def test_the_cost_of_an_answer_given_as_a_tool_call_counts_too() -> None:
    verdict = AIMessage("", tool_calls=[{"name": "Verdict", "args": {"x": 1}, "id": "2"}])
    agent = agent_on(
        Spender(script=[call_look(), verdict]), BudgetMiddleware(Budget()), response_format=ToolStrategy(Verdict)
    )
    state = agent.invoke(HI, in_thread("a"))
    assert state["structured_response"] == Verdict(x=1)
    assert state["s2t_cost_usd"] == {"local": "0.002", "llm": "0.02", "total": "0.022"}


def test_the_model_can_be_told_what_is_left() -> None:
    model = Spender()
    told = BudgetMiddleware(Budget(escalations=5, usd="0.05"), tell_model=True)
    agent_on(model, told, system_prompt="Be brief.").invoke(HI, in_thread("a"))
    system = model.seen[0]["messages"][0].text
    assert system.startswith("Be brief.")
    assert "0.05 US dollars, 5 questions to the large model" in system
    agent_on(quiet := Spender(), BudgetMiddleware(Budget(escalations=5))).invoke(HI, in_thread("a"))
    assert quiet.seen[0]["messages"][0].type == "human"


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"llm_tokens": 1_234_567}, "1234567 large-model tokens."),
        ({"usd": "0.0000000125"}, "0.0000000125 US dollars."),
        ({"usd": 1_000_000}, "1000000 US dollars."),
        ({"seconds": 7_654_321}, re.compile(r"765432[01](\.\d)? seconds\.")),
    ],
)
def test_what_is_left_is_told_without_exponents(limits: dict[str, Any], told: str | re.Pattern[str]) -> None:
    agent_on(model := Spender(), BudgetMiddleware(Budget(**limits), tell_model=True)).invoke(HI, in_thread("a"))
    assert re.search(told if isinstance(told, re.Pattern) else re.escape(told), model.seen[0]["messages"][0].text)


def test_raise_lets_the_refusal_out() -> None:
    agent = agent_on(Spender(each=3), BudgetMiddleware(Budget(escalations=2, on_exhausted="raise")))
    with pytest.raises(BudgetExceeded, match="escalations"):
        agent.invoke(HI, in_thread("a"))


@pytest.mark.parametrize("answer", [{"escalations": 3}, 3, "yes, 3 more"])
def test_ask_interrupts_in_the_middle_and_goes_on_with_more(answer: Any) -> None:
    budget = Budget(escalations=2, on_exhausted="ask")
    agent = agent_on(Spender(each=3), BudgetMiddleware(budget))
    asked = agent.invoke(HI, in_thread("a"))["__interrupt__"][0].value
    assert (asked["unit"], asked["limit"], asked["budget"]) == ("escalations", 2, "run")
    assert asked["question"] == "The budget 'run' has used 2 of 2 escalations. Allow more?"
    json.dumps(asked)
    done = agent.invoke(Command(resume=answer), in_thread("a"))
    assert done["messages"][-1].text == "asked 3"
    assert budget.state().limit == {"escalations": 5}


def test_an_answer_that_cannot_be_followed_is_asked_again() -> None:
    budget = Budget(escalations=2, on_exhausted="ask")
    agent = agent_on(Spender(each=3), BudgetMiddleware(budget))
    question = agent.invoke(HI, in_thread("a"))["__interrupt__"][0].value["question"]
    for unclear in ("yes", "-3", {"usd": 1}, "1.5"):
        [again] = agent.invoke(Command(resume=unclear), in_thread("a"))["__interrupt__"]
        assert again.value["question"].endswith(question)
        assert again.value["question"] != question
    assert agent.invoke(Command(resume="3"), in_thread("a"))["messages"][-1].text == "asked 3"
    assert budget.state().limit == {"escalations": 5}


def test_every_answer_counts_once_however_often_it_is_asked() -> None:
    budget = Budget(escalations=1, on_exhausted="ask")
    agent = agent_on(Spender(each=3), BudgetMiddleware(budget))
    agent.invoke(HI, in_thread("a"))
    for more in range(1, 4):
        state = agent.invoke(Command(resume=1), in_thread("a"))
        assert "__interrupt__" in state  # each new try spends the one more before it asks again
        assert budget.state().limit == {"escalations": 1 + more}
    done = agent.invoke(Command(resume=3), in_thread("a"))
    assert done["messages"][-1].text == "asked 3"
    assert budget.state().limit == {"escalations": 7}
    assert [message.type for message in done["messages"]] == ["human", "ai"]


@pytest.mark.parametrize("answer", [False, "no", "No, that is enough", 0])
def test_a_no_lets_the_rest_degrade(answer: Any) -> None:
    budget = Budget(escalations=2, on_exhausted="ask")
    agent = agent_on(Spender(each=3), BudgetMiddleware(budget))
    agent.invoke(HI, in_thread("a"))
    done = agent.invoke(Command(resume=answer), in_thread("a"))
    assert done["messages"][-1].text == "asked 0"
    assert budget.state().limit == {"escalations": 2}
    assert "__interrupt__" in agent.invoke(HI, in_thread("a"))  # the next run asks again


def test_a_run_can_end_when_its_budget_is_spent() -> None:
    model = Spender(script=[call_look() for _ in range(10)])
    state = agent_on(model, BudgetMiddleware(Budget(escalations=2), end_when_exhausted=True)).invoke(HI, in_thread("a"))
    assert len(model.seen) == 2
    assert "is spent (questions to the large model)" in state["messages"][-1].text


def test_what_was_kept_back_pays_for_a_last_answer_without_tools() -> None:
    budget = Budget(escalations=3, reserve_for_final=Charge(Decimal(0)))
    model = Spender(script=[call_look(), call_look()])
    state = agent_on(model, BudgetMiddleware(budget, end_when_exhausted=True)).invoke(HI, in_thread("a"))
    assert state["messages"][-1].text == "asked 1"
    assert "final answer now" in model.seen[-1]["messages"][0].text
    assert not model.seen[-1].get("tools")
    assert budget.state().spent["escalations"] == 3


async def test_async_does_the_same() -> None:
    budget = Budget(escalations=2, on_exhausted="ask")
    agent = agent_on(Spender(each=3), BudgetMiddleware(budget, tell_model=True))
    asked = await agent.ainvoke(HI, in_thread("a"))
    assert "__interrupt__" in asked
    done = await agent.ainvoke(Command(resume="3"), in_thread("a"))
    assert done["messages"][-1].text == "asked 3"
    assert done["s2t_budget"]["spent"]["escalations"] == 5


def test_without_a_thread_the_agent_spends_under_the_budget_itself() -> None:
    budget = Budget(escalations=2, name="run")
    model = Spender(each=3)
    agent_on(model, BudgetMiddleware(budget, agent="me"), checkpointer=None).invoke(HI)
    assert model.seen[0]["s2t_budget"].path == "run/me"


def test_limits_that_can_not_be_meant_show_at_once() -> None:
    with pytest.raises(BadLimit):
        BudgetMiddleware(Budget(), per_thread={"escalations": -1})


@pytest.mark.parametrize("answer", [True, "yes", {"euros": 3}, object()])
def test_a_yes_must_say_how_much(answer: Any) -> None:
    from s2t_agents.budget.extension import extension_from

    with pytest.raises(BadLimit):
        extension_from(answer, "escalations")
    assert extension_from("2.5", "usd") == {"usd": Decimal("2.5")}
    assert extension_from("30 s", "seconds") == {"seconds": 30.0}


def asked_about_local_work(budget: Budget) -> Any:
    from s2t_agents import ChatS2T
    from s2t_agents.testing import tiny_model

    model = ChatS2T(model=tiny_model(), max_tokens=12)
    return create_agent(model, [], middleware=[BudgetMiddleware(budget)], checkpointer=InMemorySaver())


def test_tokens_of_answers_are_asked_for_and_the_answer_goes_on() -> None:
    budget = Budget(answer_tokens=5, on_exhausted="ask")
    agent = asked_about_local_work(budget)
    [interrupt] = agent.invoke(HI, in_thread("a"))["__interrupt__"]
    assert (interrupt.value["unit"], interrupt.value["spent"]) == ("answer_tokens", 5)
    done = agent.invoke(Command(resume="7 more"), in_thread("a"))
    assert done["messages"][-1].usage_metadata["output_tokens"] == 12
    assert budget.state().spent["answer_tokens"] == 12


def test_without_more_local_work_the_run_ends_with_a_message() -> None:
    agent = asked_about_local_work(Budget(answer_tokens=5, on_exhausted="ask"))
    agent.invoke(HI, in_thread("a"))
    done = agent.invoke(Command(resume="no"), in_thread("a"))
    assert "is spent (tokens of answers)" in done["messages"][-1].text


@wrap_model_call
def elsewhere(request: Any, handler: Any) -> Any:
    return handler(request.override(model=Foreign()))


@pytest.mark.parametrize("other", [ModelFallbackMiddleware(Foreign()), elsewhere], ids=["fallback", "another model"])
@pytest.mark.parametrize("outer", [True, False], ids=["budget outside", "budget inside"])
def test_models_of_other_makers_answer_beside_the_middleware(other: Any, outer: bool) -> None:
    middleware = [BudgetMiddleware(Budget(escalations=1)), other]
    agent = create_agent(ChatS2T(model="/no/such/model"), middleware=middleware if outer else middleware[::-1])
    assert agent.invoke({"messages": "hello"})["messages"][-1].text == "from elsewhere"


def asking(ledger: Ledger) -> ChatS2T:
    """A model that would ask at every token."""
    escalation = Escalation(ScriptedLLM(last_candidate), margin=1.0)
    return ChatS2T(
        model=tiny_model(max_position_embeddings=4096),
        max_tokens=6,
        trigger=always(),
        escalation=escalation,
        ledger=ledger,
    )


@pytest.mark.parametrize("policy", ["degrade", "ask"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_what_a_tool_asks_of_a_model_without_a_budget_counts_against_its_agent(
    policy: Any, is_async: bool
) -> None:
    ledger = Ledger()
    model = asking(ledger)

    @tool
    async def write_later(task: str) -> str:
        """Have it written."""
        return str((await create_agent(model, name="writer").ainvoke({"messages": task}))["messages"][-1].text)

    @tool
    def write(task: str) -> str:
        """Have it written."""
        return str(create_agent(model, name="writer").invoke({"messages": task})["messages"][-1].text)

    called = write_later if is_async else write
    script = [AIMessage("", tool_calls=[{"name": called.name, "args": {"task": "x"}, "id": "1"}])]
    budget = Budget(escalations=4, on_exhausted=policy, name="fleet")
    agent = create_agent(Spender(each=1, script=script), [called], middleware=[BudgetMiddleware(budget)])
    run = (await agent.ainvoke({"messages": "go"})) if is_async else agent.invoke({"messages": "go"})
    assert budget.state().spent["escalations"] == 4
    assert [each.escalations for each in ledger.totals("agent").values()] == [3]  # the writer's, under its own name
    assert any(each.type == "tool" for each in run["messages"])  # which answered locally from there on
