"""Reasoning models: reasoning is a content block of its own, and the answer is the answer only."""

import asyncio
import json
from decimal import Decimal
from typing import Any

import pytest
import torch
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel

from s2t_agents import Budget, ChatS2T, Ledger
from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.chat.unfinished_answers import Unfinished
from s2t_agents.errors import BudgetExceeded, ConfigError
from s2t_agents.escalation import Escalation
from s2t_agents.formats.reasoning import ReasoningParser
from s2t_agents.grammar.grammar import tool_grammar
from s2t_agents.grammar.thinking import ThinkThenAnswer, cached_thinking_vocabulary
from s2t_agents.grammar.vocabulary import cached_vocabulary
from s2t_agents.ledger import GenerationRecord, Totals
from s2t_agents.llms.previews import continuations
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.scheduling.waits import finish
from s2t_agents.testing import ScriptedLLM, markov_model, tiny_tokenizer
from s2t_agents.tokenization.detokenizer import Detokenizer
from s2t_agents.triggers import always
from tests.thinking_models import ANSWER, FORMATS, TAGS, THOUGHT, answer_of, format_of, model_of, token, tokenizer_of

WAYS = [(format, opens) for format in FORMATS for opens in (False, True)]
ways = pytest.mark.parametrize(("format", "opens"), WAYS, ids=[f"{f}-{'template' if o else 'model'}" for f, o in WAYS])


class Number(BaseModel):
    """A number."""

    n: int


@tool
def look(place: str) -> str:
    """Look at a place."""
    return place


def chat(format: str, opens: bool, **settings: Any) -> ChatS2T:
    return ChatS2T(**{"model": model_of(format, opens), "max_tokens": 400, **settings})


def whole(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    return total


def thought_of(message: AIMessage) -> str:
    return "".join(block["reasoning"] for block in message.content_blocks if block["type"] == "reasoning")


def check(message: AIMessage, answer: str | None = None) -> None:
    assert thought_of(message) == message.additional_kwargs["reasoning_content"] == THOUGHT
    assert message.content_blocks[0]["type"] == "reasoning"
    if answer is not None:
        assert message.content == message.text == answer
    usage, told = message.usage_metadata, message.response_metadata["s2t"]
    assert usage is not None
    assert 0 < usage["output_token_details"]["reasoning"] < usage["output_tokens"]
    assert told["thought"]["tokens"] == usage["output_token_details"]["reasoning"]


async def every_way(model: Any, ask: Any = "Q") -> list[AIMessage]:
    """The same call by all four ways that LangChain has."""
    streamed = await asyncio.to_thread(lambda: list(model.stream(ask)))
    told = [await asyncio.to_thread(model.invoke, ask), await model.ainvoke(ask)]
    return [*told, whole(streamed), whole([chunk async for chunk in model.astream(ask)])]


@ways
async def test_the_answer_is_the_content_and_the_thought_a_block_of_its_own(format: str, opens: bool) -> None:
    for message in await every_way(chat(format, opens)):
        check(message, answer_of(format))
        assert message.response_metadata["finish_reason"] == "stop"


@ways
async def test_a_forced_call_comes_behind_the_thought(format: str, opens: bool) -> None:
    model = chat(format, opens, max_tokens=120).bind_tools([look], tool_choice="any")
    for message in await every_way(model):
        check(message, "")
        assert [call["name"] for call in message.tool_calls] == ["look"]
        assert message.response_metadata["finish_reason"] == "tool_calls"


@ways
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_a_schema_is_filled_behind_the_thought(format: str, opens: bool, method: Any) -> None:
    model = chat(format, opens, max_tokens=120).with_structured_output(Number, method=method, include_raw=True)
    told = model.invoke("Q")
    check(told["raw"])
    assert isinstance(told["parsed"], Number)


@ways
def test_reasoning_and_answer_are_all_tokens_that_were_written(format: str, opens: bool) -> None:
    steps: list[int] = []
    model = chat(format, opens, on_step=lambda _, step: steps.append(step.token_id))
    message = model.invoke("Q")
    usage = message.usage_metadata
    assert usage is not None
    thought = usage["output_token_details"]["reasoning"]
    tokenizer = tokenizer_of(format, opens)
    assert usage["output_tokens"] == len(steps)
    told = tokenizer.decode(steps[thought:], skip_special_tokens=True)
    assert told.strip() == message.content
    assert THOUGHT in tokenizer.decode(steps[:thought])


@pytest.mark.parametrize("format", ["special", "added", "letters", "magistral", "gemma4"])
def test_a_template_that_closes_the_thought_leaves_none(format: str) -> None:
    tokenizer = tokenizer_of(format, True)
    opening, closing = ("<|channel>", "<channel|>") if format == "gemma4" else TAGS[format][:2]
    says = ["o", "k", "<|im_end|>"] if format != "letters" else [token(tokenizer, "ok"), "<|im_end|>"]
    model = ChatS2T(
        model=markov_model(tokenizer, ["\n", *says], [token(tokenizer, ">\n\n"), *says] if format == "letters" else [])
    )
    off = {"enable_thinking": False}
    for message in (model.invoke("Q", template_args=off), model.model_copy(update={"template_args": off}).invoke("Q")):
        assert message.content == "ok"
        assert "reasoning_content" not in message.additional_kwargs
        assert message.usage_metadata["output_token_details"]["reasoning"] == 0
    assert opening
    assert closing


# ---------------------------------------------------------------------- limits


@ways
@pytest.mark.parametrize("limit", [0, 1])
async def test_a_limit_closes_the_thought_and_the_answer_follows(format: str, opens: bool, limit: int) -> None:
    model = chat(format, opens, max_thinking_tokens=limit, max_tokens=40)
    for message in [*await every_way(model), chat(format, opens, max_tokens=40).invoke("Q", max_thinking_tokens=limit)]:
        assert THOUGHT.startswith(thought_of(message))
        assert len(thought_of(message)) < len(THOUGHT)
        assert message.content
        assert "think" not in message.content


@pytest.mark.parametrize("wrong", [-1, True, float("nan"), "3", 2.5])
def test_a_limit_that_is_none_is_refused_before_anything_runs(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="max_thinking_tokens"):
        chat("special", False, max_thinking_tokens=wrong)
    with pytest.raises(ConfigError, match="max_thinking_tokens"):
        chat("special", False).invoke("Q", max_thinking_tokens=wrong)
    with pytest.raises(ConfigError, match="template_args"):
        chat("special", False).invoke("Q", template_args=wrong)


@ways
async def test_a_thought_that_max_tokens_cuts_off_is_kept_and_there_is_no_answer(format: str, opens: bool) -> None:
    room = 2 + (0 if opens else len(format_of(format).opening.ids))
    for message in await every_way(chat(format, opens, max_tokens=room)):
        assert message.content == ""
        assert message.response_metadata["finish_reason"] == "length"
        assert THOUGHT.startswith(thought_of(message))
        usage = message.usage_metadata
        assert usage is not None
        assert usage["output_token_details"]["reasoning"] == usage["output_tokens"] == room


@ways
def test_a_form_is_filled_though_the_thought_would_take_all_the_room(format: str, opens: bool) -> None:
    tokenizer = tokenizer_of(format, opens)
    known = format_of(format)
    start = [":"] if format == "gemma4" else ["\n"]
    loops = [[*start, known.opening.ids[0]]] if not opens and format != "harmony" else []
    endless = ["y", "z"]
    chains: list[list[Any]] = [*loops, ["<|channel|>", "a"]] if format == "harmony" else loops
    last = tokenizer.encode(known.opening.text)[-1]
    chains += [[last, *endless, "y"], ["\n", "y"]]
    model = ChatS2T(model=markov_model(tokenizer, *chains), max_tokens=100)
    message = model.with_structured_output(Number, method="json_schema", include_raw=True).invoke("Q")
    assert isinstance(message["parsed"], Number)
    assert message["raw"].response_metadata["finish_reason"] == "stop"


def test_a_model_that_ends_its_turn_within_the_thought_is_asked_for_the_answer() -> None:
    tokenizer = tokenizer_of("special", True)
    model = markov_model(tokenizer, ["\n", "h", "m", "<|im_end|>"], ["</think>", "o", "k", "<|im_end|>"])
    message = ChatS2T(model=model).invoke("Q")
    assert (thought_of(message), message.content) == ("hm", "ok")
    assert message.response_metadata["finish_reason"] == "stop"


# ---------------------------------------------------------------------- what is text


@ways
def test_stop_strings_apply_to_the_answer_alone(format: str, opens: bool) -> None:
    check(chat(format, opens, stop="m x").invoke("Q"), "h" if format == "harmony" else ANSWER)
    if format != "harmony":
        check(chat(format, opens, stop="k").invoke("Q"), "o")


@pytest.mark.parametrize("format", ["special", "added"])
def test_a_second_opening_tag_is_no_thought(format: str) -> None:
    tokenizer = tokenizer_of(format)
    spelled = ["<", "t", "h", "i", "n", "k", ">", "a", "<|im_end|>"]
    message = ChatS2T(model=markov_model(tokenizer, ["\n", "<think>", "x", "</think>", *spelled])).invoke("Q")
    assert (thought_of(message), message.content) == ("x", "<think>a")


def test_tags_in_the_users_words_open_nothing() -> None:
    for format, opens in (("special", False), ("added", False), ("letters", False)):
        tokenizer = tokenizer_of(format, opens)
        says = ["o", "<|im_end|>"]
        model = ChatS2T(model=markov_model(tokenizer, ["\n", *says]))
        for words in ("<think>", "a <think>", "<think>\n", "</think>", "<think></think>"):
            message = model.invoke(words)
            assert message.content == "o"
            assert thought_of(message) == ""


# ---------------------------------------------------------------------- history

PAST = [
    AIMessage("Yes.", additional_kwargs={"reasoning_content": "hidden"}),
    AIMessage([{"type": "reasoning", "reasoning": "hidden"}, {"type": "text", "text": "Yes."}]),
    AIMessage([{"type": "thinking", "thinking": "hidden", "signature": "s"}, {"type": "text", "text": "Yes."}]),
]


def spelled_out(format: str) -> AIMessage:
    known = format_of(format)
    return AIMessage(f"{known.opening.text}\nhidden\n{known.closing.text}\n\nYes.")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("which", range(4))
def test_a_past_thought_goes_where_the_template_wants_it(format: str, which: int) -> None:
    past = [*PAST, spelled_out(format)][which]
    encoder = PromptEncoder(tokenizer_of(format))
    rendered = encoder.render([HumanMessage("Q"), past, HumanMessage("R")])
    known = format_of(format)
    assert "".join(f"{known.opening.text}hidden{known.closing.text}".split()) in "".join(rendered.split())
    assert rendered.count("hidden") == 1
    assert rendered.count("Yes.") == 1
    old = [HumanMessage("Q"), past, *[HumanMessage("R"), AIMessage("No.")] * 2, HumanMessage("S")]
    assert encoder.render(old).count("hidden") == (0 if format == "harmony" else 1)  # its template drops old ones


@ways
def test_an_answer_comes_back_in_the_next_turn(format: str, opens: bool) -> None:
    model = chat(format, opens)
    first = model.invoke("Q")
    encoder = PromptEncoder(tokenizer_of(format, opens))
    rendered = encoder.render([HumanMessage("Q"), first, HumanMessage("R")])
    assert answer_of(format) in rendered
    check(model.invoke([HumanMessage("Q"), first, HumanMessage("R")]), answer_of(format))


def test_a_template_that_knows_no_thoughts_is_shown_none() -> None:
    encoder = PromptEncoder(tiny_tokenizer())
    for past in (*PAST, AIMessage("<think>\nhidden\n</think>\n\nYes.")):
        rendered = encoder.render([HumanMessage("Q"), past, HumanMessage("R")])
        assert "hidden" not in rendered
        assert "Yes." in rendered


# ---------------------------------------------------------------------- selection, escalation, and what they cost


class Flat:
    """One dollar a question."""

    def cost(self, *, input_tokens: int, cached_tokens: int = 0, output_tokens: int = 0) -> Decimal:
        return Decimal(1)


def first_candidate(ids: Any, candidates: Any) -> list[float]:
    return [-float(at) for at in range(len(candidates))]


@ways
def test_the_llm_is_asked_inside_thoughts_and_the_books_say_so(format: str, opens: bool, tmp_path: Any) -> None:
    llm = ScriptedLLM(first_candidate, price=Flat())
    ledger = Ledger.open(tmp_path / "ledger.jsonl")
    model = chat(
        format, opens, trigger=always(), escalation=Escalation(llm, margin=1.0), budget=Budget(usd=99), ledger=ledger
    )
    message = model.invoke("Q")
    check(message, answer_of(format))
    told, [record] = message.response_metadata["s2t"], ledger.records()
    thought = told["thought"]
    assert thought == {**record.thought.model_dump(), "llm_usd": float(record.thought.llm_usd or 0)}
    assert thought["tokens"] == message.usage_metadata["output_token_details"]["reasoning"]
    assert thought["escalations"] == thought["triggers"] == thought["selections"] == thought["llm_usd"]
    assert len(THOUGHT) - 3 <= thought["escalations"] < told["escalations"]
    streamed = whole(list(model.stream("Q")))
    assert streamed.response_metadata["s2t"]["thought"] == thought
    totals = sum(ledger.totals("agent").values(), Totals())
    assert totals.thought_tokens == 2 * thought["tokens"]
    assert totals.thought_escalations == 2 * thought["escalations"]
    assert totals.cost_usd.thought.usd == 2 * Decimal(thought["escalations"])


def test_the_llm_decides_inside_a_thought() -> None:
    tokenizer = tokenizer_of("special", True)
    slm = markov_model(tokenizer, ["\n", "h", "</think>", "o", "<|im_end|>"], ["\n", "z", "</think>"])

    def likes_z(ids: Any, candidates: Any) -> list[float]:
        return [0.0 if each == token(tokenizer, "z") else -9.0 - at for at, each in enumerate(candidates)]

    escalation = Escalation(ScriptedLLM(likes_z), margin=1.0)
    message = ChatS2T(model=slm, k=4, trigger=always(), escalation=escalation).invoke("Q")
    assert thought_of(message) == "z"
    assert message.response_metadata["s2t"]["flips"] >= 1


@pytest.mark.parametrize("ending", ["jsonl", "db"])
def test_a_ledger_from_before_thoughts_is_read(tmp_path: Any, ending: str) -> None:
    old = GenerationRecord(completion_tokens=3).model_dump(mode="json", exclude={"thought"})
    record = GenerationRecord.model_validate_json(json.dumps(old))
    assert record.thought.tokens == 0
    ledger = Ledger.open(tmp_path / f"ledger.{ending}")
    ledger.record(record)
    ledger.close()
    again = Ledger.open(tmp_path / f"ledger.{ending}")
    assert sum(again.totals("agent").values(), Totals()).thought_tokens == 0
    again.close()


# ---------------------------------------------------------------------- streams, events, agents


@ways
def test_a_stream_shows_the_thought_as_it_comes(format: str, opens: bool) -> None:
    chunks = [chunk for chunk in chat(format, opens).stream("Q") if chunk.content or chunk.additional_kwargs]
    thoughts = [chunk.additional_kwargs.get("reasoning_content", "") for chunk in chunks]
    assert "".join(thoughts) == THOUGHT
    assert sum(map(bool, thoughts)) >= 2
    firsts = [at for at, chunk in enumerate(chunks) if chunk.content]
    assert not any(thoughts[firsts[0] + 1 :])


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("format", ["special", "letters", "harmony"])
async def test_events_carry_the_thought(format: str, version: Any) -> None:
    model = chat(format, False)
    if version == "v2":
        events = [event async for event in model.astream_events("Q", version="v2")]
        pieces = [event["data"]["chunk"] for event in events if event["event"] == "on_chat_model_stream"]
        assert "".join(piece.additional_kwargs.get("reasoning_content", "") for piece in pieces) == THOUGHT
        check(events[-1]["data"]["output"], answer_of(format))
        return
    stream = model.stream_events("Q", version="v3")
    deltas = [e["delta"] for e in stream if e["event"] == "content-block-delta"]
    assert "".join(d.get("reasoning", "") for d in deltas) == THOUGHT
    assert "".join(d.get("text", "") for d in deltas) == answer_of(format)


def test_an_agent_thinks_before_each_turn() -> None:
    tokenizer = tokenizer_of("added")
    model = markov_model(
        tokenizer, ["\n", "<think>", *THOUGHT, "</think>", *ANSWER, "<|im_end|>"], ["</think>", "<tool_call>"]
    )
    agent = create_agent(ChatS2T(model=model, max_tokens=400), [look])
    messages = agent.invoke({"messages": [HumanMessage("Q")]})["messages"]
    assert thought_of(messages[-1]) == THOUGHT
    assert messages[-1].content == ANSWER


def test_an_answer_that_broke_off_in_its_thought_goes_on_there() -> None:
    model = chat("special", False, trigger=always(), escalation=Escalation(ScriptedLLM(first_candidate), margin=1.0))
    budget, unfinished = Budget(escalations=3, on_exhausted="raise"), Unfinished()
    with pytest.raises(BudgetExceeded):
        model.invoke("Q", s2t_budget=budget, s2t_unfinished=unfinished)
    budget.extend(escalations=99)
    check(model.invoke("Q", s2t_budget=budget, s2t_unfinished=unfinished), ANSWER)


@pytest.mark.parametrize("format", FORMATS)
def test_a_judge_sees_previews_that_go_on_in_and_behind_the_thought(format: str) -> None:
    model, known = model_of(format, True), format_of(format, True)
    words = cached_vocabulary(model.tokenizer, model.vocab_size, sorted(model.eos_ids))
    thinking = cached_thinking_vocabulary(words, model.tokenizer, known)
    grammar = ThinkThenAnswer(thinking, tool_grammar(words, []), phase="thought", room=200)
    turns = [{"role": "user", "content": "Q"}]
    prompt = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    first = token(model.tokenizer, "hm" if format == "letters" else "h")
    with finish(TokenSequence.from_prefix_cache(model, prompt, None)) as prefix:
        prefix.append(prompt)
        [told] = continuations(prefix, [first], 60, grammar)
    reader, detokenizer = ReasoningParser(known, "thought"), Detokenizer(model.tokenizer)
    said = [text for i in told for _, text in reader.push(i, detokenizer.push(i))[1]]
    assert reader.reasoning == THOUGHT
    assert answer_of(format).startswith("".join(said))
    assert grammar.takes(first)


@ways
@pytest.mark.parametrize("kind", ["text", "auto", "any"])
@pytest.mark.parametrize("room", [20, 90, 400])
def test_the_best_token_is_the_likeliest_that_the_mask_keeps(format: str, opens: bool, kind: str, room: int) -> None:
    tokenizer, known = tokenizer_of(format, opens), format_of(format, opens)
    words = cached_vocabulary(tokenizer)
    thinking = cached_thinking_vocabulary(words, tokenizer, known)
    tools = [convert_to_openai_tool(look)] if kind != "text" else []
    answer = tool_grammar(words, tools, "any" if kind == "any" else "auto")
    dice = torch.Generator().manual_seed(room)
    for _ in range(6):
        try:
            grammar = ThinkThenAnswer(
                thinking, answer, phase="thought" if opens else "undecided", room=room, forced=kind == "any"
            )
        except ConfigError:
            assert room < 400
            return
        for _ in range(room):
            for forced in grammar.forced():
                grammar.accept(forced)
            if grammar.finished:
                break
            logits = torch.randn(words.size, generator=dice).mul(3).round()  # many are equal: the first counts
            masked = logits.masked_fill(~grammar.fork().allowed(logits), -torch.inf)
            best = grammar.fork().best(logits)
            assert best == int(masked.argmax()) == grammar.best(logits, int(logits.argmax()))
            grammar.accept(best)


@pytest.mark.parametrize("format", ["special", "added", "gemma4"])
def test_half_a_character_at_the_thoughts_end_is_not_the_answers(format: str) -> None:
    tokenizer = tokenizer_of(format, True)
    closing = format_of(format).closing.ids[0]
    half = tokenizer.encode("é")[0]
    message = ChatS2T(model=markov_model(tokenizer, ["\n", "h", half, closing, "o", "k", "<|im_end|>"])).invoke("Q")
    assert message.content == "ok"
    assert thought_of(message).startswith("h")
