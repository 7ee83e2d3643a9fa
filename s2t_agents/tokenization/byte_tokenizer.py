"""A tokenizer as it acts on bytes: the bytes of each token, tokens that begin with given bytes, and bytes to tokens.

Two kinds are known: byte-level BPE (GPT-2, Llama 3, Qwen) and pieces with a token for every byte (SentencePiece with
byte fallback: Llama 2, Gemma). Text is text: control tokens have no bytes, and no text is encoded to one.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import InputError, TokenizerMismatch
from .detokenizer import byte_level_bytes, byte_of_token, decoder_config
from .safe_encoding import SafeEncoder

SPACE = "▁"
"""What pieces have in place of a space."""

COMMON = {*b"\n", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC3, 0xF0)}
"""Bytes for which there must be a token; some vocabularies lack control characters and rare planes of Unicode."""

MOST_REMEMBERED = 2**18
"""Texts whose first token is remembered."""

COMPOSING = "NFC"
"""A normalizer that is left out: bytes are scored as they are, and text that is composed already stays the same."""


class ByteTokenizer:
    """The byte view of a tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer; not modified.
        rows: columns of the model's logits; tokens beyond them are left out.
        name: of the model, for errors.
        template: the source of the chat template, which may name control tokens.

    Attributes:
        bytes_of: of each token by its id; None of control tokens and of ids without a token.
        longest: bytes of the longest token.
        byte_level: whether its tokens are written as GPT-2's are; else as SentencePiece's.

    Raises:
        TokenizerMismatch: a tokenizer that changes bytes, or cannot write every byte.
    """

    def __init__(self, tokenizer: Any, rows: int, *, name: str, template: str = "") -> None:
        self.name = name
        control = SafeEncoder(tokenizer, template).control
        serialized = json.loads(tokenizer.backend_tokenizer.to_str())
        self.byte_level = _is_byte_level(tokenizer)
        _check(serialized, self.byte_level, name)
        added = {each["id"]: each["content"] for each in serialized["added_tokens"]}
        self._core = Tokenizer.from_str(json.dumps(_for_text(serialized, control.keys())))
        self.bytes_of: list[bytes | None] = [None] * rows
        read = byte_level_bytes if self.byte_level else _piece_bytes
        for token, i in tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).items():
            if i < rows and i not in control:
                self.bytes_of[i] = added[i].replace(SPACE, " ").encode() if i in added else read(token)
        known = sorted((data, i) for i, data in enumerate(self.bytes_of) if data)
        self._sorted = [data for data, _ in known]
        self._ids = torch.tensor([i for _, i in known], dtype=torch.long)
        self.longest = max(map(len, self._sorted), default=0)
        self._first_lengths: dict[bytes, int] = {}
        self._single = {data[0]: i for data, i in reversed(known) if len(data) == 1}
        if missing := sorted(COMMON - self._single.keys()):
            raise TokenizerMismatch(
                f"the tokenizer of {name!r} has no token for {len(missing)} bytes that texts have, 0x{missing[0]:02X}"
                " first.",
                hint="Only byte-level BPE and SentencePiece with byte fallback can write every text.",
            )

    def span(self, prefix: bytes) -> tuple[int, int]:
        """Where the tokens that begin with these bytes, or are them, lie among all in the order of their bytes."""
        first = bisect_left(self._sorted, prefix)
        above = prefix.rstrip(b"\xff")
        last = bisect_left(self._sorted, above[:-1] + bytes([above[-1] + 1])) if above else len(self._sorted)
        return first, last

    def ids(self, span: tuple[int, int]) -> Tensor:
        """``[N]``: token ids of a span."""
        return self._ids[slice(*span)]

    def spelled(self, span: tuple[int, int]) -> Sequence[bytes]:
        """``[N]``: the bytes of a span's tokens."""
        return self._sorted[slice(*span)]

    def exactly(self, data: bytes) -> tuple[int, int]:
        """The span of the tokens that are these bytes: none, one, or two where a byte has a token of its own."""
        first = last = bisect_left(self._sorted, data)
        while last < len(self._sorted) and self._sorted[last] == data:
            last += 1
        return first, last

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of tokens; control tokens have none."""
        return b"".join(self.bytes_of[i] or b"" for i in ids)

    def encode(self, data: bytes) -> list[int]:
        """Token ids of bytes, which need not be whole characters.

        Raises:
            InputError: the tokenizer cannot write them.
        """
        ids = [i for text, broken in _runs(data) for i in self._encode_run(text, broken)]
        self._check_written(data, ids)
        return ids

    def encode_all(self, texts: Sequence[bytes]) -> Iterator[list[int]]:
        """``encode`` of each."""
        whole = [_text_or_none(each) for each in texts]
        encoded = iter(self._core.encode_batch([each for each in whole if each is not None], add_special_tokens=False))
        for data, text in zip(texts, whole, strict=True):
            yield self.encode(data) if text is None else next(encoded).ids

    def _check_written(self, data: bytes, ids: Sequence[int]) -> None:
        if b"".join(self.bytes_of[i] or b"\0\0" if i < len(self.bytes_of) else b"\0\0" for i in ids) != data:
            raise InputError(f"the tokenizer of {self.name!r} cannot write {data[-40:]!r} as it is.")

    def _encode_run(self, text: str, broken: bytes) -> list[int]:
        """A text, and the bytes of a character that is not whole."""
        if broken and self.byte_level and (whole := _completed(broken)):
            *_, (letters, _) = self._core.pre_tokenizer.pre_tokenize_str(text + whole)
            head = (text + whole).encode()[: -len(letters)].decode(errors="ignore")
            missing = len(whole.encode()) - len(broken)
            rest = self._core.model.tokenize(letters[:-missing])
            return [*self._plain(head), *(token.id for token in rest)]
        return [*self._plain(text), *(self._single[byte] for byte in broken if byte in self._single)]

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._core.encode(text, add_special_tokens=False).ids if text else []
        return ids

    def first_token_lengths(self, texts: Sequence[bytes]) -> list[int]:
        """How many bytes the first token has that each text, none empty, is encoded to; remembered."""
        if len(self._first_lengths) > MOST_REMEMBERED:
            self._first_lengths.clear()
        new = [each for each in texts if each not in self._first_lengths]
        for data, ids in zip(new, self.encode_all(new), strict=True):
            self._first_lengths[data] = len(self.bytes_of[ids[0]] or b"")
        return [self._first_lengths[each] for each in texts]


def refuse_changed_bytes(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer whose tokens do not have the bytes of the text.

    Raises:
        TokenizerMismatch: naming what changes them.
        ConfigError: no fast tokenizer.
    """
    SafeEncoder(tokenizer)
    _check(json.loads(tokenizer.backend_tokenizer.to_str()), _is_byte_level(tokenizer), name)


def _is_byte_level(tokenizer: Any) -> bool:
    return decoder_config(tokenizer.backend_tokenizer.decoder).get("type") == "ByteLevel"


def _check(serialized: dict[str, Any], byte_level: bool, name: str) -> None:
    """Refuse a tokenizer whose bytes cannot be followed.

    Raises:
        TokenizerMismatch: naming what changes them.
    """
    for each in _steps(serialized["normalizer"], "normalizers"):
        kind = each["type"]
        spaces = kind == "Replace" and each["content"] == SPACE and each["pattern"] == {"String": " "}
        begins = kind == "Prepend" and each["prepend"] == SPACE
        if kind != COMPOSING and (byte_level or not (spaces or begins)):
            raise TokenizerMismatch(
                f"the tokenizer of {name!r} changes text before it is encoded (normalizer {kind}), so its tokens"
                " do not have the bytes of the text.",
                hint="Use another LLM, or a chat model as judge (ChatJudge), which reads text.",
            )
    model = serialized["model"]
    if not byte_level and not model.get("byte_fallback"):
        raise TokenizerMismatch(
            f"the tokenizer of {name!r} ({model['type']}) is neither byte-level nor has it tokens for bytes.",
            hint="Use another LLM, or a chat model as judge (ChatJudge), which reads text.",
        )


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A serialized normalizer, or pre-tokenizer, as a list of its steps."""
    if part is None:
        return []
    return [step for each in part[key] for step in _steps(each, key)] if part["type"] == "Sequence" else [part]


def _for_text(serialized: dict[str, Any], control: Any) -> dict[str, Any]:
    """The tokenizer without control tokens, composing, and the space that some put before a text."""
    added = [each for each in serialized["added_tokens"] if each["id"] not in control]
    vocabulary = serialized["model"]["vocab"]
    if isinstance(vocabulary, dict):  # else these would move to other ids
        vocabulary = vocabulary | {each["content"]: each["id"] for each in added}
    kept = [each for each in _steps(serialized["normalizer"], "normalizers") if each["type"] == "Replace"]
    splits = [_without_space_before(each) for each in _steps(serialized["pre_tokenizer"], "pretokenizers")]
    return {
        **serialized,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": kept},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits} if splits else None,
        "post_processor": None,
        "truncation": None,
        "padding": None,
        "model": {**serialized["model"], "vocab": vocabulary, "dropout": None},
    }


def _without_space_before(step: dict[str, Any]) -> dict[str, Any]:
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if "add_prefix_space" in step else step


def _piece_bytes(token: str) -> bytes:
    byte = byte_of_token(token)
    return token.replace(SPACE, " ").encode() if byte is None else bytes([byte])


def _runs(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Text, each with the bytes after it that are no whole character."""
    while data:
        try:
            yield data.decode(), b""
            return
        except UnicodeDecodeError as error:
            yield data[: error.start].decode(), data[error.start : error.end]
            data = data[error.end :]


def _text_or_none(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _completed(broken: bytes) -> str | None:
    """A character that begins with these bytes; None where none does."""
    for count in (1, 2, 3):
        for first in (0x80, 0x90, 0xA0):
            if text := _text_or_none(broken + bytes([first]) + b"\x80" * (count - 1)):
                return text
    return None
