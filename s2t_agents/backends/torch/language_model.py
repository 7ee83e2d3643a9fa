"""Weights and tokenizer of one causal language model: the one place that calls its forward."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from math import inf
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ...fork_safety import FORWARD, hold_while_forking
from ...scheduling.prefix_cache import PrefixCache
from ...scheduling.running_prefixes import LivePrefixes
from ...scheduling.scheduler import ALONE, BESIDE, LONG_S, Owner
from ...tokenization.vocabulary import decodable_ids, drop_tokens_without_embedding
from .candidate_overlay import cloned_rows, overlay_is_exact, overlay_of, row_mask, rows_mask, rows_of
from .compute_time import Meter
from .cpu_threads import release
from .cuda.graph_runner import StaticStep, static_step_of
from .cuda.pooled_kv_cache import StaticCache
from .decoder_batch import CandidateRows
from .fingerprint import tokenizer_fingerprint, weights_fingerprint
from .kv_cache import KVCache
from .llama_decoder import STRETCH, LeanStep, hooks_of, lean_step_of
from .loading import ONE_AT_A_TIME, context_window, default_device, end_ids, load_tokenizer, load_weights
from .lora import Lora
from .packed_batch import Look, Outcome, Part, Segment, through_modules
from .packed_linear import LIMIT
from .recurrent_state import goes_on_in_stretches, keeps_a_cache
from .sdpa_backend import planless

T = TypeVar("T")


class LanguageModel:
    """A causal LM and its tokenizer.

    Args:
        model: a ``transformers`` causal LM in eval mode.
        tokenizer: its fast tokenizer; added tokens without an embedding are read as ordinary text.
        name: how it is called in reports; a path or hub id.
        prepack: bytes of weights that a CPU may hold a second time, in the layout that it multiplies fastest.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, prepack: int = LIMIT) -> None:
        self._prepack = prepack
        self.model, self.name = model, name
        self.given_tokenizer = tokenizer  # what fingerprints and comparisons with other models read
        self.tokenizer = drop_tokens_without_embedding(tokenizer, model.get_input_embeddings().weight.shape[0], name)
        self.config = model.config.get_text_config()
        self.decoder: nn.Module = model.get_decoder()
        self.device: torch.device = model.device
        self.eos_ids = end_ids(model, tokenizer, name)
        self.context_window = context_window(self.config, tokenizer)
        self.overlay_exact = overlay_is_exact(self.config) and keeps_a_cache(model)
        self.lock = threading.RLock()  # one forward at a time: hooks and caches are not thread-safe
        hold_while_forking(self, "lock", FORWARD)
        self.past = PrefixCache()
        self.kv_kind = StaticCache if self.device.type == "cuda" else KVCache
        self.live = LivePrefixes(self.past, self.kv_kind)
        cpu = self.device.type == "cpu"
        packed = self.run_packed if self.overlay_exact else None
        self.in_stretches = self.overlay_exact or goes_on_in_stretches(model, self.new_cache, name)
        parts = (BESIDE if cpu else ALONE, ALONE) if self.in_stretches else (self.context_window,) * 2
        self.owner = Owner(self.run_alone, packed, self.lock, LONG_S if cpu else inf, *parts)
        self._last_hidden: Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._keep_hidden)
        release()  # what reading the weights has left

    @classmethod
    def load(
        cls,
        path: str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
        prepack: int = LIMIT,
        **options: Any,
    ) -> LanguageModel:
        """Read a model from a directory or hub id; see ``loading.load_weights`` for errors and ``options``."""
        where = torch.device(device) if device is not None else default_device()
        tokenizer = tokenizer or load_tokenizer(path, **options)
        with ONE_AT_A_TIME:
            return cls(load_weights(path, device=where, dtype=dtype, **options), tokenizer, name=path, prepack=prepack)

    @property
    def vocab_size(self) -> int:
        """Columns of the logits, padding rows included."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @cached_property
    def with_text(self) -> Tensor | None:
        """``[V]`` bool: columns of the logits that are tokens; None when all are."""
        known = decodable_ids(self.tokenizer, self.vocab_size)
        return None if known is None else known.to(self.device)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer's ids."""
        return tokenizer_fingerprint(self.given_tokenizer)

    @cached_property
    def weights_fingerprint(self) -> str:
        """Hashes of the weights; compare with ``fingerprint.same_weights``."""
        return weights_fingerprint(self.model)

    @property
    def output_embedding(self) -> Tensor:
        """``[V, H]``: the row of every token in the output layer."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def new_cache(self) -> Cache:
        """An empty KV cache. Attention-only models keep all KV, so that any of them can be rolled back."""
        return self.kv_kind() if self.overlay_exact else DynamicCache(config=self.config)

    @torch.inference_mode()
    def step(self, ids: Tensor, cache: Cache, meter: Meter | None = None) -> tuple[Tensor, Tensor]:
        """Append tokens to a cache. Callers in several threads share forwards, see ``Owner``.

        Args:
            ids: ``[T]``.
            cache: grows by T.
            meter: takes the step's share of the time of its forwards.

        Returns:
            Logits ``[V]`` (fp32) and last hidden state ``[H]``, both after the last token.
        """
        return self.owner.step(ids, cache, meter)

    @torch.inference_mode()
    def run_alone(self, part: Part) -> Outcome | Tensor:
        """A step, or a look at candidates, in a forward of its own; see ``run_packed`` for what comes back."""
        with self.lock:
            for said in self._played([part]).values():
                return said
            (part,) = self._here([part])
            with planless(self.device):
                return self._arrived(self._look(part) if isinstance(part, Look) else self.step_alone(part))

    @torch.inference_mode()
    def run_packed(self, parts: Sequence[Part]) -> list[Outcome | Tensor]:
        """Steps of several sequences and looks at candidates of several, in one forward.

        Returns:
            In the order of ``parts``: logits ``[V]`` (fp32) and last hidden state ``[H]`` after a segment's last
            token, last hidden states ``[K, H]`` of a look.
        """
        with self.lock:
            said = self._played(parts)
            rest = [at for at in range(len(parts)) if at not in said]
            if rest:
                with planless(self.device):
                    eager = self._arrived(self._eager(self._here([parts[at] for at in rest])))
                said.update(zip(rest, eager, strict=True))
            return [said[at] for at in range(len(parts))]

    def _played(self, parts: Sequence[Part]) -> dict[int, Outcome | Tensor]:
        """What captured graphs say, by their place, of those parts that there are graphs for."""
        if self.kv_kind is not StaticCache or any(self._hooks):
            return {}
        brief = any(isinstance(part, Look) or len(part.ids) == 1 for part in parts)
        if not (brief or "static" in vars(self)) or self.static is None:
            return {}  # before the first brief part nothing is compiled: maybe there never is one
        said = self.static.serve(parts)
        return self._arrived(said) if any(isinstance(parts[at], Look) for at in said) else said

    def _eager(self, parts: Sequence[Part]) -> list[Outcome | Tensor]:
        """In one forward: past the modules where they can be, through them else."""
        if not self._leanly(parts):
            return self._packed(parts)
        if all(isinstance(part, Segment) and len(part.ids) == 1 for part in parts):
            return list(zip(*self._one_each(parts), strict=True))
        return self.lean_parts(parts)  # type: ignore[misc]

    def _here(self, parts: Sequence[Part]) -> list[Part]:
        """The same parts for an eager forward, with their tokens on the model's device."""
        if vars(self).get("static") is not None:
            vars(self)["static"].pass_over(parts)
        if self.device.type == "cpu":
            return list(parts)
        return [replace(part, ids=part.ids.to(self.device)) for part in parts]

    def _arrived(self, said: T) -> T:
        """The same, once the device is done: until then the time of a forward is not known."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return said

    @torch.inference_mode()
    def step_alone(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """``step`` in a forward of its own."""
        with self.lock:
            if self._leanly([segment]):
                return self._step_leanly(segment)
            if segment.length and len(segment.ids) > 1 and not self.in_stretches:
                return self._one_by_one(segment)
            out = self.model(
                input_ids=segment.ids[None],
                position_ids=torch.arange(segment.length, segment.length + len(segment.ids), device=self.device)[None],
                past_key_values=segment.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            assert self._last_hidden is not None
            hidden, self._last_hidden = self._last_hidden[0, -1], None
        return out.logits[0, -1].float(), hidden

    def _one_by_one(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """A stretch after others, for models whose state survives single tokens only."""
        singles = enumerate(torch.split(segment.ids, 1), segment.length)
        return [self.step_alone(Segment(token, segment.cache, length)) for length, token in singles][-1]

    def _step_leanly(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """A step past the modules: read already, as a single token, or as a stretch."""
        if len(segment.ids) > 1:
            ((logits, hidden),) = self.lean_parts([segment])  # type: ignore[misc]
            return logits, hidden
        logits, hidden = self._read_ahead(segment) or self._one_each([segment])
        return logits[0], hidden[0]

    def _read_ahead(self, segment: Segment) -> tuple[Tensor, Tensor] | None:
        """The step, if the last selection has read it along with its candidates."""
        assert self.lean is not None
        assert isinstance(segment.cache, KVCache)
        ahead, segment.cache.ahead = segment.cache.ahead, None
        hidden = ahead.take(int(segment.ids), segment.cache) if ahead is not None else None
        return (self.lean.logits(hidden), hidden) if hidden is not None else None

    def _leanly(self, parts: Sequence[Part]) -> bool:
        """Whether these can go past the modules: few tokens, candidates after something, and no hooks in the way."""
        few = STRETCH if self.device.type == "cpu" else ALONE
        for part in parts:
            stretch = isinstance(part, Segment) and 1 < len(part.ids) <= few
            single = isinstance(part, Look) or len(part.ids) == 1
            if not (isinstance(part.cache, KVCache) and (stretch or (single and part.length))):
                return False
        return not any(self._hooks) and self.lean is not None  # in this order: a trial under hooks would fail for good

    def _one_each(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """One token for each, past the modules."""
        ids = torch.cat([part.ids for part in parts])
        return self.lean(ids, [part.length for part in parts], [part.cache for part in parts])  # type: ignore[misc]

    @cached_property
    def _hooks(self) -> list[Any]:
        """Of the decoder: going past its modules would miss them."""
        return hooks_of(self.decoder)

    @cached_property
    def static(self) -> StaticStep | None:
        """The step over KV of fixed capacity, captured as graphs: on CUDA, where there is a lean step."""
        rows = self.lean_parts if self.kv_kind is StaticCache else None
        return static_step_of(self.model, rows) if rows is not None else None

    @cached_property
    def lean(self) -> LeanStep | None:
        """The written-out step of a known architecture."""
        return lean_step_of(self.model, self._prepack) if self.overlay_exact else None

    @cached_property
    def lean_parts(self) -> CandidateRows | None:
        """The written-out forward of tokens and candidates together."""
        return CandidateRows(self.lean, self.model) if self.lean is not None else None

    def _packed(self, parts: Sequence[Part]) -> list[Outcome | Tensor]:
        """Through the model's modules, which leave their last hidden state behind."""
        said = through_modules(self.model, parts)
        self._last_hidden = None
        return said

    @torch.inference_mode()
    def look_ahead(
        self, candidates: Tensor, cache: Cache, length: int, lora: Lora | None = None, meter: Meter | None = None
    ) -> Tensor:
        """Last hidden state after each candidate, as if it alone had followed the prefix.

        Callers in several threads share forwards, with each other and with steps, see ``Owner``.

        Args:
            candidates: ``[K]`` token ids.
            cache: the prefix's KV; left bitwise as it is.
            length: tokens in it.
            lora: corrections that are on at the candidates only; None reads them with the base itself.
            meter: takes the look's share of the time of its forward.

        Returns:
            ``[K, H]``. One forward; the output layer is not run.
        """
        return self.owner.look(Look(candidates, cache, length, lora), meter)

    def _look(self, look: Look) -> Tensor:
        """A look in a forward of its own; on cloned rows where a masked row would not be exact."""
        with self.lock:
            if self._leanly([look]):
                return self._look_leanly(look)
            with look.lora.on(self.model) if look.lora is not None else nullcontext():
                if self.overlay_exact:
                    return self._row(look.ids, look.cache, look.length)
                out = self.decoder(
                    input_ids=look.ids[:, None],
                    position_ids=torch.full_like(look.ids, look.length)[:, None],
                    past_key_values=cloned_rows(look.cache, len(look.ids)),
                    use_cache=True,
                )
            hidden: Tensor = out.last_hidden_state[:, -1]
            return hidden

    def _look_leanly(self, look: Look) -> Tensor:
        """A look past the modules, and maybe the step after it."""
        rows = self.lean_parts
        assert rows is not None
        if look.lora is not None and self.lean is not None and self.lean.linear.rows_alike:
            return rows.with_next(look)
        (said,) = rows([look])
        assert isinstance(said, Tensor)
        return said

    def read_rows(self, ids: Tensor, mask: Tensor, cache: Cache | None, keep: int) -> tuple[Tensor, Tensor]:
        """Read or continue B left-padded sequences at once; gradients flow where the caller lets them.

        Args:
            ids: ``[B, T]``, padding on the left.
            mask: ``[B, C + T]``, 1 for tokens and 0 for padding, the C cached columns included.
            cache: grows by T; None keeps nothing.
            keep: how many of the last columns to return.

        Returns:
            Logits ``[B, keep, V]`` (fp32) and last hidden states ``[B, keep, H]``.
        """
        with self.lock:
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=keep,
            )
            assert self._last_hidden is not None
            hidden, self._last_hidden = self._last_hidden, None
        return out.logits.float(), hidden

    def candidate_rows(self, candidates: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Last hidden state after each candidate over its own part of a prefix; gradients flow where let.

        Args:
            candidates: ``[B, N]`` token ids, one row per prefix; no candidate sees another.
            positions: ``[B, N]``; a candidate sees its prefix's first ``positions`` tokens.
            mask: ``[B, C]``, 1 for the prefixes' tokens and 0 for the padding before them.
            cache: the prefixes' KV, all of it kept; left as it is.

        Returns:
            ``[B, N, H]``. One forward; the output layer is not run.
        """
        out = self.decoder(
            input_ids=candidates,
            position_ids=positions,
            attention_mask=rows_mask(self.config, mask.bool(), positions, self.model.dtype),
            past_key_values=overlay_of(cache),
            use_cache=True,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    @torch.inference_mode()
    def look_ahead_rows(self, candidates: Tensor, rows: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """``look_ahead`` for several rows of a left-padded batch.

        Args:
            candidates: ``[N, K]`` token ids.
            rows: ``[N]``, which row of the batch each line belongs to.
            mask: ``[B, C]``, 1 for tokens and 0 for padding.
            cache: the batch's KV; left as it is.

        Returns:
            ``[N, K, H]``.
        """
        with self.lock:
            positions = mask[rows].sum(1, keepdim=True).expand_as(candidates)
            return self.candidate_rows(candidates, positions, mask[rows], rows_of(cache, rows))

    def _row(self, candidates: Tensor, cache: Cache, length: int) -> Tensor:
        positions = torch.full_like(candidates, length)
        mask = row_mask(self.config, positions, length, self.model.dtype)
        out = self.decoder(
            input_ids=candidates[None],
            position_ids=positions[None],
            attention_mask=mask,
            past_key_values=overlay_of(cache),
            use_cache=True,
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def _keep_hidden(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        # A prompt's last token is a view with the prompt's strides, for which torch would copy the output layer.
        if hidden.ndim == 3 and hidden.shape[1] == 1:
            hidden = hidden.clone(memory_format=torch.contiguous_format)
        self._last_hidden = hidden
        return hidden, *args[1:]
