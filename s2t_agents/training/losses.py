"""The selector's loss: be right about the LLM's best candidate, and near to its distribution over all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def selection_loss(scores: Tensor, llm: Tensor, *, soft: float, temperature: float) -> Tensor:
    """Cross-entropy to the LLM's best candidate, plus ``soft`` times KL to its distribution over the candidates.

    The first is L_sel of the paper (arXiv 2604.26940, section 4.2). Its regulariser to the base is not needed: the
    base's own distribution can not change.

    Args:
        scores: ``[M, K]``, log p_SLM + correction.
        llm: ``[M, K]`` log-probabilities of the LLM.
        soft: weight of the second term.
        temperature: of the LLM's distribution in it.

    Returns:
        The sum over the M groups.
    """
    hard = functional.cross_entropy(scores.float(), llm.argmax(-1), reduction="sum")
    if not soft:
        return hard
    wanted = (llm / temperature).log_softmax(-1)
    near = functional.kl_div(scores.float().log_softmax(-1), wanted, reduction="sum", log_target=True)
    return hard + soft * near


def agreements(scores: Tensor, llm: Tensor) -> Tensor:
    """``[M]`` bool: the best-scored candidate is the LLM's best."""
    return torch.as_tensor(scores.argmax(-1) == llm.argmax(-1))
