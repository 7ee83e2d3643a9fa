"""The lean step and the selection with shapes that never change, so that each can be one captured graph.

    step     ids [n], positions [n]   over n rows of an arena      logits [n, V], hidden [n, H]
    look     candidates [K], length   over one row, read only      hidden [K, H]

The arithmetic is the lean step's own; only attention reads rows of fixed capacity (``static_attention``). The default
on CUDA for models that have a lean step. Whatever does not fit (memory, other people's hooks, an empty prefix) goes
the eager way, and so does everything after a capture that failed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .arena import Arena, Arenas
from .graphs import Body, CudaGraphs, Recorder
from .lean import Affine, LeanStep, close
from .lora import LoraLayer
from .prepack import Joint
from .static_attention import LookAttention, StepAttention
from .static_kv import StaticCache

_log = logging.getLogger(__name__)

GRAIN = 8
"""Candidates are filled up to a multiple of it, so that few graphs are captured."""

Outcome = tuple[Tensor, Tensor]
"""Logits ``[n, V]`` and last hidden states ``[n, H]``."""


class Steps:
    """One token for each of ``count`` rows of an arena, from ``first`` on."""

    def __init__(self, lean: LeanStep, arena: Arena, first: int, count: int, record: Recorder) -> None:
        kv, self._spare = arena.kv[:, :, first : first + count], arena.capacity - 1
        cos, sin = lean.rotation_table(arena.capacity)
        self._ids = torch.zeros(count, dtype=torch.long, device=kv.device)
        self._positions = torch.full_like(self._ids, self._spare)

        def body() -> tuple[Tensor, ...]:
            attention = StepAttention(kv[0].unbind(), kv[1].unbind(), self._positions)
            hidden = lean.through(self._ids, cos[self._positions], sin[self._positions], attention)
            return lean.logits(hidden), hidden

        self._play = Recorded(body, record)

    def __call__(self, ids: Tensor, lengths: Sequence[int], rows: Sequence[int]) -> Outcome:
        """Append ``ids`` ``[n]`` to the rows named, counted from ``first``; the others sit out.

        Returns:
            Logits ``[n, V]`` (fp32) and last hidden states ``[n, H]``.
        """
        if len(self._ids) == 1:
            self._ids.copy_(ids)
            self._positions.fill_(lengths[0])
            logits, hidden = self._play()
            return logits.clone(), hidden.clone()
        at, positions = torch.tensor([rows, lengths], device=self._ids.device)
        self._ids[at] = ids
        self._positions.fill_(self._spare)
        self._positions[at] = positions
        logits, hidden = self._play()
        return logits[at], hidden[at]


class Looks:
    """K candidates after one row of an arena.

    Args:
        lean: the layers.
        arena: which is read.
        row: which row.
        candidates: how many, after filling up.
        corrections: added to linear layers while the candidates go through.
        record: see ``graphs``.
    """

    def __init__(
        self,
        lean: LeanStep,
        arena: Arena,
        row: int,
        candidates: int,
        corrections: Mapping[nn.Module, LoraLayer],
        record: Recorder,
    ) -> None:
        kv = arena.kv[:, :, row : row + 1]
        cos, sin = lean.rotation_table(arena.capacity)
        self._ids = torch.zeros(candidates, dtype=torch.long, device=kv.device)
        self._length = torch.zeros(1, dtype=torch.long, device=kv.device)
        # A graph knows addresses: the weights must not go while it is there. They are those of its key, see below.
        self._weights = weights_of(corrections)
        corrected = linear_with(corrections, lean.linear)

        def body() -> tuple[Tensor, ...]:
            attention = LookAttention(kv[0].unbind(), kv[1].unbind(), self._length)
            return (lean.through(self._ids, cos[self._length], sin[self._length], attention, corrected),)

        self._play = Recorded(body, record)

    def __call__(self, candidates: Tensor, length: int) -> Tensor:
        """Last hidden states ``[K, H]`` of ``candidates`` ``[K]`` after the row's first ``length`` tokens."""
        self._ids.fill_(0)
        self._ids[: len(candidates)].copy_(candidates)
        self._length.fill_(length)
        (hidden,) = self._play()
        return hidden[: len(candidates)].clone()


class Recorded:
    """A body that is recorded when it is first wanted: its static buffers hold true inputs by then."""

    def __init__(self, body: Body, record: Recorder) -> None:
        self._body, self._record = body, record
        self._again: Body | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        """Play it."""
        if self._again is None:
            self._again = self._record(self._body)
        return self._again()


class StaticStep:
    """The step and the selection of one model over arenas. Not thread-safe: used under the model's lock.

    Args:
        lean: the model's lean step.
        record: how bodies are recorded.
        arenas: where sequences sit.

    Attributes:
        failed: something could not be captured, and the eager way is taken ever since.
    """

    def __init__(self, lean: LeanStep, record: Recorder, arenas: Arenas | None = None) -> None:
        self._lean, self._recorder = lean, record
        self.arenas = arenas or Arenas()
        self._steps: WeakKeyDictionary[Arena, dict[tuple[int, int], Steps]] = WeakKeyDictionary()
        self._looks: WeakKeyDictionary[Arena, dict[tuple[int, ...], Looks]] = WeakKeyDictionary()
        self.failed = False

    @torch.inference_mode()
    def step(self, ids: Tensor, lengths: Sequence[int], caches: Sequence[Cache]) -> Outcome | None:
        """Append one token to each sequence.

        Args:
            ids: ``[n]``.
            lengths: tokens in each cache.
            caches: grow by one token.

        Returns:
            Logits ``[n, V]`` (fp32) and last hidden states ``[n, H]``; None, and nothing has changed, where only the
            eager way is left.
        """
        ours = [cache for cache in caches if self._takes(cache)]
        if len(ours) < len(caches):
            return None
        with self._eager_after_failure():
            arena = self.arenas.together(ours, max(lengths) + 1)
            if arena is None:
                return None
            rows = [cache.seat.row for cache in ours if cache.seat is not None]
            # Rows are numbered from the first, so that a few sizes serve every set of them.
            first, count = (rows[0], 1) if len(rows) == 1 else (0, 1 << max(rows).bit_length())
            known = self._steps.setdefault(arena, {})
            if (first, count) not in known:
                known[first, count] = Steps(self._lean, arena, first, count, self._recorder)
            outcome = known[first, count](ids, lengths, [row - first for row in rows])
            for cache, length in zip(ours, lengths, strict=True):
                cache.advance(length + 1)
            return outcome
        return None

    @torch.inference_mode()
    def look_ahead(
        self, candidates: Tensor, cache: Cache, length: int, corrections: Mapping[nn.Module, LoraLayer]
    ) -> Tensor | None:
        """Last hidden state after each candidate.

        Args:
            candidates: ``[K]``.
            cache: the prefix's KV; left as it is.
            length: tokens in it.
            corrections: added to linear modules.

        Returns:
            ``[K, H]``; None where only the eager way is left.
        """
        if not length or not self._takes(cache):
            return None
        with self._eager_after_failure():
            arena = self.arenas.together([cache], length + 1)
            if arena is None or cache.seat is None:
                return None
            filled = -(-len(candidates) // GRAIN) * GRAIN
            key = (cache.seat.row, filled, *(weight.data_ptr() for weight in weights_of(corrections)))
            known = self._looks.setdefault(arena, {})
            if key not in known:
                known[key] = Looks(self._lean, arena, cache.seat.row, filled, corrections, self._recorder)
            return known[key](candidates, length)
        return None

    def _takes(self, cache: Cache) -> TypeGuard[StaticCache]:
        """Whether a sequence can sit: it has tokens, and nothing has failed so far."""
        return not self.failed and isinstance(cache, StaticCache) and len(cache.layers) == self._lean.layers

    @contextmanager
    def _eager_after_failure(self) -> Iterator[None]:
        """What can not be captured is not tried again; it is said once."""
        try:
            yield
        except RuntimeError as error:
            self.failed = True
            _log.warning("steps and selections go on without captured graphs: %s", error)


def weights_of(corrections: Mapping[nn.Module, LoraLayer]) -> list[Tensor]:
    """All matrices of some corrections."""
    return [weight for layer in corrections.values() for weight in (layer.a, layer.b)]


def linear_with(corrections: Mapping[nn.Module, LoraLayer], linear: Affine) -> Affine:
    """The affine map and what the corrections add to it."""

    def corrected(joint: Joint, x: Tensor) -> tuple[Tensor, ...]:
        outputs = zip(joint.modules, linear(joint, x), strict=True)
        layers = ((corrections.get(module), out) for module, out in outputs)
        return tuple(out if layer is None else out + layer(x) for layer, out in layers)

    return corrected


def static_step_of(model: Any, lean: LeanStep | None) -> StaticStep | None:
    """The static step of a model on CUDA, if its graphs can be captured and say what the lean step says."""
    if lean is None or model.device.type != "cuda":
        return None
    static = StaticStep(lean, CudaGraphs(model.device))
    return static if agrees(model, lean, static) else None


@torch.inference_mode()
def agrees(model: Any, lean: LeanStep, static: StaticStep) -> bool:
    """Two tokens after three, both ways: the second is a replay at another position."""
    ids = torch.tensor([1, 2, 3, 4, 5], device=model.device) % model.get_input_embeddings().weight.shape[0]
    cache = StaticCache()
    model(input_ids=ids[None, :3], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for at in (3, 4):
        found = static.step(ids[at : at + 1], [at], [cache])
        if found is None:
            return False
        cache.crop(-1)
        theirs, _ = lean(ids[at : at + 1], [at], [cache])
        if not close(found[0], theirs, model.dtype):
            _log.warning("steps go without captured graphs: their logits are not those of the eager step")
            return False
    return True
