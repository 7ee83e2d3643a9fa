"""Reasoning with real vocabularies and templates: tags as tokens (Qwen3), tags as text (the others)."""

import asyncio
import copy
from functools import cache
from typing import Any

import pytest
import torch
from conftest import loaded_tokenizer, real
from langchain_core.messages import AIMessage, HumanMessage
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM

from s2t_agents import ChatS2T
from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.formats.reasoning import ReasoningFormat
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import markov_model, tiny_config

pytestmark = pytest.mark.real

OPENS = "{%- if add_generation_prompt -%}{{- '<think>\\n' -}}{%- endif -%}"
CUTS = "{#- </think> -#}"
WAYS = {  # tokenizer, what is added to its template, what the model opens with, what it thinks behind
    "qwen3": ("qwen3", "", ["\n", "<think>"]),
    "qwen3-opened": ("qwen3", OPENS, ["\n"]),
    "deepseek-opened": ("deepseek_v3", OPENS, [">\n"]),
    "llama3-opened": ("llama3", OPENS, [">\n"]),
    "llama3": ("llama3", CUTS, ["\n\n", "<th", "ink", ">\n"]),
}


class Trip(BaseModel):
    """Where to go."""

    city: str = Field(max_length=12)
    days: int = Field(ge=1, le=9)


@cache
def tokenizer_of(name: str, more: str) -> Any:
    tokenizer = copy.deepcopy(loaded_tokenizer(real(name)))
    tokenizer.chat_template += more
    return tokenizer


def ids(tokenizer: Any, texts: list[str]) -> list[int]:
    """The one token of each text."""
    told = []
    for text in texts:
        found = tokenizer.get_added_vocab().get(text)
        if found is None:
            found = tokenizer.convert_tokens_to_ids(text.replace("\n", "Ċ").replace(" ", "Ġ"))
        assert isinstance(found, int)
        assert found != tokenizer.unk_token_id, text
        told.append(found)
    return told


@cache
def thinking(way: str) -> LanguageModel:
    name, more, opening = WAYS[way]
    tokenizer = tokenizer_of(name, more)
    closing = ["</think>", "\n\n"] if name == "qwen3" else ["</", "think", ">\n\n"]
    last = [*closing, "Paris", ".", tokenizer.eos_token]
    return markov_model(tokenizer, ids(tokenizer, [*opening, "hm", " there", *last]))


@pytest.mark.parametrize("way", WAYS)
async def test_the_answer_and_the_thought_are_apart_in_all_four_ways(way: str) -> None:
    model = ChatS2T(model=thinking(way), max_tokens=60)
    chunks = await asyncio.to_thread(lambda: list(model.stream("Q")))
    later = [chunk async for chunk in model.astream("Q")]
    told = [model.invoke("Q"), await model.ainvoke("Q"), sum(chunks[1:], chunks[0]), sum(later[1:], later[0])]
    for message in told:
        assert message.content == "Paris."
        assert message.content_blocks[0] == {"type": "reasoning", "reasoning": "hm there"}
        assert message.response_metadata["finish_reason"] == "stop"
    assert told[0].usage_metadata["output_token_details"] == told[2].usage_metadata["output_token_details"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_a_schema_is_filled_behind_the_thought(way: str, method: Any) -> None:
    model = ChatS2T(model=thinking(way), max_tokens=160).with_structured_output(Trip, method=method, include_raw=True)
    told = model.invoke("Q")
    assert isinstance(told["parsed"], Trip)
    assert told["raw"].additional_kwargs["reasoning_content"] == "hm there"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("limit", [0, 5])
def test_whatever_the_weights_a_limited_thought_is_closed_and_the_form_filled(way: str, limit: int) -> None:
    name, more, _ = WAYS[way]
    tokenizer = tokenizer_of(name, more)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    config = tiny_config("qwen3", vocab_size=len(tokenizer), max_position_embeddings=4096, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(limit)
        weights = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model = ChatS2T(model=LanguageModel(weights, tokenizer, name="random"), max_tokens=160, max_thinking_tokens=limit)
    told = model.with_structured_output(Trip, method="json_schema", include_raw=True).invoke("Q")
    assert isinstance(told["parsed"], Trip)
    known = ReasoningFormat.of(tokenizer, tokenizer.chat_template)
    assert known is not None
    tags = len(known.opening.text) + len(known.closing.text)
    assert told["raw"].usage_metadata["output_token_details"]["reasoning"] <= limit + tags


def test_qwen3_does_not_think_when_its_template_says_so() -> None:
    model = ChatS2T(model=thinking("qwen3"), max_tokens=60)
    message = model.invoke("Q", template_args={"enable_thinking": False})
    assert message.content == "Paris."
    assert "reasoning_content" not in message.additional_kwargs


def test_qwen3s_history_is_its_templates_own() -> None:
    tokenizer = loaded_tokenizer(real("qwen3"))
    past = AIMessage("Yes.", additional_kwargs={"reasoning_content": "hm"})
    call = {"name": "look", "args": {}, "id": "1", "type": "tool_call"}
    asked = AIMessage("", tool_calls=[call], additional_kwargs={"reasoning_content": "let me look"})
    encoder = PromptEncoder(tokenizer)
    for turns, dicts in (
        ([past, HumanMessage("R")], [("assistant", "Yes.", "hm"), ("user", "R", None)]),
        ([past], [("assistant", "Yes.", "hm")]),
        ([AIMessage("<think>\nhm\n</think>\n\nYes.")], [("assistant", "Yes.", "hm")]),
        ([AIMessage("Write </think> there.")], [("assistant", "Write </think> there.", "")]),
    ):
        told = [{"role": "user", "content": "Q"}]
        for role, content, reasoning in dicts:
            turn = {"role": role, "content": content}
            told.append(turn if reasoning is None else turn | {"reasoning_content": reasoning})
        wanted = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
        assert encoder.render([HumanMessage("Q"), *turns]) == wanted
    assert "let me look" in encoder.render([HumanMessage("Q"), asked], generation_prompt=False)
