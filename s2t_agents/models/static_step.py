"""The lean step and the selection with shapes that never change, so that each can be one captured graph.

    step     ids [n], positions [n]   over n rows of an arena      logits [n, V], hidden [n, H], glance
    look     candidates [K], length   over one row, read only      hidden [K, H]

The arithmetic is the lean step's own; attention reads rows of fixed capacity (``static_attention``), and what stands
between the products is fused (``pointwise``). The default on CUDA for models that have a lean step. Whatever does not
fit (memory, other people's hooks, an empty prefix) goes the eager way, and so does everything after a capture that
failed, or for a while where memory was out.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .arena import Arena, Arenas
from .candidate_rows import CandidateRows
from .graphs import CudaGraphs, Recorder
from .lean import LeanStep, close
from .packed import Look, Outcome, Part, Segment
from .pointwise import PLAIN, Pointwise, fused
from .prepack import state_of
from .static_bodies import Looks, Steps, Way
from .static_kv import Begun, StaticCache

_log = logging.getLogger(__name__)

GRAIN = 8
"""Candidates are filled up to a multiple of it, so that few graphs are captured."""

RETRY_S = 60.0
"""Seconds that all goes the eager way once the device's memory was out; others may have given some back by then."""

SURE = 3
"""Tokens in a row that were the model's own choice, after which its next choice is read before anybody asks."""


class StaticStep:
    """The step and the selection of one model over arenas. Not thread-safe: used under the model's lock.

    Args:
        rows: the model's lean step, and where adapters correct it.
        record: how bodies are recorded.
        arenas: where sequences sit.
        ops: how what is no product is computed.

    Attributes:
        failed: something could not be captured, and the eager way is taken ever since.
    """

    def __init__(
        self, rows: CandidateRows, record: Recorder, arenas: Arenas | None = None, ops: Pointwise = PLAIN
    ) -> None:
        self._rows, self._way = rows, Way(rows.step, ops, record)
        self.arenas = arenas or Arenas()
        self._steps: WeakKeyDictionary[Arena, dict[tuple[int, int], Steps]] = WeakKeyDictionary()
        self._looks: WeakKeyDictionary[Arena, dict[tuple[Hashable, ...], Looks]] = WeakKeyDictionary()
        self.failed = False
        self._resumes = 0.0

    def serve(self, parts: Sequence[Part]) -> dict[int, Outcome | Tensor]:
        """Steps of one token each in one graph, looks in one each.

        Args:
            parts: any; stretches of tokens are left to others.

        Returns:
            For the parts that were served, by their place: logits ``[V]`` (fp32) and last hidden state ``[H]`` of a
            step, last hidden states ``[K, H]`` of a look. Nothing has changed for the others.
        """
        said: dict[int, Outcome | Tensor] = {}
        steps = {at: part for at, part in enumerate(parts) if isinstance(part, Segment) and len(part.ids) == 1}
        if steps and all(part.length for part in steps.values()):
            ids, segments = torch.cat([part.ids for part in steps.values()]).tolist(), steps.values()
            found = self.step(ids, [each.length for each in segments], [each.cache for each in segments])
            said.update(zip(steps, found, strict=True) if found is not None else ())
        for at, part in enumerate(parts):
            looked = self.look_ahead(part) if isinstance(part, Look) else None
            if looked is not None:
                said[at] = looked
        return said

    @torch.inference_mode()
    def step(self, ids: Sequence[int], lengths: Sequence[int], caches: Sequence[Cache]) -> list[Outcome] | None:
        """Append one token to each sequence. The next step may be under way at the end, see ``static_bodies``.

        Args:
            ids: one for each.
            lengths: tokens in each cache.
            caches: grow by one token.

        Returns:
            Logits ``[V]`` (fp32) and last hidden state ``[H]`` of each; None, and nothing has changed, where only the
            eager way is left.
        """
        ours = [cache for cache in caches if self._takes(cache)]
        if len(ours) < len(caches):
            return None
        asked = monotonic()
        with self._eager_after_failure():
            arena = self.arenas.together(ours, max(lengths) + 1)
            if arena is None:
                return None
            begun = [cache.follow(*next_) for cache, *next_ in zip(ours, ids, lengths, strict=True)]
            first, steps = self._steps_of(arena, ours)
            rows = [cache.seat.row - first for cache in ours if cache.seat is not None]
            now = _all_begun(steps, begun, rows, ids, lengths)
            following = steps.after(now, rows) if _goes_on(steps, ours, now) else []
            for cache, each in zip(ours, now, strict=True):
                cache.advance(each.position + 1, each.play.glances[each.row])
                cache.unseen_s = max(0.0, each.play.device_s - (monotonic() - asked)) / len(now)
            for cache, each, ahead in zip(ours, now, following, strict=False):
                ahead.token, cache.begun = each.play.glances[each.row].best, ahead
            return [each.outcome for each in now]
        return None

    def _steps_of(self, arena: Arena, caches: Sequence[StaticCache]) -> tuple[int, Steps]:
        """The graph for some sequences, and the first row of it."""
        known = self._steps.setdefault(arena, {})
        rows = [cache.seat.row for cache in caches if cache.seat is not None]
        # Rows are numbered from the first, so that a few sizes serve every set of them. One that is alone for a while
        # is worth a graph of its own, which takes longer to capture than many steps.
        key = (0, 1 << max(rows).bit_length())
        if len(rows) == 1 and (key not in known or caches[0].hits >= SURE):
            key = (rows[0], 1)
        if key not in known:
            known[key] = Steps(self._way, arena, *key)
        return key[0], known[key]

    @torch.inference_mode()
    def look_ahead(self, look: Look) -> Tensor | None:
        """Last hidden state after each candidate, ``[K, H]``; None where only the eager way is left."""
        cache, length = look.cache, look.length
        if not length or not self._takes(cache):
            return None
        with self._eager_after_failure():
            arena = self.arenas.together([cache], length + 1)
            if arena is None or cache.seat is None:
                return None
            filled = -(-len(look.ids) // GRAIN) * GRAIN
            corrections = self._rows.corrections(look.lora) if look.lora is not None else {}
            weights = [weight for layer in corrections.values() for weight in (layer.a, layer.b)]
            key = (cache.seat.row, filled, *map(state_of, weights))
            known = self._looks.setdefault(arena, {})
            if key not in known:
                known[key] = Looks(self._way, arena, cache.seat.row, filled, corrections)
            return known[key](look.ids, length)
        return None

    def _takes(self, cache: Cache) -> TypeGuard[StaticCache]:
        """Whether a sequence can sit: it has tokens, nothing has failed so far, and memory was not out just now."""
        ours = isinstance(cache, StaticCache) and len(cache.layers) == self._way.lean.layers
        return ours and not self.failed and monotonic() >= self._resumes

    @contextmanager
    def _eager_after_failure(self) -> Iterator[None]:
        """What cannot be captured is not tried again, what finds no memory is, later; either is said."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._resumes = monotonic() + RETRY_S
            _log.warning("for %.0f s steps and selections go on without captured graphs: %s", RETRY_S, error)
        except RuntimeError as error:
            self.failed = True
            _log.warning("steps and selections go on without captured graphs: %s", error)


def _all_begun(
    steps: Steps, begun: Sequence[Begun | None], rows: Sequence[int], ids: Sequence[int], lengths: Sequence[int]
) -> list[Begun]:
    """The steps of all sequences: those under way, and those that nobody has foreseen."""
    missing = [at for at, each in enumerate(begun) if each is None]
    if not missing:
        return [each for each in begun if each is not None]
    fresh = iter(steps.begin(*([each[at] for at in missing] for each in (rows, ids, lengths))))
    return [next(fresh) if each is None else each for each in begun]


def _goes_on(steps: Steps, caches: Sequence[StaticCache], now: Sequence[Begun]) -> bool:
    """Whether the next step is worth beginning: one play for all, of whom each has followed the model for a while."""
    together = all(each.play is now[0].play for each in now)
    return together and all(
        cache.hits >= SURE and each.position < steps.last for cache, each in zip(caches, now, strict=True)
    )


def static_step_of(model: Any, rows: CandidateRows) -> StaticStep | None:
    """The static step of a model on CUDA, if its graphs can be captured and say what the lean step says."""
    if model.device.type != "cuda":
        return None
    static = StaticStep(rows, CudaGraphs(model.device), ops=fused())
    return static if agrees(model, rows.step, static) else None


@torch.inference_mode()
def agrees(model: Any, lean: LeanStep, static: StaticStep) -> bool:
    """Two tokens after three, both ways: the second is a replay at another position."""
    ids = torch.tensor([1, 2, 3, 4, 5], device=model.device) % model.get_input_embeddings().weight.shape[0]
    cache = StaticCache()
    model(input_ids=ids[None, :3], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for at in (3, 4):
        found = static.step(ids[at : at + 1].tolist(), [at], [cache])
        if found is None:
            return False
        ((ours, _),) = found
        cache.crop(-1)
        theirs, _ = lean(ids[at : at + 1], [at], [cache])
        if not close(ours, theirs[0], model.dtype):
            _log.warning("steps go without captured graphs: their logits are not those of the eager step")
            return False
    return True
