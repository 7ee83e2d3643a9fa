"""What is recorded once and played again: a step of rows of an arena, and a look at candidates after one row.

A step ends with what the engine asks of it first (``glance``). The device is a step ahead: while the host looks at one
token of each sequence, it reads the next, if that is the token the model itself wants.

    device   step 8 ───────> step 9 ───────> step 10 ──────>
    host            glance 8 ... "token 8"  glance 9 ... "token 9"

Whoever wants another token reads that one as ever: it is written where the wrong one was. A step leaves behind what the
next one reads, so that nothing has to be sent to the device while all go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..fused_ops import Pointwise
from ..llama_decoder import Affine, LeanStep, Rows
from ..lora import LoraLayer
from ..packed_linear import Joint, state_of
from .attention import LookAttention, StepAttention, StretchAttention
from .cuda_graph import Body, Recorder
from .kv_pool import Arena
from .pooled_kv_cache import Begun, Play, mark


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
        """Play it.

        Args:
            prepare: puts the inputs into the static buffers; twice the first time, since to record is to play, too.
        """
        prepare()
        if self._again is None:
            self._again = self._record(self._body)
            prepare()
        return self._again()


class Marked:
    """A preparation that remembers when it was done, the last time: what is recorded before is not what is played.

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
class Way:
    """How bodies are made of torch's operations: the layers, what is no product in them, and how they are recorded."""

    lean: LeanStep
    ops: Pointwise
    record: Recorder

    def said(self, hidden: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[N, V]``, best tokens ``[N, 1]`` and glances ``[N, 3]`` after hidden states ``[N, H]``."""
        logits = self.lean.logits(hidden, rows.affine)
        best = logits.argmax(-1, keepdim=True)
        return logits, best, self.ops.glanced(logits, best, logits.gather(-1, best))

    def stepping(self, kv: Sequence[Tensor], positions: Tensor, cos: Tensor, sin: Tensor) -> Rows:
        """One token for each row, see ``StepAttention``; rotations ``[N, 1, d]``."""
        return Rows(cos, sin, StepAttention(kv, positions, self.ops), self.lean.linear, self.ops)

    def reading(self, kv: Sequence[Tensor], row: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Rows:
        """Several tokens of one row, see ``StretchAttention``; rotations ``[N, 1, d]``."""
        return Rows(cos, sin, StretchAttention(kv, row, positions, self.ops), self.lean.linear, self.ops)

    def looking(self, kv: Sequence[Tensor], length: Tensor, cos: Tensor, sin: Tensor, affine: Affine) -> Rows:
        """Candidates after one row, see ``LookAttention``; rotations ``[1, 1, d]``."""
        return Rows(cos, sin, LookAttention(kv, length, self.ops), affine, self.ops)


class Steps:
    """One token for each of ``count`` rows of an arena, from ``first`` on.

    Attributes:
        count: of rows.
        last: the last position that a token can take; what comes after it is nobody's, see ``arena``.
    """

    def __init__(self, way: Way, arena: Arena, first: int, count: int) -> None:
        kv, spare = arena.kv[:, :, first : first + count].unbind(1), arena.capacity - 1
        self.count, self.last, self._spare = count, spare - 1, spare
        cos, sin = way.lean.rotation_table(arena.capacity)
        self._ids = ids = torch.zeros(count, dtype=torch.long, device=arena.kv.device)
        self._positions = positions = torch.full_like(ids, self._spare)

        def body() -> tuple[Tensor, ...]:  # holds no self: a cycle would keep the KV
            rows = way.stepping(kv, positions, cos[positions], sin[positions])
            hidden = way.lean.through(ids, rows)
            logits, best, seen = way.said(hidden, rows)
            ids.copy_(best[:, 0])
            positions.add_(positions < spare)
            return logits, hidden, seen

        self._play = Recorded(body, way.record)
        self._latest: tuple[Play, list[int]] | None = None
        """The last one, and the rows that took part in it: what the buffers hold is what follows."""

    def begin(self, rows: Sequence[int], ids: Sequence[int], positions: Sequence[int]) -> list[Begun]:
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

        begun = self._begun(rows, positions, prepare)
        return [replace(each, token=token) for each, token in zip(begun, ids, strict=True)]

    def after(self, begun: Sequence[Begun], rows: Sequence[int]) -> list[Begun]:
        """Begin the step after those that are under way, with the tokens that they will want.

        Args:
            begun: the parts of one play, or of several.
            rows: where their sequences sit, counted from ``first``.
        """
        sources, positions = [each.row for each in begun], [each.position + 1 for each in begun]
        plays = list(dict.fromkeys(each.play for each in begun))
        last, its_rows = self._latest or (None, [])
        goes_on = plays == [last] and its_rows == rows == sources

        def prepare() -> None:
            if goes_on:
                return
            at, source, places, of = self._uploaded(rows, sources, positions, [plays.index(b.play) for b in begun])
            best = torch.stack([play.seen[source.clamp(max=len(play.seen) - 1), 0] for play in plays])
            self._ids[at] = best.gather(0, of[None])[0].long()
            self._positions.fill_(self._spare)[at] = places

        return self._begun(rows, positions, prepare)

    def _begun(self, rows: Sequence[int], positions: Sequence[int], prepare: Callable[[], None]) -> list[Begun]:
        marked = Marked(prepare, self._ids)
        logits, hidden, seen = (each.clone() for each in self._play(marked))
        play = Play(logits, hidden, seen, marked.at, len(rows))
        self._latest = play, list(rows)
        return [Begun(play, row, position) for row, position in zip(rows, positions, strict=True)]

    def _uploaded(self, *rows: Sequence[int]) -> Tensor:
        """Lists of integers on the device, without waiting for what it is at."""
        cuda = self._ids.is_cuda
        return torch.tensor(rows, pin_memory=cuda).to(self._ids.device, non_blocking=cuda)


class Stretches:
    """Up to ``tokens`` tokens of one row of an arena, whichever it is; what is missing is read and nobody's.

    Attributes:
        tokens: at most, and so many columns of the row are written.
    """

    def __init__(self, way: Way, arena: Arena, tokens: int) -> None:
        kv, self.tokens = arena.kv.unbind(1), tokens
        cos, sin = way.lean.rotation_table(arena.capacity)
        self._ids = ids = torch.zeros(tokens, dtype=torch.long, device=arena.kv.device)
        self._places = places = torch.zeros(3, dtype=torch.long, device=arena.kv.device)
        """The row, the tokens in it, and which of the new ones is the last."""

        def body() -> tuple[Tensor, ...]:
            row, length, last = places[:1], places[1:2], places[2:]
            positions = length + torch.arange(tokens, device=ids.device)
            rows = way.reading(kv, row, positions, cos[positions], sin[positions])
            hidden = way.lean.through(ids, rows).index_select(0, last)
            logits, _, seen = way.said(hidden, rows)
            return logits, hidden, seen

        self._play = Recorded(body, way.record)

    def begin(self, row: int, ids: Sequence[int], length: int) -> Begun:
        """Begin to read ``ids`` after the first ``length`` tokens of a row, and do not wait for it."""

        def prepare() -> None:
            filled = torch.tensor([*ids, *[0] * (self.tokens - len(ids)), row, length, len(ids) - 1])
            self._ids.copy_(filled[:-3])
            self._places.copy_(filled[-3:])

        marked = Marked(prepare, self._ids)
        logits, hidden, seen = (each.clone() for each in self._play(marked))
        return Begun(Play(logits, hidden, seen, marked.at, 1), 0, length + len(ids) - 1, ids[-1])


class Looks:
    """K candidates after one row of an arena.

    Args:
        way: how it is made.
        arena: which is read.
        row: which row.
        candidates: how many, after filling up.
        corrections: added to linear layers while the candidates go through.

    Attributes:
        state: what the corrections' weights were like when this was made.
    """

    def __init__(
        self, way: Way, arena: Arena, row: int, candidates: int, corrections: Mapping[nn.Module, LoraLayer]
    ) -> None:
        self.state = state_of_all(corrections)
        kv = arena.kv[:, :, row : row + 1].unbind(1)
        cos, sin = way.lean.rotation_table(arena.capacity)
        self._ids = ids = torch.zeros(candidates, dtype=torch.long, device=arena.kv.device)
        self._length = length = torch.zeros(1, dtype=torch.long, device=arena.kv.device)
        affine = corrected(way.lean, corrections)

        def body() -> tuple[Tensor, ...]:
            return (way.lean.through(ids, way.looking(kv, length, cos[length], sin[length], affine)),)

        self._play = Recorded(body, way.record)

    def __call__(self, candidates: Tensor, length: int) -> Tensor:
        """Last hidden states ``[K, H]`` of ``candidates`` ``[K]`` after the row's first ``length`` tokens."""

        def prepare() -> None:
            self._ids.fill_(0)
            self._ids[: len(candidates)].copy_(candidates)
            self._length.fill_(length)

        (hidden,) = self._play(prepare)
        return hidden[: len(candidates)].clone()


def state_of_all(corrections: Mapping[nn.Module, LoraLayer]) -> list[tuple[int, int, int]]:
    """What changes when a weight of them is replaced or written to."""
    return [state_of(weight) for layer in corrections.values() for weight in (layer.a, layer.b)]


class JointCorrection:
    """Corrections of all modules of a joint as two products, in the dtype of the base.

    Args:
        joint: the modules.
        corrections: of some of them, at least one.
    """

    def __init__(self, joint: Joint, corrections: Mapping[nn.Module, LoraLayer]) -> None:
        layers = [corrections.get(module) for module in joint.modules]
        there = [layer for layer in layers if layer is not None]
        weight = joint.modules[0].weight
        self._down = torch.cat([layer.a.detach() for layer in there]).to(weight.dtype).t()
        up, start, row = weight.new_zeros(self._down.shape[1], sum(joint.widths)), 0, 0
        for layer, width in zip(layers, joint.widths, strict=True):
            if layer is not None:
                rank = len(layer.a)
                up[row : row + rank, start : start + width] = layer.b.detach().t() * layer.scale
                row += rank
            start += width
        self._up = up

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add the corrections for inputs ``[N, in]`` to the outputs ``[N, out]`` of all modules, in place."""
        out.addmm_(x @ self._down, self._up)


def corrected(lean: LeanStep, corrections: Mapping[nn.Module, LoraLayer]) -> Affine:
    """The affine map and what the corrections add to it."""
    joints = {joint for joint in lean.joints if any(module in corrections for module in joint.modules)}
    added = {joint: JointCorrection(joint, corrections) for joint in joints}

    def affine(joint: Joint, x: Tensor) -> tuple[Tensor, ...]:
        if joint not in added:
            return lean.linear(joint, x)
        out = lean.linear.whole(joint, x)
        added[joint].add_to(out, x)
        return joint.split(out)

    return affine
