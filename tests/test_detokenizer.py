"""The incremental detokenizer: pieces join to the text of decoding at once, in whole characters."""

import pytest
from byte_models import random_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import BYTE_TOKENS, FAMILIES, family

from s2t_agents.tokenization.detokenizer import Detokenizer, token_bytes

BYTE_LEVEL = ("qwen2_5", "qwen3", "llama3")
TEXTS = st.text(max_size=30) | st.text(alphabet="aé天👩‍🚀 \n▁<|tool_call>", max_size=30)


def pieces(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(i) for i in ids] + [detokenizer.flush()]


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_pieces_join_to_the_decoded_text(name, text):
    tokenizer = family(name)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == whole(tokenizer, ids)
    if "\ufffd" not in text and tokenizer.unk_token_id not in ids:
        assert not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ids_at_all(name, data):
    tokenizer = family(name)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=25))
    if name not in BYTE_LEVEL:  # bad UTF-8 from byte tokens is the next test's
        byte_ids = set(tokenizer.convert_tokens_to_ids(BYTE_TOKENS))
        ids = [i for i in ids if i not in byte_ids]
    assert "".join(pieces(tokenizer, ids)) == whole(tokenizer, ids)


@pytest.mark.parametrize("name", ["mistral", "gemma", "phi3", "unigram"])
@given(data=st.lists(st.binary(max_size=6) | st.sampled_from(["天".encode(), b"a"]), max_size=4))
def test_bad_byte_tokens_become_replacement_characters_and_nothing_else_is_lost(name, data):
    tokenizer = family(name)
    raw = b"".join(data)
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in raw])
    assert "".join(pieces(tokenizer, ids)) == raw.decode("utf-8", "replace")


def test_a_character_of_three_tokens_comes_out_whole():
    tokenizer = family("llama3")
    ids = tokenizer("€", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    assert pieces(tokenizer, ids) == ["", "", "€", ""]


def test_an_unfinished_character_shows_only_at_the_end():
    tokenizer = family("llama3")
    ids = tokenizer("a€", add_special_tokens=False)["input_ids"][:-1]
    assert pieces(tokenizer, ids) == ["a", "", "", "\ufffd"]


def test_special_tokens_are_silent_and_words_keep_their_spaces():
    tokenizer = family("mistral")
    ids = tokenizer("The[INST] weather in Paris", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("[INST]") in ids
    assert "".join(pieces(tokenizer, ids)) == "The weather in Paris"


def test_cost_grows_with_the_tokens_not_with_their_square():
    tokenizer = family("gemma")
    decoded = []

    class Counting:
        def __init__(self, backend):
            self.backend = backend

        def __getattr__(self, name):
            return getattr(self.backend, name)

        def decode(self, ids, **settings):
            decoded.append(len(ids))
            return self.backend.decode(ids, **settings)

    class Wrapped:
        backend_tokenizer = Counting(tokenizer.backend_tokenizer)

    ids = tokenizer("word " * 200, add_special_tokens=False)["input_ids"]
    pieces(Wrapped, ids)
    assert max(decoded) <= 2
    assert len(decoded) <= 2 * len(ids)


@pytest.mark.parametrize("kind", ["byte-level", "pieces"])
@pytest.mark.parametrize("text", ["\U0001f600", "天é", "a\u200d\U0001f680"])
def test_the_bytes_of_tokens_that_are_parts_of_characters_join_to_the_text(kind, text):
    tokenizer = random_tokenizer(kind, 1)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(tokenizer, i) for i in ids).decode() == text
