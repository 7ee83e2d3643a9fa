"""OpenAILLM whose server has another tokenizer: exact where it tells of every token that counts, else approximate."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator

import pytest
from byte_models import random_tokenizer
from servers import CompletionServer, serving
from test_other_tokenizer import asked, family
from tokenizers import normalizers

from s2t_agents import Budget, ChatS2T, TokenPrice
from s2t_agents.errors import TokenizerMismatch
from s2t_agents.llms import LocalLLM, OpenAILLM, served_question
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import always
from s2t_agents.types import Step

CANDIDATES = [ord("t"), ord("a"), ord("n"), ord(" ")]
ANSWERS = ("", "the", "the than an", "tha")


@pytest.fixture
def other() -> LanguageModel:
    return family("byte-level")


@pytest.fixture
def server(other: LanguageModel) -> Iterator[CompletionServer]:
    with serving(other) as running:
        yield running


@pytest.fixture
def llm(server: CompletionServer, other: LanguageModel) -> Iterator[OpenAILLM]:
    price = TokenPrice("1", "1")
    llm = OpenAILLM(server.url, server.model.name, tokenizer=other.tokenizer, price=price)
    yield llm
    llm.close()


def test_it_is_exact_and_one_request_where_the_server_tells_of_every_token(
    llm: OpenAILLM, server: CompletionServer, other: LanguageModel
) -> None:
    slm, near = tiny_model(), LocalLLM(other)
    llm.check(slm)
    for count, answer in enumerate(ANSWERS, start=1):
        question = asked(slm, "say the", answer, CANDIDATES)
        found = llm.open().ask(question)
        assert found.note.startswith("exact by bytes")
        exact = near.open().ask(asked(slm, "say the", answer, CANDIDATES)).scores
        apart = [ours - theirs for ours, theirs in zip(found.scores, exact, strict=True)]  # up to what all have
        assert apart == pytest.approx([apart[0]] * len(apart), abs=1e-3)
        assert len(server.asked) == count
        prompts = server.asked[-1]["prompt"]
        read = sum(map(len, prompts)) if isinstance(prompts[0], list) else len(prompts)
        assert question.owed is not None
        assert question.owed.llm_tokens == read + (len(prompts) if isinstance(prompts[0], list) else 1)


@pytest.mark.parametrize("fewer", ["ids", "best tokens alone"])
def test_it_is_approximate_in_one_request_where_the_server_tells_less(
    llm: OpenAILLM, server: CompletionServer, other: LanguageModel, monkeypatch: pytest.MonkeyPatch, fewer: str
) -> None:
    if fewer == "ids":
        monkeypatch.setattr(served_question, "MOST_IDS", 3)
    else:
        server.by_id = False
    found = llm.open().ask(asked(tiny_model(), "say the", "the ", CANDIDATES))
    assert found.note.startswith("approximate by bytes")
    assert any(score is not None and math.isfinite(score) for score in found.scores)
    assert len(server.asked) == 1


def test_a_chat_model_answers_within_its_budget(llm: OpenAILLM) -> None:
    steps: list[Step] = []
    budget = Budget(usd="0.02")
    chat = ChatS2T(
        model=tiny_model(),
        escalation=llm,
        trigger=always(),
        max_tokens=6,
        budget=budget,
        on_step=lambda _, step: steps.append(step),
    )
    told = chat.invoke("the cat").response_metadata["s2t"]
    reports = [step.escalation for step in steps if step.escalation is not None]
    assert told["escalations"] > 0
    assert all(each.outcome == "picked" and "another tokenizer" in each.reason for each in reports)


def test_the_servers_tokenizer_is_compared_with_the_one_that_was_given(server: CompletionServer) -> None:
    wrong = OpenAILLM(server.url, server.model.name, tokenizer=random_tokenizer("byte-level", 99, merges=40))
    with pytest.raises(TokenizerMismatch, match="do not spell a sample text"):
        wrong.check(tiny_model())
    wrong.close()


def test_a_tokenizer_that_changes_bytes_is_refused_by_name(server: CompletionServer) -> None:
    tokenizer = random_tokenizer("byte-level", 3)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    llm = OpenAILLM(server.url, server.model.name, tokenizer=tokenizer)
    with pytest.raises(TokenizerMismatch, match="Lowercase"):
        llm.check(tiny_model())
    llm.close()


def test_it_pickles_with_its_tokenizer(llm: OpenAILLM) -> None:
    again = pickle.loads(pickle.dumps(llm))
    found = again.open().ask(asked(tiny_model(), "say the", "the ", CANDIDATES))
    assert found.note.startswith("exact")
    again.close()
