"""Tokenizers, templates and models with reasoning, one for every kind of tag."""

import copy
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from s2t_agents.formats.reasoning import ReasoningFormat
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import markov_model, tiny_tokenizer

THOUGHT, ANSWER = "hm x", "ok!"

TURNS = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.reasoning_content %}OPEN{{ m.reasoning_content }}CLOSE{% endif %}{{ m.content }}<|im_end|>
{% endfor -%}"""
HARMONY = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if m.thinking and loop.index0 > messages|length - 3 -%}
<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{%- endif -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>
{%- else -%}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"""

TAGS = {  # how tags are made: letters, or added tokens, special or not
    "special": ("<think>", "</think>", True),
    "added": ("<think>", "</think>", False),
    "magistral": ("[THINK]", "[/THINK]", True),
    "kimi": ("◁think▷", "◁/think▷", False),
    "thinking": ("<|thinking|>", "<|/thinking|>", True),
    "thought": ("<|begin_of_thought|>", "<|end_of_thought|>", False),
    "letters": ("<think>", "</think>", None),
}
FORMATS = (*TAGS, "harmony", "gemma4")
PIECES = ("<th", "ink", ">\n", "</", "think", ">\n\n", '>{"', "hm", " x", "ok", "!", ">ok", "<", ">", "/")


@cache
def tokenizer_of(format: str, opens: bool = False) -> Any:
    """The format's tokenizer; its template opens the thought, or leaves it to the model."""
    if format == "harmony":
        made = copy.deepcopy(tiny_tokenizer())
        made.add_special_tokens(
            {"additional_special_tokens": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]}
        )
        made.eos_token = "<|return|>"
        opened = "{%- if add_generation_prompt -%}<|channel|>analysis<|message|>{%- endif -%}"
        made.chat_template = HARMONY + (opened if opens else "")
        return made
    if format == "gemma4":
        made = copy.deepcopy(tiny_tokenizer())
        made.add_special_tokens({"additional_special_tokens": ["<|channel>", "<channel|>"]})
        opening, closing = "<|channel>thought\n", "<channel|>"
    else:
        opening, closing, special = TAGS[format]
        made = _with_letters() if special is None else copy.deepcopy(tiny_tokenizer())
        if special is not None:
            tokens = [AddedToken(tag, special=special, normalized=False) for tag in (opening, closing)]
            made.add_tokens(tokens, special_tokens=special)
    head = ":" if format == "gemma4" else "\\n"
    off = "{%- if enable_thinking is defined and not enable_thinking -%}{{- 'OPEN\\n\\nCLOSE\\n\\n' -}}"
    on = "{%- else -%}{{- 'OPEN\\n' -}}{%- endif -%}" if opens else "{%- endif -%}"
    prompt = f"{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant{head}' -}}}}{off}{on}"
    source = TURNS + prompt + "{%- endif -%}"
    made.chat_template = source.replace("OPEN", opening).replace("CLOSE", closing)
    return made


def _with_letters() -> Any:
    """Tags are ordinary text, in tokens that also hold what stands before and behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [piece.replace("\n", "Ċ").replace(" ", "Ġ") for piece in PIECES]
    merges, vocabulary = [], dict.fromkeys(alphabet)
    for word in spelled:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = None
                merges.append((word[: end - 1], word[end - 1]))
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def token(tokenizer: Any, text: str) -> int:
    """The one token of a text."""
    found = tokenizer.get_added_vocab().get(text)
    if found is None:
        found = tokenizer.convert_tokens_to_ids(text.replace("\n", "Ċ").replace(" ", "Ġ"))
    assert isinstance(found, int), text
    return found


def format_of(name: str, opens: bool = False) -> ReasoningFormat:
    """How the format is found to think."""
    tokenizer = tokenizer_of(name, opens)
    found = ReasoningFormat.of(tokenizer, tokenizer.chat_template)
    assert found is not None
    return found


@cache
def model_of(format: str, opens: bool = False) -> LanguageModel:
    """Thinks ``THOUGHT`` and answers ``ANSWER``, in the format."""
    tokenizer = tokenizer_of(format, opens)
    if format == "harmony":  # what the format dictates is not scripted; it says in both channels the same
        says = ["<|message|>", *THOUGHT, "<|end|>"]
        return markov_model(tokenizer, ["<|channel|>", "a"], says, [THOUGHT[-1], "<|return|>"])
    return markov_model(tokenizer, *_chains(format, opens, tokenizer))


def _chains(format: str, opens: bool, tokenizer: Any) -> list[list[Any]]:
    if format == "letters":
        parts = ["<th", "ink", ">\n"] if not opens else []
        parts += ["hm", " x", "</", "think", ">\n\n", "ok", "!", "<|im_end|>"]
        start = ">\n" if opens else "\n"
        return [[token(tokenizer, each) for each in (start, *parts)]]
    opening, closing = ("<|channel>", "<channel|>") if format == "gemma4" else TAGS[format][:2]
    end = [*THOUGHT, closing, *ANSWER, "<|im_end|>"]
    if format == "gemma4":  # what stands between the opening token and the thought is dictated
        return [["\n", *end], [":", opening]]
    return [["\n", *end] if opens else ["\n", opening, *end]]


def answer_of(format: str) -> str:
    """What the format's model answers."""
    return THOUGHT if format == "harmony" else ANSWER
