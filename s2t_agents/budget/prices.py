"""What a token and a device-second cost. The user's own figures first; then the genai-prices package."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import cache

from ..errors import BadLimit
from . import money

LIST_TIERS = (None, "auto", "default", "standard", "standard_only", "on_demand")
"""Service tiers at list price, as OpenAI, Anthropic and Groq name them; None where a request names none."""


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """Prices of a hosted model, in USD per million tokens.

    Args:
        input_usd_per_mtok: tokens read that the provider has not cached, nor caches now.
        output_usd_per_mtok: tokens written.
        cached_input_usd_per_mtok: tokens read from the provider's cache; None charges them as uncached.
        as_of: the day on which the price was valid, at the earliest; None when it was given without one.
        source: where the price comes from.
        long_prompts: (tokens, price) pairs, ascending: the price of a whole call whose prompt is longer than that.
        cache_write_usd_per_mtok: tokens read and written to the provider's cache; None charges them as uncached.
        cache_write_1h_usd_per_mtok: those that are kept there for an hour; None charges them as others written.

    Raises:
        BadLimit: a price that is negative, NaN, infinite, above a million or in another currency.
    """

    input_usd_per_mtok: Decimal
    output_usd_per_mtok: Decimal
    cached_input_usd_per_mtok: Decimal | None = None
    as_of: date | None = None
    source: str = "given"
    long_prompts: tuple[tuple[int, TokenPrice], ...] = ()
    cache_write_usd_per_mtok: Decimal | None = None
    cache_write_1h_usd_per_mtok: Decimal | None = None

    def __post_init__(self) -> None:
        for field in _FIELDS:
            value = getattr(self, field)
            if value is not None or field in _FIELDS[:2]:
                object.__setattr__(self, field, money.price(value, field))

    def cost(
        self,
        *,
        input_tokens: int,
        cached_tokens: int = 0,
        output_tokens: int = 0,
        cache_write_tokens: int = 0,
        cache_write_1h_tokens: int = 0,
    ) -> Decimal:
        """USD for one call, to the pico-dollar. One escalation is its prefix plus one token out.

        Args:
            input_tokens: the whole prompt, tokens read from the provider's cache or written to it included.
            cached_tokens: how many of them the provider had cached.
            output_tokens: tokens written.
            cache_write_tokens: how many of the prompt the provider has written to its cache.
            cache_write_1h_tokens: how many of those it keeps for an hour.

        Raises:
            BadLimit: a negative count, or more tokens of a part than tokens.
        """
        for name, value in {
            "input_tokens": input_tokens,
            "cached_tokens": cached_tokens,
            "output_tokens": output_tokens,
            "cache_write_tokens": cache_write_tokens,
            "cache_write_1h_tokens": cache_write_1h_tokens,
        }.items():
            money.count(value, name)
        plain, minutes = input_tokens - cached_tokens - cache_write_tokens, cache_write_tokens - cache_write_1h_tokens
        if plain < 0:
            raise BadLimit(
                f"cached_tokens={cached_tokens} and cache_write_tokens={cache_write_tokens} are above"
                f" input_tokens={input_tokens}.",
                hint="input_tokens counts the whole prompt, tokens in the cache included.",
            )
        if minutes < 0:
            raise BadLimit(
                f"cache_write_1h_tokens={cache_write_1h_tokens} is above cache_write_tokens={cache_write_tokens}.",
                hint="cache_write_tokens counts all that are written to the cache.",
            )
        price = self._for_prompt(input_tokens)
        read, cached = price.input_usd_per_mtok, price.cached_input_usd_per_mtok
        write, hour = price.cache_write_usd_per_mtok, price.cache_write_1h_usd_per_mtok
        write = read if write is None else write
        parts = (
            (read, plain),
            (read if cached is None else cached, cached_tokens),
            (write, minutes),
            (write if hour is None else hour, cache_write_1h_tokens),
            (price.output_usd_per_mtok, output_tokens),
        )
        total = money.total(money.multiply(usd, tokens) for usd, tokens in parts)
        return money.round_usd(money.divide(total, 1_000_000))

    def _for_prompt(self, tokens: int) -> TokenPrice:
        price = self
        for above, dearer in self.long_prompts:
            if tokens > above:
                price = dearer
        return price


_FIELDS = (
    "input_usd_per_mtok",
    "output_usd_per_mtok",
    "cached_input_usd_per_mtok",
    "cache_write_usd_per_mtok",
    "cache_write_1h_usd_per_mtok",
)
"""Prices of a ``TokenPrice``; the first two must be there."""


@dataclass(frozen=True, slots=True)
class DevicePrice:
    """The price of local compute.

    Args:
        usd_per_hour: USD per device-hour: what the machine is rented for, or its power and wear. 0 is free.

    Raises:
        BadLimit: negative, NaN, infinite, above a million or in another currency.
    """

    usd_per_hour: Decimal

    def __post_init__(self) -> None:
        object.__setattr__(self, "usd_per_hour", money.price(self.usd_per_hour, "usd_per_hour"))

    def cost(self, seconds: float) -> Decimal:
        """USD for so many measured device-seconds, to the nearest pico-dollar."""
        spent = money.dollars(seconds, "seconds")
        return money.round_usd(money.divide(money.multiply(self.usd_per_hour, spent), 3600))


def known_price(model_name: str, provider: str | None = None) -> TokenPrice | None:
    """Today's list price of a known API model, from genai-prices; None when it is not listed there.

    Args:
        model_name: as the API calls it, such as ``"gpt-4o-mini"``.
        provider: such as ``"openai"``; found from the model's name when left out.
    """
    from genai_prices.data_snapshot import get_snapshot

    snapshot = get_snapshot()
    try:
        _, model = snapshot.find_provider_model(model_name, None, provider, None)
    except LookupError:
        return None
    prices = model.get_prices(datetime.now(UTC))
    version = importlib.metadata.version("genai-prices")
    as_of = snapshot.timestamp.date() if snapshot.from_auto_update else _list_date(version)
    base = _tier(prices, None, as_of, f"genai-prices {version}")
    if base is None:
        return None
    starts = sorted({tier.start for part in _PARTS for tier in getattr(getattr(prices, part, None), "tiers", ())})
    tiers = ((start, _tier(prices, start, as_of, base.source)) for start in starts)
    return replace(base, long_prompts=tuple((start, price) for start, price in tiers if price is not None))


_PARTS = ("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok", "cache_write_1h_mtok")


def _tier(prices: object, start: int | None, as_of: date | None, source: str) -> TokenPrice | None:
    """The price above ``start`` prompt tokens, or the base price; None if input or output has none."""
    found: list[Decimal | None] = []
    for part in _PARTS:
        price = getattr(prices, part, None)
        if price is not None and not isinstance(price, Decimal):
            fitting = [tier.price for tier in price.tiers if start is not None and tier.start <= start]
            price = fitting[-1] if fitting else price.base
        found.append(price)
    read, output, cached, write, hour = found
    if read is None or output is None:
        return None
    return TokenPrice(read, output, cached, as_of, source, (), write, hour)


@cache
def _list_date(version: str) -> date | None:
    """The newest dated price change in force in the bundled list: the list is at least that recent."""
    from genai_prices.data_snapshot import get_snapshot

    today = datetime.now(UTC).date()
    starts = (
        getattr(price.constraint, "start_date", None)
        for provider in get_snapshot().providers
        for model in provider.models
        if isinstance(model.prices, list)
        for price in model.prices
    )
    return max((start for start in starts if start is not None and start <= today), default=None)
