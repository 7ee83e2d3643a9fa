"""One GGUF model and one llama.cpp context over it: batches of rows in, logits and last hidden states out.

    cells    | a0 a1 a2 | b0 b1 | a3 | . . . |      one buffer of KV for all sequences
    owners   | a,c  a,c a | b b | a  | . . . |      a fork owns the same cells: nothing is copied

Conversations are the business of ``kv_cache``. One thread at a time.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError, ModelNotFound, Overloaded, S2TError, UnsafeWeights
from .gguf_header import GGUFHeader
from .library import complaints, library, stop_flag_reader

BATCH = 512
"""Tokens of a decode at most; also what llama.cpp computes at once."""

OUTPUTS = 64
"""Rows of a decode whose logits and hidden states are wanted, at most."""

SEQUENCES = 64
"""Sequences that a context tells apart, candidates under way included; llama.cpp allows 256."""

KV_BYTES = 512 * 2**20
"""Memory for KV, where ``n_ctx`` does not say otherwise; never for less than ``LEAST_CELLS`` tokens."""

LEAST_CELLS, MOST_WINDOWS = 8192, 8


class KVType(NamedTuple):
    """A ggml type: its number, and the bits that a value takes, its block's scale included."""

    number: int
    bits: float


KV_TYPES = {
    "f32": KVType(0, 32),
    "f16": KVType(1, 16),
    "bf16": KVType(30, 16),
    "q8_0": KVType(8, 8.5),
    "q5_1": KVType(7, 6),
    "q5_0": KVType(6, 5.5),
    "q4_1": KVType(3, 5),
    "q4_0": KVType(2, 4.5),
}


class NoRoom(Overloaded):
    """No free cells, or no free number: forget sequences and try again. Nothing has changed."""

    def __init__(self, message: str) -> None:
        hint = 'Run fewer generations at once, or give it more: model_kwargs={"n_ctx": ...}.'
        super().__init__(f"the model's context is full: {message}.", hint=hint)


class Interrupted(S2TError):
    """Another thread has stopped a forward: nothing of it is kept."""

    retryable = True


@dataclass(frozen=True)
class Options:
    """How a model is loaded. Names and meanings are llama.cpp's.

    Attributes:
        n_ctx: tokens whose KV there is room for, of all sequences together; None chooses.
        n_gpu_layers: layers on the GPU; a negative number means all. Ignored without a GPU.
        n_threads: of the CPU; None takes torch's number, in ``backend``.
        type_k: of the keys, a name of ``KV_TYPES``.
        type_v: of the values.
    """

    n_ctx: int | None = None
    n_gpu_layers: int = -1
    n_threads: int | None = None
    type_k: str = "f16"
    type_v: str = "f16"

    def __post_init__(self) -> None:
        for name in ("n_ctx", "n_threads", "n_gpu_layers"):
            value = getattr(self, name)
            least = -1 if name == "n_gpu_layers" else 1
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"{name} is {value!r}.", hint=f"Give a whole number from {least} on.")
        for name in ("type_k", "type_v"):
            if getattr(self, name) not in KV_TYPES:
                raise ConfigError(f"{name} is {getattr(self, name)!r}.", hint=f"Use one of {', '.join(KV_TYPES)}.")


Run = tuple[Sequence[int] | NDArray[np.int32], int, int]
"""Tokens of one sequence in a decode: ids ``[N]``, position of the first, number of the sequence."""


class Context:
    """Weights and a context.

    Args:
        header: of the model's file.
        options: see there.
        sequences: how many there may be at once.
        check: check every weight, for a file that was not checked yet.

    Attributes:
        vocab_size: columns of the logits.
        width: of a hidden state.
        window: tokens that the model was trained on, in one sequence.
        cells: tokens that there is room for, in all.
        rolls_back: whether a sequence can be cut anywhere; recurrent states cannot.

    Raises:
        ModelNotFound: an architecture that llama.cpp does not know, or none that writes text.
        UnsafeWeights: llama.cpp refuses the file.
        ConfigError: no memory for it, or the binding is missing.
    """

    def __init__(
        self, header: GGUFHeader, options: Options = Options(), *, sequences: int = SEQUENCES, check: bool = False
    ) -> None:
        self._c, self._header = library(), header
        self._model: Any = None
        self._context: Any = None
        self._stop = ctypes.create_string_buffer(2)
        self._model = self._load(options, check)
        self.window = int(self._c.llama_model_n_ctx_train(self._model))
        try:
            self._context = self._make(options, sequences)
        except BaseException:
            self.close()
            raise
        self._memory = self._c.llama_get_memory(self._context)
        if not self._memory:
            self.close()
            raise ModelNotFound(
                f"{str(header.path)!r} ({header.architecture}) keeps nothing of what it reads: it does not write.",
                hint="Give a causal language model.",
            )
        self.vocab_size = int(self._c.llama_vocab_n_tokens(self._vocab))
        self.width = int(self._c.llama_model_n_embd_out(self._model))
        self.cells = int(self._c.llama_n_ctx(self._context))
        self.sequences = sequences
        self.rolls_back = not (
            self._c.llama_model_is_recurrent(self._model) or self._c.llama_model_is_hybrid(self._model)
        )
        self._embedding = True
        self._batch = _Batch(self._c, BATCH)

    @property
    def _vocab(self) -> Any:
        return self._c.llama_model_get_vocab(self._model)

    def _load(self, options: Options, check: bool) -> Any:
        wanted = self._c.llama_model_default_params()
        wanted.n_gpu_layers = options.n_gpu_layers
        wanted.check_tensors = check
        wanted.use_extra_bufts = not check  # no second copy of the weights where they are only looked at
        with complaints() as messages:
            model = self._c.llama_model_load_from_file(os.fsencode(self._header.path), wanted)
        if not model:
            raise self._refusal(messages)
        if self._c.llama_model_has_encoder(model) or not self._c.llama_model_has_decoder(model):
            self._c.llama_model_free(model)
            raise ModelNotFound(
                f"{str(self._header.path)!r} ({self._header.architecture}) is no model that only writes.",
                hint="Give a causal language model.",
            )
        return model

    def _refusal(self, messages: Sequence[str]) -> ConfigError:
        what = next(
            (line for line in messages if "error loading model" in line),
            messages[0] if messages else "it does not say why",
        )
        what = what.partition("error loading model: ")[2] or what
        path = str(self._header.path)
        if "unknown model architecture" in what:
            return ModelNotFound(
                f"llama.cpp does not know the architecture {self._header.architecture!r} of {path!r}.",
                hint="Upgrade llama-cpp-python, or give the safetensors checkpoint.",
            )
        return UnsafeWeights(f"llama.cpp refuses {path!r}: {what:.400}.", hint="Copy or download it again.")

    def _make(self, options: Options, sequences: int) -> Any:
        wanted = self._c.llama_context_default_params()
        threads = options.n_threads or os.cpu_count() or 1
        wanted.n_ctx = options.n_ctx or self._room(options)
        if wanted.n_ctx > (most := SEQUENCES * max(self.window, LEAST_CELLS)):
            raise ConfigError(
                f"n_ctx is {options.n_ctx}; {SEQUENCES} sequences of {self.window:,} tokens have {most:,} at most.",
                hint="Give a smaller number.",
            )
        wanted.n_batch = wanted.n_ubatch = BATCH
        wanted.n_seq_max = sequences
        wanted.n_outputs_max = OUTPUTS
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.type_k, wanted.type_v = (KV_TYPES[each].number for each in (options.type_k, options.type_v))
        wanted.pooling_type = self._c.LLAMA_POOLING_TYPE_NONE
        wanted.embeddings = True
        wanted.swa_full = True  # else the KV before a sliding window is lost, and a sequence cannot be cut back
        wanted.kv_unified = True  # a fork shares its cells
        wanted.abort_callback = stop_flag_reader()
        wanted.abort_callback_data = ctypes.addressof(self._stop)
        with complaints() as messages:
            context = self._c.llama_init_from_model(self._model, wanted)
        if not context:
            raise ConfigError(
                f"llama.cpp makes no context of {wanted.n_ctx:,} tokens for {str(self._header.path)!r}: "
                f"{messages[0] if messages else 'it does not say why'}.",
                hint='A smaller one takes less memory: model_kwargs={"n_ctx": 4096}.',
            )
        return context

    def _room(self, options: Options) -> int:
        """Tokens that the default memory for KV holds."""
        window = self.window
        layers, heads = (int(ask(self._model)) for ask in (self._c.llama_model_n_layer, self._c.llama_model_n_head_kv))
        width = int(self._c.llama_model_n_embd(self._model)) // max(1, int(self._c.llama_model_n_head(self._model)))
        width = self._header.number(f"{self._header.architecture}.attention.key_length") or width
        bits = KV_TYPES[options.type_k].bits + KV_TYPES[options.type_v].bits
        token = max(1, int(layers * heads * width * bits / 8))
        return min(max(KV_BYTES // token, min(LEAST_CELLS, window)), MOST_WINDOWS * window)

    def read(self, runs: Sequence[Run]) -> None:
        """Read tokens into their sequences, at most ``BATCH``; errors as ``decode``."""
        self._run(runs, outputs=False)
        self._c.llama_synchronize(self._context)

    def decode(self, runs: Sequence[Run]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Read tokens into their sequences, at most ``OUTPUTS``.

        Returns:
            Logits ``[N, V]`` and last hidden states ``[N, H]`` after each, fp32.

        Raises:
            NoRoom: nothing has changed.
            Interrupted: see ``interrupt``; the caller takes back what was read.
            RuntimeError: llama.cpp broke down.
        """
        rows = self._run(runs, outputs=True)
        logits = self._copied(self._c.llama_get_logits(self._context), rows, self.vocab_size)
        return logits, self._copied(self._c.llama_get_embeddings(self._context), rows, self.width)

    def _run(self, runs: Sequence[Run], *, outputs: bool) -> int:
        """One decode; returns its rows."""
        self._check_open()
        rows = sum([len(ids) for ids, _, _ in runs])
        if rows > (OUTPUTS if outputs else BATCH):  # llama.cpp would end the process
            raise ValueError(f"{rows} rows in one decode")
        if outputs != self._embedding:
            self._c.llama_set_embeddings(self._context, outputs)  # with them on it computes the logits of every row
            self._embedding = outputs
        with complaints() as messages:
            status = self._c.llama_decode(self._context, self._batch.filled(runs, outputs))
        if status == 1:
            raise NoRoom(f"no room for {rows} tokens among {self.cells:,}")
        if status == 2:
            raise Interrupted("a forward was stopped.")
        if status:
            raise RuntimeError(f"llama.cpp's decode failed ({status}): {'; '.join(messages) or 'it does not say why'}")
        return rows

    def _copied(self, pointer: Any, rows: int, columns: int) -> NDArray[np.float32]:
        """A copy of llama.cpp's buffer ``[rows, columns]``, which the next decode overwrites."""
        flat = (ctypes.c_float * (rows * columns)).from_address(ctypes.addressof(pointer.contents))
        return np.array(flat, dtype=np.float32).reshape(rows, columns)

    def share(self, source: int, target: int, length: int) -> None:
        """The first ``length`` tokens of one sequence become those of another, which is empty."""
        self._check_open()
        self._c.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def cut(self, sequence: int, length: int) -> bool:
        """Forget all tokens of a sequence after the first ``length``; False where that cannot be done."""
        if self._context is None:  # what is left of a model that was closed
            return True
        return bool(self._c.llama_memory_seq_rm(self._memory, sequence, length, -1))

    def token_bytes(self, sequence: int) -> int:
        """Bytes of the KV of one token, as an empty sequence shows when it reads one."""
        before = self._size(sequence)
        self.read([([0], 0, sequence)])
        try:
            return max(1, self._size(sequence) - before)
        finally:
            self.cut(sequence, 0)

    def _check_open(self) -> None:
        if self._context is None:
            raise RuntimeError(f"{str(self._header.path)!r} was closed")

    def _size(self, sequence: int) -> int:
        self._check_open()
        return int(self._c.llama_state_seq_get_size(self._context, sequence))

    def saved(self, sequence: int) -> NDArray[np.uint8]:
        """A sequence's KV ``[bytes]``, for ``restore``."""
        saved = np.empty(self._size(sequence), dtype=np.uint8)
        data = _pointer(saved, ctypes.c_uint8)
        written = int(self._c.llama_state_seq_get_data(self._context, data, saved.nbytes, sequence))
        if written != saved.nbytes:
            raise RuntimeError(f"llama.cpp saved {written:,} of {saved.nbytes:,} bytes of a sequence")
        return saved

    def restore(self, sequence: int, saved: NDArray[np.uint8]) -> bool:
        """Give an empty sequence the KV that was saved; False where there is no room for it."""
        self._check_open()
        data = _pointer(saved, ctypes.c_uint8)
        with complaints():
            read = int(self._c.llama_state_seq_set_data(self._context, data, saved.nbytes, sequence))
        if not read:
            self.cut(sequence, 0)
        return read == saved.nbytes

    def interrupt(self) -> None:
        """Stop the decode under way, and any other until ``resume``. From any thread."""
        self._stop[0] = b"1"

    def resume(self) -> None:
        """Decodes run through again."""
        self._stop[0] = b"\0"

    def tokens(self, text: str) -> list[int]:
        """Ids as llama.cpp's own tokenizer has them, control tokens read as such and none added."""
        raw = text.encode()
        most = len(raw) + 16
        ids = (ctypes.c_int32 * most)()
        count = int(self._c.llama_tokenize(self._vocab, raw, len(raw), ids, most, False, True))
        return list(ids[: max(0, count)])

    def ends(self, ids: Sequence[int]) -> frozenset[int]:
        """Those of the tokens that end an answer."""
        return frozenset(each for each in ids if self._c.llama_vocab_is_eog(self._vocab, each))

    def close(self) -> None:
        """Free context and weights; it cannot be used afterwards. Twice is once."""
        context, self._context = self._context, None
        model, self._model = self._model, None
        if context:
            self._c.llama_free(context)
        if model:
            self._c.llama_model_free(model)

    def __del__(self) -> None:
        if hasattr(self, "_model"):
            self.close()


class _Batch:
    """The arrays of a ``llama_batch``, made once."""

    def __init__(self, c: Any, capacity: int) -> None:
        self._ids, self._positions, self._sequences = (np.zeros(capacity, dtype=np.int32) for _ in range(3))
        self._counts = np.ones(capacity, dtype=np.int32)
        self._wanted = np.zeros(capacity, dtype=np.int8)
        self._pointers = self._sequences.ctypes.data + 4 * np.arange(capacity, dtype=np.uintp)
        self._batch = c.llama_batch(
            n_tokens=0,
            token=_pointer(self._ids, c.llama_token),
            embd=None,
            pos=_pointer(self._positions, c.llama_pos),
            n_seq_id=_pointer(self._counts, ctypes.c_int32),
            seq_id=_pointer(self._pointers, ctypes.POINTER(c.llama_seq_id)),
            logits=_pointer(self._wanted, ctypes.c_int8),
        )

    def filled(self, runs: Sequence[Run], outputs: bool) -> Any:
        """The batch of these tokens, good until the next one."""
        start = 0
        for ids, position, sequence in runs:
            end = start + len(ids)
            self._ids[start:end], self._sequences[start:end] = ids, sequence
            self._positions[start:end] = position if len(ids) == 1 else np.arange(position, position + len(ids))
            start = end
        self._wanted[:start] = outputs
        self._batch.n_tokens = start
        return self._batch


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
