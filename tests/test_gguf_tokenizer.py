"""The tokenizer of a GGUF file is the tokenizer that the model was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import loaded_tokenizer, real
from gguf_files import MERGED, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from benchmarks import assets
from s2t_agents.backends.llamacpp.gguf_header import read_header
from s2t_agents.backends.llamacpp.tokenizer import PROBE, merges_of, read_tokenizer
from s2t_agents.errors import ConfigError, UnsafeWeights
from s2t_agents.testing import CHATML, tiny_tokenizer

gguf = pytest.importorskip("gguf")

RULES = {"qwen3": "qwen2", "llama3": "llama-bpe", "deepseek_v3": "deepseek-v3", "gpt4o": "gpt-4o"}


def write_vocabulary(
    path: Path,
    tokens: list[str],
    *,
    kind: str = "gpt2",
    rule: str | None = None,
    types: list[int] | None = None,
    merges: list[str] | None = None,
    scores: list[float] | None = None,
    architecture: str = "llama",
    begins_with_space: bool | None = None,
    name: str | None = None,
    adds: Mapping[str, bool] | None = None,
    **ids: int,
) -> Path:
    """A GGUF file with a vocabulary and one small tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    if name is not None:
        writer.add_name(name)
    for key in ("context_length", "embedding_length", "block_count"):
        writer.add_uint32(f"{architecture}.{key}", 8)
    writer.add_tokenizer_model(kind)
    if rule is not None:
        writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types or [1] * len(tokens))
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    if begins_with_space is not None:
        writer.add_add_space_prefix(begins_with_space)
    for key, true in (adds or {}).items():
        writer.add_bool(f"tokenizer.ggml.add_{key}_token", true)
    for key, token in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)
    writer.add_tensor("t", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_converted(tokenizer: Any, folder: Path, name: str) -> Path:
    """The file that llama.cpp's converter makes of a tokenizer."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = tokenizer.get_vocab()
    added = {each["content"]: each for each in described["added_tokens"]}
    size = max(vocabulary.values()) + 1
    by_id = {i: token for token, i in vocabulary.items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    types = [5 if i not in by_id else 1 if by_id[i] not in added else 3 if added[by_id[i]]["special"] else 4
             for i in range(size)]  # fmt: skip
    file = folder / f"{name}.gguf"
    ids = {"eos": tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else {}
    if name == "gemma3":
        spaced = [" " * len(token) if token and set(token) == {"▁"} else token for token in tokens]
        ids |= {"unknown": vocabulary["<unk>"]}
        scores = [-1000.0] * size
        return write_vocabulary(
            file, spaced, kind="llama", types=types, scores=scores, architecture="gemma3", begins_with_space=False,
            **ids,
        )  # fmt: skip
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    return write_vocabulary(file, tokens, rule=RULES[name], types=types, merges=merges, **ids)


@pytest.mark.real
@pytest.mark.parametrize("name", assets.TOKENIZERS)
def test_it_is_the_original_on_real_text(name: str, tmp_path: Path) -> None:
    original = loaded_tokenizer(real(name))
    its_own = Tokenizer.from_file(str(real(name) / "tokenizer.json"))  # transformers rebuilds some, not quite the same
    ours = read_tokenizer(read_header(as_converted(original, tmp_path, name)))
    assert ours.get_vocab() == its_own.get_vocab()
    questions = (real("bfcl") / "BFCL_v4_live_simple.json").read_text().splitlines()[:60]
    for text in [PROBE, *questions, " leading", "trailing ", "a\u0301", "▁", "\n" * 5 + " " * 7, "2024-01-31T09:15"]:
        wanted = its_own.encode(text, add_special_tokens=False).ids
        assert ours.backend_tokenizer.encode(text, add_special_tokens=False).ids == wanted
        assert ours.decode(wanted) == its_own.decode(wanted, skip_special_tokens=False)


@pytest.mark.real
def test_digits_after_spaces_are_as_smollm_s_makers_split_them(smollm2_gguf: Path) -> None:
    ours = read_tokenizer(read_header(smollm2_gguf))
    assert ours.convert_ids_to_tokens(ours.encode("x  17")) == ["x", "ĠĠ", "1", "7"]


def test_it_brings_template_window_and_named_tokens(tmp_path: Path) -> None:
    ours = read_tokenizer(read_header(write_gguf(tmp_path / "a.gguf")))
    assert ours.get_vocab() == {**tiny_tokenizer().get_vocab(), MERGED: 263}
    assert ours.convert_ids_to_tokens(ours.encode("then")) == [MERGED, "e", "n"]
    assert ours.chat_template == CHATML
    assert (ours.eos_token, ours.pad_token, ours.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert ours.model_max_length == 512
    rendered = ours.apply_chat_template([{"role": "user", "content": "hé\n"}], tokenize=False)
    assert ours.encode(rendered) == tiny_tokenizer().encode(rendered)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_every_text_comes_back(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    file = folder / "roundtrip.gguf"
    ours = read_tokenizer(read_header(file if file.exists() else write_gguf(file)))
    assert ours.decode(ours.encode(text)) == text


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = ["▁", "t", "h", "e", "a", "▁t", "th", "he", "▁th", "▁the", "the", "  ", "<think>"]


def sentencepieces(folder: Path) -> Any:
    tokens = [*PIECES, *WORDS]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(WORDS) - 1), 4]
    scores = [0.0] * len(PIECES) + [-1000.0] * 5 + [-float(at) for at in range(len(WORDS) - 5)]
    file = write_vocabulary(
        folder / "spm.gguf", tokens, kind="llama", types=types, scores=scores, unknown=0, bos=1, eos=2
    )
    return read_tokenizer(read_header(file))


def test_sentencepieces_are_merged_by_score_and_the_rest_is_bytes(tmp_path: Path) -> None:
    ours = sentencepieces(tmp_path)

    def encode(text: str) -> list[int]:
        ids: list[int] = ours.encode(text, add_special_tokens=False)
        return ids

    def pieces(text: str) -> list[str]:
        found: list[str] = ours.convert_ids_to_tokens(encode(text))
        return found

    assert pieces("the tea") == ["▁the", "▁t", "e", "a"]
    assert pieces("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert pieces("a<think>a")[1:] == ["a", "<think>", "▁", "a"]
    for text in ("the tea", "é the", "\n\tthe 😀"):
        assert ours.decode(encode(text)) == text


@pytest.mark.parametrize("adds", [{}, *({name: true} for name in ("bos", "eos") for true in (True, False))], ids=str)
@pytest.mark.parametrize("rule", [None, "gpt-2", "llama-bpe", "tekken", "qwen2", "glm4"])
def test_what_stands_around_a_text_is_what_llama_cpp_puts_there(
    rule: str | None, adds: dict[str, bool], tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    file = tmp_path / "framed.gguf"
    if rule is None:
        types = [2, 3, 3, *[6] * 256, *[1] * len(WORDS)]
        scores = [0.0] * (len(PIECES) + len(WORDS))
        write_vocabulary(
            file, [*PIECES, *WORDS], kind="llama", types=types, scores=scores, adds=adds, unknown=0, bos=1, eos=2
        )
    else:
        vocabulary = tiny_tokenizer().get_vocab()
        tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), MERGED]
        types, ids = [3 if vocabulary.get(token, 0) >= 256 else 1 for token in tokens], {"bos": 256, "eos": 258}
        write_vocabulary(file, tokens, rule=rule, types=types, merges=[" ".join(MERGED)], adds=adds, **ids)
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False).tokenize(b"the tea")
    assert read_tokenizer(read_header(file)).encode("the tea") == theirs


def llama_cpp_s_own(file: Path) -> Any:
    """What llama.cpp makes of a file's vocabulary."""
    return pytest.importorskip("llama_cpp").Llama(str(file), vocab_only=True, verbose=False)


MARKED = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|end|>", "<think>"]
TYPES = [2, 3, 3, 3, 3, 3, 4]


def small_vocabulary(path: Path, kind: str, **changes: Any) -> Path:
    """Marked tokens, and bytes."""
    if kind == "gpt2":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens, types = [*MARKED, *letters, "th"], [*TYPES, *[1] * 257]
        return write_vocabulary(path, tokens, rule="gpt-2", types=types, merges=["t h"], **changes)
    tokens, types = [*MARKED, *PIECES[3:], *WORDS[:-2]], [*TYPES, *[6] * 256, *[1] * (len(WORDS) - 2)]
    scores = [-float(at) for at in range(len(tokens))]
    return write_vocabulary(path, tokens, kind="llama", types=types, scores=scores, **changes)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", [None, "tiny", "Phi 3", "Phi-3-mini-128k-instruct", "my phi3", "PHI-3.5-MoE"])
def test_white_space_after_a_marked_token_is_kept_where_llama_cpp_keeps_it(
    name: str | None, kind: str, tmp_path: Path
) -> None:
    file = small_vocabulary(tmp_path / "a.gguf", kind, name=name, bos=1, eos=5, unknown=0)
    ours, theirs = read_tokenizer(read_header(file)), llama_cpp_s_own(file)
    for token in MARKED:
        for text in (f"a {token}\n\t the", f" {token}  {token} \r\n", f"{token}the{token}"):
            wanted = theirs.tokenize(text.encode(), add_bos=False, special=True)
            assert ours.encode(text, add_special_tokens=False) == wanted, text


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("named", [{}, {"bos": 3}, {"eos": 5}, {"bos": 1, "eos": 2, "unknown": 0}, {"bos": 9999}])
def test_ids_that_a_file_does_not_name_are_llama_cpp_s(named: dict[str, int], kind: str, tmp_path: Path) -> None:
    file = small_vocabulary(tmp_path / "a.gguf", kind, **named)
    ours, theirs = read_tokenizer(read_header(file)), llama_cpp_s_own(file)
    tokens = read_header(file).tokens
    for token, known in ((ours.bos_token, theirs.token_bos()), (ours.eos_token, theirs.token_eos())):
        assert token == (tokens[known] if tokens[known] in MARKED else None)  # a letter neither begins nor ends a text
    for text in ("+,-", "the</s> a", "<unk>"):
        assert ours.encode(text, add_special_tokens=False) == theirs.tokenize(text.encode(), False, special=True)


def test_llama_cpp_s_ids_are_taken_where_they_are_marked(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, types = [*letters[:11], "<|endoftext|>", *letters[11:], "th"], [*[1] * 11, 3, *[1] * 246]
    file = write_vocabulary(tmp_path / "a.gguf", tokens, rule="gpt-2", types=types, merges=["t h"])
    ours, theirs = read_tokenizer(read_header(file)), llama_cpp_s_own(file)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.token_bos(), theirs.token_eos()) == (11, 11)


def test_merges_follow_the_ranks() -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "aba": 3, "ba": 4}
    ranks = {"a": 0.0, "b": 0.0, "ab": -2.0, "aba": -3.0, "ba": -1.0}
    assert merges_of(vocabulary, ranks) == [("b", "a"), ("a", "b"), ("a", "ba"), ("ab", "a")]


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"kind": "bert"}, ConfigError, "bert"),
        ({"rule": "of tomorrow"}, ConfigError, "of tomorrow"),
        ({"merges": ["x nothing"]}, UnsafeWeights, "tokenizer"),
        ({}, UnsafeWeights, "no merges"),
    ],
)
def test_what_makes_no_tokenizer_is_one_error(
    changes: dict[str, Any], error: type[Exception], named: str, tmp_path: Path
) -> None:
    file = write_vocabulary(tmp_path / "a.gguf", ["x", "y"], **{"rule": "gpt-2", **changes})
    with pytest.raises(error, match=named):
        read_tokenizer(read_header(file))
