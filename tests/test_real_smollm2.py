"""SmolLM2-135M-Instruct, a real checkpoint, as a LangChain model: exact, callable, structured, streamed, in agents."""

import asyncio
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.utils import convert_to_openai_messages
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel, Field
from test_langchain_standard import Integration

from benchmarks import assets
from s2t_agents import ChatS2T

pytestmark = pytest.mark.real

CONVERSATIONS = [
    [HumanMessage("What is the capital of France?")],
    [SystemMessage("You answer in one short sentence."), HumanMessage("Why is the sky blue?")],
    [HumanMessage("List three colours, separated by commas.")],
    [
        HumanMessage("Say hello in Spanish."),
        AIMessage("Hola!"),
        HumanMessage("And in Italian? Mind the é, 你好 and 🙂."),
    ],
]


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> list[str]:
    """Greedy answers of transformers' own ``generate`` to the conversations, up to 32 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    answers = []
    for conversation in CONVERSATIONS:
        inputs = tokenizer.apply_chat_template(
            convert_to_openai_messages(conversation), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = network.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(ids, skip_special_tokens=True))
    return answers


@pytest.fixture
def model(smollm2: Path) -> ChatS2T:
    return ChatS2T(model=str(smollm2), max_tokens=32)


# ---------------------------------------------------------------------- plain answers


def test_greedy_answers_are_those_of_transformers(model: ChatS2T, reference: list[str]) -> None:
    assert all(len(answer) > 3 for answer in reference)
    assert [model.invoke(conversation).text for conversation in CONVERSATIONS] == reference


def test_four_at_once_are_answered_as_one_by_one(model: ChatS2T, reference: list[str]) -> None:
    assert [answer.text for answer in model.batch(CONVERSATIONS)] == reference
    assert [answer.text for answer in asyncio.run(model.abatch(CONVERSATIONS))] == reference


def test_a_stream_is_the_answer_in_pieces(model: ChatS2T, reference: list[str]) -> None:
    for conversation, expected in zip(CONVERSATIONS, reference, strict=True):
        chunks = list(model.stream(conversation))
        assert "".join(chunk.text for chunk in chunks) == expected
        assert sum(bool(chunk.text) for chunk in chunks) > 1
        assert chunks[-1].response_metadata or any(chunk.usage_metadata for chunk in chunks)


# ---------------------------------------------------------------------- calls and forms


@tool
def get_weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> str:
    """Get the weather in a city."""
    return f"{city}: 21 degrees {unit}, sunny."


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.mark.parametrize("choice", ["any", "add", "get_weather"])
def test_a_forced_call_names_a_tool_and_fits_its_schema(model: ChatS2T, choice: str) -> None:
    forced = model.bind_tools([get_weather, add], tool_choice=choice)
    message = forced.invoke("What is the weather in Paris, in celsius?", max_tokens=96)
    [call] = message.tool_calls
    assert not message.invalid_tool_calls
    assert call["name"] in ({"add", "get_weather"} if choice == "any" else {choice})
    {"add": add, "get_weather": get_weather}[call["name"]].args_schema.model_validate(call["args"])


def test_a_forced_call_streams_whole(model: ChatS2T) -> None:
    forced = model.bind_tools([get_weather], tool_choice="any")
    whole = None
    for chunk in forced.stream("What is the weather in Paris?", max_tokens=96):
        whole = chunk if whole is None else whole + chunk
    assert [call["name"] for call in whole.tool_calls] == ["get_weather"]
    assert "Paris" in whole.tool_calls[0]["args"]["city"]


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=24)
    country: str = Field(max_length=24)
    capital: bool


@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
def test_structured_output_fits_the_schema(model: ChatS2T, method: str) -> None:
    city = model.with_structured_output(City, method=method).invoke(
        "Describe the city of Paris as JSON with the keys name, country and capital.", max_tokens=128
    )
    assert isinstance(city, City)
    assert "Paris" in city.name


# ---------------------------------------------------------------------- agents


class CallFirst(AgentMiddleware):
    """Forces a call after the user's turn and forbids it after a tool's: 135M parameters decide badly."""

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        asked = isinstance(request.messages[-1], ToolMessage)
        return handler(request.override(tool_choice="none" if asked else "any"))


def test_an_agent_calls_reads_the_result_and_answers_over_two_turns(model: ChatS2T) -> None:
    agent = create_agent(
        model.model_copy(update={"max_tokens": 64}),
        [get_weather],
        middleware=[CallFirst()],
        checkpointer=InMemorySaver(),
    )
    config = {"configurable": {"thread_id": "1"}}
    for city in ("Paris", "Madrid"):
        state = agent.invoke({"messages": [HumanMessage(f"What is the weather in {city}?")]}, config)
        question, call, result, answer = state["messages"][-4:]
        assert [message.type for message in (question, call, result, answer)] == ["human", "ai", "tool", "ai"]
        assert city in call.tool_calls[0]["args"]["city"]
        assert result.status == "success"
        assert answer.text
        assert not answer.tool_calls
    assert len(state["messages"]) == 8


# ---------------------------------------------------------------------- LangChain's own suite

TALKS = pytest.mark.xfail(reason="135M parameters: unforced, it describes what the tool would do instead of calling it")


class TestStandard(Integration):
    """The 45 tests that a chat model of text is held to, as for the demo pair; two are beyond a model of this size."""

    method = "function_calling"

    @pytest.fixture(autouse=True)
    def _folder(self, smollm2: Path) -> None: ...

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(assets.ASSETS["smollm2"].path), "max_tokens": 64}

    @property
    def model_override_value(self) -> str:
        return self.chat_model_params["model"]

    @TALKS
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_agent_loop(self, model: Any) -> None:
        super().test_agent_loop(model)


del Integration
