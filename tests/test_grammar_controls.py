"""Grammars and control tokens: text that spells a control token is encoded as ordinary tokens."""

import json
from typing import Any

import pytest
from templates import FAMILIES, family

from s2t_agents.formats.tool_calls import ToolCallParser
from s2t_agents.grammar.grammar import json_grammar, tool_grammar
from s2t_agents.grammar.vocabulary import Vocabulary, cached_vocabulary
from s2t_agents.tokenization.detokenizer import Detokenizer
from s2t_agents.tokenization.safe_encoding import SafeEncoder


def tool(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def controls(tokenizer: Any) -> dict[int, str]:
    """Control tokens but white space, by id."""
    found = SafeEncoder(tokenizer, str(tokenizer.chat_template or "")).control
    return {i: token.content for i, token in found.items() if not token.content.isspace()}


def written(words: Vocabulary, one: dict[str, Any]) -> list[int]:
    """The only call that a grammar leaves, or one of them: its shortest."""
    grammar = tool_grammar(words, [one], "any", parallel=False)
    ids = grammar.shortest(600)
    assert ids is not None
    state = grammar.start()
    for token in ids:
        assert state.takes(token)
        state.accept(token)
    return ids


def parsed(tokenizer: Any, ids: list[int]) -> ToolCallParser:
    parser, detokenizer = ToolCallParser.for_tokenizer(tokenizer), Detokenizer(tokenizer)
    for token in ids:
        parser.push(token, detokenizer.push(token))
    parser.push(None, detokenizer.flush())
    parser.finish()
    return parser


def check_literals(tokenizer: Any, words: Vocabulary, literals: list[str]) -> None:
    """Every literal as constant, name of a property and name of the tool, alone and inside other text."""
    own = controls(tokenizer).keys() - {tag for tag in words.tags if tag is not None}
    for literal in literals:
        for text in (literal, f"a {literal}b"):
            ids = written(words, tool("f", {"x": {"const": text}, text: {"enum": [1]}}))
            assert not own & set(ids), text
            (call,) = parsed(tokenizer, ids).tool_calls
            assert call["args"] == {"x": text, text: 1}
        ids = written(words, tool(literal, {}))
        assert not own & set(ids), literal
        assert [call["name"] for call in parsed(tokenizer, ids).tool_calls] == [literal]
        tags = [i for i in ids if i in words.tags]
        assert len(tags) in (0, 2)


def check_strings(tokenizer: Any, words: Vocabulary) -> None:
    """Inside a string no control token is legal, and neither is one in free text but tags that open calls."""
    grammar = json_grammar(words, {"type": "string"})
    state = grammar.start()
    for token in words.encode_answers([['"a']])[0]:
        state.accept(token)
    every = [i for i in controls(tokenizer) if i < words.size]
    assert not state.allowed()[every].any()
    said = tool_grammar(words, [], "none").start()
    for token in words.encode_answers([["Hi"]])[0]:
        said.accept(token)
    assert not said.allowed()[[i for i in every if i not in words.eos_ids]].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_literals_that_spell_control_tokens_are_spelt_with_others(name: str) -> None:
    tokenizer = family(name)
    words = cached_vocabulary(tokenizer)
    check_literals(tokenizer, words, list(controls(tokenizer).values()))
    check_strings(tokenizer, words)


@pytest.mark.parametrize("name", FAMILIES)
def test_any_text_is_still_expressible_and_tokens_mean_what_the_tokenizer_says(name: str) -> None:
    tokenizer = family(name)
    words = cached_vocabulary(tokenizer)
    for text in ("plain", "<table> </s> <|im_end|>", "größe 天 🙂", "a\n\nb"):
        grammar = json_grammar(words, {"const": text})
        ids = grammar.shortest(200)
        assert ids is not None
        detokenizer = Detokenizer(tokenizer)
        spelt = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        assert json.loads(spelt) == text


@pytest.mark.real
def test_on_real_tokenizers_no_literal_becomes_a_control_token(real_tokenizer: Any) -> None:
    words = cached_vocabulary(real_tokenizer)
    own = list(dict.fromkeys(token.content for token in real_tokenizer.added_tokens_decoder.values()))
    step = max(1, len(own) // 16)  # of tokens reserved by the thousand, some
    picked = [
        token for token in dict.fromkeys([*own[::step], *own[:10], "<tool_call>", "</tool_call>"]) if token.strip()
    ]
    check_literals(real_tokenizer, words, picked)
    check_strings(real_tokenizer, words)
