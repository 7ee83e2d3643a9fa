"""What requests cost: one of so many tokens, the most that it may be, and several in sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

from ..types import Charge, Price
from . import money
from .prices import TokenPrice


def charge_for(
    price: Price | None,
    *,
    input_tokens: int,
    cached_tokens: int = 0,
    output_tokens: int = 1,
    cache_write_tokens: int = 0,
    cache_write_1h_tokens: int = 0,
    escalations: int = 1,
) -> Charge:
    """The cost of a request. Cached tokens have their own price and do not count as LLM tokens.

    Args:
        price: None leaves the dollars unknown.
        input_tokens: of the whole prompt, cached and written tokens included.
        cached_tokens: how many of them were in the LLM's prefix cache.
        output_tokens: tokens generated.
        cache_write_tokens: how many of the prompt were written to that cache.
        cache_write_1h_tokens: how many of those it keeps for an hour.
        escalations: questions to the LLM that it is.
    """
    usd = None
    if price is not None:
        written = {"cache_write_tokens": cache_write_tokens, "cache_write_1h_tokens": cache_write_1h_tokens}
        known = {name: n for name, n in written.items() if n and takes(price, name)}
        usd = price.cost(input_tokens=input_tokens, cached_tokens=cached_tokens, output_tokens=output_tokens, **known)
    return Charge(usd=usd, llm_tokens=input_tokens - cached_tokens + output_tokens, escalations=escalations)


def most_for(price: Price | None, *, input_tokens: int, output_tokens: int, escalations: int = 1) -> Charge:
    """The most that a request may cost, whatever of its prompt is read from the LLM's cache or written to it.

    Each part of a ``TokenPrice`` has one price a token, so a prompt that is all of the dearest costs most; any other
    price is asked for a plain prompt. Arguments as of ``charge_for``.
    """
    cases: list[tuple[str, ...]] = [()]
    if isinstance(price, TokenPrice):  # of another class, what it was not told of is not asked
        cases += [("cached_tokens",), ("cache_write_tokens",), ("cache_write_tokens", "cache_write_1h_tokens")]
    plain, *others = (
        charge_for(
            price,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            escalations=escalations,
            **dict.fromkeys(names, input_tokens),
        )
        for names in cases
    )
    dollars = [each.usd for each in others if each.usd is not None]
    return replace(plain, usd=max(plain.usd, *dollars)) if plain.usd is not None and dollars else plain


def takes(price: Price, part: str) -> bool:
    """Whether a price names this part; of a class that does not, its tokens cost as others read."""
    try:
        return part in signature(price.cost).parameters
    except (TypeError, ValueError):  # it is no Python function
        return False


def cache_counts(details: Mapping[str, Any], input_tokens: int) -> dict[str, int] | None:
    """What of a prompt was in the LLM's cache, and what was written to it, as arguments of ``charge_for``.

    Args:
        details: of a usage's prompt tokens: LangChain's ``input_token_details`` (also those of a service tier, and
            Anthropic's two kinds of writing), or ``prompt_tokens_details`` of OpenAI's API.
        input_tokens: of the whole prompt. Counts beyond it are cut, those of the cheapest part first.

    Returns:
        None if a count is no whole number.
    """
    counts = {name: details.get(name) or 0 for name in (*_READ, *_WRITTEN, *_WRITTEN_FOR)}
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in counts.values()):
        return None
    hour = min(max(counts["ephemeral_1h_input_tokens"], 0), input_tokens)
    kinds = sum(max(counts[name], 0) for name in _WRITTEN_FOR)  # where they are told, LangChain's sum may be 0
    written = min(max(kinds, *(counts[name] for name in _WRITTEN)), input_tokens)
    read = min(max(0, *(counts[name] for name in _READ)), input_tokens - written)
    return {"cached_tokens": read, "cache_write_tokens": written, "cache_write_1h_tokens": hour}


_READ = ("cache_read", "cached_tokens", "flex_cache_read", "priority_cache_read")
_WRITTEN = ("cache_creation", "cache_write_tokens", "flex_cache_creation", "priority_cache_creation")
_WRITTEN_FOR = ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")


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
