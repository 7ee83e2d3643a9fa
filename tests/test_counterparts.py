"""The tokens of an SLM and an LLM: two tokenizers are compared once, however many questions and answers follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from servers import serving
from test_other_tokenizer import asked, family
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from s2t_agents.chat.asked_conversation import AskedConversation
from s2t_agents.llms import LLMSelector, LocalLLM, OpenAILLM
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import tiny_model, tiny_tokenizer
from s2t_agents.training.byte_teacher import ByteTeacher
from s2t_agents.training.config import EvaluationRows
from s2t_agents.training.rows import RowMaker
from s2t_agents.training.tasks import Item
from s2t_agents.types import Sampling

CANDIDATES = [ord("t"), ord("a"), ord("n")]
MODELS: dict[str, Callable[[], LanguageModel]] = {
    "same": lambda: LanguageModel(tiny_model(seed=2).model, tiny_tokenizer(), name="same"),
    "other": lambda: family("byte-level"),
}


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tokenizers whose whole vocabulary was read, once for every time."""
    found: list[Any] = []
    read = TokenizersBackend.get_vocab

    def get_vocab(tokenizer: Any) -> dict[str, int]:
        found.append(tokenizer)
        return read(tokenizer)

    monkeypatch.setattr(TokenizersBackend, "get_vocab", get_vocab)
    return found


@pytest.fixture(params=MODELS)
def large(request: pytest.FixtureRequest) -> LanguageModel:
    return MODELS[request.param]()


@pytest.fixture(params=["local", "served"])
def llm(request: pytest.FixtureRequest, large: LanguageModel) -> Iterator[LLMSelector]:
    if request.param == "local":
        yield LocalLLM(large)
        return
    with serving(large) as server:
        llm = OpenAILLM(server.url, server.model.name, tokenizer=large.tokenizer)
        yield llm
        llm.close()


def test_no_question_after_the_first_reads_a_vocabulary(llm: LLMSelector, whole: list[Any]) -> None:
    slm = tiny_model()
    llm.check(slm)
    llm.open().ask(asked(slm, "say the", "", CANDIDATES))
    assert whole
    whole.clear()
    for answer in ("the", "the than an", "tha"):
        session = llm.open()
        for so_far in ("", answer):
            question = asked(slm, "say the", so_far, CANDIDATES)
            session.quote(question)
            session.ask(question)
        session.close()
    assert not whole


def test_each_slm_is_compared_for_itself(llm: LLMSelector, large: LanguageModel) -> None:
    same, other = tiny_model(), family("pieces", seed=8)
    for slm in (same, other, same):
        candidates = slm.tokenizer.encode("tan")[:2]
        note = llm.open().ask(asked(slm, "say the", "the ", candidates)).note
        assert ("another tokenizer" in note) == (slm.tokenizer_fingerprint != large.tokenizer_fingerprint)


def test_no_answer_of_an_evaluation_after_the_first_reads_a_vocabulary(large: LanguageModel, whole: list[Any]) -> None:
    row = RowMaker(tiny_model(), large, EvaluationRows(llm_trigger_entropy=0.0, k=3), 0).selection(None)
    for at in range(4):
        steps = list(row.engine(Item(str(at), (), (), None)).steps([5, 6, 7 + at], Sampling(max_tokens=3)))
        assert any(step.picked_by == "llm" for step in steps)
        if at:
            assert not whole
        whole.clear()


def test_no_trajectory_that_is_taught_after_the_first_reads_a_vocabulary(whole: list[Any]) -> None:
    from langchain_core.messages import HumanMessage

    slm = tiny_model()
    teacher = ByteTeacher(family("byte-level"), slm)
    candidates = torch.tensor([CANDIDATES])
    logits = torch.zeros(1, slm.vocab_size).log_softmax(1)
    for at, text in enumerate(["say the", "say an", "the"]):
        prompt = slm.tokenizer.encode(text)
        conversation = AskedConversation([HumanMessage(text)], (), len(prompt))
        teacher.opinions([(prompt, [ord("t")])], [logits], [candidates], [conversation])
        if at:
            assert not whole
        whole.clear()
