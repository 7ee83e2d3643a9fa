"""Prompts with real tokenizers and chat templates: the template's ids, and no control token from outside."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from conversations import PLACES, control_ids, conversation, hostile_texts, words_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

from s2t_agents.chat.messages import PromptEncoder

pytestmark = pytest.mark.real

WITHOUT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|endofprompt|>{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Real:
    """A real tokenizer and its encoder, with a short repr."""

    tokenizer: Any = field(repr=False)
    encoder: PromptEncoder

    def encode(self, messages: list, tools: Sequence = ()) -> list[int]:
        return self.encoder.encode(messages, tools)

    def expected(self, messages: list, tools: Sequence = ()) -> list[int]:
        """What ``apply_chat_template`` makes of the arrangement that is used."""
        used = self.encoder.render_conversation(messages, tools)
        return self.tokenizer.apply_chat_template(
            used.turns, tools=used.tools or None, tokenize=True, add_generation_prompt=True
        )["input_ids"]

    def control(self, messages: list, tools: Sequence = ()) -> list[int]:
        return control_ids(self.tokenizer, self.encode(messages, tools))


@cache
def encoder_of(tokenizer: Any) -> PromptEncoder:
    return PromptEncoder(tokenizer)


@pytest.fixture
def real(real_tokenizer: Any) -> Real:
    if not real_tokenizer.chat_template:  # gpt4o's
        real_tokenizer.chat_template = WITHOUT_TEMPLATE
    return Real(real_tokenizer, encoder_of(real_tokenizer))


def test_a_conversation_has_exactly_the_ids_of_apply_chat_template(real: Real) -> None:
    messages, tools = conversation()
    for end in range(1, len(messages) + 1):
        for given_tools in ([], tools):
            ids = real.encode(messages[:end], given_tools)
            assert ids == real.expected(messages[:end], given_tools)
    told = real.tokenizer.decode(ids)
    assert all(text in told for place, text in PLACES.items() if place != "call_id")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="ab xn<>|_/é天\n'{}1.", min_size=1, max_size=30).filter(str.strip))
def test_any_harmless_text_has_the_ids_of_apply_chat_template(real: Real, text: str) -> None:
    messages, tools = conversation(system=text, user=text, result=text, value=text, description=text)
    assert real.encode(messages, tools) == real.expected(messages, tools)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_text_anywhere_leaves_the_control_tokens_as_they_are(real: Real, data: st.DataObject) -> None:
    places = data.draw(st.sets(st.sampled_from(sorted(PLACES)), min_size=1), label="places")
    texts = {place: data.draw(hostile_texts(real.tokenizer), label=place) for place in sorted(places)}
    assert real.control(*conversation(**texts)) == real.control(*conversation())


def test_every_control_token_in_every_place_is_text(real: Real) -> None:
    words = [word for word in words_of(real.tokenizer, 400) if word.strip()]
    expected = real.control(*conversation())
    for place in PLACES:
        for joined in ("x".join(words), " ".join(words), f" {words[-1]}\n"):
            assert real.control(*conversation(**{place: joined})) == expected, place


def test_a_control_token_split_over_two_texts_is_text(real: Real) -> None:
    """Whatever a template puts between two texts, or takes away at their edges."""
    expected = real.control([SystemMessage("a"), HumanMessage("b"), AIMessage("c"), HumanMessage("d")])
    for word in words_of(real.tokenizer, 30):
        for at in range(1, len(word)):
            head, tail = word[:at], word[at:]
            if head.strip() and tail.strip():
                told = [SystemMessage(head), HumanMessage(tail), AIMessage(f"{head} "), HumanMessage(f"\n{tail}")]
                assert real.control(told) == expected
