"""LangChain's standard tests for chat models, inherited completely: models in this process and on a server."""

from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar, Literal

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from servers import CompletionServer, serving

from s2t_agents import ChatS2T, LanguageModel, LocalLLM


@cache
def llm() -> LocalLLM:
    """Loaded once for all tests."""
    return LocalLLM("s2t-demo-llm")


@pytest.fixture(scope="module")
def slm_server() -> Iterator[CompletionServer]:
    with serving(LanguageModel.load("s2t-demo")) as running:
        yield running


@pytest.fixture(scope="module")
def llm_server() -> Iterator[CompletionServer]:
    with serving(LanguageModel.load("s2t-demo-llm")) as running:
        yield running


@pytest.fixture(scope="module")
def vcr_config() -> dict[str, Any]:
    """Nothing is played from a tape: the suite's timed test asks the server, too."""
    return {"ignore_localhost": True}


class OnServers:
    """Settings of a model on a server; ``model_override_value`` is the address of another one."""

    slm: ClassVar[CompletionServer]
    llm: ClassVar[CompletionServer]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _servers(cls, slm_server: CompletionServer, llm_server: CompletionServer) -> None:
        cls.slm, cls.llm = slm_server, llm_server

    @staticmethod
    def address(server: CompletionServer) -> str:
        return f"vllm://127.0.0.1:{server.server_port}/{server.model.name}"


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatS2T

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "s2t-demo"}


class TestUnitOnServer(OnServers, TestUnit):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": self.address(self.slm), "model_kwargs": {"tokenizer": "s2t-demo"}}


class Integration(ChatModelIntegrationTests):
    method: Literal["function_calling", "json_schema", "json_mode"]

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatS2T

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "s2t-demo", "selector": "s2t-demo", "escalation": llm(), "max_tokens": 48}

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


@pytest.mark.slow
class IntegrationOnServer(OnServers, Integration):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            **super().chat_model_params,
            "model": self.address(self.slm),
            "model_kwargs": {"tokenizer": "s2t-demo"},
            "selector": None,
        }

    @property
    def model_override_value(self) -> str:
        return self.address(self.llm)


class TestFunctionCallingOnServer(IntegrationOnServer):
    method = "function_calling"


class TestJsonSchemaOnServer(IntegrationOnServer):
    method = "json_schema"


class TestJsonModeOnServer(IntegrationOnServer):
    method = "json_mode"
