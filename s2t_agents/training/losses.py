"""The selector's loss: be right about the LLM's best candidate, and near to its distribution over all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def selection_loss(scores: Tensor, llm: Tensor, *, soft: float, temperature: float) -> Tensor:
    """Cross-entropy to the LLM's best candidate, plus ``soft`` times KL to its distribution over the candidates.

    The first is L_sel of the paper (arXiv 2604.26940, section 4.2). Its regulariser to the base is not needed: the
    base's own distribution cannot change.

    Args:
        scores: ``[M, K]``, log p_SLM + correction.
        llm: ``[M, K]`` log-probabilities of the LLM; NaN where it gave none. Such a candidate was not its pick, and
            that is all that is known: the first term counts it as one of those not picked, the second leaves it out of
            both distributions.
        soft: weight of the second term.
        temperature: of the LLM's distribution in it.

    Returns:
        The sum over the M groups.
    """
    hard = functional.cross_entropy(scores.float(), pick(llm), reduction="sum")
    if not soft:
        return hard
    if (unknown := llm.isnan()).any():
        return hard + soft * _near_where_known(scores, llm / temperature, unknown)
    wanted = (llm / temperature).log_softmax(-1)
    near = functional.kl_div(scores.float().log_softmax(-1), wanted, reduction="sum", log_target=True)
    return hard + soft * near


def _near_where_known(scores: Tensor, wanted: Tensor, unknown: Tensor) -> Tensor:
    """KL over the candidates that were given a score, summed over the groups; 0 where that is one alone."""
    out = torch.finfo(torch.float32).min
    ours = scores.float().masked_fill(unknown, out).log_softmax(-1)
    theirs = wanted.masked_fill(unknown, out).log_softmax(-1)
    return functional.kl_div(ours, theirs, reduction="none", log_target=True).masked_fill(unknown, 0.0).sum()


def pick(llm: Tensor) -> Tensor:
    """``[M]``: place of the LLM's best candidate, from its log-probabilities ``[M, K]``, NaN where it gave none."""
    return llm.masked_fill(llm.isnan(), -torch.inf).argmax(-1)


def agreements(scores: Tensor, llm: Tensor) -> Tensor:
    """``[M]`` bool: the best-scored candidate is the LLM's best."""
    return torch.as_tensor(scores.argmax(-1) == pick(llm))
