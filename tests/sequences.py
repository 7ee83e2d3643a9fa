"""Sequences as tests begin them, and the scheduler's requests one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from s2t_agents.backends.base import ScoreCandidates, SequenceCache, StepOutput
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.requests import AppendRequest, ScoreRequest
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.scheduling.waits import finish


def read(model: LanguageModel, ids: Sequence[int]) -> TokenSequence:
    """A sequence of these tokens."""
    sequence = TokenSequence(model)
    sequence.append(ids)
    return sequence


def moved(sequence: TokenSequence, ids: Sequence[int]) -> int:
    """Make it the sequence ``ids``; returns the tokens that were computed for it."""
    return finish(sequence.moving_to(ids))


def scored_after(sequence: TokenSequence, candidates: Tensor, lora: Any = None) -> Tensor:
    """Last hidden states ``[K, H]`` of candidates ``[K]`` after it."""
    return finish(sequence.scoring_candidates(candidates, lora))


@torch.inference_mode()
def appended(model: LanguageModel, ids: Tensor, cache: SequenceCache) -> StepOutput:
    """Append ``ids`` ``[T]`` to a cache: logits ``[V]`` and last hidden state ``[H]``."""
    request = AppendRequest(ids, cache)
    model.scheduler.run([request])
    return request.result()


@torch.inference_mode()
def scored(model: LanguageModel, candidates: Tensor, cache: SequenceCache, length: int, lora: Any = None) -> Tensor:
    """Last hidden states ``[K, H]`` of candidates ``[K]`` after the cache's ``length`` tokens."""
    request = ScoreRequest(ScoreCandidates(candidates, cache, length, lora))
    model.scheduler.run([request])
    return request.result()
