"""SmolLM2 with Gemma 3 as its LLM: two families, two tokenizers, two chat templates, real weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from s2t_agents import Budget, ChatS2T
from s2t_agents.chat.asked_conversation import AskedConversation
from s2t_agents.llms import LocalLLM, Question
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.triggers import entropy
from s2t_agents.types import Step

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def slm(smollm2: Path) -> LanguageModel:
    return LanguageModel.load(str(smollm2))


@pytest.fixture(scope="module")
def llm(gemma3_270m: Path) -> LocalLLM:
    return LocalLLM(str(gemma3_270m))


def test_it_answers(slm: LanguageModel, llm: LocalLLM) -> None:
    steps: list[Step] = []
    chat = ChatS2T(
        model=slm,
        escalation=llm,
        trigger=entropy(above=0.5),
        budget=Budget(llm_tokens=2000),
        max_tokens=24,
        on_step=lambda _, step: steps.append(step),
    )
    answer = chat.invoke("Name three cities in France, and say one thing about each.")
    told = answer.response_metadata["s2t"]
    reports = [step.escalation for step in steps if step.escalation is not None]
    assert answer.text
    assert told["escalations"] == len(reports) > 2
    assert not told["degraded"]
    assert all(each.outcome == "picked" and each.reason.startswith("exact by bytes") for each in reports)
    assert told["budget"]["spent"]["llm_tokens"] == sum(each.actual.llm_tokens for each in reports if each.actual)


def test_it_prefers_what_is_right_however_the_text_is_cut(slm: LanguageModel, llm: LocalLLM) -> None:
    from langchain_core.messages import HumanMessage

    tokenizer = slm.tokenizer
    prompt = tokenizer.encode("The capital?")
    for answer, right, wrong in [
        ("The capital of France is", " Paris", " bananas"),
        ("The capital of Fra", "nce", "gment"),
        ("One, two, three, four, fi", "ve", "sh"),
    ]:
        prefix = TokenSequence(slm)
        prefix.append(prompt + tokenizer.encode(answer))
        candidates = [tokenizer.encode(each)[0] for each in (wrong, right)] + list(slm.eos_ids)[:1]
        conversation = AskedConversation([HumanMessage("Go on.")], (), len(prompt))
        session = llm.open()
        given = session.ask(Question(prefix.ids, candidates, prefix=prefix, conversation=conversation)).scores
        session.close()
        scores = [score if score is not None else -math.inf for score in given]
        assert scores[1] == max(scores), answer
        assert all(score < 0 for score in scores)
