"""The llama.cpp backend: a GGUF file, run as it is."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import ConfigError
from ...fork_safety import FORWARD, hold_while_forking
from ..base import Append, Capabilities, Limits, Output, ScoreCandidates, StepOutput, Work
from .context import BATCH, OUTPUTS, Context, NoRoom, Options, Run
from .gguf_header import GGUFHeader, read_header
from .kv_cache import LlamaCppCache, SequenceSlots
from .tokenizer import probe, read_tokenizer
from .trial import try_out
from .weights import checkpoint_norms, dequantised

T = TypeVar("T")

logger = logging.getLogger(__name__)

FEW = 8
"""Tokens of an append up to which all of them give outputs; of more, all but the last are read without, in a decode of
their own: with hidden states on, llama.cpp computes the logits of every row."""

SPARE = 8
"""Sequences that are left to candidates however many caches there are."""

NEUTRAL_SAMPLING = {"general.sampling.penalty_repeat": 1.0, "general.sampling.xtc_probability": 0.0}
"""Sampling of a file that would choose other tokens at temperature 0, too, and what it is where it does nothing."""

HAND_OVER_S = 0.02
"""Seconds of a step from which the hand-over to the scheduler's thread (0.3 ms of 13, measured on SmolLM2) is no
matter, so that an interrupt stops a forward half-way. A caller that is alone runs shorter steps itself."""

LAYER_PROBES = 64
"""Bytes of each tensor that the weights' fingerprint reads, at three places."""


class LlamaCppBackend:
    """A GGUF model in llama.cpp; see ``base.Backend``.

    Args:
        context: of the model.
        header: of its file.
        tokenizer: a fast one; None reads the file's own.
        name: how it is called in reports.
    """

    library = "llama.cpp"

    def __init__(self, context: Context, header: GGUFHeader, *, tokenizer: Any = None, name: str) -> None:
        self._context, self._header, self.name = context, header, name
        self.given_tokenizer = self.tokenizer = read_tokenizer(header) if tokenizer is None else tokenizer
        self.architecture, self.hidden_size = header.architecture, context.width
        self.vocab_size = context.vocab_size
        self.context_window = min(context.window, context.cells)
        self.device = torch.device("cpu")
        self.eos_ids = context.ends([i for i in self.tokenizer.get_vocab().values() if i < context.vocab_size])
        self.lock = threading.RLock()  # one thread at a time
        hold_while_forking(self, "lock", FORWARD)
        self.capabilities = Capabilities(
            batching=True,
            candidate_scoring=True,
            candidate_lora=False,
            hidden_states=True,
            truncation=context.rolls_back,
            fork_while_running=context.rolls_back,
        )
        self.limits = Limits(
            prefill_alone=BATCH,
            prefill_beside=BATCH // 2,
            sequences=OUTPUTS - SPARE,
            candidates=OUTPUTS,
            hand_over_s=HAND_OVER_S,
        )
        self._pool = SequenceSlots(context, self.lock, SPARE)
        self._compare_tokenizers()
        self._tell_of_long_factors()
        self._warn_of_sampling()

    @classmethod
    def load(
        cls, path: str | Path, *, tokenizer: Any = None, name: str | None = None, **options: Any
    ) -> LlamaCppBackend:
        """Read a GGUF file.

        Args:
            path: of the file, or of any part of one that was split.
            tokenizer: of the original model, instead of the file's.
            name: how it is called; None takes the path.
            options: see ``context.Options``.

        Raises:
            ConfigError: an option that cannot be; the binding is missing; no memory.
            ModelNotFound: no such file, or no language model.
            UnsafeWeights: damaged, or made to do harm.
        """
        try:
            wanted = Options(**options)
        except TypeError as error:
            known = ", ".join(Options.__dataclass_fields__)
            raise ConfigError(f"GGUF models take no such option: {error}.", hint=f"They take {known}.") from error
        header = read_header(path)
        try_out(header)
        threads = wanted.n_threads or torch.get_num_threads()
        return cls(
            Context(header, replace(wanted, n_threads=threads)), header, tokenizer=tokenizer, name=name or str(path)
        )

    def _compare_tokenizers(self) -> None:
        """Say once where our tokenizer and llama.cpp's own differ."""
        text = probe(self._header, self.eos_ids)
        ours = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if ours != (theirs := self._context.tokens(text)):
            logger.info(
                "%s: a sample text has %d tokens by its tokenizer here, and %d others by llama.cpp's own.",
                self.name, len(ours), len(theirs),
            )  # fmt: skip

    def _tell_of_long_factors(self) -> None:
        """Say once that a context is so large that llama.cpp takes the factors that are for long prompts."""
        key = f"{self.architecture}.rope.scaling.original_context_length"
        original = self._header.number(key) or self._context.window
        if "rope_factors_long.weight" in self._header.tensors and self._context.cells > original:
            logger.info(
                "%s: n_ctx is %d: prompts of any length are read with the rope factors for more than %d tokens; "
                "with n_ctx=%d they are read with those for fewer.",
                self.name, self._context.cells, original, original,
            )  # fmt: skip

    def _warn_of_sampling(self) -> None:
        """Say once that a file asks for other tokens than the likeliest ones at temperature 0."""
        values = {key: self._header.metadata.get(key) for key in NEUTRAL_SAMPLING}
        asked = [f"{key}={value:g}" for key, value in values.items()
                 if isinstance(value, int | float) and value != NEUTRAL_SAMPLING[key]]  # fmt: skip
        if asked:
            logger.warning(
                "%s: the file asks for %s, which is not done here: at temperature 0 it is always the likeliest token.",
                self.name, ", ".join(asked),
            )  # fmt: skip

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer's ids."""
        from ..fingerprint import tokenizer_fingerprint

        return tokenizer_fingerprint(self.given_tokenizer)

    @cached_property
    def weights_fingerprint(self) -> str:
        """Hash of names, shapes, types and some bytes of all tensors: it tells one quantization from another."""
        digest = hashlib.sha256()
        for name, (path, info) in sorted(self._header.tensors.items()):
            digest.update(f"{name} {info.shape} {info.kind} ".encode())
            with path.open("rb") as file:
                for at in (0, info.nbytes // 2, max(0, info.nbytes - LAYER_PROBES)):
                    file.seek(info.offset + at)
                    digest.update(file.read(LAYER_PROBES))
        return f"gguf-{digest.hexdigest()[:16]}"

    @cached_property
    def checkpoint_fingerprint(self) -> str | None:
        """Hash of the normalisation weights; see ``fingerprint.checkpoint_fingerprint``."""
        from ..fingerprint import checkpoint_fingerprint

        return checkpoint_fingerprint(checkpoint_norms(self._header))

    @cached_property
    def quantization(self) -> str:
        """Types of the matrices, that of most weights first, such as ``Q4_1`` or ``IQ3_XXS, Q8_0``."""
        from gguf import GGMLQuantizationType

        weights: Counter[str] = Counter()
        for _, info in self._header.tensors.values():
            if len(info.shape) > 1:
                weights[GGMLQuantizationType(info.kind).name] += prod(info.shape)
        return ", ".join(kind for kind, _ in weights.most_common()) or "none"

    @cached_property
    def output_embedding(self) -> Tensor:
        """``[V, H]`` fp16: rows of the output layer, dequantised when first asked for."""
        tensors = self._header.tensors
        return dequantised(*(tensors.get("output.weight") or tensors["token_embd.weight"]))

    def new_cache(self) -> LlamaCppCache:
        """An empty one."""
        return self._pool.new_cache()

    def forward(self, batch: Sequence[Work]) -> list[Output]:
        """See ``base.Backend``. Candidates are sequences of their own for one decode, over shared cells.

        Raises:
            Overloaded: the sequences that run need more KV than there is room for.
            Interrupted: see ``interrupt``.
            RuntimeError: llama.cpp broke down.
        """
        with self.lock:
            try:
                return self._forward(batch)
            except BaseException:
                for item in batch:
                    if isinstance(item, Append):
                        item.cache.truncate(item.length)
                raise

    def _forward(self, batch: Sequence[Work]) -> list[Output]:
        self._pool.move_idle(list({id(item.cache): item.cache for item in batch}.values()))
        silent, telling = [], []
        for item in batch:
            ids = item.ids.numpy().astype(np.int32)
            if isinstance(item, ScoreCandidates):
                telling += [Piece(ids[at : at + 1], item.length, item.cache, kept=False) for at in range(len(ids))]
                continue
            alone = len(ids) - 1 if len(ids) > FEW else 0
            if alone:
                silent.append(Piece(ids[:alone], item.length, item.cache))
            telling.append(Piece(ids[alone:], item.length + alone, item.cache))
        for group in grouped(silent, BATCH, BATCH):
            self._with_room(group, self._context.read)
        decoded = [self._with_room(group, self._context.decode) for group in self._groups(telling)]
        logits, hidden = decoded[0] if len(decoded) == 1 else map(np.concatenate, zip(*decoded, strict=True))
        return self._handed_out(batch, torch.from_numpy(logits), torch.from_numpy(hidden))

    def _groups(self, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
        """What one decode can tell: by rows, and by the numbers that are left for candidates."""
        return grouped(pieces, OUTPUTS, max(SPARE, self._pool.free - SPARE))

    def _with_room(self, pieces: Sequence[Piece], run: Callable[[list[Run]], T]) -> T:
        """One decode; parked caches make room for it where they must."""
        while True:
            taken: list[int] = []
            try:
                runs: list[Run] = []
                for piece in pieces:
                    number = piece.cache.number
                    if not piece.kept:
                        taken.append(self._pool.take(spare=True))
                        self._context.share(number, taken[-1], piece.start)
                        number = taken[-1]
                    runs.append((piece.ids, piece.start, number))
                return run(runs)
            except NoRoom:
                if not self._pool.make_room():
                    raise
            finally:
                for number in taken:
                    self._pool.give_back(number)

    def _handed_out(self, batch: Sequence[Work], logits: Tensor, hidden: Tensor) -> list[Output]:
        outputs: list[Output] = []
        row = 0
        for item in batch:
            if isinstance(item, ScoreCandidates):
                outputs.append(hidden[row : row + len(item.ids)])
                row += len(item.ids)
                continue
            row += len(item.ids) if len(item.ids) <= FEW else 1
            outputs.append(StepOutput(logits[row - 1], hidden[row - 1]))
            item.cache.length = item.length + len(item.ids)
        return outputs

    def interrupt(self) -> None:
        """Stop the forward under way, and all others until ``resume``: they raise ``Interrupted``. From any thread."""
        self._context.interrupt()

    def resume(self) -> None:
        """Forwards run through again."""
        self._context.resume()

    def close(self) -> None:
        """Free the model; nothing of it can be used afterwards."""
        with self.lock:
            self._context.close()


class Piece(NamedTuple):
    """Tokens of one sequence in a decode.

    Attributes:
        ids: ``[N]``.
        start: position of the first.
        cache: of the sequence.
        kept: they become part of it; else they are candidates after it.
    """

    ids: NDArray[np.int32]
    start: int
    cache: LlamaCppCache
    kept: bool = True


def grouped(pieces: Sequence[Piece], rows: int, candidates: int) -> Iterator[list[Piece]]:
    """The pieces, in order, in groups of at most so many rows and candidates; long ones are cut."""
    group: list[Piece] = []
    room, left = rows, candidates
    for piece in pieces:
        at = 0
        while at < len(piece.ids):
            if not room or not (piece.kept or left):
                yield group
                group, room, left = [], rows, candidates
            ids = piece.ids[at : at + room]
            group.append(Piece(ids, piece.start + at, piece.cache, piece.kept))
            room, left, at = room - len(ids), left - (not piece.kept), at + len(ids)
    if group:
        yield group
