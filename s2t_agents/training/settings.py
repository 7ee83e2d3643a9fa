"""The sections of the TOML file that say how a stage works: models, rollouts, fit, targets, rows. See ``config``."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..backends.loading import is_gguf
from ..budget import TokenPrice
from ..bundled import model_path
from ..scheduling.language_model import LanguageModel

Kind = Literal["head", "activated", "adapted", "published"]
KINDS: tuple[Kind, ...] = ("head", "activated", "adapted", "published")
"""From the cheapest to the dearest to train."""
Value = TypeVar("Value")

SERVED_WAIT_S = 600.0
"""For a token of a rollout: a server with many to answer lets some wait."""


def _each_once(values: tuple[Value, ...]) -> tuple[Value, ...]:
    if twice := [value for at, value in enumerate(values) if value in values[:at]]:
        raise ValueError(f"{twice[0]} is there more than once")
    return values


Distinct = Annotated[tuple[Value, ...], AfterValidator(_each_once)]
"""Rows of a table are told apart by such a value."""


class Settings(BaseModel):
    """Base: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ServedPrice(Settings):
    """USD per million tokens of a served model.

    Attributes:
        input: tokens read.
        output: tokens written.
        cached: tokens read from the server's prefix cache; None charges them as read anew.
        cache_write: tokens that the server writes to that cache; None charges them as others read anew.
    """

    input: Decimal = Field(ge=0)
    output: Decimal = Field(ge=0)
    cached: Decimal | None = Field(default=None, ge=0)
    cache_write: Decimal | None = Field(default=None, ge=0)

    def of_tokens(self) -> TokenPrice:
        """For a budget."""
        return TokenPrice(self.input, self.output, self.cached, cache_write_usd_per_mtok=self.cache_write)


class Models(Settings):
    """The pair.

    Attributes:
        slm: path, hub id or bundled name.
        llm: likewise; with ``llm_server`` its name at the server.
        slm_server: ``vllm://host:port/name`` of a server with the SLM: rollouts are made and read there. Everything
            else reads the weights of ``slm``, of which a collection only needs the tokenizer.
        slm_key_env, llm_key_env: names of environment variables with the servers' bearer tokens.
        slm_price, llm_price: of the servers' tokens; None where it is unknown.
        llm_server: base URL of an OpenAI-compatible vLLM server, such as ``http://localhost:8000/v1``.
        llm_tokenizer: path or hub id of the LLM's tokenizer when it is served; by default ``llm``.
        device: of what runs on this machine; None takes the best there is.
        dtype: None takes fp32 for small models on a CPU, the checkpoint's own otherwise. GGUF files have their own.
    """

    slm: str = "s2t-demo"
    llm: str = "s2t-demo-llm"
    llm_server: str | None = None
    llm_tokenizer: str | None = None
    slm_server: str | None = None
    slm_key_env: str | None = None
    llm_key_env: str | None = None
    slm_price: ServedPrice | None = None
    llm_price: ServedPrice | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def load_slm(self) -> LanguageModel:
        """The small model; errors as ``LanguageModel.load``."""
        return self._load(self.slm)

    def load_slm_to_collect(self) -> LanguageModel:
        """The small model as it makes rollouts: on its server, if it has one.

        Raises:
            ModelServerError: it cannot be reached.
            S2TError: as ``LanguageModel.load``.
        """
        if self.slm_server is None:
            return self.load_slm()
        tokenizer = model_path(self.slm)
        return LanguageModel.load(
            self.slm_server, tokenizer=tokenizer, api_key_env=self.slm_key_env, allow_http=True, timeout_s=SERVED_WAIT_S
        )

    @property
    def served_prices(self) -> dict[str, ServedPrice | None]:
        """Of the models on servers, by their addresses."""
        servers = {self.slm_server: self.slm_price, self.llm_server: self.llm_price}
        return {server: price for server, price in servers.items() if server is not None}

    def load_llm(self) -> LanguageModel:
        """The large model, on this machine."""
        return self._load(self.llm)

    def _load(self, name: str) -> LanguageModel:
        path = model_path(name)
        dtype = getattr(torch, self.dtype) if self.dtype and not is_gguf(path) else None
        model = LanguageModel.load(path, device=self.device, dtype=dtype)
        model.backend.name = name
        return model


class Rollouts(Settings):
    """``[collect]``: how rollouts are made.

    Attributes:
        k: candidates kept per step.
        greedy: one greedy rollout per item.
        samples: so many sampled rollouts per item besides.
        temperature: of the sampled ones.
        max_tokens: per turn.
        shard_items: items per shard, and per batch; an interruption loses the shard at hand. None: an eighth of all, 4
            (with a server 32) at least, 128 at most. A collection that was begun goes on with its own.
        seed: of the draws.
        selector: directory of a selector that corrects the greedy rollouts (an on-policy round).
        dtype: of both models while they collect; None runs them as ``[models]`` says. On a CPU with AVX512_BF16
            ``bfloat16`` collects about twice as fast.
    """

    k: int = Field(default=16, ge=1, le=64)
    greedy: bool = True
    samples: int = Field(default=0, ge=0)
    temperature: float = Field(default=0.8, gt=0)
    max_tokens: int = Field(default=160, ge=1)
    shard_items: int | None = Field(default=None, ge=1)
    seed: int = 0
    selector: Path | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class Adapter(Settings):
    """LoRA of the activated, the adapted and the published kind."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16, gt=0)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Fit(Settings):
    """``[train]``: how a selector is trained.

    Attributes:
        k: candidates that it will rank; at most the rollouts' k.
        rate: share of steps, by entropy, that are trained on.
        kl_rate: share of steps, by KL, that are trained on besides.
        epochs: passes over the training trajectories, at most.
        lr: peak learning rate (cosine to zero after ``warmup`` steps).
        weight_decay: of AdamW.
        batch: steps' groups per optimiser step (head), or trajectories (adapters), gradient accumulation included.
        warmup: optimiser steps.
        clip: of the gradient's norm.
        soft: weight of the soft term beside the cross-entropy.
        label_temperature: of the LLM's distribution in the soft term.
        width: of the head's hidden layer.
        adapter: LoRA of the other kinds.
        prompt_share: share of the prompts' tokens, drawn anew at every step, at which the adapted kind learns the
            LLM's whole distribution besides, not of the rollouts' K candidates alone. The LLM has to be on this machine
            (about four times the work); with 0 it is not needed.
        max_row: candidates in one forward; longer rows are split, their gradients added.
        bf16: autocast.
        checkpointing: activations of the adapters' layers are computed again in the backward pass instead of kept:
            less memory for one more forward pass, the same weights. The head has none to keep.
        validation: share of items held back for early stopping.
        evaluate_every: optimiser steps between looks at them; checkpoints are written then.
        patience: looks without a better agreement before training stops.
        seed: of initialisation and order.
    """

    k: int = Field(default=8, ge=1, le=64)
    rate: float = Field(default=0.1, gt=0, le=1)
    kl_rate: float = Field(default=0.02, ge=0, le=1)
    epochs: int = Field(default=3, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    batch: int = Field(default=16, ge=1)
    warmup: int = Field(default=20, ge=0)
    clip: float = Field(default=1.0, gt=0)
    soft: float = Field(default=0.5, ge=0)
    label_temperature: float = Field(default=1.0, gt=0)
    width: int = Field(default=256, ge=1)
    adapter: Adapter = Adapter()
    prompt_share: float = Field(default=0.0, ge=0, le=1)
    max_row: int = Field(default=512, ge=1)
    bf16: bool = False
    checkpointing: bool = False
    validation: float = Field(default=0.08, gt=0, lt=1)
    evaluate_every: int = Field(default=50, ge=1)
    patience: int = Field(default=6, ge=1)
    seed: int = 0


class Targets(Settings):
    """``[calibrate]``: the rates that thresholds are set to.

    Attributes:
        trigger_rate: share of all steps.
        escalation_rate: share of triggered steps.
        false_alarms: largest share of answers in which the LLM would change nothing and the selector does; sets the
            selector's caution. None leaves it at 0.
    """

    trigger_rate: float = Field(default=0.05, gt=0, lt=1)
    escalation_rate: float = Field(default=0.2, gt=0, lt=1)
    false_alarms: float | None = Field(default=None, gt=0, lt=1)


class EvaluationRows(Settings):
    """``[evaluate]``: which rows, at which settings.

    Attributes:
        trigger_rate: of the local rows, by entropy; None takes each selector's own calibrated trigger.
        llm_trigger_rate: of llm_select and takeover. All thresholds come from the selectors' calibration, on held-out
            rollouts, never from the problems of the table.
        llm_trigger_entropy: nats from which llm_select and takeover ask, in place of ``llm_trigger_rate``; without a
            selector, read off the held-out rollouts where it is not given.
        budgets: escalations per answer of the hybrid rows.
        hybrid: kind of the selector in the hybrid and random rows; None takes the one with the best held-out agreement.
        votes: samples of the majority row; 0 leaves it out.
        temperature: of those samples.
        ks: sweep over K; empty for none.
        rates: sweep over trigger rates; empty for none.
        k: candidates where no selector sets them.
        max_tokens: per turn.
        batch: problems that are answered together.
        agreement: problems on which the agreement with the LLM at triggered steps is measured.
        llm_usd_per_million: price of the LLM's tokens, for the cost column; None where it is unknown.
    """

    trigger_rate: float | None = Field(default=None, gt=0, lt=1)
    llm_trigger_rate: float = Field(default=0.1, gt=0, lt=1)
    llm_trigger_entropy: float | None = Field(default=None, ge=0)
    budgets: Distinct[Annotated[int, Field(ge=0)]] = (1, 2, 4, 8)
    hybrid: Kind | None = None
    votes: int = Field(default=8, ge=0)
    temperature: float = Field(default=0.7, gt=0)
    ks: Distinct[Annotated[int, Field(ge=1, le=64)]] = ()
    rates: Distinct[Annotated[float, Field(gt=0, lt=1)]] = ()
    k: int = Field(default=8, ge=1, le=64)
    max_tokens: int = Field(default=160, ge=1)
    batch: int = Field(default=100, ge=1)
    agreement: int = Field(default=100, ge=0)
    llm_usd_per_million: float | None = Field(default=None, ge=0)
