"""The LLM of an evaluation: one charge whatever was read before, and tokens of its own where it takes over."""

from __future__ import annotations

import pytest

from s2t_agents.engine.engine import Engine, steps_of
from s2t_agents.escalation import Escalation
from s2t_agents.grammar.grammar import tool_grammar
from s2t_agents.grammar.vocabulary import cached_vocabulary
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.waits import gather
from s2t_agents.testing import tiny_model
from s2t_agents.training.counted_llm import CountedLLM, TakeoverLLM
from s2t_agents.training.dialogue import Speaker, Trace
from s2t_agents.triggers import always, entropy
from s2t_agents.types import Sampling

PROMPTS = [[5, 6, 7], list(range(40, 60)), [65] * 9, list(range(40, 60))]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}}


@pytest.fixture(scope="module")
def pair() -> tuple[LanguageModel, LanguageModel]:
    return tiny_model(seed=1), tiny_model(seed=2, hidden_size=48, head_dim=12)


def answers(slm: LanguageModel, llms: list[CountedLLM], tokens: int = 12) -> list[Trace]:
    engines = [Engine(slm, k=4, trigger=entropy(above=0.0), escalation=Escalation(llm, margin=1.0)) for llm in llms]
    rows = zip(engines, PROMPTS, strict=True)
    found = gather([steps_of(each.generation(ids, Sampling(max_tokens=tokens))) for each, ids in rows])
    return [Trace.of(steps) for steps in found]


def test_an_answer_is_charged_as_if_it_were_the_only_one(pair: tuple[LanguageModel, LanguageModel]) -> None:
    slm, llm = pair
    llm.prefix_cache.clear()
    first = answers(slm, [CountedLLM(llm) for _ in PROMPTS])
    again = answers(slm, [CountedLLM(llm) for _ in PROMPTS])  # prompts are cached by now
    assert [trace.llm_tokens for trace in again] == [trace.llm_tokens for trace in first]
    for trace, prompt in zip(first, PROMPTS, strict=True):
        assert trace.llm_tokens == len(prompt) + trace.by_llm[-1] + len(
            trace.by_llm
        )  # all that was new, and a token each


def test_taking_over_everywhere_is_the_llms_own_answer(pair: tuple[LanguageModel, LanguageModel]) -> None:
    slm, llm = pair
    found = answers(slm, [TakeoverLLM(llm) for _ in PROMPTS])
    alone = [[step.token_id for step in Engine(llm).steps(ids, Sampling(max_tokens=12))] for ids in PROMPTS]
    assert [trace.ids for trace in found] == alone


def test_taking_over_stays_within_the_grammar(pair: tuple[LanguageModel, LanguageModel]) -> None:
    slm, llm = pair
    words = cached_vocabulary(slm.tokenizer, slm.vocab_size, sorted(slm.eos_ids))
    engine = Engine(slm, k=4, trigger=always(), escalation=Escalation(TakeoverLLM(llm), margin=1.0))
    grammar = tool_grammar(words, [TOOL], "any", parallel=False).start(200)
    steps = list(engine.steps([5, 6, 7], Sampling(max_tokens=200), grammar=grammar))
    assert [name for name, _ in Speaker(slm).read([step.token_id for step in steps]).calls] == ["add"]
    assert any(step.picked_by == "llm" for step in steps)
