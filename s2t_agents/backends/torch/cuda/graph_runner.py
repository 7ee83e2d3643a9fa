"""The graph runner: decode steps, chunks of prompts and candidate scoring as captured graphs of fixed shapes.

    decode       ids [n], positions [n]   over n rows of a KV pool   logits [n, V], hidden [n, H], statistics
    chunk        ids [N], length          over one row               logits [V], hidden [H], statistics
    candidates   ids [K], length          over one row, read only    hidden [K, H]

The arithmetic is that of ``llama_decoder``; attention reads rows of fixed capacity (``cuda.attention``), and operations
between the products are fused (``fused_ops``). The default on CUDA for the architectures of ``llama_decoder``. What
does not fit (memory, hooks on modules, an empty prefix) takes the eager path, and so does everything after a capture
that failed, or for a while after memory was out.
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

from ...base import Append, Output, ScoreCandidates, StepOutput, Work
from ..decoder_batch import DecoderBatch
from ..fused_ops import EAGER, PointwiseOps, compiled_ops
from ..llama_decoder import close
from .cuda_graph import RETRY_S, CudaGraphs, Recorder, out_of_memory
from .decode_graphs import CandidateGraph, DecodeGraph, GraphBuilder, state_of_all
from .in_flight import InFlightRow, InFlightStep
from .kv_pool import SURE, KVPool, KVPools, PooledKVCache
from .prefill_graphs import OFTEN, PrefillGraphs, filled

_log = logging.getLogger(__name__)

ScoringGraphsBy = WeakKeyDictionary[nn.Module, dict[tuple[int, int], CandidateGraph]]
"""By adapter (the base itself where there is none), then by row and number of candidates."""

GRAIN = 8
"""Candidates are filled up to a multiple of it, so that few graphs are captured."""

_WITHOUT = "steps and selections go on without captured graphs of this kind"

ALONE_STEPS = 16
"""Steps in a row that a sequence takes alone, after which it is worth a graph of its own."""


@dataclass(frozen=True, eq=False)
class TokenAppend:
    """One token that a sequence takes, or several.

    Attributes:
        cache: the sequence, which grows by them.
        ids: which they are.
        length: tokens before them.
    """

    cache: PooledKVCache
    ids: Sequence[int]
    length: int

    def in_flight(self) -> InFlightRow | None:
        """The step of one token, if it is under way already."""
        return self.cache.follow(self.ids[0], self.length)


class GraphRunner:
    """The step and the selection of one model over KV pools. Not thread-safe: used under the model's lock.

    Args:
        eager: the model's written-out decoder, and where adapters correct it.
        record: how bodies are recorded.
        pools: where sequences lie.
        ops: how everything but matrix products is computed.
        builder: of which kind bodies are.
        often: see ``prefill_graphs.OFTEN``.

    Attributes:
        failed: something could not be captured, and the eager path is taken ever since.
        pools: where sequences lie.
        prefill_graphs: chunks of prompts.
    """

    def __init__(
        self,
        eager: DecoderBatch,
        record: Recorder,
        pools: KVPools | None = None,
        ops: PointwiseOps = EAGER,
        builder: type[GraphBuilder] = GraphBuilder,
        often: float = OFTEN,
    ) -> None:
        self._eager, self._builder = eager, builder(eager.decoder, ops, record)
        self.pools = pools or KVPools()
        self._decode_graphs: WeakKeyDictionary[KVPool, dict[tuple[int, int], DecodeGraph]] = WeakKeyDictionary()
        self._scoring_graphs: WeakKeyDictionary[KVPool, ScoringGraphsBy] = WeakKeyDictionary()
        self.prefill_graphs = PrefillGraphs(eager, self._builder, often)
        self._parameters = [module._parameters for module in eager.base.modules() if module._parameters]
        self._addresses = self._weights_lie()
        self.failed = False
        self._resumes = 0.0
        self._ahead: list[InFlightStep] = []
        """Begun by the last call, and not waited for so far."""
        self._left = 0.0
        """When the last call ended."""

    @property
    def captured(self) -> dict[str, int]:
        """How many bodies of each kind there are."""
        return {
            "decode": sum(len(each) for each in self._decode_graphs.values()),
            "prefill": len(self.prefill_graphs.sizes),
            "candidates": sum(len(each) for by in self._scoring_graphs.values() for each in by.values()),
        }

    def serve(self, parts: Sequence[Work]) -> dict[int, Output]:
        """Steps of one token each in one graph, chunks and candidate scorings in one each.

        Args:
            parts: any; chunks that are long or rare are left to others.

        Returns:
            For the parts that were served, by their place: logits ``[V]`` (fp32) and last hidden state ``[H]`` of a
            step, last hidden states ``[K, H]`` of candidate scoring. Nothing has changed for the others.
        """
        for step in self._ahead:  # this call waits for what is left of it
            step.alone_s = monotonic() - self._left
        self._ahead = []
        outputs = self._served(parts)
        if any(isinstance(part, ScoreCandidates) for part in parts):
            self._ahead = []  # this call goes on until the device has done all that it has begun
        self._left = monotonic()
        return outputs

    def pass_over(self, parts: Sequence[Work]) -> None:
        """Some parts go the eager path: it waits for all that was begun, and writes where its steps have written."""
        self._ahead = []
        for part in parts:
            if isinstance(part.cache, PooledKVCache):
                part.cache.in_flight = None

    def _served(self, parts: Sequence[Work]) -> dict[int, Output]:
        outputs: dict[int, Output] = {}
        self._renew()
        appends = self._token_appends(parts)
        if appends:
            found = zip(appends, self.step(list(appends.values())), strict=True)
            outputs.update((at, outcome) for at, outcome in found if outcome is not None)
        for at, part in enumerate(parts):
            scored = self.score_candidates(part) if isinstance(part, ScoreCandidates) else None
            if scored is not None:
                outputs[at] = scored
        return outputs

    def _renew(self) -> None:
        """Graphs read weights where these lay at the capture: once any lies elsewhere, all graphs are made anew."""
        addresses = self._weights_lie()
        if addresses == self._addresses:
            return
        self._addresses = addresses
        self._decode_graphs.clear()
        self.prefill_graphs.clear()
        self._scoring_graphs.clear()
        for cache in self.pools.occupants():
            cache.in_flight = None

    def _weights_lie(self) -> list[int]:
        """The addresses of the base's weights."""
        return [each.data_ptr() for module in self._parameters for each in module.values() if each is not None]

    def _token_appends(self, parts: Sequence[Work]) -> dict[int, TokenAppend]:
        """Those parts that are tokens, by their place."""
        return {
            at: TokenAppend(part.cache, part.ids.tolist(), part.length)
            for at, part in enumerate(parts)
            if isinstance(part, Append)
            and part.lora is None
            and self._takes(part.cache)
            and (len(part.ids) == 1 or self.prefill_graphs.worth(len(part.ids)))
        }

    @torch.inference_mode()
    def step(self, appends: Sequence[TokenAppend]) -> list[StepOutput | None]:
        """Append tokens to each sequence. The next step may be under way at the end, see ``decode_graphs``.

        Returns:
            Logits ``[V]`` (fp32) and last hidden state ``[H]`` of each; None, and nothing has changed, for those to
            whom only the eager path is left.
        """
        outputs: dict[TokenAppend, StepOutput] = {}
        with self._eager_after_failure():
            needed = [append.length + filled(append.ids) for append in appends]
            pools = self.pools.slot([append.cache for append in appends], needed)
            # Read once: a sequence whose caller is interrupted may leave its row at any time.
            slots = [append.cache.slot for append in appends]
            for pool in dict.fromkeys(each for each in pools if each is not None):
                here = zip(appends, pools, slots, strict=True)
                rows = {t: slot.row for t, each, slot in here if each is pool and slot and slot.pool is pool}
                outputs.update(self._step_pool(pool, rows))
        return [outputs.get(append) for append in appends]

    def _step_pool(self, pool: KVPool, rows: Mapping[TokenAppend, int]) -> dict[TokenAppend, StepOutput]:
        """Steps and chunks of sequences in rows of one KV pool; chunks that could not be read are missing."""
        read = {
            append: self.prefill_graphs.read(pool, row, append.cache, append.ids, append.length)
            for append, row in rows.items()
            if len(append.ids) > 1
        }
        appends = [append for append in rows if read.get(append, append) is not None]
        if not appends:
            return {}
        in_flight = [read.get(append) or append.in_flight() for append in appends]
        for append in appends:
            append.cache.alone_steps = append.cache.alone_steps + 1 if len(appends) == 1 else 0
        first, steps = self._steps_of(
            pool, [rows[append] for append in appends], alone_steps=appends[0].cache.alone_steps
        )
        places = [rows[append] - first for append in appends]
        now = _all_begun(steps, in_flight, places, appends)
        following = steps.after(now, places) if _goes_on(steps, appends, now) else []
        self._ahead += [each.step for each in following[:1]]
        for append, each in zip(appends, now, strict=True):
            append.cache.advance(each.position + 1, each.step.statistics_of_rows[each.row])
            append.cache.device_alone_s = each.step.device_alone_s
        for append, each, prefetched in zip(appends, now, following, strict=False):
            prefetched.token, append.cache.in_flight = each.step.statistics_of_rows[each.row].best, prefetched
        return {append: StepOutput(*each.output) for append, each in zip(appends, now, strict=True)}

    def _steps_of(self, pool: KVPool, rows: Sequence[int], alone_steps: int) -> tuple[int, DecodeGraph]:
        """The graph for some rows, and the first row of it."""
        known = self._decode_graphs.setdefault(pool, {})
        # Rows are numbered from the first, so that a few sizes serve every set of them. One that is alone for a while
        # is worth a graph of its own, which takes longer to capture than many steps.
        key = (0, 1 << max(rows).bit_length())
        if len(rows) == 1 and (key not in known or alone_steps >= ALONE_STEPS):
            key = (rows[0], 1)
        if key not in known:
            known[key] = DecodeGraph(self._builder, pool, *key)
        return key[0], known[key]

    @torch.inference_mode()
    def score_candidates(self, scoring: ScoreCandidates) -> Tensor | None:
        """Last hidden state after each candidate, ``[K, H]``; None where only the eager path is left."""
        cache, length = scoring.cache, scoring.length
        if not length or not self._takes(cache):
            return None
        with self._eager_after_failure():
            (pool,) = self.pools.slot([cache], [length + 1])
            if pool is None or cache.slot is None:
                return None
            candidates = -(-len(scoring.ids) // GRAIN) * GRAIN
            corrections = self._eager.corrections(scoring.lora) if scoring.lora is not None else {}
            known = self._scoring_graphs.setdefault(pool, WeakKeyDictionary()).setdefault(
                scoring.lora or self._eager.base, {}
            )
            key = (cache.slot.row, candidates)
            if key not in known or known[key].state != state_of_all(corrections):
                known[key] = CandidateGraph(self._builder, pool, cache.slot.row, candidates, corrections)
            return known[key](scoring.ids, length)
        return None

    def _takes(self, cache: Cache) -> TypeGuard[PooledKVCache]:
        """Whether a sequence can take a slot: nothing has failed so far, and memory was not out just now."""
        if self.failed or monotonic() < self._resumes or not isinstance(cache, PooledKVCache):
            return False
        if not cache.layers:
            cache.start(self._builder.llama_decoder.no_kv())
        return len(cache.layers) == self._builder.llama_decoder.layers

    @contextmanager
    def _eager_after_failure(self) -> Iterator[None]:
        """What cannot be captured is not tried again, what finds no memory is, later; either is logged."""
        try:
            yield
        except RuntimeError as error:
            if out_of_memory(error):
                self._resumes = monotonic() + RETRY_S
                _log.warning("for %.0f s steps and selections go on without captured graphs: %s", RETRY_S, error)
            else:
                self.failed = True
                _log.warning("steps and selections go on without captured graphs: %s", error)


def _all_begun(
    steps: DecodeGraph, in_flight: Sequence[InFlightRow | None], rows: Sequence[int], appends: Sequence[TokenAppend]
) -> list[InFlightRow]:
    """The steps of all sequences: those under way, and new ones for the rest."""
    missing = [(row, append) for row, append, each in zip(rows, appends, in_flight, strict=True) if each is None]
    fresh: Iterator[InFlightRow] = iter(())
    if missing:
        tokens, lengths = [append.ids[0] for _, append in missing], [append.length for _, append in missing]
        fresh = iter(steps.begin([row for row, _ in missing], tokens, lengths))
    return [next(fresh) if each is None else each for each in in_flight]


def _goes_on(steps: DecodeGraph, appends: Sequence[TokenAppend], now: Sequence[InFlightRow]) -> bool:
    """Whether the next step is worth beginning: half of them at least have followed the model for a while."""
    sure = sum(append.cache.hits >= SURE for append in appends)
    return 2 * sure >= len(appends) and all(each.position < steps.last for each in now)


def graph_runner_of(model: Any, eager: DecoderBatch) -> GraphRunner | None:
    """The graph runner of a model on CUDA, if its graphs can be captured and agree with the written-out decoder."""
    if model.device.type != "cuda":
        return None
    for builder in graph_builders():
        graph_runner = GraphRunner(eager, CudaGraphs(model.device), ops=compiled_ops(), builder=builder)
        if agrees(model, eager, graph_runner):
            return graph_runner
    return None


def graph_builders() -> list[type[GraphBuilder]]:
    """How a step can be made on this machine, the fastest first."""
    try:
        from .triton_decode import TritonGraphBuilder
    except ImportError as error:
        _log.info("steps go without kernels of their own: %s", error)
        return [GraphBuilder]
    return [TritonGraphBuilder, GraphBuilder]


@torch.inference_mode()
def agrees(model: Any, eager: DecoderBatch, graph_runner: GraphRunner) -> bool:
    """Two tokens after three, both ways: the second is a replay at another position; and candidates after them."""
    ids = torch.tensor([1, 2, 3, 4, 5], device=model.device) % model.get_input_embeddings().weight.shape[0]
    cache = PooledKVCache()
    model(input_ids=ids[None, :3], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for at in (3, 4):
        (step,) = graph_runner.step([TokenAppend(cache, [int(ids[at])], at)])
        if step is None:
            return False
        ours, _ = step
        cache.crop(-1)
        theirs, _ = eager.decoder(ids[at : at + 1], [at], [cache])
        if not close(ours, theirs[0], model.dtype):
            _log.warning("%s: the logits are not those of the eager step", _WITHOUT)
            return False
    scoring = ScoreCandidates(ids, cache, 5)
    scored, (rows,) = graph_runner.score_candidates(scoring), eager([scoring])
    if scored is None:
        return False
    assert isinstance(rows, Tensor)
    if not close(eager.decoder.logits(scored), eager.decoder.logits(rows), model.dtype):
        _log.warning("%s: candidates' logits are not those of the eager way", _WITHOUT)
        return False
    return True
