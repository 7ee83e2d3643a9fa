"""Several sequences in one forward: their new tokens stand in one row, each over the KV of its own sequence.

    row        a7 | b3 b4 b5 | c9          one token of a, three of b, one of c
    positions   7 |  3  4  5 |  9
    attention  a7 sees a0..a7; b4 sees b0..b4; no row sees another sequence

No padding, and no cache is copied or moved: linear layers see one row of N tokens, which reads the weights once for all
of them; attention runs per sequence, by the model's own function. Each sequence's logits equal those of its own step
(tests/test_packed_batch.py holds it to 1e-4 in fp32, on every architecture). Candidates of a selection can stand in
the row too, over KV that stays as it is; an adapter's corrections are added on their chunk alone.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ...errors import ConfigError
from ...redaction import one_line
from ..base import Append, Output, ScoreTree, StepOutput, Work
from .attention import branches_of, branching, causal
from .candidate_overlay import layer_kinds, overlay_of
from .kv_cache import KVCache
from .llama_decoder import TRIALS, close
from .text_decoder import text_decoder

_log = logging.getLogger(__name__)

NAME = "s2t_packed"
"""Under which name transformers finds our attention."""

FAILURES = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model's forward raises where it was not made for such inputs."""


@dataclass(frozen=True)
class RaggedKV:
    """Keys, or values, of several sequences.

    Attributes:
        parts: ``[1, heads, length_i + T_i, d]`` each.
        widths: T of each.
        beside: which of its new tokens each of them sees, ``[T, T]`` bool; None where each sees those before it.
        attend: name of the model's own attention.
        window: tokens that a row sees in this layer, itself included; None sees all.
        masks: made so far in this forward, by tokens, length and window; layers share them.
    """

    parts: Sequence[Tensor]
    widths: list[int]
    beside: list[Tensor | None]
    attend: str
    window: int | None
    masks: dict[tuple[int, int, int | None, int], Tensor]


class PackedKV(Cache):  # type: ignore[misc]
    """Writes each segment's keys and values to its own sequence; those of candidates nowhere that counts.

    Args:
        parts: in the order of the row.
        attend: name of the model's own attention.
        windows: of each layer, see ``RaggedKV``.
    """

    def __init__(self, parts: Sequence[Work], attend: str, windows: Sequence[int | None]) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._widths, self._beside = (
            [len(part.ids) for part in parts],
            [branches_of(part) for part in parts],
        )
        self._caches = [part.cache if isinstance(part, Append) else overlay_of(part.cache) for part in parts]
        self._attend, self._windows = attend, windows
        self._masks: dict[tuple[int, int, int | None, int], Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[RaggedKV, RaggedKV]:
        """From ``[1, heads, N, d]`` of the row to the whole of each sequence."""
        keys, values = [], []
        pieces = zip(
            self._caches,
            torch.split(key_states, self._widths, -2),
            torch.split(value_states, self._widths, -2),
            strict=True,
        )
        for cache, key, value in pieces:
            all_keys, all_values = cache.update(key, value, layer_idx)
            keys.append(all_keys)
            values.append(all_values)
        shared = (self._widths, self._beside, self._attend, self._windows[layer_idx], self._masks)
        return RaggedKV(keys, *shared), RaggedKV(values, *shared)


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: RaggedKV,
    value: RaggedKV,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The model's own attention, sequence by sequence; from queries ``[1, heads, N, d]`` to ``[1, N, heads, d]``."""
    attend = own_attention(module, key.attend)
    if sliding_window is None:  # some models say it in their mask alone, which is ours here
        sliding_window = key.window
    outputs = []
    rows = zip(torch.split(query, key.widths, -2), key.parts, value.parts, key.beside, strict=True)
    for at, (q, k, v, beside) in enumerate(rows):
        mask = None
        if q.shape[-2] > 1:
            size = (q.shape[-2], k.shape[-2], sliding_window, -1 if beside is None else at)
            mask = key.masks.get(size)
            if mask is None:
                made = causal(*size[:3], like=q) if beside is None else branching(beside, *size[1:3], like=q)
                mask = key.masks[size] = made
        elif sliding_window is not None and k.shape[-2] > sliding_window:
            k, v = k[..., -sliding_window:, :], v[..., -sliding_window:, :]
        outputs.append(attend(module, q, k, v, mask, sliding_window=sliding_window, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


@functools.cache
def attention_functions() -> Any:
    """transformers' table of attention functions by name, ours among them."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # seconds, which only a loaded model has to pay

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend_packed)
    return ALL_ATTENTION_FUNCTIONS


def own_attention(module: nn.Module, name: str) -> Any:
    """The attention function that this model uses by itself."""
    return attention_functions().get(name) or sys.modules[type(module).__module__].eager_attention_forward


def through_modules(model: Any, parts: Sequence[Work]) -> list[Output]:
    """One forward through a model's modules; its output layer runs over the last token of each segment only.

    Args:
        model: a causal LM.
        parts: their tokens on its device.

    Returns:
        In the order of ``parts``: logits ``[V]`` (fp32) and last hidden state ``[H]`` after a segment's last token,
        last hidden states ``[K, H]`` of candidate scoring, logits ``[N, V]`` of a tree.
    """
    config, decoder, device = model.config.get_text_config(), text_decoder(model), model.device
    ends = list(accumulate(len(part.ids) for part in parts))
    with_logits = [rows_with_logits(part, end) for part, end in zip(parts, ends, strict=True)]
    last = [row for rows in with_logits for row in rows]
    places = [at for part in parts for at in positions_of(part)]
    with packed_attention(config) as own, corrected(model, parts), keeping(decoder) as kept:
        inputs = {
            "input_ids": torch.cat([part.ids for part in parts])[None],
            "position_ids": torch.tensor(places, device=device)[None],
            "attention_mask": ready_mask(config, model.get_output_embeddings().weight),
            "past_key_values": PackedKV(parts, own, windows_of(config)),
            "use_cache": True,
        }
        if last:
            out = model(**inputs, logits_to_keep=torch.tensor(last, device=device))
        else:
            decoder(**inputs)
    hidden = kept[0]
    logits = iter(torch.split(out.logits[0], list(map(len, with_logits)))) if last else iter([])
    outputs: list[Output] = []
    for end, part, rows in zip(ends, parts, with_logits, strict=True):
        logits_of_part = next(logits).float() if last else hidden[:0]
        if isinstance(part, Append):
            outputs.append(StepOutput(logits_of_part[0], hidden[end - 1].clone()))
        else:
            outputs.append(logits_of_part if rows else hidden[end - len(part.ids) : end])
    return outputs


def positions_of(part: Work) -> Sequence[int]:
    """The positions of a part's tokens in its sequence; candidates all stand at the same."""
    if isinstance(part, Append):
        return range(part.length, part.length + len(part.ids))
    return part.positions if isinstance(part, ScoreTree) else [part.length] * len(part.ids)


def rows_with_logits(part: Work, end: int) -> range:
    """Rows of a part that ends at ``end`` after which logits are wanted: an append's last, all of a tree."""
    first = end - 1 if isinstance(part, Append) else end - len(part.ids) if isinstance(part, ScoreTree) else end
    return range(first, end)


def windows_of(config: Any) -> list[int | None]:
    """How far each layer sees, itself included; None sees all."""
    return [config.sliding_window if kind == "sliding_attention" else None for kind in layer_kinds(config)]


@torch.inference_mode()
def packs(model: Any, name: str) -> bool:
    """Whether a sequence beside another one in a row gives the logits and hidden state that it gives alone.

    By a trial, of the first model of its class, config, dtype and device.

    Not where a model reads the KV itself before its attention, has an attention of its own that cannot be replaced, or
    does something between its layers and the output layer.

    Args:
        model: a causal LM whose every layer is attention.
        name: of the model, for the error.

    Raises:
        ConfigError: it does not read tokens alone.
    """
    kind = type(model), repr(model.config.to_dict()), model.dtype, model.device.type
    if kind not in _tried:
        vocab = model.get_input_embeddings().weight.shape[0]
        trials = ((torch.arange(1, 6) + at * vocab // TRIALS) % vocab for at in range(TRIALS))
        _tried[kind] = any(_packs(model, ids, name) for ids in trials)
    return _tried[kind]


_tried: dict[tuple[Any, ...], bool] = {}
"""Outcomes by class, config, dtype and device: the weights play no part."""


def _packs(model: Any, ids: Tensor, name: str) -> bool:
    """Three tokens of five ``[5]`` behind the other two, and alone."""
    other, own = torch.split(ids.to(model.device), [2, 3])
    kept: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: kept.append(args[0][0, -1]))
    try:
        alone = model(input_ids=own[None], past_key_values=KVCache(), use_cache=True, logits_to_keep=1)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        reason = one_line(str(error))[:200].rstrip(".")
        raise ConfigError(
            f"{name!r} ({model.config.model_type}) does not write text from tokens alone: {reason}.",
            hint="Give a decoder-only language model, or one that sees or hears whose text part writes by itself.",
        ) from error
    finally:
        hook.remove()
    try:
        _, beside = through_modules(model, [Append(other, KVCache(), 0), Append(own, KVCache(), 0)])
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        _log.debug("%s is read one sequence after another: %r", type(model).__name__, error)
        return False
    assert isinstance(beside, StepOutput)
    pairs = [(beside.logits, alone.logits[0, -1].float()), (beside.hidden.float(), kept[0].float())]
    return all(ours.shape == theirs.shape and close(ours, theirs, model.dtype) for ours, theirs in pairs)


@contextmanager
def packed_attention(config: Any) -> Iterator[str]:
    """The model's attention replaced by ours; gives the name of its own. One thread at a time."""
    own: str = config._attn_implementation or "eager"
    attention_functions()
    config._attn_implementation_internal = NAME
    try:
        yield own
    finally:
        config._attn_implementation_internal = own


@contextmanager
def corrected(base: nn.Module, parts: Sequence[Work]) -> Iterator[None]:
    """The base model with each item's adapter on, at its own tokens alone."""
    with ExitStack() as stack:
        start = 0
        for part in parts:
            end = start + len(part.ids)
            if part.lora is not None:
                stack.enter_context(part.lora.on(base, slice(start, end)))
            start = end
        yield


@contextmanager
def keeping(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Gets the last hidden states ``[N, H]`` of the one row that the decoder reads inside the block."""
    kept: list[Tensor] = []
    handle = decoder.register_forward_hook(lambda module, args, out: kept.append(out.last_hidden_state[0]))
    try:
        yield kept
    finally:
        handle.remove()


def ready_mask(config: Any, like: Tensor) -> Tensor | dict[str, Tensor]:
    """A mask that keeps the model from making its own: ours are made per sequence."""
    nothing = torch.zeros(1, 1, 1, 1, dtype=like.dtype, device=like.device)
    kinds = dict.fromkeys(layer_kinds(config))
    return dict.fromkeys(kinds, nothing) if len(kinds) > 1 else nothing
