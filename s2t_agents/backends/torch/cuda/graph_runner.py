"""The lean step and the selection with shapes that never change, so that each can be one captured graph.

    step      ids [n], positions [n]   over n rows of an arena      logits [n, V], hidden [n, H], glance
    stretch   ids [N], length          over one row                 logits [V], hidden [H], glance
    look      candidates [K], length   over one row, read only      hidden [K, H]

The arithmetic is the lean step's own; attention reads rows of fixed capacity (``static_attention``), and what stands
between the products is fused (``pointwise``). The default on CUDA for models that have a lean step. Whatever does not
fit (memory, other people's hooks, an empty prefix) goes the eager way, and so does everything after a capture that
failed, or for a while where memory was out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..decoder_batch import CandidateRows
from ..fused_ops import PLAIN, Pointwise, fused
from ..llama_decoder import close
from ..packed_batch import Look, Outcome, Part, Segment
from .cuda_graph import RETRY_S, CudaGraphs, Recorder, out_of_memory
from .decode_graphs import Looks, Steps, Way, state_of_all
from .kv_pool import Arena, Arenas
from .pooled_kv_cache import SURE, Begun, Play, StaticCache
from .prefill_graphs import OFTEN, StretchReader, filled

_log = logging.getLogger(__name__)

LooksBy = WeakKeyDictionary[nn.Module, dict[tuple[int, int], Looks]]
"""By adapter (the base itself where there is none), then by row and number of candidates."""

GRAIN = 8
"""Candidates are filled up to a multiple of it, so that few graphs are captured."""

_WITHOUT = "steps and selections go on without captured graphs of this kind"

LONE = 16
"""Steps in a row that a sequence takes alone, after which it is worth a graph of its own."""


@dataclass(frozen=True, eq=False)
class Turn:
    """One token that a sequence takes, or several.

    Attributes:
        cache: the sequence, which grows by them.
        ids: which they are.
        length: tokens before them.
    """

    cache: StaticCache
    ids: Sequence[int]
    length: int

    def begun(self) -> Begun | None:
        """The step of one token, if it is under way already."""
        return self.cache.follow(self.ids[0], self.length)


class StaticStep:
    """The step and the selection of one model over arenas. Not thread-safe: used under the model's lock.

    Args:
        rows: the model's lean step, and where adapters correct it.
        record: how bodies are recorded.
        arenas: where sequences sit.
        ops: how what is no product is computed.
        way: of which kind bodies are.
        often: see ``static_stretches.OFTEN``.

    Attributes:
        failed: something could not be captured, and the eager way is taken ever since.
    """

    def __init__(
        self,
        rows: CandidateRows,
        record: Recorder,
        arenas: Arenas | None = None,
        ops: Pointwise = PLAIN,
        way: type[Way] = Way,
        often: float = OFTEN,
    ) -> None:
        self._rows, self._way = rows, way(rows.step, ops, record)
        self.arenas = arenas or Arenas()
        self._steps: WeakKeyDictionary[Arena, dict[tuple[int, int], Steps]] = WeakKeyDictionary()
        self._looks: WeakKeyDictionary[Arena, LooksBy] = WeakKeyDictionary()
        self._stretches = StretchReader(rows, self._way, often)
        self._parameters = [module._parameters for module in rows.base.modules() if module._parameters]
        self._addresses = self._weights_lie()
        self.failed = False
        self._resumes = 0.0
        self._ahead: list[Play] = []
        """Begun by the last call, and waited for by nobody so far."""
        self._left = 0.0
        """When the last call ended."""

    @property
    def captured(self) -> dict[str, int]:
        """How many bodies of each kind there are."""
        return {
            "steps": sum(len(each) for each in self._steps.values()),
            "stretches": len(self._stretches),
            "looks": sum(len(each) for by in self._looks.values() for each in by.values()),
        }

    def serve(self, parts: Sequence[Part]) -> dict[int, Outcome | Tensor]:
        """Steps of one token each in one graph, stretches and looks in one each.

        Args:
            parts: any; stretches that are long or rare are left to others.

        Returns:
            For the parts that were served, by their place: logits ``[V]`` (fp32) and last hidden state ``[H]`` of a
            step, last hidden states ``[K, H]`` of a look. Nothing has changed for the others.
        """
        for play in self._ahead:  # whoever asks now waits for what is left of it
            play.alone_s = monotonic() - self._left
        self._ahead = []
        said = self._served(parts)
        if any(isinstance(part, Look) for part in parts):
            self._ahead = []  # this call goes on until the device has done all that it has begun
        self._left = monotonic()
        return said

    def pass_over(self, parts: Sequence[Part]) -> None:
        """Some parts go the eager way: it waits for all that was begun, and writes where its steps have written."""
        self._ahead = []
        for part in parts:
            if isinstance(part.cache, StaticCache):
                part.cache.begun = None

    def _served(self, parts: Sequence[Part]) -> dict[int, Outcome | Tensor]:
        said: dict[int, Outcome | Tensor] = {}
        self._renew()
        turns = self._turns(parts)
        if turns:
            found = zip(turns, self.step(list(turns.values())), strict=True)
            said.update((at, outcome) for at, outcome in found if outcome is not None)
        for at, part in enumerate(parts):
            looked = self.look_ahead(part) if isinstance(part, Look) else None
            if looked is not None:
                said[at] = looked
        return said

    def _renew(self) -> None:
        """Graphs read weights where these lay at the capture: once any lies elsewhere, all graphs are made anew."""
        addresses = self._weights_lie()
        if addresses == self._addresses:
            return
        self._addresses = addresses
        self._steps.clear()
        self._stretches.clear()
        self._looks.clear()
        for cache in self.arenas.guests():
            cache.begun = None

    def _weights_lie(self) -> list[int]:
        """The addresses of the base's weights."""
        return [each.data_ptr() for module in self._parameters for each in module.values() if each is not None]

    def _turns(self, parts: Sequence[Part]) -> dict[int, Turn]:
        """Those parts that are tokens, by their place."""
        return {
            at: Turn(part.cache, part.ids.tolist(), part.length)
            for at, part in enumerate(parts)
            if isinstance(part, Segment)
            and self._takes(part.cache)
            and (len(part.ids) == 1 or self._stretches.worth(len(part.ids)))
        }

    @torch.inference_mode()
    def step(self, turns: Sequence[Turn]) -> list[Outcome | None]:
        """Append tokens to each sequence. The next step may be under way at the end, see ``static_bodies``.

        Returns:
            Logits ``[V]`` (fp32) and last hidden state ``[H]`` of each; None, and nothing has changed, for those to
            whom only the eager way is left.
        """
        said: dict[Turn, Outcome] = {}
        with self._eager_after_failure():
            needed = [turn.length + filled(turn.ids) for turn in turns]
            arenas = self.arenas.seat([turn.cache for turn in turns], needed)
            # Asked once: whoever is interrupted while others lead takes his KV out of its row at any time.
            seats = [turn.cache.seat for turn in turns]
            for arena in dict.fromkeys(each for each in arenas if each is not None):
                here = zip(turns, arenas, seats, strict=True)
                rows = {t: seat.row for t, each, seat in here if each is arena and seat and seat.arena is arena}
                said.update(self._together(arena, rows))
        return [said.get(turn) for turn in turns]

    def _together(self, arena: Arena, rows: Mapping[Turn, int]) -> dict[Turn, Outcome]:
        """Steps and stretches of sequences in rows of one arena; stretches that could not be read are missing."""
        read = {
            turn: self._stretches.read(arena, row, turn.cache, turn.ids, turn.length)
            for turn, row in rows.items()
            if len(turn.ids) > 1
        }
        turns = [turn for turn in rows if read.get(turn, turn) is not None]
        if not turns:
            return {}
        begun = [read.get(turn) or turn.begun() for turn in turns]
        for turn in turns:
            turn.cache.lone = turn.cache.lone + 1 if len(turns) == 1 else 0
        first, steps = self._steps_of(arena, [rows[turn] for turn in turns], lone=turns[0].cache.lone)
        places = [rows[turn] - first for turn in turns]
        now = _all_begun(steps, begun, places, turns)
        following = steps.after(now, places) if _goes_on(steps, turns, now) else []
        self._ahead += [each.play for each in following[:1]]
        for turn, each in zip(turns, now, strict=True):
            turn.cache.advance(each.position + 1, each.play.glances[each.row])
            turn.cache.unseen_s = each.play.unseen_s
        for turn, each, ahead in zip(turns, now, following, strict=False):
            ahead.token, turn.cache.begun = each.play.glances[each.row].best, ahead
        return {turn: each.outcome for turn, each in zip(turns, now, strict=True)}

    def _steps_of(self, arena: Arena, rows: Sequence[int], lone: int) -> tuple[int, Steps]:
        """The graph for some rows, and the first row of it."""
        known = self._steps.setdefault(arena, {})
        # Rows are numbered from the first, so that a few sizes serve every set of them. One that is alone for a while
        # is worth a graph of its own, which takes longer to capture than many steps.
        key = (0, 1 << max(rows).bit_length())
        if len(rows) == 1 and (key not in known or lone >= LONE):
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
            (arena,) = self.arenas.seat([cache], [length + 1])
            if arena is None or cache.seat is None:
                return None
            candidates = -(-len(look.ids) // GRAIN) * GRAIN
            corrections = self._rows.corrections(look.lora) if look.lora is not None else {}
            known = self._looks.setdefault(arena, WeakKeyDictionary()).setdefault(look.lora or self._rows.base, {})
            key = (cache.seat.row, candidates)
            if key not in known or known[key].state != state_of_all(corrections):
                known[key] = Looks(self._way, arena, cache.seat.row, candidates, corrections)
            return known[key](look.ids, length)
        return None

    def _takes(self, cache: Cache) -> TypeGuard[StaticCache]:
        """Whether a sequence can sit: nothing has failed so far, and memory was not out just now."""
        if self.failed or monotonic() < self._resumes or not isinstance(cache, StaticCache):
            return False
        if not cache.layers:
            cache.start(self._way.lean.no_kv())
        return len(cache.layers) == self._way.lean.layers

    @contextmanager
    def _eager_after_failure(self) -> Iterator[None]:
        """What cannot be captured is not tried again, what finds no memory is, later; either is said."""
        try:
            yield
        except RuntimeError as error:
            if out_of_memory(error):
                self._resumes = monotonic() + RETRY_S
                _log.warning("for %.0f s steps and selections go on without captured graphs: %s", RETRY_S, error)
            else:
                self.failed = True
                _log.warning("steps and selections go on without captured graphs: %s", error)


def _all_begun(steps: Steps, begun: Sequence[Begun | None], rows: Sequence[int], turns: Sequence[Turn]) -> list[Begun]:
    """The steps of all sequences: those under way, and those that nobody has foreseen."""
    missing = [(row, turn) for row, turn, each in zip(rows, turns, begun, strict=True) if each is None]
    fresh: Iterator[Begun] = iter(())
    if missing:
        tokens, lengths = [turn.ids[0] for _, turn in missing], [turn.length for _, turn in missing]
        fresh = iter(steps.begin([row for row, _ in missing], tokens, lengths))
    return [next(fresh) if each is None else each for each in begun]


def _goes_on(steps: Steps, turns: Sequence[Turn], now: Sequence[Begun]) -> bool:
    """Whether the next step is worth beginning: half of them at least have followed the model for a while."""
    sure = sum(turn.cache.hits >= SURE for turn in turns)
    return 2 * sure >= len(turns) and all(each.position < steps.last for each in now)


def static_step_of(model: Any, rows: CandidateRows) -> StaticStep | None:
    """The static step of a model on CUDA, if its graphs can be captured and say what the lean step says."""
    if model.device.type != "cuda":
        return None
    for way in ways():
        static = StaticStep(rows, CudaGraphs(model.device), ops=fused(), way=way)
        if agrees(model, rows, static):
            return static
    return None


def ways() -> list[type[Way]]:
    """How a step can be made on this machine, the fastest first."""
    try:
        from .triton_decode import KernelWay
    except ImportError as error:
        _log.info("steps go without kernels of their own: %s", error)
        return [Way]
    return [KernelWay, Way]


@torch.inference_mode()
def agrees(model: Any, rows: CandidateRows, static: StaticStep) -> bool:
    """Two tokens after three, both ways: the second is a replay at another position; and candidates after them."""
    ids = torch.tensor([1, 2, 3, 4, 5], device=model.device) % model.get_input_embeddings().weight.shape[0]
    cache = StaticCache()
    model(input_ids=ids[None, :3], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for at in (3, 4):
        (said,) = static.step([Turn(cache, [int(ids[at])], at)])
        if said is None:
            return False
        ours, _ = said
        cache.crop(-1)
        theirs, _ = rows.step(ids[at : at + 1], [at], [cache])
        if not close(ours, theirs[0], model.dtype):
            _log.warning("%s: the logits are not those of the eager step", _WITHOUT)
            return False
    look = Look(ids, cache, 5)
    looked, (eager,) = static.look_ahead(look), rows([look])
    if looked is None:
        return False
    assert isinstance(eager, Tensor)
    if not close(rows.step.logits(looked), rows.step.logits(eager), model.dtype):
        _log.warning("%s: candidates' logits are not those of the eager way", _WITHOUT)
        return False
    return True
