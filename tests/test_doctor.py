"""``s2t doctor`` and ``escalation=``: whom a name means, and what a pair can do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from servers import CompletionServer, serving
from typer.testing import CliRunner

from s2t_agents import ChatJudge, ChatS2T, LocalLLM, OpenAILLM
from s2t_agents.chat.doctor import diagnosed
from s2t_agents.cli import app
from s2t_agents.errors import ConfigError
from s2t_agents.llms.front import llm_of


def test_whom_a_name_means() -> None:
    assert isinstance(llm_of("s2t-demo-llm"), LocalLLM)
    assert isinstance(llm_of(Path("some/model.gguf")), LocalLLM)
    served = llm_of("https://llm.example.com/v1#my-llm")
    assert isinstance(served, OpenAILLM)
    assert (served.name, served.endpoint.display_url) == ("my-llm", "https://llm.example.com/v1/")
    vllm = llm_of("vllm://127.0.0.1:8000/org/model")
    assert isinstance(vllm, OpenAILLM)
    assert vllm.name == "org/model"
    assert isinstance(llm_of(ChatS2T(model="s2t-demo-llm")), ChatJudge)
    own = LocalLLM("s2t-demo-llm")
    assert llm_of(own) is own


@pytest.mark.parametrize("given", ["https://llm.example.com/v1", 3, FakeListChatModel(responses=["a"])])
def test_what_names_nobody_is_refused_with_the_way_out(given: object) -> None:
    with pytest.raises(ConfigError) as caught:
        llm_of(given)
    assert caught.value.hint


def test_a_pair_of_one_family() -> None:
    found = diagnosed("s2t-demo", LocalLLM("s2t-demo-llm"))
    assert (found.tokenizer, found.scores, found.works) == ("the same", "exact, by token ids", True)
    assert found.price.startswith("unknown")


def test_the_command_prints_it_for_people_and_programs() -> None:
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 0
    assert "the same" in shown.output
    told = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert told["works"] is True
    assert told["scores"] == "exact, by token ids"


def test_a_pair_of_two_families(tmp_path: Path) -> None:
    from test_other_tokenizer import family

    other = family("pieces")
    other.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "vocab_size": len(other.tokenizer)}))
    found = diagnosed("s2t-demo", LocalLLM(str(tmp_path)))
    assert (found.tokenizer, found.scores, found.works) == ("another", "exact, by bytes", True)
    assert found.extra_tokens is not None
    assert found.extra_tokens > 1


def test_a_server_with_another_tokenizer(served: CompletionServer) -> None:
    llm = OpenAILLM(served.url, served.model.name, tokenizer=served.model.tokenizer)
    found = diagnosed("s2t-demo", llm)
    assert (found.tokenizer, found.works) == ("another", True)
    assert found.scores.startswith("by bytes")
    assert found.extra_tokens is None


@pytest.fixture
def served() -> Iterator[CompletionServer]:
    from test_other_tokenizer import family

    with serving(family("pieces")) as server:
        yield server
