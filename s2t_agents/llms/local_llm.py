"""An LLM on this machine: loaded at the first escalation; its KV cache is extended only when it is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..backends.loading import load_tokenizer
from ..budget.charges import charge_for
from ..errors import EscalationFailed, ModelNotFound, first_line
from ..fork_safety import hold_while_forking
from ..hub import ModelSource
from ..identity import identity
from ..redaction import url_without_secrets, without_secrets
from ..scheduling.idle_sequences import IdleSequences
from ..scheduling.language_model import LanguageModel
from ..scheduling.waits import Waiting, finish
from ..types import Charge, Price
from .base import WaitingSession
from .byte_session import ByteSession
from .kept_prefix import KeptPrefix, check_fits
from .question import Answer, Question
from .token_map import ComparedTokens, Side, side_of

MAX_IDLE_CACHES = 4
"""KV caches kept after a generation, for the next turn of the same conversation."""

RELOAD_S = 300.0
"""Seconds until loading is tried again after a failure: loading large weights takes minutes."""


NOT_HERE = (
    'An LLM that runs elsewhere is asked by ChatJudge(init_chat_model("openai:gpt-4o-mini")), or any other chat model, '
    "or by OpenAILLM(url, name)."
)
"""The way out for a name that is no model's here."""


class LocalLLM(ComparedTokens):
    """A model on this machine, of the SLM's family or any other.

    With the SLM's tokenizer it scores the candidates' tokens. With another one it scores their bytes, exactly
    (``covering``), and reads the conversation in its own chat template.

    Args:
        model: a directory, hub id or GGUF file, or a loaded model.
        chat_template: source that replaces its tokenizer's chat template, where its tokenizer is not the SLM's; a model
            without any reads ``PLAIN``.
        price: of its tokens, for dollar budgets; None if unknown.
        device: where it runs; may differ from the SLM's.
        dtype: None chooses as for the SLM.
        options: as of ``ChatS2T(model_kwargs=...)``; ``tokenizer`` replaces the model's.
    """

    def __init__(
        self,
        model: str | LanguageModel,
        *,
        chat_template: str | None = None,
        price: Price | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.name = model if isinstance(model, str) else model.name
        self.price, self.chat_template = price, chat_template
        self._given = self._model = None if isinstance(model, str) else model
        self._options: dict[str, Any] = {"device": device, "dtype": dtype, **options}
        self._lock = threading.Lock()
        hold_while_forking(self, "_lock")
        self._failure, self._retry_at = "", 0.0
        self.idle = IdleSequences(MAX_IDLE_CACHES)

    def __repr__(self) -> str:
        clean = {"chat_template": self.chat_template, **without_secrets(self._options)}
        options = [
            f"{key}={identity(value)!r}" for key, value in clean.items() if value is not None and key != "device"
        ]
        return f"LocalLLM({', '.join([repr(self._given or without_secrets(self.name)), *options])})"

    def __getstate__(self) -> dict[str, Any]:
        """Pickles as its settings; weights and caches are loaded again when needed."""
        options = {"chat_template": self.chat_template, **without_secrets(self._options)}
        return {"name": url_without_secrets(self.name), "price": self.price, "options": options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["name"], price=state["price"], **state["options"])  # type: ignore[misc]

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._model is not None

    def given_tokenizer(self) -> Any:
        """Its tokenizer, without reading weights."""
        return self._model.given_tokenizer if self._model else self._read_tokenizer()

    def side(self) -> Side:
        """See ``ComparedTokens``; loads the weights."""
        return side_of(self.load(), self.chat_template)

    def _read_tokenizer(self) -> Any:
        try:
            return self._options.get("tokenizer") or load_tokenizer(self.name, **_from_pretrained(self._options))
        except ModelNotFound as error:
            if ModelSource.of(self.name, {}).is_path:
                raise
            raise ModelNotFound(str(error), hint=NOT_HERE) from error

    def open(self) -> LocalSession:
        """A session with its own KV cache."""
        return LocalSession(self)

    def load(self) -> LanguageModel:
        """The model; loaded at the first call.

        Raises:
            EscalationFailed: it cannot be loaded; raised again without a new try for ``RELOAD_S`` seconds.
        """
        with self._lock:
            if self._model is None:
                if time.monotonic() < self._retry_at:
                    raise EscalationFailed(self._failure)
                self._model = self._read()
            return self._model

    def _read(self) -> LanguageModel:
        try:
            return LanguageModel.load(self.name, **self._options)
        except Exception as error:  # loading may raise anything
            self._failure = f"the weights of {self.name!r} cannot be loaded: {first_line(error)}."
            self._retry_at = time.monotonic() + RELOAD_S
            raise EscalationFailed(self._failure) from error


def _from_pretrained(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in ("device", "dtype", "tokenizer", "prepack")}


class LocalSession(WaitingSession):
    """One generation's KV cache in the LLM, extended lazily: the common prefix is kept, the rest is one prefill.

    An SLM with another tokenizer is answered by a ``ByteSession``.
    """

    def __init__(self, llm: LocalLLM) -> None:
        self._llm, self._kept = llm, KeptPrefix(llm.load, llm.idle)
        self._by_bytes: ByteSession | None = None

    def _other(self, question: Question) -> ByteSession | None:
        """Who answers this question by bytes; None where the tokens are the same."""
        slm = question.prefix.model if question.prefix is not None else None
        if self._by_bytes is None and slm is not None and (tokens := self._llm.token_map(slm)) is not None:
            self._by_bytes = ByteSession(self._llm.name, self._llm.price, self._kept, tokens)
        return self._by_bytes

    def quote(self, question: Question) -> Charge:
        """The cost of the tokens not in the KV cache, and of one output token."""
        if (other := self._other(question)) is not None:
            return other.quote(question)
        return charge_for(self._llm.price, input_tokens=self.uncached_tokens(question.ids, question.scope))

    def asking(self, question: Question) -> Waiting[Answer]:
        """Score every candidate.

        Raises:
            EscalationFailed: the prefix is too long, or the device failed (out of memory).
        """
        if (other := self._other(question)) is not None:
            return (yield from other.asking(question))
        cost = self.quote(question)
        with self._kept.asked():
            scores = yield from self.scoring(question.ids, question.candidates, question.scope)
        question.owe(cost)
        return Answer(tuple(scores))

    def uncached_tokens(self, ids: Sequence[int], scope: str | None = None) -> int:
        """Number of tokens of ``ids`` that are not in the KV cache."""
        sequence = self._kept.found(ids, scope)
        return len(ids) - (sequence.common_prefix(ids) if sequence else 0)

    def scores(self, ids: Sequence[int], candidates: Sequence[int], scope: str | None = None) -> list[float]:
        """``scoring``, blocking."""
        return finish(self.scoring(ids, candidates, scope))

    def scoring(self, ids: Sequence[int], candidates: Sequence[int], scope: str | None = None) -> Waiting[list[float]]:
        """Log-probabilities of the candidates after ``ids``; one forward pass over the new tokens."""
        model = self._llm.load()
        check_fits(model, len(ids))
        rows = model.vocab_size
        if outside := next((token for token in ids if token >= rows), None):
            raise EscalationFailed(f"the LLM has no embedding for token {outside} of the prefix: it has {rows}.")
        log_probs = (yield from self.reading(model, ids, scope)).log_softmax(0)
        within: list[float] = log_probs[[token if token < rows else 0 for token in candidates]].tolist()
        return [value if token < rows else -inf for value, token in zip(within, candidates, strict=True)]

    def reading(self, model: LanguageModel, ids: Sequence[int], scope: str | None) -> Waiting[Tensor]:
        """The LLM's logits ``[V]`` after ``ids``."""
        sequence = self._kept.take(ids, scope)
        yield from sequence.moving_to(ids)
        return sequence.logits

    def close(self) -> None:
        """Keep the KV cache for the next turn."""
        self._kept.close()
