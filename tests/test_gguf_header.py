"""Headers of GGUF files: a sound one is read whole, any other is one error, soon and in little memory."""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import WINDOW, shapes, split_gguf, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from s2t_agents.backends.llamacpp.gguf_header import GGUFHeader, read_header
from s2t_agents.errors import ModelNotFound, UnsafeWeights

gguf = pytest.importorskip("gguf")

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "sound.gguf", kind="Q4_0").read_bytes()


def of(data: bytes, folder: Path) -> GGUFHeader:
    file = folder / "model.gguf"
    file.write_bytes(data)
    return read_header(file)


def text(words: str | bytes) -> bytes:
    raw = words.encode() if isinstance(words, str) else words
    return U64.pack(len(raw)) + raw


def header(*keys: bytes, tensors: bytes = b"", count: int = 0, keys_said: int | None = None) -> bytes:
    said = len(keys) if keys_said is None else keys_said
    return b"GGUF" + U32.pack(3) + U64.pack(count) + U64.pack(said) + b"".join(keys) + tensors


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + U32.pack(kind) + value


def test_a_sound_file_is_read_as_the_format_s_own_package_reads_it(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", kind="Q4_0")
    ours, theirs = read_header(file), gguf.GGUFReader(file)
    assert ours.architecture == "llama"
    assert ours.number("llama.context_length") == WINDOW
    assert list(ours.metadata) == [name for name in theirs.fields if not name.startswith("GGUF.")]
    for name, value in ours.metadata.items():
        found = theirs.fields[name].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == (found or value)
    assert {name: (info.shape, info.kind, info.offset, info.nbytes) for name, (_, info) in ours.tensors.items()} == {
        each.name: (tuple(each.shape.tolist()), each.tensor_type, each.data_offset, each.n_bytes)
        for each in theirs.tensors
    }
    assert set(ours.tensors) == set(shapes(2, 264))


@settings(max_examples=300, deadline=1000)
@given(data=st.data())
def test_a_file_cut_off_anywhere_is_refused(
    sound: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(sound) - 1))
    with pytest.raises((UnsafeWeights, ModelNotFound)):
        of(sound[:cut], tmp_path_factory.getbasetemp())


@settings(max_examples=500, deadline=1000)
@given(data=st.data())
def test_whatever_is_changed_a_header_is_refused_or_lies_within_its_file(
    sound: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed = bytearray(sound)
    end = sound.index(b"blk.1.ffn_down.weight") + 80
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, end))
        new = data.draw(st.binary(min_size=1, max_size=9) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x09\0\0\0"]))
        changed[at : at + len(new)] = new
    try:
        read = of(bytes(changed), tmp_path_factory.getbasetemp())
    except (UnsafeWeights, ModelNotFound):
        return
    last = 0
    for _, info in read.tensors.values():
        assert last <= info.offset <= info.offset + info.nbytes <= len(changed)
        last = info.offset + info.nbytes


NESTED = b"".join(U32.pack(9) + U64.pack(1) for _ in range(10_000))

HOSTILE = {
    "no magic": b"PK\3\4" + bytes(100),
    "nothing": b"",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "version 1": b"GGUF" + U32.pack(1) + bytes(100),
    "the other byte order": b"GGUF" + struct.pack(">I", 3) + bytes(100),
    "2^64 keys": header(keys_said=2**64 - 1),
    "2^64 tensors": header(count=2**64 - 1),
    "tensors that are not there": header(count=900_000),
    "a key of 2^63 bytes": header(U64.pack(2**63) + b"x"),
    "an empty key": header(key("", 4, U32.pack(1))),
    "a key twice": header(key("a", 4, U32.pack(1)), key("a", 4, U32.pack(1))),
    "a key that is not UTF-8": header(key(b"\xff\xfe", 4, U32.pack(1))),
    "a value that is not UTF-8": header(key("a", 8, text(b"\xc3\x28"))),
    "a type that is none": header(key("a", 13, bytes(8))),
    "a truth that is neither": header(key("a", 7, b"\2")),
    "a NaN": header(key("llama.rope.freq_base", 6, struct.pack("<f", float("nan")))),
    "an infinity": header(key("a", 12, struct.pack("<d", float("inf")))),
    "arrays in arrays": header(key("a", 9, NESTED)),
    "2^64 bytes in an array": header(key("a", 9, U32.pack(0) + U64.pack(2**64 - 1))),
    "2^61 strings": header(key("a", 9, U32.pack(8) + U64.pack(2**61))),
    "more strings than bytes": header(key("a", 9, U32.pack(8) + U64.pack(3_000_000) + bytes(1000))),
    "an alignment of 3": header(key("general.alignment", 4, U32.pack(3))),
    "an alignment of 0": header(key("general.alignment", 4, U32.pack(0))),
    "an alignment of 2^31": header(key("general.alignment", 4, U32.pack(2**31))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeWeights, match=r"no sound GGUF file: .+"):
        of(HOSTILE[name], tmp_path)


def one_tensor(name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + U32.pack(len(shape)) + b"".join(map(U64.pack, shape)) + U32.pack(kind) + U64.pack(offset)


@pytest.mark.parametrize(
    "tensors",
    [
        [one_tensor("a"), one_tensor("a", offset=128)],
        [one_tensor("a"), one_tensor("b", offset=64)],
        [one_tensor("a"), one_tensor("b", offset=1024)],
        [one_tensor("a", offset=2**63)],
        [one_tensor("a", shape=(1 << 40,))],
        [one_tensor("a", shape=(2**33, 2**33))],
        [one_tensor("a", shape=(2**63,))],
        [one_tensor("a", shape=(0,))],
        [one_tensor("a", shape=())],
        [one_tensor("a", shape=(1, 1, 1, 1, 1))],
        [one_tensor("a", shape=(33,), kind=2)],
        [one_tensor("a", kind=4)],
        [one_tensor("a", kind=2**31)],
        [one_tensor("a" * 64)],
    ],
    ids=["twice", "overlap", "gap", "far", "large", "product", "sign", "empty", "flat", "five", "block", "old", "type",
         "name"],
)  # fmt: skip
def test_a_tensor_outside_the_file_over_another_or_of_no_shape_is_refused(tensors: list[bytes], tmp_path: Path) -> None:
    data = header(tensors=b"".join(tensors), count=len(tensors)) + bytes(4096)
    with pytest.raises(UnsafeWeights, match="no sound GGUF file"):
        of(data, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"context_length": 0},
        {"context_length": 2**31},
        {"embedding_length": None},
        {"block_count": 5_000},
    ],
)
def test_sizes_that_no_model_has_are_refused(changes: dict[str, int | None], tmp_path: Path) -> None:
    with pytest.raises(UnsafeWeights, match=next(iter(changes))):
        read_header(write_gguf(tmp_path / "a.gguf", metadata=changes))


def test_an_end_of_text_outside_the_vocabulary_is_refused(sound: bytes, tmp_path: Path) -> None:
    at = sound.index(b"tokenizer.ggml.eos_token_id") + len(b"tokenizer.ggml.eos_token_id") + 4
    with pytest.raises(UnsafeWeights, match="end of text is the token 264 of 264"):
        of(sound[:at] + U32.pack(264) + sound[at + 4 :], tmp_path)


def test_another_token_outside_the_vocabulary_is_none(sound: bytes, tmp_path: Path) -> None:
    at = sound.index(b"tokenizer.ggml.padding_token_id") + len(b"tokenizer.ggml.padding_token_id") + 4
    read = of(sound[:at] + U32.pack(2**32 - 1) + sound[at + 4 :], tmp_path)
    assert read.token_id("padding") is None
    assert read.tokens[read.token_id("eos") or 0] == "<|im_end|>"


def test_a_token_that_is_there_twice_is_refused(sound: bytes, tmp_path: Path) -> None:
    assert sound.count(text("A")) == sound.count(text("B")) == 1
    with pytest.raises(UnsafeWeights, match="two of its tokens are one"):
        of(sound.replace(text("A"), text("B")), tmp_path)


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for name in ("pipe.gguf", "missing.gguf", ".", "a" * 300, "a\0b"):
        opened = threading.Thread(target=lambda path: refused(tmp_path / path), args=(name,), daemon=True)
        opened.start()
        opened.join(10)
        assert not opened.is_alive()
        assert refused(tmp_path / name)


def refused(path: Path) -> bool:
    with pytest.raises(ModelNotFound):
        read_header(path)
    return True


def test_version_2_is_read_as_version_3_is(sound: bytes, tmp_path: Path) -> None:
    second = of(sound[:4] + U32.pack(2) + sound[8:], tmp_path)
    assert second.tokens == of(sound, tmp_path).tokens
    assert {name: info for name, (_, info) in second.tensors.items()} == {
        name: info for name, (_, info) in of(sound, tmp_path).tensors.items()
    }


def write_other(path: Path, architecture: str, *, kind: str | None = None, tensor: bool = True, **more: Any) -> Path:
    """A GGUF file that is no language model, or of a model that does not write."""
    writer = gguf.GGUFWriter(path, architecture)
    if kind is not None:
        writer.add_type(kind)
    if tensor:
        writer.add_tensor("t", np.zeros(32, dtype=np.float32))
    for name in ("context_length", "embedding_length", "block_count"):
        writer.add_uint32(f"{architecture}.{name}", 8)
    if "tokens" in more:
        writer.add_tokenizer_model(more.pop("tokens"))
        writer.add_token_list(["a", "b"])
    for name, value in more.items():
        key = f"{architecture}.{name.replace('__', '.')}"
        writer.add_bool(key, value) if isinstance(value, bool) else writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a LoRA adapter": ("llama", {"kind": "adapter"}, "adapter"),
    "an image encoder": ("clip", {"kind": "mmproj"}, "mmproj"),
    "an older image encoder": ("clip", {}, "the part of a model that sees"),
    "statistics for quantization": ("llama", {"kind": "imatrix"}, "imatrix"),
    "a vocabulary": ("llama", {"tokens": "gpt2", "tensor": False}, "a vocabulary and no weights"),
    "a control vector": ("controlvector", {}, "no tokenizer"),
    "a model of pictures": ("flux", {}, "no tokenizer"),
    "an encoder": ("bert", {"tokens": "bert", "attention__causal": False}, "from left to right"),
    "an embedder that is a decoder": ("qwen3", {"tokens": "gpt2", "pooling_type": 3}, "one vector or score"),
    "a reranker": ("qwen3", {"tokens": "gpt2", "pooling_type": 4}, "one vector or score"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_gguf_files_than_those_of_models_that_write_are_named(name: str, tmp_path: Path) -> None:
    architecture, told, message = OTHERS[name]
    with pytest.raises(ModelNotFound, match=message):
        read_header(write_other(tmp_path / "a.gguf", architecture, **told))


def test_a_decoder_that_says_that_it_pools_nothing_is_one(tmp_path: Path) -> None:
    file = write_other(tmp_path / "a.gguf", "qwen3", tokens="gpt2", pooling_type=0, attention__causal=True)
    assert read_header(file).architecture == "qwen3"


def test_a_split_model_is_one_model_from_any_part(tmp_path: Path) -> None:
    files = split_gguf(tmp_path)
    for file in files:
        read = read_header(file)
        assert read.files == tuple(files)
        assert set(read.tensors) == set(shapes(2, 264))
        assert read.architecture == "llama"


def test_a_split_model_without_a_part_or_with_another_s_is_refused(tmp_path: Path) -> None:
    files = split_gguf(tmp_path)
    second = files[1].read_bytes()
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(UnsafeWeights, match="part 2 of 3"):
        read_header(files[0])
    files[1].unlink()
    with pytest.raises(ModelNotFound, match="00002-of-00003"):
        read_header(files[0])
    (tmp_path / "renamed.gguf").write_bytes(second)
    with pytest.raises(UnsafeWeights, match="NAME-00001-of-00003.gguf"):
        read_header(tmp_path / "renamed.gguf")


@pytest.mark.real
def test_a_real_file_is_read(smollm2_gguf: Path) -> None:
    read = read_header(smollm2_gguf)
    assert len(read.tensors) == 272
    assert read.text("tokenizer.ggml.pre") == "smollm"
