"""Constrained decoding: every output is legal, and complete within the token limit."""

import json
import random

import jsonschema
import pytest
import torch
from random_schemas import object_schema, schema
from templates import family

from s2t_agents.chat.response_options import ResponseOptions
from s2t_agents.errors import BadSchema, ConfigError
from s2t_agents.formats.tool_calls import CLOSE, OPEN, ToolCallParser
from s2t_agents.grammar.grammar import MAX_TRIED, json_grammar, tool_grammar
from s2t_agents.grammar.schema_rules import longest_minimum_bytes
from s2t_agents.grammar.vocabulary import cached_vocabulary
from s2t_agents.tokenization.detokenizer import Detokenizer

TAGGED, SPELT = "qwen2_5", "llama3"  # vocabularies with <tool_call> as one token, and without
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name, parameters=None):
    function = {"name": name, "description": "d"} | ({"parameters": parameters} if parameters is not None else {})
    return {"type": "function", "function": function}


WEATHER, NOW = tool("weather", CITY), tool("now")


class Dice:
    """A model that wants anything: random logits at every step, from a seed."""

    def __init__(self, seed, scale=3.0):
        self.random, self.scale = torch.Generator().manual_seed(seed), scale

    def logits(self, size):
        return torch.randn(size, generator=self.random) * self.scale


def generate(grammar, *, max_tokens=None, seed=0, wants=None, most=400):
    """Token ids of one generation, without the end token, as the engine would run it."""
    words, dice = grammar.vocabulary, Dice(seed)
    state, ids = grammar.start(max_tokens), []
    while len(ids) < (max_tokens or most):
        for token in state.forced():
            state.accept(token)
            ids.append(token)
        if state.finished or len(ids) >= (max_tokens or most):
            break
        logits = dice.logits(words.size)
        if wants is not None and len(ids) < len(wants):
            logits[wants[len(ids)]] = 99.0
        token = int(logits.masked_fill(~state.allowed(logits), -torch.inf).argmax())
        state.accept(token)
        if token in words.eos_ids:
            break
        ids.append(token)
    return ids


def calls_of(name, ids):
    parser, detokenizer = ToolCallParser.for_tokenizer(family(name)), Detokenizer(family(name))
    for token in ids:
        parser.push(token, detokenizer.push(token))
    parser.push(None, detokenizer.flush())
    parser.finish()
    return parser


def check_whole(parser):
    """There are calls, all of them whole; dice write 8E1216, too, which no double holds."""
    assert parser.tool_calls or parser.invalid_tool_calls
    assert all("is no number up to" in made["error"] for made in parser.invalid_tool_calls)


def accepts(grammar, text):
    """Whether the text is a whole answer of the grammar."""
    state = grammar.start()
    tags = {tag: i for tag, i in zip((OPEN, CLOSE), grammar.vocabulary.tags, strict=True) if i is not None}
    for piece in _pieces(text):
        for token in grammar.vocabulary.encode_answers([[tags.get(piece, piece)]])[0]:
            if not state.allowed()[token]:
                return False
            state.accept(token)
    return bool(state.finished or state.allowed()[list(grammar.vocabulary.eos_ids)].any())


def _pieces(text):
    while text:
        at, tag = min(((text.find(tag), tag) for tag in (OPEN, CLOSE) if tag in text), default=(len(text), ""))
        yield text[:at]
        yield tag
        text = text[at + len(tag) :]


def call(name, args):
    return f"{OPEN}\n{json.dumps({'name': name, 'arguments': args}, ensure_ascii=False)}\n{CLOSE}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [TAGGED, SPELT])
@pytest.mark.parametrize("block", range(5))
def test_500_random_schemas_come_out_whole_and_valid_within_any_limit(name, block):
    """50 schemas a block, two vocabularies: JSON and calls of a model that rolls dice, in a random token limit."""
    words = cached_vocabulary(family(name))
    for seed in range(50 * block, 50 * block + 50):
        r = random.Random(f"{name} {seed}")
        asked = schema(r)
        slack = r.randint(0, r.choice([0, 3, 20, 120]))
        answer = json_grammar(words, asked)
        text = words.llguidance_tokenizer.decode_str(
            generate(answer, max_tokens=answer.shortest_tokens + slack, seed=seed)
        )
        jsonschema.validate(json.loads(text), asked)

        parameters = {"type": "object", "properties": {"value": {"type": "string"}}} | object_schema(r, 1)
        several = r.choice([True, False])
        asked = [tool("weather", parameters), *([NOW] if several else [])]
        tools = tool_grammar(words, asked, "any", parallel=several)
        parser = calls_of(name, generate(tools, max_tokens=tools.shortest_tokens + slack, seed=seed))
        check_whole(parser)
        for made in parser.tool_calls:
            jsonschema.validate(made["args"], parameters if made["name"] == "weather" else {"maxProperties": 0})


@pytest.mark.parametrize("name", [TAGGED, SPELT])
@pytest.mark.parametrize("seed", range(12))
def test_auto_says_something_and_its_calls_are_whole(name, seed):
    grammar = tool_grammar(cached_vocabulary(family(name)), [WEATHER, NOW])
    parser = calls_of(name, generate(grammar, max_tokens=8 + 11 * seed, seed=seed))
    assert parser.text.strip() or parser.tool_calls
    assert not parser.invalid_tool_calls


@pytest.mark.parametrize("name", [TAGGED, SPELT])
def test_auto_takes_text_calls_and_both(name):
    grammar = tool_grammar(cached_vocabulary(family(name)), [WEATHER, NOW], "auto")
    one, other = call("weather", {"city": "天"}), call("now", {})
    for text in ("Hi!", one, f"Let me see.\n{one}", f"{one}\n{other}", f"Hm {other}\n{one}\n{one}"):
        assert accepts(grammar, text), text
    for text in ("", " \n", call("weather", {}), call("weather", {"city": 3}), call("nowhere", {}), f"{one} and more"):
        assert not accepts(grammar, text), text


@pytest.mark.parametrize("name", [TAGGED, SPELT])
def test_any_a_name_and_none(name):
    words = cached_vocabulary(family(name))
    one, other = call("weather", {"city": "x"}), call("now", {})
    required = tool_grammar(words, [WEATHER, NOW], "any")
    assert [accepts(required, text) for text in (one, other, f"{one}\n{other}", "Hi")] == [True, True, True, False]
    named = ResponseOptions((WEATHER, NOW), "any", tool="now").compile(words)
    assert [accepts(named, text) for text in (one, other, f"{other}\n{other}", "Hi")] == [False, True, False, False]
    silent = tool_grammar(words, [WEATHER, NOW], "none")
    assert accepts(silent, "Hi")
    assert not silent.start().allowed()[[tag for tag in words.tags if tag is not None]].any()


@pytest.mark.parametrize("choice", ["auto", "any"])
def test_without_parallel_calls_there_is_one(choice):
    grammar = tool_grammar(cached_vocabulary(family(TAGGED)), [NOW], choice, parallel=False)
    assert accepts(grammar, call("now", {}))
    assert not accepts(grammar, f"{call('now', {})}\n{call('now', {})}")


@pytest.mark.parametrize(
    "parameters", [None, {}, {"type": "object"}, {"properties": {}}, {"type": "object", "properties": {}}]
)
def test_a_tool_without_parameters_is_called_without_arguments(parameters):
    grammar = tool_grammar(cached_vocabulary(family(TAGGED)), [tool("now", parameters)], "any", parallel=False)
    state = grammar.start()
    assert family(TAGGED).decode(state.forced()) == call("now", {})


def test_what_has_no_choice_in_it_is_forced():
    grammar = tool_grammar(cached_vocabulary(family(TAGGED)), [WEATHER], "any")
    state = grammar.start()
    forced = state.forced()
    assert family(TAGGED).decode(forced) == f'{OPEN}\n{{"name": "weather", "arguments": {{"city":'
    for token in forced:
        state.accept(token)
    assert state.forced() == []


def test_tools_take_no_arguments_that_they_do_not_name():
    grammar = tool_grammar(cached_vocabulary(family(TAGGED)), [WEATHER], "any")
    assert not accepts(grammar, call("weather", {"city": "x", "colour": "red"}))
    free = tool("free", {"type": "object", "additionalProperties": {"type": "integer"}})
    assert accepts(tool_grammar(cached_vocabulary(family(TAGGED)), [free], "any"), call("free", {"b": 1}))


def test_references_and_unions_as_pydantic_writes_them():
    cat = {"type": "object", "properties": {"kind": {"const": "cat", "type": "string"}, "lives": {"type": "integer"}},
           "required": ["kind", "lives"], "title": "Cat"}  # fmt: skip
    dog = {"type": "object", "properties": {"kind": {"const": "dog", "type": "string"}}, "required": ["kind"]}
    pet = {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
           "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat"}}}  # fmt: skip
    parameters = {"$defs": {"Cat": cat, "Dog": dog}, "type": "object", "properties": {"pet": pet}, "required": ["pet"]}
    grammar = tool_grammar(cached_vocabulary(family(TAGGED)), [tool("adopt", parameters)], "any")
    assert accepts(grammar, call("adopt", {"pet": {"kind": "cat", "lives": 9}}))
    assert accepts(grammar, call("adopt", {"pet": {"kind": "dog"}}))
    assert not accepts(grammar, call("adopt", {"pet": {"kind": "dog", "lives": 9}}))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"enum": []}, r"x: enum \[\]"),
        (False, "x: schema false"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "x: maximum 3"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "x: maxLength 3"),
        ({"type": "array", "minItems": 5, "maxItems": 3}, "x: maxItems 3"),
        ({"type": "array", "items": {"enum": []}, "minItems": 1}, r"x\[\]: enum"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "x: allOf"),
        ({"type": "string", "enum": [1, 2]}, r"x: enum \[1, 2\]"),
        ({"type": "object", "additionalProperties": False, "required": ["y"]}, 'x: required "y"'),
        ({"type": "array", "items": {"type": "string"}, "minItems": 10**9}, "x: minItems 1000000000"),
        ({"default": object()}, "no JSON"),
    ],
)
def test_a_schema_that_no_answer_fits_is_refused_when_it_is_bound_and_the_culprit_named(bad, said):
    words = cached_vocabulary(family(TAGGED))
    parameters = {"type": "object", "properties": {"x": bad}, "required": ["x"]}
    with pytest.raises(BadSchema, match=said):
        json_grammar(words, parameters)
    with pytest.raises(BadSchema, match=f"tool 'odd'.*{said}"):
        tool_grammar(words, [NOW, tool("odd", parameters)])


@pytest.mark.parametrize(
    "broken", [3, {}, {"function": 1}, {"function": {"name": ""}}, {"function": {"name": "f", "parameters": [1]}}]
)
def test_what_is_no_tool_is_refused(broken):
    with pytest.raises(BadSchema, match="This is no tool"):
        tool_grammar(cached_vocabulary(family(TAGGED)), [NOW, broken])


def test_many_schemas_that_refer_to_each_other_are_measured_in_no_time():
    names = [f"n{i}" for i in range(14)]
    node = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in names]}
    assert longest_minimum_bytes({"$defs": dict.fromkeys(names, node), "$ref": "#/$defs/n0"}) < 1000


def test_without_logits_every_legal_token_of_a_small_vocabulary_is_tried():
    grammar = json_grammar(cached_vocabulary(family(TAGGED)), CITY)
    state = grammar.start(40)
    for token in grammar.vocabulary.llguidance_tokenizer.tokenize_str('{"city": "a'):
        state.accept(token)
    assert int(state.allowed().sum()) > 3 * MAX_TRIED


@pytest.mark.parametrize("tools", [[], [NOW]])
def test_a_choice_that_names_no_tool_is_refused(tools):
    with pytest.raises(ConfigError, match="fits no tool"):
        ResponseOptions(tuple(tools), "any", tool="weather").compile(cached_vocabulary(family(TAGGED)))


def test_a_limit_that_can_hold_no_answer_is_refused_before_anything_is_generated():
    grammar = tool_grammar(cached_vocabulary(family(TAGGED)), [WEATHER], "any")
    with pytest.raises(ConfigError, match=f"shortest has {grammar.shortest_tokens} tokens"):
        grammar.start(grammar.shortest_tokens - 1)
    assert len(generate(grammar, max_tokens=grammar.shortest_tokens)) == grammar.shortest_tokens


def test_a_model_that_never_stops_is_made_to_close_in_time():
    grammar = json_grammar(cached_vocabulary(family(TAGGED)), CITY)
    endless = (
        grammar.vocabulary.llguidance_tokenizer.tokenize_str("{")
        + grammar.vocabulary.llguidance_tokenizer.tokenize_str("a") * 500
    )
    for limit in (grammar.shortest_tokens, 30, 150):
        ids = generate(grammar, max_tokens=limit, wants=endless)
        city = json.loads(grammar.vocabulary.llguidance_tokenizer.decode_str(ids))["city"]
        assert len(ids) <= limit
        assert limit < 50 or len(city) > 100  # and not long before it must


def test_far_from_the_limit_nothing_is_withheld():
    grammar = json_grammar(cached_vocabulary(family(TAGGED)), CITY)
    free, limited, near = grammar.start(), grammar.start(10_000), grammar.start(grammar.shortest_tokens + 2)
    for state in (free, limited, near):
        for token in grammar.vocabulary.llguidance_tokenizer.tokenize_str('{"city": "'):
            state.accept(token)
    assert torch.equal(free.allowed(), limited.allowed())
    near_mask = near.allowed(torch.zeros(grammar.vocabulary.size))
    assert 0 < int(near_mask.sum()) <= MAX_TRIED + 1 < int(free.allowed().sum())


def test_masks_cover_the_models_logits_and_hold_no_padding():
    tokenizer = family(TAGGED)
    words = cached_vocabulary(tokenizer, size=512)
    mask = tool_grammar(words, [WEATHER]).start().allowed()
    assert mask.shape == (512,)
    assert mask.dtype == torch.bool
    assert not mask[len(tokenizer) :].any()
    assert words is cached_vocabulary(tokenizer, size=512)


def test_an_illegal_token_is_an_error_and_generations_do_not_share_state():
    grammar = json_grammar(cached_vocabulary(family(TAGGED)), {"enum": ["red", "green"]})
    first, second = grammar.start(), grammar.start()
    first.accept(grammar.vocabulary.llguidance_tokenizer.tokenize_str('"red"')[0])
    with pytest.raises(ValueError, match="not legal here"):
        second.accept(grammar.vocabulary.llguidance_tokenizer.tokenize_str("}")[0])
    assert accepts(grammar, '"green"')


def test_no_string_can_hold_half_a_surrogate_pair():
    grammar = json_grammar(cached_vocabulary(family(TAGGED)), {"type": "string"})
    assert not accepts(grammar, '"\\ud800"')
    assert accepts(grammar, '"\\n天"')


@pytest.mark.parametrize("limit", [None, 60, 34])
def test_a_fork_comes_to_the_same_decisions_and_moves_nothing_of_its_origin(limit):
    grammar = json_grammar(cached_vocabulary(family(TAGGED)), CITY)
    state, dice = grammar.start(limit), Dice(7)
    for _ in range(20):
        for token in state.forced():
            state.accept(token)
        if state.finished:
            break
        logits = dice.logits(grammar.vocabulary.size)
        fork, again = state.fork(), state.fork()
        allowed = fork.allowed(logits)
        assert torch.equal(again.allowed(logits), allowed)
        token = int(logits.masked_fill(~allowed, -torch.inf).argmax())
        fork.accept(token)
        fork.forced()
        assert state.takes(token)
        state.accept(token)
        if token in grammar.vocabulary.eos_ids:
            break


@pytest.mark.parametrize("limit", [None, 34])
def test_what_a_mask_keeps_is_taken_and_what_is_illegal_is_not(limit):
    grammar = json_grammar(cached_vocabulary(family(TAGGED)), CITY)
    state, dice = grammar.start(limit), Dice(3)
    for token in grammar.vocabulary.llguidance_tokenizer.tokenize_str('{"city": "'):
        state.accept(token)
    legal = grammar.start()
    for token in grammar.vocabulary.llguidance_tokenizer.tokenize_str('{"city": "'):
        legal.accept(token)
    kept = state.fork().allowed(dice.logits(grammar.vocabulary.size))
    everything = legal.allowed()
    assert all(state.takes(int(token)) for token in kept.nonzero()[:, 0])
    assert not any(state.takes(int(token)) for token in (~everything).nonzero()[:, 0])
