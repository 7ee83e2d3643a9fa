"""What requests cost: one of so many tokens, and several in sum."""

from __future__ import annotations

from collections.abc import Iterable

from ..types import Charge, Price
from . import money


def charge_for(
    price: Price | None, *, input_tokens: int, cached_tokens: int = 0, output_tokens: int = 1, escalations: int = 1
) -> Charge:
    """The cost of a request. Cached tokens have their own price and do not count as LLM tokens.

    Args:
        price: None leaves the dollars unknown.
        input_tokens: of the whole prompt, cached tokens included.
        cached_tokens: how many of them were in the LLM's prefix cache.
        output_tokens: tokens generated.
        escalations: questions to the LLM that it is.
    """
    usd = None
    if price is not None:
        usd = price.cost(input_tokens=input_tokens, cached_tokens=cached_tokens, output_tokens=output_tokens)
    return Charge(usd=usd, llm_tokens=input_tokens - cached_tokens + output_tokens, escalations=escalations)


def sum_of(charges: Iterable[Charge]) -> Charge:
    """Added unit by unit; dollars None if one of them is unknown, and 0 for no charges."""
    charges = list(charges)
    known = [each.usd for each in charges if each.usd is not None]
    return Charge(
        usd=money.total(known) if len(known) == len(charges) else None,
        llm_tokens=sum(each.llm_tokens for each in charges),
        escalations=sum(each.escalations for each in charges),
        answers=sum(each.answers for each in charges),
        answer_tokens=sum(each.answer_tokens for each in charges),
    )
