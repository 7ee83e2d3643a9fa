"""LangChain's standard tests for chat models, by ``ChatOpenAI`` through ``s2t serve``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from server_support import demo_model, serving_chat

langchain_openai = pytest.importorskip("langchain_openai")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),  # ChatOpenAI keeps its connections, each of which belongs to one loop
]


@pytest.fixture(scope="module", autouse=True)
def _served() -> Iterator[None]:
    with serving_chat(demo_model(), names=["s2t-demo", "s2t-demo-too"]) as url:
        ThroughServer.url = url
        yield


class ThroughServer(ChatModelIntegrationTests):
    url: str
    method: Literal["function_calling", "json_schema", "json_mode"]

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return langchain_openai.ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "s2t-demo", "base_url": ThroughServer.url, "api_key": "unused", "stream_usage": True}

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": self.method}

    @property
    def supports_json_mode(self) -> bool:
        return False  # any JSON object: the bundled model does not know which one is wanted

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


class TestJsonMode(ThroughServer):
    method = "json_mode"
