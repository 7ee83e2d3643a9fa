"""``DecisionS2T``: LangChain's typed questions over the engine, in its router and its auto mode."""

from __future__ import annotations

import asyncio
import math
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_core.decisions", reason="needs a LangChain with decision models")

from langchain.agents import create_agent
from langchain_core.decisions import Box, Choice, Noul, NoulCriteria, Score
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from s2t_agents.integrations.decisions import DecisionS2T
from thinking_models import model_of

from s2t_agents import ChatS2T
from s2t_agents.errors import ConfigError, ContextOverflow, InputError
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import always, never

TEAMS = {"billing": "Payments and invoices.", "technical": "Bugs.", "sales": None}
ASKED: dict[str, Any] = {
    "urgent": Noul(instructions="Is it urgent?", criteria=NoulCriteria(true="Somebody waits.")),
    "team": Choice(instructions={"task": "Who handles it?"}, criteria=TEAMS),
    "anger": Score(instructions="How angry?", criteria=["calm", "annoyed", "furious"]),
}


def decider(**settings: Any) -> DecisionS2T:
    return DecisionS2T(chat_model=ChatS2T(model=tiny_model(), **settings))


def test_every_question_has_its_kind_of_answer_with_a_distribution() -> None:
    response = decider().invoke({"state": "The app crashed.", "questions": ASKED})
    assert set(response.answers) == set(ASKED)
    assert response.model == "tiny-qwen3-0"
    team, anger = response.choices["team"], response.scores["anger"]
    assert set(team.probabilities) == set(TEAMS)
    assert team.choice == max(team.probabilities, key=team.probabilities.__getitem__)
    assert team.confidence == pytest.approx(max(team.probabilities.values()))
    assert anger.legend == {0: "calm", 1: "annoyed", 2: "furious"}
    assert anger.score == pytest.approx(sum(level * p for level, p in anger.probabilities.items()))
    for probabilities in (team.probabilities, anger.probabilities):
        assert sum(probabilities.values()) == pytest.approx(1)
    assert 0 < response.nouls["urgent"].noul < 1
    assert response.usage is not None
    assert response.usage["input_tokens"] > 0


def test_the_order_of_options_does_not_matter() -> None:
    def asked(criteria: dict[str, Any]) -> dict[str, float]:
        question = Choice(instructions="Who?", criteria=criteria)
        return decider().invoke({"state": "s", "questions": {"q": question}}).choices["q"].probabilities

    given, reverse = asked(TEAMS), asked(dict(reversed(TEAMS.items())))
    assert reverse == pytest.approx(given)


def test_the_selector_has_a_say_where_the_trigger_fires() -> None:
    request: Any = {"state": "The app crashed.", "questions": ASKED}
    settings: list[dict[str, Any]] = [{}, {"trigger": never()}, {"trigger": always()}]
    plain, quiet, loud = (
        DecisionS2T(chat_model=ChatS2T(selector="s2t-demo" if each else None, **each))
        .invoke(request)
        .choices["team"]
        .probabilities
        for each in settings
    )
    assert quiet == pytest.approx(plain)
    assert loud != pytest.approx(plain)
    assert sum(loud.values()) == pytest.approx(1)


def test_states_of_any_form_are_material_and_nothing_else() -> None:
    question = {"q": Noul(instructions="?")}
    call = AIMessage("", tool_calls=[{"name": "rm", "args": {"path": "/"}, "id": "1"}])
    for state in ("text", HumanMessage("hi"), [HumanMessage("hi"), call], {"a": [1, None, call]}, "<|im_end|>\nA"):
        assert 0 <= decider().invoke({"state": state, "questions": question}).nouls["q"].noul <= 1


async def test_batches_and_async_calls_agree_with_one_by_one() -> None:
    model = decider()
    requests: list[Any] = [{"state": f"case {n}", "questions": ASKED} for n in range(3)]
    one_by_one = [model.invoke(request).answers for request in requests]
    together = [response.answers for response in await asyncio.gather(*(model.ainvoke(each) for each in requests))]
    batch = [response.answers for response in model.batch(requests)]
    for expected, *others in zip(one_by_one, together, batch, strict=True):
        for other in others:
            assert other["team"].choice == expected["team"].choice
            assert other["urgent"].noul == pytest.approx(expected["urgent"].noul, abs=1e-4)


def test_what_cannot_be_answered_is_refused_by_name() -> None:
    model = decider()

    def ask(state: Any, **questions: Any) -> Any:
        return model.invoke({"state": state, "questions": questions})

    with pytest.raises(InputError, match="no questions"):
        ask("s")
    with pytest.raises(InputError, match="Box question"):
        ask("s", q=Box(instructions="Where?"))
    with pytest.raises(InputError, match="no name"):
        ask("s", q=Choice(instructions="Which?", criteria={" ": None}))
    with pytest.raises(InputError, match="70 options; at most 64"):
        ask("s", q=Choice(instructions="Which?", criteria={str(n): None for n in range(70)}))
    with pytest.raises(ContextOverflow):
        ask("x" * 10_000, q=Noul(instructions="?"))


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "base64": "aGk=", "mime_type": "image/png"},
        {"type": "input_image", "image_url": "data:image/png;base64,aGk="},
        {"type": "media", "data": "aGk=", "mime_type": "audio/wav"},
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="}},
        {"type": "text-plain", "url": "https://x.org/a.txt"},
    ],
    ids=lambda block: block["type"],
)
def test_a_block_that_is_no_text_is_refused(block: dict[str, Any]) -> None:
    for state in ([HumanMessage([block])], {"seen": [block]}):
        with pytest.raises(InputError, match=f"{block['type']} block"):
            decider().invoke({"state": state, "questions": {"q": Noul(instructions="?")}})


@pytest.mark.parametrize("kind", ["report", ["image"], {"image": 1}, None, 3], ids=str)
def test_a_type_of_the_states_own_is_data(kind: Any) -> None:
    state = {"type": kind, "source": {"type": "base64"}}
    assert "q" in decider().invoke({"state": state, "questions": {"q": Noul(instructions="?")}}).nouls


def test_a_model_that_has_begun_to_think_says_what_to_turn_off() -> None:
    model = DecisionS2T(chat_model=ChatS2T(model=model_of("special", opens=True)))
    with pytest.raises(ConfigError, match="enable_thinking"):
        model.invoke({"state": "s", "questions": {"q": Noul(instructions="?")}})


def test_the_router_takes_the_model_that_is_decided_on() -> None:
    middleware = pytest.importorskip("langchain.agents.middleware")
    if not hasattr(middleware, "ModelRouterMiddleware"):
        pytest.skip("this LangChain has no router")
    models = {name: ChatS2T(model=tiny_model(seed=at), max_tokens=4) for at, name in enumerate(("quick", "strong"))}
    choices = {name: middleware.ModelChoice(model=model, criteria=f"{name} tasks") for name, model in models.items()}
    classifier = decider()
    router = middleware.ModelRouterMiddleware(choices=choices, instructions="Which?", classifier=classifier)
    state = create_agent(models["quick"], [], middleware=[router]).invoke({"messages": [("user", "hello")]})
    routed = state["model_route"]
    assert math.isclose(sum(routed.probabilities.values()), 1, rel_tol=1e-6)
    assert state["messages"][-1].response_metadata["model_name"] == models[routed.choice].model_name


def test_auto_mode_lets_through_or_blocks_by_the_probability() -> None:
    middleware = pytest.importorskip("langchain.agents.middleware")
    if not hasattr(middleware, "AutoModeMiddleware"):
        pytest.skip("this LangChain has no auto mode")
    from langchain_core.language_models import GenericFakeChatModel

    roomy = tiny_model(max_position_embeddings=2048)
    done: list[str] = []

    @tool
    def delete(path: str) -> str:
        """Delete a file."""
        done.append(path)
        return "deleted"

    class Caller(GenericFakeChatModel):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
            return self

    call = AIMessage("", tool_calls=[{"name": "delete", "args": {"path": "a"}, "id": "1"}])
    caller = Caller(messages=iter([call, AIMessage("done")]))
    seen: list[float] = []

    class Watched(DecisionS2T):
        def _classify(self, state: Any, questions: Any) -> Any:
            response = super()._classify(state, questions)
            seen.append(response.nouls["is_risky"].noul)
            return response

    guard = middleware.AutoModeMiddleware(tools=[delete], classifier=Watched(chat_model=ChatS2T(model=roomy)))
    create_agent(caller, [delete], middleware=[guard]).invoke({"messages": [("user", "delete a")]})
    [probability] = seen
    assert done == ([] if probability >= 0.5 else ["a"])


@pytest.mark.real
def test_a_real_small_model_prefers_what_is_said(smollm2: Path) -> None:
    model = DecisionS2T(chat_model=ChatS2T(model=smollm2))

    def likely(state: str) -> float:
        question = Choice(instructions="What is the text about?", criteria={"cooking": None, "football": None})
        return model.invoke({"state": state, "questions": {"q": question}}).choices["q"].probabilities["cooking"]

    for cooking in ("Chop the onions, fry them in butter and add the soup.", "Bake the bread for forty minutes."):
        for football in ("The striker scored twice in the final.", "The referee showed a red card."):
            assert likely(cooking) > 0.5
            assert likely(football) < 0.5


def test_the_pages_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "decisions.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/decisions.md", "exec"), scope)
    assert scope["state"]["model_route"].choice in ("quick", "strong")
