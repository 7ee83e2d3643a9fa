"""LangChain's standard tests for chat models, by ``ChatOpenAI`` through ``s2t serve``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.chat_models import init_chat_model
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from pydantic import BaseModel
from server_support import QUESTION, STOCK_QUESTION, demo_model, serving_chat

langchain_openai = pytest.importorskip("langchain_openai")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),  # ChatOpenAI keeps its connections, each of which belongs to one loop
    pytest.mark.filterwarnings("ignore:.*is marked with '@pytest.mark.asyncio' but it is not an async function"),
]


@pytest.fixture(scope="module", autouse=True)
def _served() -> Iterator[None]:
    with serving_chat(demo_model(), names=["s2t-demo", "s2t-demo-too"]) as url:
        ThroughServer.url = url
        yield


class ThroughServer(ChatModelIntegrationTests):
    """The bundled model ends none of the suite's jokes by itself: their JSON is whole all the same."""

    url: str
    method: Literal["function_calling", "json_schema"]

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return langchain_openai.ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "s2t-demo", "base_url": self.url, "api_key": "unused", "stream_usage": True}

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": self.method}

    @property
    def supports_json_mode(self) -> bool:
        return False  # any JSON object, of which the suite wants two keys: the bundled model does not read that wish

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "s2t-demo-too"


class TestFunctionCalling(ThroughServer):
    method = "function_calling"


class TestJsonSchema(ThroughServer):
    method = "json_schema"


class Sum(BaseModel):
    """The outcome."""

    total: int
    unit: Literal["shells", "lamps"]


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_output_that_the_model_ends_by_itself(method: str) -> None:
    llm = init_chat_model("openai:s2t-demo", base_url=ThroughServer.url, api_key="unused")
    found = llm.with_structured_output(Sum, method=method).invoke(QUESTION)
    assert isinstance(found, Sum)


@pytest.mark.parametrize("max_tokens", [None, 12, 40])
def test_json_mode_gives_a_whole_object(max_tokens: int | None) -> None:
    llm = init_chat_model(
        "openai:s2t-demo", base_url=ThroughServer.url, api_key="unused", max_completion_tokens=max_tokens
    )
    objects = llm.with_structured_output(None, method="json_mode")
    for question in (QUESTION, "Tell me a joke about cats. Return the result as a JSON.", "[1, 2"):
        found = objects.invoke(question)
        assert isinstance(found, dict)
        *_, streamed = objects.stream(question)
        assert streamed == found


def test_log_probabilities_reach_langchain() -> None:
    llm = init_chat_model("openai:s2t-demo", base_url=ThroughServer.url, api_key="unused", logprobs=True)
    answer = llm.invoke(QUESTION)
    assert "".join(each["token"] for each in answer.response_metadata["logprobs"]["content"]) == answer.text


@pytest.mark.parametrize("streamed", [False, True])
def test_a_langgraph_agent_calls_its_tool_and_answers(streamed: bool) -> None:
    def get_stock(item: str) -> int:
        """Look up the stock of an item."""
        return 85

    llm = init_chat_model("openai:s2t-demo", base_url=ThroughServer.url, api_key="unused", stream_usage=True)
    llm = llm.model_copy(update={"streaming": streamed})
    run = create_agent(llm, tools=[get_stock]).invoke({"messages": STOCK_QUESTION})
    assert [message.type for message in run["messages"]] == ["human", "ai", "tool", "ai"]
    assert run["messages"][-1].text.endswith("The answer is 94.")
    assert run["messages"][-1].usage_metadata["input_token_details"]["cache_read"] > 0
