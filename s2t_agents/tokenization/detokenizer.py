"""Incremental detokenizer: token ids to text one at a time, whole characters only, in constant time per token.

By the tokenizer's decoder:

* *byte-level* (GPT-2, Llama 3, Qwen): a token's bytes go through an incremental UTF-8 decoder;
* *pieces* (SentencePiece, WordPiece, ...): a token's text is what it adds to the decoding of the token before it, so
  the decoder's rules for spaces apply; ``<0xE4>`` byte tokens go through the incremental UTF-8 decoder.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>\Z")


def _byte_alphabet() -> dict[str, int]:
    """Characters of byte-level vocabularies and the byte that each stands for (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the other bytes are the code points from 256 on, in order.
    """
    letters = sorted(ByteLevel.alphabet())
    own = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    others = sorted(set(range(256)) - set(own.values()))
    return own | dict(zip((letter for letter in letters if ord(letter) >= 256), others, strict=True))


_BYTE_OF_LETTER = _byte_alphabet()


class Detokenizer:
    """Incremental text of one generation.

    The pieces joined equal ``tokenizer.decode(ids, skip_special_tokens=True)`` without clean-up of spaces. One
    exception: if byte tokens of a SentencePiece vocabulary do not form valid UTF-8, each invalid byte becomes one
    U+FFFD, and valid characters beside it, which were emitted before, are kept.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        with_special: show special tokens, too.
    """

    def __init__(self, tokenizer: Any, *, with_special: bool = False) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        added = self._tokenizer.get_added_tokens_decoder().items()
        self._special = {i for i, t in added if t.special and not with_special}
        decoder = decoder_config(self._tokenizer.decoder)
        self._byte_level = decoder.get("type") == "ByteLevel"
        self._byte_fallback = "ByteFallback" in json.dumps(decoder)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._previous: int | None = None

    def push(self, token_id: int) -> str:
        """Text that this token completes; ``""`` for special tokens that are not shown and incomplete characters."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special:
            return ""
        if self._byte_level:
            return self._utf8.decode(byte_level_bytes(token))
        if self._byte_fallback and (byte := byte_of_token(token)) is not None:
            text = self._utf8.decode(bytes([byte]))
        else:
            text = self.flush() + self._text_added_by(token_id)
        self._previous = token_id
        return text

    def flush(self) -> str:
        """The remaining text at the end: U+FFFD for an incomplete character, else ``""``."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest

    def _text_added_by(self, token_id: int) -> str:
        if self._previous is None:
            return str(self._tokenizer.decode([token_id], skip_special_tokens=False))
        before = self._tokenizer.decode([self._previous], skip_special_tokens=False)
        both = self._tokenizer.decode([self._previous, token_id], skip_special_tokens=False)
        return str(both[len(before) :])


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """Bytes of a token of a fast Hugging Face tokenizer; they need not be whole characters."""
    core = tokenizer.backend_tokenizer
    token = core.id_to_token(token_id) or ""
    if decoder_config(core.decoder).get("type") == "ByteLevel":
        return byte_level_bytes(token)
    byte = byte_of_token(token)
    return str(core.decode([token_id], skip_special_tokens=False)).encode() if byte is None else bytes([byte])


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; UTF-8 for an added token with characters outside the alphabet."""
    try:
        return bytes([_BYTE_OF_LETTER[letter] for letter in token])
    except KeyError:
        return token.encode()


def byte_of_token(token: str) -> int | None:
    """The byte that a byte token of a SentencePiece vocabulary stands for; None of other tokens."""
    match = _BYTE_TOKEN.match(token)
    return int(match[1], 16) if match else None


def decoder_config(decoder: Any) -> dict[str, Any]:
    """The decoder's config; its pickled state is JSON without the vocabulary."""
    return dict(json.loads(decoder.__getstate__())) if decoder is not None else {}
