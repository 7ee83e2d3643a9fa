"""What chat calls share behind a chat model."""

from typing import Any

import pytest
from langchain_core.messages import HumanMessage

from s2t_agents import ChatS2T
from s2t_agents.chat import runtime
from s2t_agents.chat.response_options import ResponseOptions
from s2t_agents.grammar.grammar import CompiledGrammar
from s2t_agents.grammar.vocabulary import Vocabulary


def tool(name: str) -> dict[str, Any]:
    return {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}}


def test_a_grammar_in_use_is_compiled_once_however_many_others_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    real = ResponseOptions.compile

    def noted(self: ResponseOptions, vocabulary: Vocabulary) -> CompiledGrammar:
        compiled.append(self.tools[0]["function"]["name"])
        return real(self, vocabulary)

    monkeypatch.setattr(ResponseOptions, "compile", noted)
    monkeypatch.setattr(runtime, "MAX_GRAMMARS", 6)
    chat = ChatS2T(model="s2t-demo", max_tokens=1)
    question = [HumanMessage("2 + 2?")]
    for other in range(8):
        chat.bind_tools([tool("mine")]).invoke(question)
        chat.bind_tools([tool(f"other_{other}")]).invoke(question)
    assert compiled.count("mine") == 1
    chat.bind_tools([tool("other_0")]).invoke(question)
    assert compiled.count("other_0") == 2  # not kept for ever
