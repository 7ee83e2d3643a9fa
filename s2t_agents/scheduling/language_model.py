"""A loaded model: its backend, the scheduler that all requests go through, and the prefix cache."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from ..backends.base import Backend, Capabilities, Need, SequenceCache
from ..backends.loading import load_backend
from ..backends.torch.backend import TorchBackend
from ..backends.torch.packed_linear import LIMIT
from ..errors import ConfigError
from ..redaction import without_secrets
from ..tokenization.vocabulary import decodable_ids
from .prefix_cache import PrefixCache
from .running_prefixes import RunningPrefixes
from .scheduler import Scheduler

LACKS: dict[Need, str] = {
    "candidate_scoring": "cannot score candidates beside each other",
    "candidate_lora": "takes no adapter for single tokens",
    "hidden_states": "gives no hidden states",
}


class LanguageModel:
    """A causal LM, its tokenizer, and the one scheduler that runs it.

    Args:
        model: a ``transformers`` causal LM in eval mode; ``LanguageModel.on`` takes any backend.
        tokenizer: its fast tokenizer; added tokens without an embedding are read as ordinary text.
        name: how it is called in reports; a path or hub id.
        prepack: bytes of weights that a CPU may hold a second time, in the layout that it multiplies fastest.

    Attributes:
        backend: runs the forwards.
        scheduler: batches what concurrent callers want of it.
        prefix_cache: KV caches of earlier turns.
        running: prompts that are read or answered right now.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, prepack: int = LIMIT) -> None:
        self._use(TorchBackend(model, tokenizer, name=name, prepack=prepack))

    def _use(self, backend: Backend) -> None:
        self.backend = backend
        self.scheduler = Scheduler(backend)
        self.prefix_cache = PrefixCache()
        self.running = RunningPrefixes(self.prefix_cache, shares=backend.capabilities.fork_while_running)

    @classmethod
    def on(cls, backend: Backend) -> Self:
        """A model on any backend."""
        model = cls.__new__(cls)
        model._use(backend)
        return model

    @classmethod
    def load(cls, path: str, **options: Any) -> Self:
        """Read a model; arguments and errors as ``backends.loading.load_backend``."""
        return cls.on(load_backend(path, **options))

    def __repr__(self) -> str:
        kind = f"{self.library}, {self.quantization}"
        if isinstance(self.backend, TorchBackend):
            kind += f", {self.backend.model.dtype}"
        return f"LanguageModel({without_secrets(self.name)!r}, {kind}, weights={self.weights_fingerprint})"

    @property
    def name(self) -> str:
        """Path or hub id."""
        return self.backend.name

    @property
    def tokenizer(self) -> Any:
        """Limited to ids that have an embedding."""
        return self.backend.tokenizer

    @property
    def given_tokenizer(self) -> Any:
        """The tokenizer as it came."""
        return self.backend.given_tokenizer

    @property
    def architecture(self) -> str:
        """``model_type`` of its config."""
        return self.backend.architecture

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.backend.hidden_size

    @property
    def vocab_size(self) -> int:
        """V, columns of the logits, padding rows included."""
        return self.backend.vocab_size

    @property
    def context_window(self) -> int:
        """Tokens."""
        return self.backend.context_window

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.backend.eos_ids

    @property
    def device(self) -> torch.device:
        """Where logits and hidden states arrive."""
        return self.backend.device

    @property
    def capabilities(self) -> Capabilities:
        """What its backend can do with it."""
        return self.backend.capabilities

    def require(self, *needs: Need) -> None:
        """Refuse what its backend cannot do.

        Raises:
            ConfigError: it lacks one of these capabilities.
        """
        for need in needs:
            if not getattr(self.capabilities, need):
                raise ConfigError(
                    f"{self.name!r} {LACKS[need]} ({type(self.backend).__name__}), which a trigger or selector needs.",
                    hint="Load the checkpoint in PyTorch, or take a trigger and a selector that do without.",
                )

    @property
    def lock(self) -> Any:
        """Held during forwards; a thread that holds it has the model to itself."""
        return self.backend.lock

    @property
    def output_embedding(self) -> Tensor:
        """``[V, H]``: the row of every token in the output layer."""
        return self.backend.output_embedding

    @property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer's ids."""
        return self.backend.tokenizer_fingerprint

    @property
    def weights_fingerprint(self) -> str:
        """Hashes of the weights; compare with ``fingerprint.same_weights``."""
        return self.backend.weights_fingerprint

    @property
    def library(self) -> str:
        """What computes it: ``torch``, ``llama.cpp`` or ``server``."""
        return self.backend.library

    @property
    def quantization(self) -> str:
        """Types of its weights; ``none`` of plain ones."""
        return self.backend.quantization

    @property
    def checkpoint_fingerprint(self) -> str | None:
        """Hash of what all quantizations of its checkpoint share; None where nothing tells."""
        return self.backend.checkpoint_fingerprint

    @cached_property
    def with_text(self) -> Tensor | None:
        """``[V]`` bool: columns of the logits that are tokens; None when all are."""
        known = decodable_ids(self.tokenizer, self.vocab_size)
        return None if known is None else known.to(self.device)

    @property
    def torch_backend(self) -> TorchBackend:
        """The PyTorch backend, for training and for adapters.

        Raises:
            ConfigError: the model runs on another engine.
        """
        if isinstance(self.backend, TorchBackend):
            return self.backend
        raise ConfigError(
            f"{self.name!r} runs on {type(self.backend).__name__}; this needs its weights in PyTorch.",
            hint="Load the checkpoint itself, or use a head selector.",
        )

    @property
    def model(self) -> Any:
        """The ``transformers`` model; errors as ``torch_backend``."""
        return self.torch_backend.model

    def new_cache(self) -> SequenceCache:
        """An empty KV cache of one sequence."""
        return self.backend.new_cache()
