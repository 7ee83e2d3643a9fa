"""A grammar near its token limit: whatever is chosen among the allowed tokens, the answer ends complete within it."""

import json
import random

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_schemas import object_schema, schema
from templates import family
from test_grammar import NOW, SPELT, TAGGED, WEATHER, Dice, calls_of, check_whole, tool

from s2t_agents.backends.loading import load_tokenizer
from s2t_agents.grammar.completion_search import SearchBudget
from s2t_agents.grammar.grammar import CompiledGrammar, GrammarState, json_grammar, tool_grammar
from s2t_agents.grammar.vocabulary import cached_vocabulary

CHOICES = ("best", "likely", "any", "endless")
"""How a token is chosen: the best of random logits, one of those that a mask keeps for them, one that a mask without
logits keeps, the one that puts the end off longest."""


OPENING = set('{[",a1\\')


def chosen(state: GrammarState, how: str, logits: torch.Tensor, lot: random.Random, texts: list[str]) -> int:
    if how == "best":
        return state.best(logits)
    if how == "endless":  # opens what must be closed, never closes
        logits = logits + 9 * torch.tensor([bool(set(text) & OPENING) for text in texts])
        return state.best(logits)
    allowed = state.allowed(logits if how == "likely" else None).nonzero()[:, 0].tolist()
    return int(lot.choice(allowed))


def written(grammar: CompiledGrammar, limit: int, hows: list[str], seed: int) -> list[int]:
    """An answer, its end token left out, each token chosen in the next of these ways."""
    words, dice, lot = grammar.vocabulary, Dice(seed), random.Random(seed)
    texts = [words.llguidance_tokenizer.decode_str([i]) for i in range(words.size)]
    state, ids = grammar.start(limit), []
    while len(ids) < limit:
        for token in state.forced():
            state.accept(token)
            ids.append(token)
        if state.finished or len(ids) >= limit:
            break
        token = chosen(state, hows[len(ids) % len(hows)], dice.logits(words.size), lot, texts)
        state.accept(token)
        if token in words.eos_ids:
            break
        ids.append(token)
    assert len(ids) <= limit
    return ids


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from([TAGGED, SPELT]),
    seed=st.integers(0, 10**6),
    slack=st.one_of(st.integers(0, 3), st.integers(0, 120)),
    hows=st.lists(st.sampled_from(CHOICES), min_size=1, max_size=3),
)
def test_any_choice_among_the_allowed_tokens_ends_complete_within_any_limit_that_can_hold_an_answer(
    name, seed, slack, hows
):
    words, lot = cached_vocabulary(family(name)), random.Random(seed)
    asked = schema(lot)
    answer = json_grammar(words, asked)
    ids = written(answer, answer.shortest_tokens + slack, hows, seed)
    jsonschema.validate(json.loads(words.llguidance_tokenizer.decode_str(ids)), asked)

    parameters = {"type": "object", "properties": {"value": {"type": "string"}}} | object_schema(lot, 1)
    several = lot.choice([True, False])
    bound = [tool("weather", parameters), *([NOW] if several else [])]
    tools = tool_grammar(words, bound, "any", parallel=several)
    parser = calls_of(name, written(tools, tools.shortest_tokens + slack, hows, seed))
    check_whole(parser)
    for made in parser.tool_calls:
        jsonschema.validate(made["args"], parameters if made["name"] == "weather" else {"maxProperties": 0})


@pytest.mark.parametrize("how", CHOICES)
@pytest.mark.parametrize("limit", [8, 21, 40, 90])
def test_a_call_that_is_begun_in_a_text_is_complete_within_the_limit(how, limit):
    grammar = tool_grammar(cached_vocabulary(family(TAGGED)), [WEATHER, NOW], "auto")
    for seed in range(3):
        assert not calls_of(TAGGED, written(grammar, limit, [how], seed)).invalid_tool_calls


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    slack=st.one_of(st.none(), st.integers(0, 3), st.integers(0, 120)),
    kind=st.sampled_from(["json", "any", "auto"]),
)
def test_the_best_token_is_the_likeliest_that_the_mask_keeps(seed, slack, kind):
    words, lot, dice = cached_vocabulary(family(TAGGED)), random.Random(seed), Dice(seed)
    parameters = {"type": "object", "properties": {}} | object_schema(lot, 1)
    grammar = json_grammar(words, parameters) if kind == "json" else tool_grammar(words, [tool("f", parameters)], kind)
    state = grammar.start(None if slack is None else grammar.shortest_tokens + slack)
    for _ in range(40):
        for token in state.forced():
            state.accept(token)
        if state.finished:
            break
        logits = dice.logits(words.size).round()  # many are equal: the first of them counts
        masked = logits.masked_fill(~state.fork().allowed(logits), -torch.inf)
        token = state.fork().best(logits)
        assert token == int(masked.argmax())
        assert state.best(logits, int(logits.argmax())) == token
        assert state.takes(token)
        state.accept(token)
        if token in words.eos_ids:
            break


def steps_of_searches(words, items, count, monkeypatch):
    """Of one call with a list of so many, within hardly more tokens than it needs."""
    steps, spend = [], SearchBudget.spend

    def counted(budget):
        steps.append(budget)
        return spend(budget)

    parameters = {"type": "object", "properties": {"list": {"type": "array", "items": items, "minItems": count}}}
    grammar = tool_grammar(words, [tool("f", parameters | {"required": ["list"]})], "any")
    limit = grammar.shortest_tokens + 6
    monkeypatch.setattr(SearchBudget, "spend", counted)
    assert len(written(grammar, limit, ["best"], 0)) >= limit - 4, "it has used its room"
    return len(steps)


LISTED = pytest.mark.parametrize("items", [{"type": "integer"}, {"type": "number"}], ids=str)
COUNTS = pytest.mark.parametrize(("count", "steps"), [(12, 3 * 200), (70, 15 * 200)])
"""Searches that end, and such as use up their 200 steps: those are repeated where half of the room is left."""


@LISTED
@COUNTS
def test_a_failed_search_is_not_repeated_after_the_next_token(items, count, steps, monkeypatch):
    assert steps_of_searches(cached_vocabulary(family(TAGGED)), items, count, monkeypatch) <= steps


@pytest.mark.real
@LISTED
@COUNTS
def test_on_real_tokenizers_a_failed_search_is_not_repeated_either(items, count, steps, real_tokenizer, monkeypatch):
    assert steps_of_searches(cached_vocabulary(real_tokenizer), items, count, monkeypatch) <= steps


def digits_that_fit_after_a_bare_comma(words, slack):
    """Of the second number in a list of 24, the first of which a comma without its space follows."""
    parameters = {
        "type": "object",
        "properties": {"list": {"type": "array", "items": {"type": "number"}, "minItems": 24}},
    }
    grammar = tool_grammar(words, [tool("f", parameters | {"required": ["list"]})], "any")
    state, without_limit = grammar.start(grammar.shortest_tokens + slack), grammar.start()
    one, comma, space = (words.llguidance_tokenizer.tokenize_str(text)[0] for text in ("1", ",", " "))

    def accept(*tokens):
        for token in tokens:
            state.accept(token)
            without_limit.accept(token)

    accept(*without_limit.forced())
    while not without_limit.takes(one):
        accept(int(state.allowed().nonzero()[0, 0]), *without_limit.forced())
    for token in (one, comma, space, one):
        if without_limit.takes(token):
            assert state.takes(token), words.llguidance_tokenizer.decode_str([token])
            accept(token)
    count = 0
    while state.takes(one):
        accept(one)
        count += 1
    return count


@pytest.mark.parametrize("slack", [6, 20, 30])
def test_an_unusual_token_costs_itself_and_not_the_room_of_the_rest(slack):
    for tokenizer in (load_tokenizer("s2t-demo"), family(TAGGED)):
        assert digits_that_fit_after_a_bare_comma(cached_vocabulary(tokenizer), slack) >= slack - 4


@pytest.mark.real
def test_on_real_tokenizers_it_costs_no_more_either(real_tokenizer):
    assert digits_that_fit_after_a_bare_comma(cached_vocabulary(real_tokenizer), 12) >= 8
