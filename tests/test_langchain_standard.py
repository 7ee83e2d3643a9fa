"""LangChain's standard tests for chat models, inherited completely."""

from typing import Any, Literal

from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from s2t_agents import ChatS2T, LocalLLM


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatS2T

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "s2t-demo"}


class Integration(ChatModelIntegrationTests):
    method: Literal["function_calling", "json_schema", "json_mode"]

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatS2T

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "s2t-demo", "selector": "s2t-demo", "escalation": LocalLLM("s2t-demo-llm"), "max_tokens": 48}

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": self.method}

    @property
    def supports_json_mode(self) -> bool:
        return True

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
        return "s2t-demo-llm"

    @property
    def enable_vcr_tests(self) -> bool:
        return True


class TestFunctionCalling(Integration):
    method = "function_calling"


class TestJsonSchema(Integration):
    method = "json_schema"


class TestJsonMode(Integration):
    method = "json_mode"
