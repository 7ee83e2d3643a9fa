"""Reasoning formats are detected in tokenizer and template; the streaming parser splits reasoning from answer."""

import json
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2t_agents.errors import ConfigError
from s2t_agents.formats.reasoning import (
    ReasoningFormat,
    ReasoningParser,
    ReasoningPhase,
    parse_max_thinking_tokens,
    tag_pairs,
)
from s2t_agents.formats.tool_calls import PlainTextParser, ToolCallParser
from s2t_agents.grammar.grammar import CompiledGrammar, json_grammar, tool_grammar
from s2t_agents.grammar.thinking import MAX_GAP_BYTES, ThinkingVocabulary, ThinkThenAnswer
from s2t_agents.grammar.vocabulary import cached_vocabulary
from s2t_agents.testing import tiny_tokenizer
from s2t_agents.tokenization.detokenizer import Detokenizer
from tests.templates import FAMILIES, family
from tests.thinking_models import FORMATS, TAGS, format_of, token, tokenizer_of

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
LOOK = {"type": "function", "function": {"name": "look", "parameters": CITY}}


# ---------------------------------------------------------------------- formats


@pytest.mark.parametrize("name", TAGS)
def test_tags_are_found_by_their_form(name: str) -> None:
    found, (opening, closing, special) = format_of(name), TAGS[name]
    assert (found.opening.text, found.closing.text) == (opening, closing)
    assert found.opening.by_token == found.closing.by_token == (special is not None)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen3"])
def test_families_that_know_no_thoughts_have_no_format(name: str) -> None:
    assert ReasoningFormat.of(family(name), family(name).chat_template) is None
    assert ReasoningFormat.of(tiny_tokenizer(), tiny_tokenizer().chat_template) is None


@pytest.mark.parametrize(
    ("template", "pair"),
    [
        ("{{ m.content }}<think>\n", ("<think>", "</think>")),
        ("{{ m.content.split('</think>')[-1] }}", ("<think>", "</think>")),
        ("<seed:think>{{ x }}</seed:think>", ("<seed:think>", "</seed:think>")),
        ("<|START_THINKING|>", ("<|START_THINKING|>", "<|END_THINKING|>")),
        ("{{ '<|end_of_thought|>' }}", ("<|begin_of_thought|>", "<|end_of_thought|>")),
        ("<|think|>a</|think|>", ("<|think|>", "</|think|>")),
        ("[THINK]{{ t }}[/THINK]", ("[THINK]", "[/THINK]")),
        ("<thinking>a</thinking>", ("<thinking>", "</thinking>")),
    ],
)
def test_a_tag_alone_has_its_counterpart_by_its_form(template: str, pair: tuple[str, str]) -> None:
    assert tag_pairs(set(), template)[0] == pair


def test_words_that_only_look_like_tags_are_none() -> None:
    assert not tag_pairs(set(), "<thinker> <b>think</b> <reasoning_effort> <tool_call> {{ think > 3 }}")


def test_tags_that_are_tokens_go_before_tags_that_are_letters() -> None:
    assert tag_pairs({"[THINK]", "[/THINK]"}, "<think>[THINK]")[0] == ("[THINK]", "[/THINK]")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("opens", "place"), [(False, "undecided"), (True, "thought")])
def test_the_prompt_says_who_opens_the_thought(name: str, opens: bool, place: ReasoningPhase) -> None:
    tokenizer = tokenizer_of(name, opens)
    turns = [{"role": "user", "content": "Q"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert format_of(name, opens).phase_after(tokenizer, prompt) == place


@pytest.mark.parametrize("wrong", [-1, True, False, 2.5, float("nan"), float("inf"), "3", [1]])
def test_a_limit_that_is_no_number_of_tokens_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="max_thinking_tokens is "):
        parse_max_thinking_tokens(wrong)
    assert (parse_max_thinking_tokens(None), parse_max_thinking_tokens(0), parse_max_thinking_tokens(7)) == (None, 0, 7)


# ---------------------------------------------------------------------- the reader

TEXTS = st.text(alphabet="ab<>/thinkTHINK \n{é", max_size=12)


def read(reader: ReasoningParser, pieces: list[tuple[int, str]]) -> tuple[str, str, list[str]]:
    """All of the thought, all of the answer, and the thought as it streamed."""
    shown, said = [], []
    for token_id, text in pieces:
        thought, answer = reader.push(token_id, text)
        shown.append(thought)
        said += [each for _, each in answer]
    thought, answer = reader.finish("")
    return reader.reasoning, "".join([*said, *(each for _, each in answer)]), [*shown, thought]


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS, st.booleans(), st.randoms())
def test_letters_are_read_the_same_however_they_are_cut(thought: str, answer: str, opened: bool, dice: Any) -> None:
    thought = thought.replace("</think>", "")
    text = ("" if opened else "\n<think>") + thought + "</think>" + answer
    cuts = sorted(dice.sample(range(len(text) + 1), min(len(text), 6)))
    pieces = [(-1, text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    reader = ReasoningParser(format_of("letters"), "thought" if opened else "undecided")
    reasoning, said, shown = read(reader, pieces)
    before, _, after = (thought + "</think>" + answer).partition("</think>")
    assert reasoning == "".join(shown) == before.strip()
    assert said == after.lstrip()


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.randoms())
def test_an_answer_without_a_thought_is_read_to_the_letter(answer: str, dice: Any) -> None:
    cuts = sorted(dice.sample(range(len(answer) + 1), min(len(answer), 4)))
    pieces = [(-1, answer[a:b]) for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    reader = ReasoningParser(format_of("letters"), "undecided")
    if not answer.lstrip().startswith("<think>"):
        assert read(reader, pieces)[:2] == ("", answer)
        assert reader.tokens == 0


# ---------------------------------------------------------------------- the grammar behind the thought


class Dice:
    """Logits by chance; tokens of JSON and of tags come often."""

    def __init__(self, seed: int) -> None:
        self._chance = torch.Generator().manual_seed(seed)

    def logits(self, size: int) -> torch.Tensor:
        return torch.randn(size, generator=self._chance)


def grammars(name: str) -> tuple[ThinkingVocabulary, dict[str, CompiledGrammar]]:
    tokenizer = tokenizer_of(name)
    words = cached_vocabulary(tokenizer)
    compiled = {
        "json": json_grammar(words, CITY),
        "call": tool_grammar(words, [LOOK], "any", parallel=False),
        "auto": tool_grammar(words, [LOOK]),
        "text": tool_grammar(words, []),
    }
    return ThinkingVocabulary(words, tokenizer, format_of(name)), compiled


def written(state: ThinkThenAnswer, room: int, dice: Dice, eos: frozenset[int], size: int) -> list[int]:
    """What a model of chance writes: each token is what the engine would take."""
    ids: list[int] = []
    while len(ids) < room and not state.finished:
        for each in state.forced():
            assert state.takes(each)
            state.accept(each)
            ids.append(each)
        if len(ids) >= room or state.finished:
            break
        logits = dice.logits(size)
        allowed = state.allowed(logits)
        assert allowed.any()
        chosen = int(logits.masked_fill(~allowed, -torch.inf).argmax())
        ids.append(chosen)
        if chosen in eos:
            break
        assert state.takes(chosen)
        state.accept(chosen)
    return ids


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("place", ["undecided", "thought"])
@pytest.mark.parametrize("kind", ["json", "call"])
def test_an_answer_in_a_form_is_whole_in_any_room_that_holds_it(name: str, place: ReasoningPhase, kind: str) -> None:
    thinking, compiled = grammars(name)
    grammar, tokenizer = compiled[kind], tokenizer_of(name)
    least = grammar.shortest_tokens + thinking.tokens_to_close
    with pytest.raises(ConfigError, match=r"max_tokens=\d+ cannot hold an answer"):
        ThinkThenAnswer(thinking, grammar, phase=place, room=grammar.shortest_tokens - 1, forced=True)
    for seed, room in enumerate((least, least + 5, 3 * least)):
        for limit in (None, 2):
            state = ThinkThenAnswer(thinking, grammar, phase=place, room=room, limit=limit, forced=True)
            words = thinking.vocabulary
            ids = written(state, room, Dice(seed), words.eos_ids, words.size)
            assert len(ids) <= room
            reader, detokenizer = ReasoningParser(thinking.format, place), Detokenizer(tokenizer)
            answer = []
            for each in ids:
                inside = reader.thinking
                answer += reader.push(each, "" if each in words.eos_ids else detokenizer.push(each))[1]
                if inside and not reader.thinking:
                    detokenizer.flush()  # chance ends thoughts within a character
            parser = ToolCallParser.for_tokenizer(tokenizer) if kind == "call" else PlainTextParser()
            for piece in answer:
                parser.push(*piece)
            parser.finish()
            filled = parser.tool_calls[0]["args"] if kind == "call" else json.loads(parser.text)
            jsonschema.validate(filled, CITY)
            assert kind == "json" or not parser.text
            if limit is not None and reader.tokens:
                spelled = len(thinking.format.opening.text) + len(thinking.format.closing.text)
                bridge = thinking.format.bridge
                assert reader.tokens <= limit + spelled + (len(bridge.ids) if bridge else 0) + 1  # space before a tag


@pytest.mark.parametrize("name", FORMATS)
def test_no_control_token_is_legal_inside_a_thought_but_the_closing_one(name: str) -> None:
    thinking, compiled = grammars(name)
    tokenizer = tokenizer_of(name)
    state = ThinkThenAnswer(thinking, compiled["auto"], phase="thought", room=200)
    added = {i: one.content for i, one in tokenizer.added_tokens_decoder.items()}
    legal = {added[i] for i in state.allowed().nonzero()[:, 0].tolist() if i in added}
    own = {thinking.format.opening.text, thinking.format.closing.text}
    assert legal <= own
    assert (thinking.format.closing.text in legal) == thinking.format.closing.by_token


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("place", ["undecided", "thought"])
@pytest.mark.parametrize("kind", ["json", "call", "auto", "text"])
def test_a_fork_comes_to_the_same_decisions_and_what_is_allowed_is_taken(
    name: str, place: ReasoningPhase, kind: str
) -> None:
    thinking, compiled = grammars(name)
    words = thinking.vocabulary
    state = ThinkThenAnswer(thinking, compiled[kind], phase=place, room=150, limit=20, forced=kind in ("json", "call"))
    dice = Dice(5)
    for _ in range(120):
        for each in state.forced():
            state.accept(each)
        if state.finished:
            break
        logits = dice.logits(words.size)
        fork, again = state.fork(), state.fork()
        allowed = fork.allowed(logits)
        assert torch.equal(again.allowed(logits), allowed)
        chosen = int(logits.masked_fill(~allowed, -torch.inf).argmax())
        if chosen in words.eos_ids:
            break
        fork.accept(chosen)
        fork.forced()
        assert state.takes(chosen)
        state.accept(chosen)
        illegal = (~state.fork().allowed()).nonzero()[:1, 0].tolist()
        if not state.forced() and illegal and not state.takes(illegal[0]):
            with pytest.raises(ValueError, match="not legal here"):
                state.fork().accept(illegal[0])


def test_a_token_may_hold_the_tags_end_and_the_answers_begin_where_the_answer_may_begin_so() -> None:
    tokenizer = tokenizer_of("letters")
    thinking, compiled = grammars("letters")
    ids = {text: token(tokenizer, text) for text in ("</", "think", '>{"', ">ok", ">\n\n", ">")}
    for kind, legal in (("json", {'>{"', ">\n\n", ">"}), ("text", {'>{"', ">ok", ">\n\n", ">"})):
        state = ThinkThenAnswer(thinking, compiled[kind], phase="thought", room=500, forced=kind == "json")
        for text in ("</", "think"):
            state.accept(ids[text])
        mask = state.allowed()
        assert {text for text in ('>{"', ">ok", ">\n\n", ">") if mask[ids[text]]} == legal
    state = ThinkThenAnswer(thinking, compiled["json"], phase="thought", room=500, forced=True)
    for text in ("</", "think", '>{"'):
        state.accept(ids[text])
    rest = thinking.vocabulary.llguidance_tokenizer.decode_str(state.forced())
    assert rest.startswith('city"')


@pytest.mark.parametrize(("closing", "brought"), [(">", 0), (">\n\n", 2)])
def test_white_space_that_comes_with_the_tags_end_counts_for_the_gap(closing: str, brought: int) -> None:
    tokenizer = tokenizer_of("letters")
    thinking, compiled = grammars("letters")
    state = ThinkThenAnswer(thinking, compiled["json"], phase="thought", room=500, forced=True)
    for text in ("</", "think", closing):
        state.accept(token(tokenizer, text))
    space, legal = token(tokenizer, "\n"), 0
    while state.takes(space):
        assert state.allowed()[space]
        state.accept(space)
        legal += 1
    assert legal == MAX_GAP_BYTES - brought
    assert not state.allowed()[space]


@pytest.mark.parametrize("name", ["special", "letters", "gemma4"])
@pytest.mark.parametrize("spaces", range(MAX_GAP_BYTES + 1))
def test_white_space_in_the_gap_is_taken_from_the_answers_room(name: str, spaces: int) -> None:
    tokenizer = tokenizer_of(name)
    thinking, _ = grammars(name)
    words = thinking.vocabulary
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    answer = json_grammar(words, schema)
    room = 2 * (answer.margin + thinking.tokens_to_close)
    state = ThinkThenAnswer(thinking, answer, phase="thought", room=room, limit=0, forced=True)
    space, letter, ids = token(tokenizer, "\n"), token(tokenizer, "x"), list[int]()

    def accept(each: int) -> None:
        state.accept(each)
        ids.append(each)

    for each in state.forced():
        accept(each)
    for _ in range(spaces):
        state.allowed(torch.zeros(words.size))  # as for every step
        assert state.takes(space)
        accept(space)
    before = len(ids)
    while not state.finished and len(ids) < room:
        for each in state.forced() or [state.best(torch.eye(words.size)[letter])]:
            accept(each)
    assert state.finished
    json.loads(tokenizer.decode(ids[before:]))
    assert len(ids) > room - 10  # it would have said more


@pytest.mark.parametrize("kind", ["json", "call"])
@pytest.mark.parametrize("name", ["special", "letters", "gemma4"])
def test_where_there_is_no_room_to_think_the_answers_first_tokens_are_forced(name: str, kind: str) -> None:
    thinking, compiled = grammars(name)
    least = compiled[kind].shortest_tokens
    state = ThinkThenAnswer(thinking, compiled[kind], phase="undecided", room=least, forced=True)
    plain = compiled[kind].start(least)
    assert state.forced() == plain.forced() != []


@pytest.mark.parametrize(("kind", "text"), [("json", False), ("text", True)])
def test_after_a_piece_of_the_tag_comes_the_rest_of_it_unless_the_answer_may_begin_so(kind: str, text: bool) -> None:
    tokenizer = tokenizer_of("letters")
    thinking, compiled = grammars("letters")
    state = ThinkThenAnswer(thinking, compiled[kind], phase="undecided", room=500, forced=kind == "json")
    state.accept(token(tokenizer, "<th"))
    mask = state.allowed()
    assert mask[token(tokenizer, "ink")]
    for other in ("ok", "{"):
        assert bool(mask[token(tokenizer, other)]) == state.takes(token(tokenizer, other)) == text


def test_a_model_that_would_end_its_turn_in_a_thought_closes_the_thought() -> None:
    thinking, compiled = grammars("special")
    state = ThinkThenAnswer(thinking, compiled["text"], phase="thought", room=50)
    logits = torch.zeros(thinking.vocabulary.size)
    logits[list(thinking.vocabulary.eos_ids)] = 9.0
    assert state.allowed(logits).nonzero()[:, 0].tolist() == list(thinking.format.closing.ids)
