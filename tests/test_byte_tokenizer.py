"""Tokenizers as they act on bytes: what is encoded is what was given, and text never becomes a control token."""

from __future__ import annotations

import json
from typing import Any

import pytest
from byte_models import END, random_tokenizer, real_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from s2t_agents.errors import InputError, TokenizerMismatch
from s2t_agents.testing import tiny_tokenizer
from s2t_agents.tokenization.byte_tokenizer import ByteTokenizer

KINDS = ("byte-level", "pieces")


def bytes_of(tokenizer: Any) -> ByteTokenizer:
    return ByteTokenizer(tokenizer, len(tokenizer), name="tiny", template=str(tokenizer.chat_template or ""))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 50), data=st.one_of(st.binary(max_size=12), st.text("ab é😀", max_size=8).map(str.encode)))
def test_bytes_are_encoded_to_tokens_of_the_same_bytes(kind: str, seed: int, data: bytes) -> None:
    tokenizer = bytes_of(random_tokenizer(kind, seed))
    if kind == "pieces" and not _utf8(data) and {0xC0, 0xC1} & set(data):
        return
    assert tokenizer.decode(tokenizer.encode(data)) == data


def _utf8(data: bytes) -> bool:
    try:
        return data.decode() is not None
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 50), text=st.text("ab é", max_size=10))
def test_whole_characters_are_encoded_as_the_tokenizer_itself_does(kind: str, seed: int, text: str) -> None:
    tokenizer = random_tokenizer(kind, seed, splits=True)
    assert bytes_of(tokenizer).encode(text.encode()) == tokenizer.encode(text)


def test_half_a_character_is_encoded_as_the_front_of_the_whole_one() -> None:
    tokenizer = bytes_of(random_tokenizer("byte-level", 0, alphabet="é", merges=0))
    assert tokenizer.encode("aé".encode()[:2]) == tokenizer.encode("aé".encode())[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_text_never_becomes_a_control_token(kind: str) -> None:
    tokenizer = random_tokenizer(kind, 3)
    control = tokenizer.eos_token_id
    own = bytes_of(tokenizer)
    assert control in tokenizer.encode(f"a{END}")
    assert control not in own.encode(f"a{END}".encode())
    assert own.bytes_of[control] is None
    assert own.decode(own.encode(f"a{END}".encode())) == f"a{END}".encode()


def test_spans_hold_all_tokens_that_begin_with_the_bytes() -> None:
    own = bytes_of(random_tokenizer("byte-level", 7, merges=20))
    for prefix in (b"a", b"ab", b" ", b"\xff", b"\xc3", b""):
        found = set(own.ids(own.span(prefix)).tolist())
        assert found == {i for i, data in enumerate(own.bytes_of) if data and data.startswith(prefix)}
        assert set(own.ids(own.exactly(prefix)).tolist()) == {
            i for i, data in enumerate(own.bytes_of) if data == prefix if data
        }


def with_normalizer(tokenizer: Any, normalizer: Any) -> Any:
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "normalizer",
    [normalizers.Lowercase(), normalizers.NFKC(), normalizers.StripAccents(), normalizers.Replace("a", "b")],
)
def test_a_normalizer_that_changes_bytes_is_refused_by_name(kind: str, normalizer: Any) -> None:
    changing = with_normalizer(random_tokenizer(kind, 0), normalizers.Sequence([normalizer]))
    with pytest.raises(TokenizerMismatch, match=rf"'tiny'.*{type(normalizer).__name__}"):
        bytes_of(changing)


def test_composing_is_left_out_so_that_bytes_stay_as_they_are() -> None:
    composing = bytes_of(with_normalizer(random_tokenizer("byte-level", 0), normalizers.NFC()))
    assert composing.decode(composing.encode("é".encode())) == "é".encode()


def test_a_tokenizer_that_cannot_write_every_byte_is_refused() -> None:
    serialized = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = serialized["model"]["vocab"]
    serialized["model"]["vocab"] = {token: i for token, i in vocabulary.items() if token != "q"}
    lacking = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(serialized)))
    with pytest.raises(TokenizerMismatch, match="0x71"):
        bytes_of(lacking)


def test_text_that_pieces_cannot_tell_from_a_space_is_refused() -> None:
    with pytest.raises(InputError, match="cannot write"):
        bytes_of(random_tokenizer("pieces", 0)).encode("a▁b".encode())


@pytest.mark.real
def test_real_tokenizers_write_every_text_as_themselves_and_every_byte(real_tokenizer: Any) -> None:
    own = real_bytes(real_tokenizer)
    for text in (
        "Hello, world!  3.14\n\n\tdef f(x):",
        "naïve café — 你好。世界 😀👍🏽",
        "  <table> 1,000 12345 HELLOworld",
        "\r\n x",
    ):
        data = text.encode()
        assert own.encode(data) == real_tokenizer.encode(text, add_special_tokens=False)
        for length in range(len(data)):
            assert own.decode(own.encode(data[:length])) == data[:length]
    for token in real_tokenizer.all_special_tokens:
        assert own.decode(own.encode(token.encode())) == token.encode()
