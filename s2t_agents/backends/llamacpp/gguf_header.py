"""The header of a GGUF file, read and checked before a library maps it.

    magic, version, counts | key, type, value ... | name, shape, type, offset ... | padding | data of the tensors

llama.cpp ends the process where an assertion of its own fails, so whatever a header can say wrong about the extent of
its file is refused here, in bounded time and memory: nothing is allocated for a count before the file is known to hold
that many. ``trial`` sees to what only the library itself can tell.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from io import BufferedReader
from math import isfinite, prod
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError, ModelNotFound, UnsafeWeights

Value = bool | int | float | str | list[str] | NDArray[Any]
"""Of a metadata key: a scalar, or the elements of an array."""

VERSIONS = (2, 3)
"""Of the format; the first counted in 32 bits and ended in 2023."""

MOST_HEADER = 128 * 2**20
"""Bytes before the first tensor; a vocabulary of 260,000 tokens and its merges takes some 15 million."""

MOST_STRINGS = 4_000_000
"""Strings in all arrays of a header."""

MOST_KEYS = 65_536
"""Metadata keys, and bytes of one."""

MOST_TENSORS = 1_000_000
"""Tensors of a file; a name has less than ``MOST_OF_A_NAME`` bytes."""

MOST_OF_A_NAME = 64
MOST_DIMENSIONS = 4
MOST_ALIGNMENT = 2**20
MOST_PARTS = 1_000

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_TYPES = {key: np.dtype(name) for key, name in _SCALARS.items()}
_U32, _U64, _KEY_END, _TENSOR_END = Struct("<I"), Struct("<Q"), Struct("<I"), Struct("<IQ")
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_ARCHITECTURE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OUT_OF = "Copy or download it again."
_CAUSAL = "Give a causal language model."


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: as llama.cpp calls it, such as ``blk.0.attn_q.weight``.
        shape: the first counts the values of a row, as ggml orders them.
        kind: number of its ggml type.
        offset: of its first byte in the file.
        nbytes: how many it has.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class GGUFHeader:
    """The checked header of a model's file, or of each of its parts.

    Attributes:
        files: the parts, the first one first; a whole model has one.
        metadata: of the first part.
        tensors: by name, of all parts, with the part that holds each.
    """

    files: tuple[Path, ...]
    metadata: Mapping[str, Value]
    tensors: Mapping[str, tuple[Path, TensorInfo]]

    @property
    def path(self) -> Path:
        """The file that llama.cpp is given."""
        return self.files[0]

    @property
    def architecture(self) -> str:
        """Such as ``llama``."""
        return str(self.metadata["general.architecture"])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for _, info in self.tensors.values())

    def text(self, key: str) -> str | None:
        """A string of the metadata; None where there is none."""
        found = self.metadata.get(key)
        return found if isinstance(found, str) else None

    def number(self, key: str) -> int | None:
        """A whole number of the metadata; None where there is none."""
        found = self.metadata.get(key)
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    @property
    def tokens(self) -> list[str]:
        """The vocabulary, by id."""
        found = self.metadata["tokenizer.ggml.tokens"]
        assert isinstance(found, list)
        return found

    def token_id(self, name: str) -> int | None:
        """The id in ``tokenizer.ggml.NAME_token_id``; None where there is none, or one that is no token."""
        found = self.number(f"tokenizer.ggml.{name}_token_id")
        return found if found is not None and 0 <= found < len(self.tokens) else None


def read_header(path: str | Path) -> GGUFHeader:
    """Read and check the header of a GGUF file, and of its other parts where it has some.

    Args:
        path: the file, or any part of one that was split.

    Raises:
        ModelNotFound: no such file, or one that holds no language model.
        UnsafeWeights: damaged, cut off, or made to look as what it is not; the message says where.
    """
    path = Path(path)
    metadata, infos = _read(path)
    count = metadata.get("split.count")
    if not isinstance(count, int) or count <= 1:
        return _checked(GGUFHeader((path,), metadata, {info.name: (path, info) for info in infos}))
    files = _parts(path, count)
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    first: Mapping[str, Value] = {}
    for number, file in enumerate(files):
        metadata, infos = _read(file)
        first = first or metadata
        if metadata.get("split.no") != number or metadata.get("split.count") != count:
            raise _bad(file, f"it is not part {number + 1} of {count}")
        for info in infos:
            if info.name in tensors:
                raise _bad(file, f"two parts hold the tensor {info.name}")
            tensors[info.name] = (file, info)
    if first.get("split.tensors.count") != len(tensors):
        raise _bad(path, f"its parts hold {len(tensors)} tensors, not {first.get('split.tensors.count')}")
    return _checked(GGUFHeader(files, first, tensors))


def _parts(path: Path, count: int) -> tuple[Path, ...]:
    """All parts of a split file, by the names that llama.cpp looks for."""
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count or count > MOST_PARTS:
        raise _bad(path, f"it is a part of {count}, and not named NAME-00001-of-{count:05d}.gguf")
    return tuple(path.with_name(f"{named[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1))


def _checked(header: GGUFHeader) -> GGUFHeader:
    """The header of something that llama.cpp may be asked to load: its own words, not only its extent, make sense."""
    path, kind = header.path, header.metadata.get("general.type", "model")
    if kind != "model":
        raise ModelNotFound(f"{str(path)!r} holds no model but {kind!r:.40}.", hint="Give the model's own file.")
    if not _ARCHITECTURE.fullmatch(header.text("general.architecture") or ""):
        raise _bad(path, "general.architecture names no architecture")
    if header.architecture == "clip":
        raise ModelNotFound(f"{str(path)!r} holds the part of a model that sees.", hint="Give the part that writes.")
    if not header.tensors:
        raise ModelNotFound(f"{str(path)!r} holds a vocabulary and no weights.", hint="Give the model's own file.")
    if not any(key.startswith("tokenizer.") for key in header.metadata):  # pictures, sounds, control vectors
        raise ModelNotFound(
            f"{str(path)!r} ({header.architecture}) has no tokenizer: it writes no text.", hint="Give a language model."
        )
    if header.metadata.get(f"{header.architecture}.attention.causal") is False:
        raise ModelNotFound(
            f"{str(path)!r} ({header.architecture}) does not write its text from left to right.", hint=_CAUSAL
        )
    if header.number(f"{header.architecture}.pooling_type"):
        raise ModelNotFound(
            f"{str(path)!r} ({header.architecture}) makes one vector or score of a text: it writes none.", hint=_CAUSAL
        )
    for name, most in (("context_length", 2**31), ("embedding_length", 2**20), ("block_count", 2**12)):
        value = header.metadata.get(f"{header.architecture}.{name}")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < most:
            raise _bad(path, f"{header.architecture}.{name} is {value!r:.40}")
    _check_vocabulary(header)
    return header


def _check_vocabulary(header: GGUFHeader) -> None:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise _bad(header.path, "it has no tokens")
    for name in ("scores", "token_type"):
        values = header.metadata.get(f"tokenizer.ggml.{name}")
        if values is not None and (not isinstance(values, np.ndarray) or len(values) != len(tokens)):
            raise _bad(header.path, f"tokenizer.ggml.{name} is no value for each of {len(tokens)} tokens")
    if len(set(tokens) - {""}) < len(tokens) - tokens.count(
        ""
    ):  # llama.cpp gives empty ones names, and ends over others
        raise _bad(header.path, "two of its tokens are one")
    if "tokenizer.ggml.eos_token_id" in header.metadata and header.token_id("eos") is None:
        raise _bad(header.path, f"its end of text is the token {header.number('tokenizer.ggml.eos_token_id')} "
                   f"of {len(tokens)}")  # fmt: skip


def _read(path: Path) -> tuple[Mapping[str, Value], list[TensorInfo]]:
    """Metadata and tensors of one file."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe may never end
            raise ModelNotFound(f"{str(path)!r} is no regular file.", hint="Give a .gguf file.")
        with path.open("rb") as file:
            return _Reader(path, file, found.st_size).header()
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ModelNotFound(f"no model at {str(path)!r:.300}: {said}.", hint="Give a .gguf file.") from error


class _Reader:
    """Goes through one header; every byte is asked for by ``_take``, which knows what the file holds."""

    def __init__(self, path: Path, file: BufferedReader, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._held, self._at, self._strings = bytearray(), 0, 0

    def header(self) -> tuple[Mapping[str, Value], list[TensorInfo]]:
        begins = bytes(self._take(min(4, self._size)))
        if begins == b"vers":
            raise _bad(self._path, "it is a pointer of Git LFS", hint="Fetch the file itself: git lfs pull.")
        if begins != b"GGUF":
            raise _bad(self._path, "it does not begin with GGUF", hint="Give a .gguf file.")
        version = self._unpack(_U32)
        if version not in VERSIONS:
            other = "; it is of the other byte order" if version % 65536 == 0 else ""
            raise _bad(self._path, f"its version is {version}, not one of {VERSIONS}{other}", hint="Convert it again.")
        tensors, keys = self._unpack(_U64), self._unpack(_U64)
        if keys > MOST_KEYS or tensors > MOST_TENSORS:
            raise _bad(self._path, f"it claims {keys:,} keys and {tensors:,} tensors")
        metadata: dict[str, Value] = {}
        for _ in range(keys):
            key = self._text(MOST_KEYS)
            if not key or key in metadata:
                raise _bad(self._path, f"the key {key!r:.80} is empty, or there twice")
            metadata[key] = self._value(key, self._unpack(_KEY_END))
        return metadata, self._tensors(tensors, self._alignment(metadata))

    def _alignment(self, metadata: Mapping[str, Value]) -> int:
        value = metadata.get("general.alignment", 32)
        if not isinstance(value, int) or not 0 < value <= MOST_ALIGNMENT or value & (value - 1):
            raise _bad(self._path, f"its alignment is {value!r:.40}")
        return value

    def _value(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self._text(MOST_HEADER)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _TYPES:
            raise _bad(self._path, f"the type of {key!r:.80} is {kind}")
        value = self._numbers(kind, 1)[0].item()
        if kind == _BOOL and value > 1:
            raise _bad(self._path, f"{key!r:.80} is {value}, which is neither true nor false")
        if not isfinite(value):
            raise _bad(self._path, f"{key!r:.80} is {value}")
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> Value:
        kind, count = self._unpack(_U32), self._unpack(_U64)
        if kind == _STRING:
            self._strings += count
            if self._strings > MOST_STRINGS:
                raise _bad(self._path, f"{key!r:.80} claims {count:,} strings")
            self._need(8 * count)
            return [self._text(MOST_HEADER) for _ in range(count)]
        if kind not in _TYPES:  # arrays of arrays included: no model has them, and llama.cpp reads none
            raise _bad(self._path, f"{key!r:.80} is an array of type {kind}")
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> NDArray[Any]:
        kept = np.frombuffer(self._take(count * _TYPES[kind].itemsize), dtype=_TYPES[kind])
        return kept.copy()

    def _tensors(self, count: int, alignment: int) -> list[TensorInfo]:
        """The tensors: one after the other without a gap, as llama.cpp wants them, so none lies over another."""
        self._need(24 * count)
        named: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._text(MOST_OF_A_NAME - 1)
            dimensions = self._unpack(_U32)
            if name in named or not 0 < dimensions <= MOST_DIMENSIONS:
                raise _bad(self._path, f"the tensor {name!r} is there twice, or has {dimensions} dimensions")
            shape = tuple(self._unpack(_U64) for _ in range(dimensions))
            kind, offset = _TENSOR_END.unpack(self._take(_TENSOR_END.size))
            named[name] = shape, kind, offset
        start = -(-self._at // alignment) * alignment
        infos, end = [], 0
        for name, (shape, kind, offset) in named.items():
            nbytes = self._bytes_of(name, shape, kind)
            if offset != end or start + end + nbytes > self._size:
                raise _bad(self._path, f"the tensor {name!r} of {nbytes:,} bytes lies at {offset:,}, not {end:,}, "
                           f"in a file of {self._size:,}")  # fmt: skip
            infos.append(TensorInfo(name, shape, kind, start + end, nbytes))
            end = -(-(end + nbytes) // alignment) * alignment
        return infos

    def _bytes_of(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        if kind not in block_sizes():
            raise _bad(self._path, f"the tensor {name!r} is of the unknown type {kind}", hint="Upgrade gguf.")
        block, size = block_sizes()[kind]
        if 0 in shape or shape[0] % block or prod(shape) >= 2**63:
            raise _bad(self._path, f"the shape of {name!r} is {shape}")
        return prod(shape) // block * size

    def _text(self, most: int) -> str:
        length = self._unpack(_U64)
        if length > most:
            raise _bad(self._path, f"a string claims {length:,} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise _bad(self._path, f"a string is not UTF-8: {error.reason}") from error

    def _unpack(self, form: Struct) -> Any:
        return form.unpack(self._take(form.size))[0]

    def _take(self, count: int) -> bytearray:
        self._need(count)
        start, self._at = self._at, self._at + count
        return self._held[start : self._at]

    def _need(self, count: int) -> None:
        """See to it that so many bytes more are held."""
        end = self._at + count
        if end > self._size:
            raise _bad(self._path, f"it is cut off: {self._size:,} bytes, and its header wants {end:,}")
        if end > MOST_HEADER:
            raise _bad(self._path, f"its header takes more than {MOST_HEADER:,} bytes")
        while len(self._held) < end:
            more = self._file.read(max(end - len(self._held), 2**20))
            if not more:
                raise _bad(self._path, "it became shorter while it was read")
            self._held += more


@cache
def block_sizes() -> Mapping[int, tuple[int, int]]:
    """Values and bytes of a block, by the number of the ggml type.

    Raises:
        ConfigError: the package gguf is missing, or hidden by a file of that name.
    """
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            raise ConfigError(
                f"GGUF files need the package gguf, and {error.path!r} is another.", hint="Rename it."
            ) from error
        raise ConfigError("GGUF files need the package gguf.", hint="pip install 's2t-agents[llamacpp]'") from error
    return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def _bad(path: Path, what: str, *, hint: str = _OUT_OF) -> UnsafeWeights:
    return UnsafeWeights(f"{str(path)!r} is no sound GGUF file: {what}.", hint=hint)
