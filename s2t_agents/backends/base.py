"""The backend protocol: what an inference engine offers so that one scheduler can run any of them.

    scheduler ── batch of work items ──> Backend.forward ──> one output per item
                 Append(cache, ids)                            StepOutput: logits [V], hidden [H]
                 ScoreCandidates(cache, ids [K])               hidden states [K, H]; the cache stays as it is
                 ScoreTree(cache, ids [N], parents [N])        logits [N, V]; the cache stays as it is

A backend owns weights, tokenizer and the KV caches of its sequences, and runs one forward at a time. It knows nothing
of requests, queues, grammars or budgets. ``tests/test_backend_conformance.py`` holds for every backend.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .deadline import Deadline
from .statistics import LogitStatistics

Need = Literal["candidate_scoring", "candidate_lora", "hidden_states"]
"""A capability that triggers and selectors may need; the others are the scheduler's and the engine's."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do with this model, as data: callers read it and never ask for a class.

    Attributes:
        batching: several work items in one forward.
        candidate_scoring: hidden states after K candidates equal those of K separate sequences.
        candidate_lora: an adapter can be on at the tokens of one item alone.
        tree_scoring: logits after every token of a tree in one forward.
        hidden_states: outputs carry the last hidden state, which heads and probes read.
        truncation: a cache can be cut back to any length; False for recurrent states.
        fork_while_running: the front of a cache may be copied while its sequence goes on.
        concurrent_forwards: forwards of different sequences may run at once, each in its caller's thread: the engine is
            on another machine.
        all_logits: every token's logit is known; else only the best tokens', all others are -inf, see ``BestLogits``.
    """

    batching: bool
    candidate_scoring: bool
    candidate_lora: bool
    hidden_states: bool
    truncation: bool
    fork_while_running: bool
    concurrent_forwards: bool = False
    all_logits: bool = True
    tree_scoring: bool = False


class SequenceCache:
    """The KV cache of one sequence. Not thread-safe; the scheduler serialises what touches it.

    No ``ABC``, whose ``isinstance`` takes longer: it is asked at every token.
    """

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens in it."""

    @property
    @abstractmethod
    def read(self) -> int:
        """Tokens whose forward is done in every layer; at most ``length``."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of device or host memory."""

    @abstractmethod
    def fork(self, length: int) -> SequenceCache:
        """An independent cache with the first ``length`` tokens; an empty one where this one was closed.

        Without ``Capabilities.truncation`` only the whole length can be forked.
        """

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``; also undoes a forward that failed half-way."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back at once; a cache that is dropped gives it back when it is collected. Its length is 0."""

    def mark_read(self, length: int) -> None:
        """A forward over the first ``length`` tokens is done: ``read`` counts them from now on."""

    def expect(self, length: int) -> None:
        """Its generation will ask for no prediction at this length, or after: what is computed ahead ends there."""

    def park(self) -> None:
        """Its generation has ended: give back what only running sequences need. The tokens stay."""

    def unpark(self) -> None:
        """Another generation goes on with it, after ``park``."""

    def statistics(self) -> LogitStatistics | None:
        """Of the logits after the last token, where the forward has computed them on the way; None elsewhere."""
        return None

    def unbilled_s(self) -> float:
        """Seconds of device time that its last forward took while no caller waited; reset by the call."""
        return 0.0


@dataclass(frozen=True)
class Append:
    """Tokens to append to one sequence; a prompt may come in several of these (chunked prefill).

    Attributes:
        ids: ``[T]``.
        cache: the sequence's own; grows by T.
        length: tokens in it before.
        lora: adapter that is on at these tokens; None reads them with the base model.
        deadline: of the generation; for a backend that waits for others itself. None has none.
    """

    ids: Tensor
    cache: Any
    length: int
    lora: Any | None = None
    deadline: Deadline | None = None


@dataclass(frozen=True)
class ScoreCandidates:
    """Candidates after one sequence: each attends to the sequence and itself, and nothing is kept.

    Attributes:
        ids: ``[K]``.
        cache: the sequence's own; stays bitwise as it is.
        length: tokens in it.
        lora: adapter that is on at the candidates; None scores them with the base model.
    """

    ids: Tensor
    cache: Any
    length: int
    lora: Any | None = None


@dataclass(frozen=True)
class ScoreTree:
    """A tree of tokens after one sequence: each attends to the sequence, its ancestors and itself, and nothing is kept.

    It may follow an ``Append`` to the same cache in one batch: then it comes after those tokens.

    Attributes:
        ids: ``[N]``.
        parents: ``[N]``: place of the token before each, -1 for the end of the sequence; parents come first.
        cache: the sequence's own; stays bitwise as it is.
        length: tokens in it.
    """

    ids: Tensor
    parents: Tensor
    cache: Any
    length: int
    lora: None = None

    @cached_property
    def ancestors(self) -> Tensor:
        """``[N, N]`` bool: what each token attends to among these, itself included."""
        seen = torch.eye(len(self.ids), dtype=torch.bool)
        for at, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                seen[at] |= seen[parent]
        return seen

    @property
    def positions(self) -> list[int]:
        """``[N]``: of each token in its sequence."""
        return [self.length + depth - 1 for depth in self.ancestors.sum(1).tolist()]


class StepOutput(NamedTuple):
    """After the last token of an ``Append``: logits ``[V]`` (fp32) and last hidden state ``[H]``."""

    logits: Tensor
    hidden: Tensor


Work = Append | ScoreCandidates | ScoreTree
"""What one sequence wants of a forward."""

Output = StepOutput | Tensor
"""``StepOutput`` of an ``Append``; hidden states ``[K, H]`` of ``ScoreCandidates``; logits ``[N, V]``, fp32, of a
``ScoreTree``."""


@dataclass(frozen=True)
class Limits:
    """How a backend wants its batches.

    Attributes:
        prefill_alone: tokens of a prompt per forward while nothing else waits; bounds the memory of a forward.
        prefill_beside: tokens of prompts per forward beside decoding sequences, so that a long prompt delays none. On a
            CPU a chunk of the default size costs about as much as a batch of decode steps.
        sequences: per forward, at most.
        candidates: per forward, of all ``ScoreCandidates`` and ``ScoreTree`` together; the first is always taken whole.
        hand_over_s: seconds of a step from which forwards run in the scheduler's thread even for a single caller;
            infinite runs them in the caller's thread. From the default on, the hand-over (0.1 ms) is worth a CPU's
            OpenMP team.
    """

    prefill_alone: int = 1024
    prefill_beside: int = 256
    sequences: int = 64
    candidates: int = 256
    hand_over_s: float = 0.01


class Backend(Protocol):
    """An inference engine with one model loaded.

    Attributes:
        library: what computes: ``torch``, ``llama.cpp`` or a ``server``.
        name: path or hub id of the model, as reports show it.
        tokenizer: fast tokenizer of ``transformers``, limited to ids that have an embedding.
        given_tokenizer: the tokenizer as it came; fingerprints and comparisons between models read this one.
        architecture: ``model_type`` of the config.
        hidden_size: H.
        vocab_size: V, columns of the logits, padding rows included.
        context_window: tokens.
        eos_ids: tokens that end an answer.
        device: where logits and hidden states arrive.
        capabilities: see there.
        limits: see there.
        lock: a ``threading.RLock``, held during forwards. A thread that holds it has the model to itself.
    """

    library: str
    name: str
    tokenizer: Any
    given_tokenizer: Any
    architecture: str
    hidden_size: int
    context_window: int
    eos_ids: frozenset[int]
    device: torch.device
    capabilities: Capabilities
    limits: Limits
    lock: Any

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer's ids."""
        ...

    @property
    def weights_fingerprint(self) -> str:
        """Hash of the weights."""
        ...

    @property
    def quantization(self) -> str:
        """Types of the weights as they were loaded; ``none`` of plain ones, whatever their precision."""
        ...

    @property
    def checkpoint_fingerprint(self) -> str | None:
        """Hash of the normalisation weights, which quantization leaves as they are: the same for all forms of one
        checkpoint. None where they tell nothing."""
        ...

    @property
    def output_embedding(self) -> Tensor:
        """``[V, H]``: rows of the output layer."""
        ...

    def new_cache(self) -> SequenceCache:
        """An empty one."""
        ...

    def forward(self, batch: Sequence[Work]) -> list[Output]:
        """Run all items in one forward, or one by one without ``Capabilities.batching``; outputs in their order.

        Raises:
            Exception: of the engine; caches may be left with tokens beyond what was read, ``truncate`` undoes that.
        """
        ...

    def interrupt(self) -> None:
        """Stop the forward under way, where the engine can: it raises. So do all others until ``resume``. From any
        thread."""
        ...

    def resume(self) -> None:
        """Forwards run through again."""
        ...


class BestLogits(Backend, Protocol):
    """A backend without ``Capabilities.all_logits``: its logits are log-probabilities."""

    def among(self, cache: Any, allowed: Tensor, deadline: Deadline | None = None) -> Tensor:
        """Logits ``[V]`` after the sequence, of ``allowed`` ``[V]`` bool tokens, where none of those known is allowed:
        log-probabilities over those that are named.

        Raises:
            Exception: of the engine, or of the deadline.
        """
        ...
