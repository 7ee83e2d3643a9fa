"""Tiny tokenizers with random merges, and LLMs that are exact distributions of texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from s2t_agents.llms.covering import Covering
from s2t_agents.tokenization.byte_tokenizer import ByteTokenizer

END = "<|end|>"
LETTERS = {
    "byte-level": sorted(pre_tokenizers.ByteLevel.alphabet()),
    "pieces": [f"<0x{byte:02X}>" for byte in range(256)] + [chr(code) for code in range(33, 127)] + ["▁", "é"],
}


def random_tokenizer(kind: str, seed: int, *, alphabet: str = "ab é", merges: int = 8, splits: bool = False) -> Any:
    """A fast tokenizer whose merges are drawn at random from texts of ``alphabet``.

    Args:
        kind: "byte-level" or "pieces".
        seed: of the merges.
        alphabet: letters that are merged.
        merges: how many.
        splits: byte-level only: split as GPT-2 does before merging.
    """
    draw = random.Random(seed)
    vocabulary = {letter: i for i, letter in enumerate(LETTERS[kind])}
    spelled = _spelled(kind, alphabet)
    known, pairs = list(spelled), []
    for _ in range(merges):
        pair = draw.choice(known), draw.choice(known)
        if len("".join(pair)) > 4 or "".join(pair) in vocabulary:
            continue
        pairs.append(pair)
        known.append("".join(pair))
        vocabulary["".join(pair)] = len(vocabulary)
    fallback = kind == "pieces"
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, byte_fallback=fallback, unk_token=None))
    if fallback:
        core.normalizer = normalizers.Replace(" ", "▁")
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
        core.decoder = decoders.ByteLevel()
    core.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END)


def _spelled(kind: str, alphabet: str) -> list[str]:
    if kind == "pieces":
        return sorted(alphabet.replace(" ", "▁"))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return sorted({letter for word, _ in split.pre_tokenize_str(alphabet) for letter in word})


class TextLLM:
    """An LLM that knows a distribution of texts: each token's probability is that of the texts that go on with it.

    Args:
        tokenizer: writes the texts; a text ends with its end token.
        weights: of the texts.
    """

    def __init__(self, tokenizer: Any, weights: dict[str, float]) -> None:
        self._end, self._size = tokenizer.eos_token_id, len(tokenizer)
        self._written = [([*tokenizer.encode(text), self._end], weight) for text, weight in weights.items()]

    def logits(self, ids: Sequence[int]) -> Tensor:
        """``[V]`` after these tokens."""
        found = torch.zeros(self._size, dtype=torch.float64)
        for written, weight in self._written:
            if len(written) > len(ids) and written[: len(ids)] == list(ids):
                found[written[len(ids)]] += weight
        if not found.any():
            found[self._end] = 1.0  # after what no text begins with; never reached
        return found.log()


class RandomLLM:
    """An LLM with other logits after every context, whatever it is."""

    def __init__(self, seed: int, size: int) -> None:
        self._seed, self._size = seed, size

    def logits(self, ids: Sequence[int]) -> Tensor:
        """``[V]`` after these tokens."""
        source = torch.Generator().manual_seed(hash((self._seed, *ids)) % 2**31)
        return torch.randn(self._size, generator=source, dtype=torch.float64) * 2


def rows(llm: TextLLM | RandomLLM, covering: Covering) -> Tensor:
    """``[1 + N, V]``: the logits that a covering wants."""
    paths: list[list[int]] = []
    for token, parent in zip(covering.tree.ids, covering.tree.parents, strict=True):
        paths.append([*(paths[parent] if parent >= 0 else covering.trunk), token])
    return torch.stack([llm.logits(path) for path in [covering.trunk, *paths]])


@cache
def real_bytes(tokenizer: Any) -> ByteTokenizer:
    """The byte view of a real tokenizer; made once."""
    return ByteTokenizer(tokenizer, len(tokenizer), name="real", template=str(tokenizer.chat_template or ""))
