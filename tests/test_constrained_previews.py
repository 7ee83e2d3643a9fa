"""Previews under a grammar: legal token by token, as the engine would generate, and emitted whole."""

import json
import random
from collections.abc import Sequence

import pytest
import torch

from s2t_agents.engine.engine import Engine
from s2t_agents.escalation import Escalation
from s2t_agents.grammar.grammar import CompiledGrammar, GrammarState, json_grammar, tool_grammar
from s2t_agents.grammar.vocabulary import cached_vocabulary
from s2t_agents.llms import Answer, Question
from s2t_agents.llms.previews import continuations, previews
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.testing import ScriptedLLM, tiny_model
from s2t_agents.triggers import always, when
from s2t_agents.types import Sampling, Step

PROMPT = [10, 20, 30, 40, 50]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"enum": [1, 2, 30]}},
    "required": ["city", "days"],
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": CITY}}
    for name in ("weather", "whereabouts")
]
GRAMMARS = ("json", "calls", "auto")
LIMITS = (None, 90)  # no limit, and one near which every token must leave room to finish


def grammar_of(model: LanguageModel, name: str) -> CompiledGrammar:
    words = cached_vocabulary(model.tokenizer, model.vocab_size, model.eos_ids)
    if name == "json":
        return json_grammar(words, CITY)
    return tool_grammar(words, TOOLS, "any" if name == "calls" else "auto")


def after(model: LanguageModel, grammar: GrammarState, written: int) -> tuple[TokenSequence, list[int]]:
    """So many greedy tokens into an answer: the prefix there, and what was written; the grammar comes along."""
    prefix, ids = TokenSequence(model), []
    pending = list(PROMPT)
    while len(ids) < written or pending:
        for token in grammar.forced():
            grammar.accept(token)
            ids.append(token)
            pending.append(token)
        prefix.append(pending)
        pending = []
        if len(ids) < written:
            token = Proposal(prefix, 1, allowed=grammar.allowed(prefix.logits)).best
            grammar.accept(token)
            ids.append(token)
            pending = [token]
    return prefix, ids


def places() -> list[tuple[str, int | None, int]]:
    return [(name, limit, written) for name in GRAMMARS for limit in LIMITS for written in (0, 24)]


@pytest.mark.parametrize(("name", "limit", "written"), places())
def test_every_preview_is_legal_token_by_token_and_leaves_the_grammar_as_it_was(
    name: str, limit: int | None, written: int
) -> None:
    model = tiny_model(seed=3)
    compiled = grammar_of(model, name)
    grammar = compiled.start(limit)
    prefix, ids = after(model, grammar, written)
    allowed = grammar.allowed(prefix.logits)
    candidates = Proposal(prefix, 6, allowed=allowed).candidates.tolist()
    for row in continuations(prefix, candidates, 24, grammar):
        walk = compiled.start()
        for token in [*ids, *row]:
            assert walk.takes(token)
            walk.accept(token)
    assert torch.equal(grammar.allowed(prefix.logits), allowed)
    assert next(iter(previews(prefix, candidates, 24, grammar))).tokens[0] == candidates[0]


@pytest.mark.parametrize(("name", "limit", "written"), places())
def test_a_preview_is_what_the_engine_would_write_after_that_candidate(
    name: str, limit: int | None, written: int
) -> None:
    model = tiny_model(seed=3)
    compiled = grammar_of(model, name)
    grammar = compiled.start(limit)
    prefix, ids = after(model, grammar, written)
    candidates = Proposal(prefix, 6, allowed=grammar.allowed(prefix.logits)).candidates.tolist()
    rows = continuations(prefix, candidates, 16, grammar)
    for at, row in enumerate(rows):

        def this_one(ids: Sequence[int], shown: Sequence[int], at: int = at) -> list[float]:
            return [0.0 if place == at else -9.0 for place in range(len(shown))]

        here = when(lambda proposal: len(proposal.prefix) == len(PROMPT) + len(ids))
        engine = Engine(model, k=6, trigger=here, escalation=Escalation(ScriptedLLM(this_one), margin=1.0))
        steps = engine.steps(PROMPT, Sampling(max_tokens=len(ids) + 16), grammar=compiled.start(limit))
        written_by_it = [step.token_id for step in steps]
        assert written_by_it[len(ids) : len(ids) + len(row)] == list(row)


class Whole(ScriptedLLM):
    """A judge without a network: keeps the whole preview of a candidate chosen by lot, and remembers it."""

    def __init__(self, seed: int) -> None:
        super().__init__(lambda ids, candidates: [])
        self.lot, self.kept = random.Random(seed), []  # type: ignore[var-annotated]

    def ask(self, question: Question) -> Answer:
        assert question.prefix is not None
        shown = previews(question.prefix, question.candidates, 24, question.grammar)
        chosen = self.lot.choice(shown)
        self.kept.append((len(question.ids), chosen.tokens))
        scores = tuple(0.0 if at == chosen.at[0] else None for at in range(len(question.candidates)))
        return Answer(scores, chosen.tokens[1:])


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("limit", [None, 110, 80])
@pytest.mark.parametrize("seed", range(2))
def test_a_kept_preview_is_never_cut(name: str, limit: int | None, seed: int) -> None:
    model, llm = tiny_model(seed=seed), Whole(seed)
    compiled = grammar_of(model, name)
    room = limit or 120
    engine = Engine(model, k=4, trigger=always(), escalation=Escalation(llm, margin=1.0))
    steps: list[Step] = list(engine.steps(PROMPT, Sampling(max_tokens=room), grammar=compiled.start(limit)))
    tokens = [step.token_id for step in steps]
    assert llm.kept
    for prefix_tokens, kept in llm.kept:
        at = prefix_tokens - len(PROMPT)
        assert tuple(tokens[at : at + len(kept)]) == kept[: room - at]
    if limit is not None and name == "json":
        json.loads(model.tokenizer.decode([t for t in tokens if t not in model.eos_ids]))


def test_a_forced_line_break_ends_no_preview() -> None:
    model = tiny_model(seed=3)
    grammar = grammar_of(model, "auto").start()
    prefix, _ = after(model, grammar, 0)
    opened = model.tokenizer.convert_tokens_to_ids("<tool_call>")
    shown = previews(prefix, [opened], 60, grammar)
    assert shown[0].text.startswith('<tool_call>\n{"name": "w')
    assert '"arguments": {"city": "' in shown[0].text


def test_the_end_of_a_grammar_is_the_end_of_a_preview() -> None:
    model = tiny_model(seed=3)
    words = cached_vocabulary(model.tokenizer, model.vocab_size, model.eos_ids)
    grammar = json_grammar(words, {"enum": ["red", "green"]}).start()
    prefix, _ = after(model, grammar, 0)
    candidates = Proposal(prefix, 4, allowed=grammar.allowed(prefix.logits)).candidates.tolist()
    assert {preview.text for preview in previews(prefix, candidates, 40, grammar)} == {
        'red"',
        'green"',
    }  # the quote is forced
