"""The tokenizer: bytes in, bytes out; digits alone; a template which renders what the structure calls for."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.demo_pair import tokenizer as tokenizers
from benchmarks.demo_pair.corpus import Encoder
from benchmarks.demo_pair.tokenizer import SPECIAL
from s2t_agents.bundled import WEIGHTS
from s2t_agents.demo.problem import tool_call_message, tool_result_message
from s2t_agents.demo.world import generate


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load(WEIGHTS / "slm")


def test_building_is_deterministic_and_keeps_the_structure(tokenizer):
    first, second = (tokenizers.build(count=400).backend_tokenizer.to_str() for _ in range(2))
    assert first == second
    built, saved = json.loads(first), json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("pre_tokenizer", "decoder", "added_tokens", "normalizer", "post_processor"):
        assert built[part] == saved[part]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_every_digit_is_a_token(tokenizer):
    assert tokenizer.tokenize("85 - 27 = 58.") == ["8", "5", "Ġ-Ġ", "2", "7", "Ġ=Ġ", "5", "8", "."]
    assert all(not any(c.isdigit() for c in token) or len(token) == 1 for token in tokenizer.get_vocab())


def test_control_tokens(tokenizer):
    assert set(SPECIAL) <= set(tokenizer.all_special_tokens)
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_a_tool_conversation_renders(tokenizer):
    problem = generate(2, "heldout", "tool")
    call = problem.expected_call
    assert call is not None
    text = tokenizer.apply_chat_template(list(problem.gold), tools=list(problem.tools), tokenize=False)
    head = f"{problem.system}\n\n# Tools" if problem.system else "# Tools"
    block = "\n".join(json.dumps(tool) for tool in problem.tools)
    arguments = json.dumps(dict(call.arguments))
    assert text == (
        f"<|im_start|>system\n{head}\n{block}<|im_end|>\n<|im_start|>user\n{problem.question}<|im_end|>\n"
        f'<|im_start|>assistant\n<tool_call>\n{{"name": "{call.name}", "arguments": {arguments}}}\n</tool_call>'
        f"<|im_end|>\n"
        f"<|im_start|>user\n<tool_response>\n{call.result}\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n{problem.gold[-1]['content']}<|im_end|>\n"
    )


def test_template_details(tokenizer):
    def render(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    # Verbatim text, content None, the generation prompt.
    assert render([{"role": "user", "content": "  a \n"}], add_generation_prompt=True) == (
        "<|im_start|>user\n  a \n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render([{"role": "assistant", "content": None}]) == "<|im_start|>assistant\n<|im_end|>\n"
    # Arguments as a mapping or as JSON text; text before the call.
    problem = generate(2, "heldout", "tool")
    call = problem.expected_call
    assert call is not None
    as_text = tool_call_message(call)
    as_dict = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": call.name, "arguments": dict(call.arguments)}}],
    }
    assert render([as_text]) == render([as_dict])
    assert render([{**as_text, "content": "Wait."}]).startswith("<|im_start|>assistant\nWait.\n<tool_call>\n")
    # Results in a row share a turn.
    result = {"role": "tool", "tool_call_id": "1", "content": "7"}
    both = "<tool_response>\n7\n</tool_response>\n<tool_response>\n7\n</tool_response>"
    assert render([result, result]) == f"<|im_start|>user\n{both}<|im_end|>\n"
    assert render([{"role": "user", "content": [{"type": "text", "text": "a"}]}]) == ("<|im_start|>user\na<|im_end|>\n")


def test_only_assistant_turns_are_learned(tokenizer):
    problem = generate(2, "heldout", "tool")
    ids, weights = Encoder(tokenizer)(problem.gold, problem.tools, 0.0)
    learned = tokenizer.decode([token for token, weight in zip(ids, weights, strict=True) if weight])
    call = problem.expected_call
    assert call is not None
    arguments = json.dumps(dict(call.arguments))
    assert learned == (
        f'<tool_call>\n{{"name": "{call.name}", "arguments": {arguments}}}\n</tool_call><|im_end|>'
        f"{problem.gold[-1]['content']}<|im_end|>"
    )
    assert tool_result_message(call)["content"] not in learned[: learned.index("<|im_end|>")]


def test_prompts_are_short(tokenizer):
    encode = Encoder(tokenizer)
    lengths = [len(encode(p.gold, p.tools, 0.0)[0]) for p in (generate(seed) for seed in range(200))]
    assert sum(lengths) / len(lengths) < 160
    assert max(lengths) < 300
