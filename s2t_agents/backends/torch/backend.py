"""The PyTorch backend: a transformers checkpoint, its KV caches, and what training needs besides."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from math import inf
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...fork_safety import FORWARD, hold_while_forking
from ...tokenization.vocabulary import drop_tokens_without_embedding
from ..base import Capabilities, Limits, Output, SequenceCache, Work
from ..cpu_threads import release_threads
from ..fingerprint import checkpoint_fingerprint, norms_of, tokenizer_fingerprint, weights_fingerprint
from .candidate_overlay import overlay_is_exact, overlay_of, rows_mask
from .cuda.graph_runner import GraphRunner
from .cuda.kv_pool import PooledKVCache
from .grouped_attention import grouped_attention
from .kv_cache import KVCache, RecurrentCache
from .loading import (
    ONE_AT_A_TIME,
    context_window,
    default_device,
    end_ids,
    load_tokenizer,
    load_weights,
    refuse_bidirectional,
)
from .long_rope import fix_long_rope
from .model_runner import ModelRunner
from .packed_batch import packs
from .packed_linear import LIMIT
from .recurrent_state import keeps_a_cache, resumes_in_chunks
from .text_decoder import text_decoder


class TorchBackend:
    """A causal LM of ``transformers`` and its tokenizer; see ``base.Backend``.

    Args:
        model: in eval mode; longrope is fixed in it, see ``long_rope``.
        tokenizer: its fast tokenizer; added tokens without an embedding are read as ordinary text.
        name: how it is called in reports; a path or hub id.
        prepack: bytes of weights that a CPU may hold a second time, in the layout that it multiplies fastest.

    Attributes:
        model: as given.
        decoder: its stack of layers.
        config: of the text model.
        runner: chooses the path of each forward.
    """

    library = "torch"

    def __init__(self, model: Any, tokenizer: Any, *, name: str, prepack: int = LIMIT) -> None:
        self.model, self.name, self.given_tokenizer = model, name, tokenizer
        self.tokenizer = drop_tokens_without_embedding(tokenizer, model.get_input_embeddings().weight.shape[0], name)
        self.config = model.config.get_text_config()
        refuse_bidirectional(self.config, name)
        self.architecture: str = self.config.model_type
        self.hidden_size: int = self.config.hidden_size
        self.decoder = text_decoder(model)
        self.device: torch.device = model.device
        self.eos_ids = end_ids(model, tokenizer, name)
        self.context_window = context_window(self.config, tokenizer)
        fix_long_rope(model, self.context_window, name)
        self.lock = threading.RLock()  # one forward at a time: hooks and caches are not thread-safe
        hold_while_forking(self, "lock", FORWARD)
        self._attention_only = attention_only = self.attention_only(model)
        graphs, cpu = self.device.type == "cuda", self.device.type == "cpu"
        self._cache_class: type[KVCache] = PooledKVCache if graphs else KVCache
        chunks = attention_only or resumes_in_chunks(model, self.new_cache, name)
        self.runner = ModelRunner(
            model,
            attention_only=attention_only,
            packs=attention_only and packs(model, name),
            resumes_in_chunks=chunks,
            graphs=graphs,
            prepack=prepack,
        )
        self.capabilities = Capabilities(
            batching=self.runner.batches,
            candidate_scoring=True,
            candidate_lora=True,
            hidden_states=True,
            truncation=attention_only,
            fork_while_running=attention_only and not graphs,
            tree_scoring=self.runner.batches,
        )
        limits = Limits()
        if not cpu:
            limits = replace(limits, prefill_beside=limits.prefill_alone, hand_over_s=inf)
        if not chunks:
            limits = replace(limits, prefill_alone=self.context_window, prefill_beside=self.context_window)
        self.limits = limits
        release_threads()  # OpenMP threads that loading the weights has started

    @staticmethod
    def attention_only(model: Any) -> bool:
        """Whether every layer is attention over a KV cache: then sequences can be cut and forked anywhere."""
        return overlay_is_exact(model.config.get_text_config()) and keeps_a_cache(model)

    def use_graphs(self, graph_runner: GraphRunner | None = None) -> None:
        """Run single tokens over a KV pool, on any device; on CUDA that is the default.

        Args:
            graph_runner: None makes one at the first single token. Caches that exist already keep their kind.
        """
        self._cache_class = PooledKVCache
        self.capabilities = replace(self.capabilities, fork_while_running=False)
        self.runner.use_graphs(graph_runner)

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
    ) -> TorchBackend:
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
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer's ids."""
        return tokenizer_fingerprint(self.given_tokenizer)

    @cached_property
    def weights_fingerprint(self) -> str:
        """Hashes of the weights; compare with ``fingerprint.same_weights``."""
        return weights_fingerprint(self.model)

    @cached_property
    def checkpoint_fingerprint(self) -> str | None:
        """Hash of the normalisation weights; see ``fingerprint.checkpoint_fingerprint``."""
        return checkpoint_fingerprint(norms_of(self.model))

    @property
    def quantization(self) -> str:
        """The method by which ``transformers`` quantised the weights; ``none`` where it did not."""
        settings = getattr(self.config, "quantization_config", None)
        if not settings:
            return "none"
        method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
        return str(getattr(method, "value", method) or type(settings).__name__)

    @property
    def output_embedding(self) -> Tensor:
        """``[V, H]``: the row of every token in the output layer."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def new_cache(self) -> SequenceCache:
        """An empty one. Attention-only models keep all KV, so that any length can be returned to."""
        return self._cache_class() if self._attention_only else RecurrentCache(config=self.config)

    def forward(self, batch: Sequence[Work]) -> list[Output]:
        """See ``base.Backend``."""
        with self.lock:
            if self.capabilities.batching:
                return self.runner.forward(batch)
            return [output for item in batch for output in self.runner.forward([item])]

    def interrupt(self) -> None:
        """Nothing: a forward of PyTorch runs to its end."""

    def resume(self) -> None:
        """Nothing."""

    def read_rows(self, ids: Tensor, mask: Tensor, cache: Cache | None, keep: int | Tensor) -> tuple[Tensor, Tensor]:
        """Read or continue B left-padded sequences at once, for training; gradients flow where the caller lets them.

        Args:
            ids: ``[B, T]``, padding on the left.
            mask: ``[B, C + T]``, 1 for tokens and 0 for padding, the C cached columns included.
            cache: of ``transformers``; grows by T; None keeps nothing.
            keep: how many of the last columns to return, or which of the T, ``[n]``.

        Returns:
            Logits ``[B, n, V]`` (fp32) and last hidden states ``[B, n, H]``.
        """
        with self.lock, grouped_attention(self.config, ids.shape[1]):
            logits, hidden = self.runner.through_modules(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=keep,
            )
        return logits.float(), hidden

    def candidate_rows(self, candidates: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Last hidden state after each candidate over its own part of a prefix; gradients flow where let.

        Args:
            candidates: ``[B, N]`` token ids, one row per prefix; no candidate sees another.
            positions: ``[B, N]``; a candidate sees its prefix's first ``positions`` tokens.
            mask: ``[B, C]``, 1 for the prefixes' tokens and 0 for the padding before them.
            cache: the prefixes' KV, all of it kept; left as it is.

        Returns:
            ``[B, N, H]``. One forward, without the output layer where that reads what the layers give.
        """
        inputs = {
            "input_ids": candidates,
            "position_ids": positions,
            "attention_mask": rows_mask(self.config, mask.bool(), positions, self.model.dtype),
            "past_key_values": overlay_of(cache),
            "use_cache": True,
        }
        if not self.capabilities.batching:
            return self.runner.through_modules(**inputs)[1]
        hidden: Tensor = self.decoder(**inputs).last_hidden_state
        return hidden
