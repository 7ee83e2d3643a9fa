"""The demo pair's tokenizer: a byte-level BPE, built from the demo world, shared by both models byte for byte.

It is built once, before the first training: models only fit the tokenizer they were trained with, so the one saved with
the weights is what counts, and a later change of the world does not change it.

Three choices make a tiny model's life easy: every digit is a token of its own; an operator with its blanks is one token
(``85 - 27 = 58.`` is 9 tokens); the boilerplate of tool schemas is a handful of tokens. Any text round-trips, as bytes.

    python -m benchmarks.demo_pair.tokenizer s2t_agents/demo/weights/llm
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from s2t_agents.demo.lexicon import ITEMS, LANGUAGES, NAMES, PLACES, WORDS
from s2t_agents.demo.world import Kind, Message, generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
VOCABULARY = 1536
TEMPLATE = Path(__file__).with_name("chat_template.jinja")

# Tried in this order. The first block is the boilerplate of schemas and calls, kept whole so that BPE can merge it.
_PIECES = (
    r'\{"type": "function", "function": \{"name": "',
    r'", "description": "',
    r'\.?", "parameters": \{"properties": \{"?',
    r'": \{"type": "(?:integer|string)"\}, "',
    r'": \{"type": "(?:integer|string)"\}\}, "required": \["',
    r'": \{"description": "',
    r'\.?", "type": "(?:integer|string)"\}(?:, "|\}, "required": \[")',
    r'"\], "type": "object"\}\}\}',
    r'\}, "type": "object"\}\}\}',
    r'\{"name": "',
    r'", "arguments": \{"?',
    r'": \{?"?|", "|, "|\{"',
    r'"?\}\}',
    r" [+\-*=] (?=\p{N})|[.,:] (?=\p{N})",
    r"\p{N}",
    r"[ _]?\p{L}+",
    r" ?[^\s\p{L}\p{N}_]",
    r"_|\s+",
)


def documents(count: int) -> Iterator[str]:
    """Text to build the vocabulary from: conversations of every kind, and the word lists with and without a blank."""
    kinds: tuple[Kind, ...] = ("word", "tool", "tool", "call", "call", "talk")
    for seed in range(count):
        problem = generate(seed, "train", kinds[seed % len(kinds)])
        yield "\n".join(["system", "# Tools", *(json.dumps(tool) for tool in problem.tools)])
        for message in problem.gold:
            yield f"{message['role']}\n{_plain(message)}"
    words = (*NAMES, *ITEMS, *PLACES, *WORDS, *LANGUAGES)
    yield from (f"{word} {word}" for word in words for _ in range(40))


def _plain(message: Message) -> str:
    text = str(message["content"] or "")
    for call in message.get("tool_calls", ()):
        text += f'{{"name": "{call["function"]["name"]}", "arguments": {call["function"]["arguments"]}}}'
    # Random characters must not eat the vocabulary: they stay bytes.
    return "".join(character for character in text if ord(character) < 128)


def build(count: int = 12_000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `count` conversations (seconds); the same world gives the same tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex("|".join(_PIECES)), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(count), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return cast("PreTrainedTokenizerFast", fast)


def load(folder: Path) -> Any:
    """The saved tokenizer of `folder`, without any network."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def main() -> None:
    """Build the tokenizer and save it in every folder named on the command line."""
    tokenizer = build()
    for folder in sys.argv[1:]:
        tokenizer.save_pretrained(folder)
        print(f"{len(tokenizer)} tokens -> {folder}")


if __name__ == "__main__":
    main()
