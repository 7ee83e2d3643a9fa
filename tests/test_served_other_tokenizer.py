"""OpenAILLM whose server has another tokenizer: exact where it tells of every token that counts, else approximate."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from byte_models import random_tokenizer
from langchain_core.messages import HumanMessage
from sequences import read
from servers import CompletionServer, serving, status
from test_other_tokenizer import asked, family
from tokenizers import normalizers

from s2t_agents import Budget, ChatS2T, TokenPrice
from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.errors import EscalationFailed, TokenizerMismatch
from s2t_agents.llms import LocalLLM, OpenAILLM, Question, served_question
from s2t_agents.llms.token_map import side_of_tokens
from s2t_agents.llms.token_texts import TokenTexts
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import always
from s2t_agents.types import Step

CANDIDATES = [ord("t"), ord("a"), ord("n"), ord(" ")]
LETTERS = range(ord("A"), ord("z"))
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


class TestAServerOfText:
    """It takes a prompt as text alone, or names tokens by their text, or both."""

    @pytest.fixture(params=["takes text", "takes text, by 500", "names texts", "both"])
    def server(self, other: LanguageModel, request: pytest.FixtureRequest) -> Iterator[CompletionServer]:
        with serving(other) as running:
            running.by_id = False
            running.takes_ids, running.names_ids = request.param == "names texts", "takes" in request.param
            running.refusal = 500 if "500" in request.param else 422
            yield running

    def test_it_is_understood_where_its_tokenizer_is_another(
        self, llm: OpenAILLM, server: CompletionServer, other: LanguageModel
    ) -> None:
        with serving(other) as by_ids:
            by_ids.by_id = False
            reference = OpenAILLM(by_ids.url, other.name, tokenizer=other.tokenizer)
            for answer in ANSWERS:
                found = llm.open().ask(asked(tiny_model(), "say the", answer, LETTERS))
                expected = reference.open().ask(asked(tiny_model(), "say the", answer, LETTERS))
                assert found.note.startswith("approximate by bytes")
                same_where_known(found.scores, expected.scores)
            reference.close()
        refused = 0 if server.takes_ids else 1  # once: it is remembered
        assert len(server.asked) == len(ANSWERS) + refused

    @pytest.mark.parametrize(("takes_ids", "names_ids"), [(False, True), (True, False), (False, False)])
    def test_it_is_understood_where_its_tokenizer_is_the_slms(self, takes_ids: bool, names_ids: bool) -> None:
        with serving(tiny_model(seed=5)) as running:
            running.by_id = False
            exact = ask_it(running)
            running.takes_ids, running.names_ids = takes_ids, names_ids
            same_where_known(ask_it(running), exact)


@pytest.mark.parametrize("refusal", [422, 500])
def test_a_question_whose_text_spells_a_control_token_is_never_sent_as_text(
    llm: OpenAILLM, server: CompletionServer, other: LanguageModel, refusal: int
) -> None:
    server.takes_ids, server.refusal = False, refusal
    question = asked(tiny_model(), f"say {other.tokenizer.eos_token}", "the", CANDIDATES)
    with pytest.raises(EscalationFailed, match="Input should be a valid string"):
        llm.open().ask(question)
    assert server.asked
    assert not [body for body in server.asked if isinstance(body["prompt"], str)]


def test_a_server_that_fails_is_not_taken_for_one_of_text(llm: OpenAILLM, server: CompletionServer) -> None:
    server.fault = status(500, "out of memory")
    with pytest.raises(EscalationFailed, match="out of memory"):
        llm.open().ask(asked(tiny_model(), "say the", "the", CANDIDATES))
    server.fault = None
    assert llm.open().ask(asked(tiny_model(), "say the", "the", CANDIDATES)).note.startswith("exact")
    assert not [body for body in server.asked if isinstance(body["prompt"], str)]


def test_a_server_that_ignores_which_ids_are_wanted_is_asked_after_one_prompt_from_then_on(
    llm: OpenAILLM, server: CompletionServer
) -> None:
    server.by_id = False
    for _ in range(2):
        llm.open().ask(asked(tiny_model(), "say the", "the", CANDIDATES))
    first, then = (body["prompt"] for body in server.asked)
    assert isinstance(first[0], list)
    assert isinstance(then[0], int)


@pytest.mark.real
def test_real_tokenizers_prompts_are_read_as_they_are_and_no_text_becomes_a_control_token(real_tokenizer: Any) -> None:
    ends = frozenset({real_tokenizer.eos_token_id})
    side = side_of_tokens(real_tokenizer, ends, "real", None)
    texts, encoder = TokenTexts(side, "real"), PromptEncoder(real_tokenizer, chat_template=side.template)
    plain = encoder.encode([HumanMessage("Say  d\u00e9j\u00e0 vu, \u6771\u4eac?\n\n```py\nx = 1\n```")], [])
    assert real_tokenizer(texts.prompt(plain))["input_ids"] == plain
    for control in (real_tokenizer.eos_token, *list(side.control)[:3]):
        with pytest.raises(EscalationFailed, match="are not read as they are"):
            texts.prompt(encoder.encode([HumanMessage(f"Say {control} twice.")], []))
    if side.view.byte_level:
        for token in range(0, len(side.view.bytes_of), 97):
            named = real_tokenizer.decode([token])
            if side.view.bytes_of[token] and "\ufffd" not in named:
                assert texts.id_of(named) == token


def same_where_known(found: Sequence[float | None], expected: Sequence[float | None]) -> None:
    """Parts of characters have no text of their own: nothing is known of them."""
    known = [k for k, score in enumerate(found) if score is not None and math.isfinite(score)]
    assert known
    assert [found[k] for k in known] == pytest.approx([expected[k] for k in known], abs=1e-4)


def ask_it(server: CompletionServer) -> list[float | None]:
    slm = tiny_model()
    llm = OpenAILLM(server.url, server.model.name)
    text = [*slm.tokenizer.encode("say the"), *slm.tokenizer.encode("th")]
    best = read(server.model, text).logits.topk(4).indices.tolist()
    scores = llm.open().ask(Question(text, best, prefix=read(slm, text))).scores
    llm.close()
    return list(scores)


def test_sentence_pieces_named_by_their_text_are_refused(other: LanguageModel) -> None:
    pieces = family("pieces")
    with serving(pieces) as server:
        server.by_id = server.names_ids = False
        llm = OpenAILLM(server.url, pieces.name, tokenizer=pieces.tokenizer)
        with pytest.raises(EscalationFailed, match="does not tell those of SentencePiece apart"):
            llm.open().ask(asked(tiny_model(), "say the", "the", CANDIDATES))
        llm.close()
