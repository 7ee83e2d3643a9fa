"""vLLM's model classes with a head selector in ``compute_logits``; see ``vllm.py``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import gemma3, llama, mistral, qwen2, qwen3

from ..backends.fingerprint import embedding_fingerprint, same_weights
from ..bundled import selector_path
from ..endpoints.served_selection import MOST_CANDIDATES
from ..errors import AdapterMismatch, ConfigError
from ..selectors.config import SelectorConfig
from ..selectors.head import HeadSelector
from ..selectors.in_logits import BatchTrigger, EntropyAbove, LogitSelection, ProbeAbove
from ..selectors.learned_trigger import load_probe


@dataclass(frozen=True)
class Base:
    """The served model, as a head selector reads it."""

    name: str
    hidden_size: int
    output_embedding: Tensor
    device: torch.device


class SelectsInLogits:
    """Mixed into a causal LM of vLLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        parallel = vllm_config.parallel_config.tensor_parallel_size
        if parallel > 1:
            raise ConfigError(
                f"tensor_parallel_size is {parallel}; a head selector reads whole rows of the output layer.",
                hint="Serve with 1 (data parallelism and pipelines are fine), or without S2T_SELECTOR.",
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.__dict__["s2t_model"] = vllm_config.model_config  # no parameter, no module: not part of the weights
        self.__dict__["s2t_selection"] = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The model's own, then the selector."""
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        self.__dict__["s2t_selection"] = selection_of(self, self.__dict__["s2t_model"])
        return loaded

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The model's own logits ``[N, V]``, candidates re-ranked at triggered rows."""
        logits: Tensor | None = super().compute_logits(hidden_states)  # type: ignore[misc]
        selection: LogitSelection | None = self.__dict__["s2t_selection"]
        return logits if logits is None or selection is None else selection(hidden_states, logits)


def selection_of(model: Any, config: Any) -> LogitSelection:
    """The selector that the environment names, for this model.

    Raises:
        AdapterMismatch: it was trained on other weights.
        ConfigError: it is not a head; trigger or K that cannot be.
    """
    path = selector_path(os.environ["S2T_SELECTOR"])
    wanted = SelectorConfig.load(path)
    if wanted.kind != "head":
        raise ConfigError(f"{str(path)!r} is of the kind {wanted.kind!r}; in vLLM a selector is a head.")
    words = config.get_vocab_size()
    embedding = model.model.embed_tokens.weight.data[:words]
    if not same_weights(wanted.base.weights_fingerprint, embedding_fingerprint(embedding)):
        raise AdapterMismatch(
            f"the selector at {str(path)!r} was trained on {wanted.base.name!r}; {config.model!r} has other weights."
        )
    base = Base(config.model, config.get_hidden_size(), model.lm_head.weight.data[:words], embedding.device)
    selector = HeadSelector.read(path, base, wanted)
    return LogitSelection(selector, _trigger(path, wanted), _k(wanted))


def _trigger(path: Any, config: SelectorConfig) -> BatchTrigger:
    given = os.environ.get("S2T_TRIGGER")
    if given is not None:
        try:
            return EntropyAbove(float(given))
        except ValueError:
            raise ConfigError(f"S2T_TRIGGER is {given!r}; it is a number of nats.") from None
    if config.calibration is None:
        raise ConfigError(f"the selector at {str(path)!r} has no thresholds.", hint="Run `s2t calibrate`.")
    if config.calibration.probe_above is None:
        return EntropyAbove(config.calibration.trigger_entropy)
    return ProbeAbove(*load_probe(path, config), config.calibration.probe_above)


def _k(config: SelectorConfig) -> int:
    given = os.environ.get("S2T_K", str(config.k))
    if not given.isdecimal() or not 2 <= int(given) <= MOST_CANDIDATES:
        raise ConfigError(f"S2T_K is {given!r}; in vLLM a selector has 2 to {MOST_CANDIDATES} candidates.")
    return int(given)


class LlamaForCausalLM(SelectsInLogits, llama.LlamaForCausalLM):
    """Llama, SmolLM."""


class MistralForCausalLM(SelectsInLogits, mistral.MistralForCausalLM):
    """Mistral."""


class Qwen2ForCausalLM(SelectsInLogits, qwen2.Qwen2ForCausalLM):
    """Qwen2, Qwen2.5."""


class Qwen3ForCausalLM(SelectsInLogits, qwen3.Qwen3ForCausalLM):
    """Qwen3."""


class Gemma3ForCausalLM(SelectsInLogits, gemma3.Gemma3ForCausalLM):
    """Gemma 3, text."""
