"""Captured graphs of a decode step over rows of a KV pool, of a prompt's chunk, and of candidates after one row.

A decode step also computes its rows' ``LogitStatistics``. The device runs one step ahead: while the host handles the
tokens of step 8, the device computes step 9 for the tokens that the model itself prefers.

    device   step 8 ───────────> step 9 ───────────> step 10 ──────>
    host            statistics 8 ... token 8  statistics 9 ... token 9

On a misprediction the actual token is computed normally and overwrites the speculated slot. The input ids of the next
step stay on the device, so that nothing is uploaded while all rows follow the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..fused_ops import PointwiseOps
from ..llama_decoder import BatchMetadata, LinearMap, LlamaDecoder
from ..lora import LoraLayer
from ..packed_linear import FusedLinear, state_of
from .attention import CandidateAttention, DecodeAttention, PrefillAttention
from .cuda_graph import Body, Recorder
from .in_flight import InFlightRow, InFlightStep, mark
from .kv_pool import KVPool


class Recorded:
    """A body that is recorded when it is first wanted: its static buffers hold true inputs by then.

    Args:
        body: may change its inputs.
        record: how it is recorded.
    """

    def __init__(self, body: Body, record: Recorder) -> None:
        self._body, self._record = body, record
        self._again: Body | None = None

    def __call__(self, prepare: Callable[[], None]) -> tuple[Tensor, ...]:
        """Replay it.

        Args:
            prepare: puts the inputs into the static buffers; twice the first time, since recording runs it, too.
        """
        prepare()
        if self._again is None:
            self._again = self._record(self._body)
            prepare()
        return self._again()


class Marked:
    """A preparation that remembers when it was done, the last time: what is recorded before is not the replay.

    Args:
        prepare: puts inputs into static buffers.
        like: on the device that is watched.

    Attributes:
        at: see ``mark``.
    """

    def __init__(self, prepare: Callable[[], None], like: Tensor) -> None:
        self._prepare, self._like = prepare, like
        self.at: torch.cuda.Event | None = None

    def __call__(self) -> None:
        """Prepare."""
        self._prepare()
        self.at = mark(self._like)


@dataclass(frozen=True)
class GraphBuilder:
    """How bodies are made of torch's operations: the layers, what is between their products, how they are recorded."""

    llama_decoder: LlamaDecoder
    ops: PointwiseOps
    record: Recorder

    def outputs(self, hidden: Tensor, rows: BatchMetadata) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[N, V]``, best tokens ``[N, 1]`` and statistics ``[N, 3]`` after hidden states ``[N, H]``."""
        logits = self.llama_decoder.logits(hidden, rows.affine)
        best = logits.argmax(-1, keepdim=True)
        return logits, best, self.ops.logit_statistics(logits, best, logits.gather(-1, best))

    def decode_metadata(self, kv: Sequence[Tensor], positions: Tensor, cos: Tensor, sin: Tensor) -> BatchMetadata:
        """One token for each row, see ``DecodeAttention``; rotations ``[N, 1, d]``."""
        return BatchMetadata(cos, sin, DecodeAttention(kv, positions, self.ops), self.llama_decoder.linear, self.ops)

    def prefill_metadata(
        self, kv: Sequence[Tensor], row: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
    ) -> BatchMetadata:
        """Several tokens of one row, see ``PrefillAttention``; rotations ``[N, 1, d]``."""
        return BatchMetadata(
            cos, sin, PrefillAttention(kv, row, positions, self.ops), self.llama_decoder.linear, self.ops
        )

    def candidate_metadata(
        self, kv: Sequence[Tensor], length: Tensor, cos: Tensor, sin: Tensor, affine: LinearMap
    ) -> BatchMetadata:
        """Candidates after one row, see ``CandidateAttention``; rotations ``[1, 1, d]``."""
        return BatchMetadata(cos, sin, CandidateAttention(kv, length, self.ops), affine, self.ops)


class DecodeGraph:
    """One token for each of ``count`` rows of a KV pool, from ``first`` on.

    Attributes:
        count: of rows.
        last: the last position that a token can take; the column after it is spare, see ``kv_pool``.
    """

    def __init__(self, builder: GraphBuilder, pool: KVPool, first: int, count: int) -> None:
        kv, spare = pool.kv[:, :, first : first + count].unbind(1), pool.capacity - 1
        self.count, self.last, self._spare = count, spare - 1, spare
        cos, sin = builder.llama_decoder.rotation_table(pool.capacity)
        self._ids = ids = torch.zeros(count, dtype=torch.long, device=pool.kv.device)
        self._positions = positions = torch.full_like(ids, self._spare)

        def body() -> tuple[Tensor, ...]:  # holds no self: a cycle would keep the KV
            rows = builder.decode_metadata(kv, positions, cos[positions], sin[positions])
            hidden = builder.llama_decoder.through(ids, rows)
            logits, best, seen = builder.outputs(hidden, rows)
            ids.copy_(best[:, 0])
            positions.add_(positions < spare)
            return logits, hidden, seen

        self._graph = Recorded(body, builder.record)
        self._latest: tuple[InFlightStep, list[int]] | None = None
        """The last one, and the rows that took part in it: what the buffers hold is what follows."""

    def begin(self, rows: Sequence[int], ids: Sequence[int], positions: Sequence[int]) -> list[InFlightRow]:
        """Begin the step of some rows, counted from ``first``, and do not wait for it; the others sit out.

        Args:
            rows: which.
            ids: the token of each.
            positions: where it stands.
        """

        def prepare() -> None:
            if self.count == 1:
                self._ids.fill_(ids[0])
                self._positions.fill_(positions[0])
            else:
                at, tokens, places = self._uploaded(rows, ids, positions)
                self._ids[at] = tokens
                self._positions.fill_(self._spare)[at] = places

        in_flight = self._begun(rows, positions, prepare)
        return [replace(each, token=token) for each, token in zip(in_flight, ids, strict=True)]

    def after(self, in_flight: Sequence[InFlightRow], rows: Sequence[int]) -> list[InFlightRow]:
        """Begin the step after those that are under way, with the tokens that they will want.

        Args:
            in_flight: rows of one step, or of several.
            rows: where their sequences lie, counted from ``first``.
        """
        sources, positions = [each.row for each in in_flight], [each.position + 1 for each in in_flight]
        steps = list(dict.fromkeys(each.step for each in in_flight))
        last, its_rows = self._latest or (None, [])
        goes_on = steps == [last] and its_rows == rows == sources

        def prepare() -> None:
            if goes_on:
                return
            at, source, places, of = self._uploaded(rows, sources, positions, [steps.index(b.step) for b in in_flight])
            best = torch.stack([step.seen[source.clamp(max=len(step.seen) - 1), 0] for step in steps])
            self._ids[at] = best.gather(0, of[None])[0].long()
            self._positions.fill_(self._spare)[at] = places

        return self._begun(rows, positions, prepare)

    def _begun(self, rows: Sequence[int], positions: Sequence[int], prepare: Callable[[], None]) -> list[InFlightRow]:
        marked = Marked(prepare, self._ids)
        logits, hidden, seen = (each.clone() for each in self._graph(marked))
        step = InFlightStep(logits, hidden, seen, marked.at, len(rows))
        self._latest = step, list(rows)
        return [InFlightRow(step, row, position) for row, position in zip(rows, positions, strict=True)]

    def _uploaded(self, *rows: Sequence[int]) -> Tensor:
        """Lists of integers on the device, without waiting for what it is at."""
        cuda = self._ids.is_cuda
        return torch.tensor(rows, pin_memory=cuda).to(self._ids.device, non_blocking=cuda)


class PrefillGraph:
    """Up to ``tokens`` tokens of one row of a KV pool, whichever it is; what is missing is padding.

    Attributes:
        tokens: at most, and so many columns of the row are written.
    """

    def __init__(self, builder: GraphBuilder, pool: KVPool, tokens: int) -> None:
        kv, self.tokens = pool.kv.unbind(1), tokens
        cos, sin = builder.llama_decoder.rotation_table(pool.capacity)
        self._ids = ids = torch.zeros(tokens, dtype=torch.long, device=pool.kv.device)
        self._places = places = torch.zeros(3, dtype=torch.long, device=pool.kv.device)
        """The row, the tokens in it, and which of the new ones is the last."""

        def body() -> tuple[Tensor, ...]:
            row, length, last = places[:1], places[1:2], places[2:]
            positions = length + torch.arange(tokens, device=ids.device)
            rows = builder.prefill_metadata(kv, row, positions, cos[positions], sin[positions])
            hidden = builder.llama_decoder.through(ids, rows).index_select(0, last)
            logits, _, seen = builder.outputs(hidden, rows)
            return logits, hidden, seen

        self._graph = Recorded(body, builder.record)

    def begin(self, row: int, ids: Sequence[int], length: int) -> InFlightRow:
        """Begin to read ``ids`` after the first ``length`` tokens of a row, and do not wait for it."""

        def prepare() -> None:
            filled = torch.tensor([*ids, *[0] * (self.tokens - len(ids)), row, length, len(ids) - 1])
            self._ids.copy_(filled[:-3])
            self._places.copy_(filled[-3:])

        marked = Marked(prepare, self._ids)
        logits, hidden, seen = (each.clone() for each in self._graph(marked))
        return InFlightRow(InFlightStep(logits, hidden, seen, marked.at, 1), 0, length + len(ids) - 1, ids[-1])


class CandidateGraph:
    """K candidates after one row of a KV pool.

    Args:
        builder: how it is made.
        pool: which is read.
        row: which row.
        candidates: how many, after filling up.
        corrections: added to linear layers while the candidates go through.

    Attributes:
        state: what the corrections' weights were like when this was made.
    """

    def __init__(
        self, builder: GraphBuilder, pool: KVPool, row: int, candidates: int, corrections: Mapping[nn.Module, LoraLayer]
    ) -> None:
        self.state = state_of_all(corrections)
        kv = pool.kv[:, :, row : row + 1].unbind(1)
        cos, sin = builder.llama_decoder.rotation_table(pool.capacity)
        self._ids = ids = torch.zeros(candidates, dtype=torch.long, device=pool.kv.device)
        self._length = length = torch.zeros(1, dtype=torch.long, device=pool.kv.device)
        affine = corrected(builder.llama_decoder, corrections)

        def body() -> tuple[Tensor, ...]:
            return (
                builder.llama_decoder.through(
                    ids, builder.candidate_metadata(kv, length, cos[length], sin[length], affine)
                ),
            )

        self._graph = Recorded(body, builder.record)

    def __call__(self, candidates: Tensor, length: int) -> Tensor:
        """Last hidden states ``[K, H]`` of ``candidates`` ``[K]`` after the row's first ``length`` tokens."""

        def prepare() -> None:
            self._ids.fill_(0)
            self._ids[: len(candidates)].copy_(candidates)
            self._length.fill_(length)

        (hidden,) = self._graph(prepare)
        return hidden[: len(candidates)].clone()


def state_of_all(corrections: Mapping[nn.Module, LoraLayer]) -> list[tuple[int, int, int]]:
    """What changes when a weight of them is replaced or written to."""
    return [state_of(weight) for layer in corrections.values() for weight in (layer.a, layer.b)]


class FusedCorrection:
    """Corrections of all modules of a fused linear as two products, in the dtype of the base.

    Args:
        fused: the modules.
        corrections: of some of them, at least one.
    """

    def __init__(self, fused: FusedLinear, corrections: Mapping[nn.Module, LoraLayer]) -> None:
        layers = [corrections.get(module) for module in fused.modules]
        there = [layer for layer in layers if layer is not None]
        weight = fused.modules[0].weight
        self._down = torch.cat([layer.a.detach() for layer in there]).to(weight.dtype).t()
        up, start, row = weight.new_zeros(self._down.shape[1], sum(fused.widths)), 0, 0
        for layer, width in zip(layers, fused.widths, strict=True):
            if layer is not None:
                rank = len(layer.a)
                up[row : row + rank, start : start + width] = layer.b.detach().t() * layer.scale
                row += rank
            start += width
        self._up = up

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add the corrections for inputs ``[N, in]`` to the outputs ``[N, out]`` of all modules, in place."""
        out.addmm_(x @ self._down, self._up)


def corrected(llama_decoder: LlamaDecoder, corrections: Mapping[nn.Module, LoraLayer]) -> LinearMap:
    """The affine map and what the corrections add to it."""
    fused_linears = {
        fused for fused in llama_decoder.fused_linears if any(module in corrections for module in fused.modules)
    }
    added = {fused: FusedCorrection(fused, corrections) for fused in fused_linears}

    def affine(fused: FusedLinear, x: Tensor) -> tuple[Tensor, ...]:
        if fused not in added:
            return llama_decoder.linear(fused, x)
        out = llama_decoder.linear.whole(fused, x)
        added[fused].add_to(out, x)
        return fused.split(out)

    return affine
