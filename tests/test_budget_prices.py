"""Prices: the user's own, or the list's with its date; unknown is None; device time costs money."""

from __future__ import annotations

import decimal
from datetime import date
from decimal import Decimal
from typing import Any

import genai_prices
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2t_agents.budget import DevicePrice, TokenPrice, known_price
from s2t_agents.errors import BadLimit

PRICE = TokenPrice(Decimal("0.15"), Decimal("0.6"), Decimal("0.075"))
WRITTEN = TokenPrice(3, 15, 0.3, cache_write_usd_per_mtok=3.75, cache_write_1h_usd_per_mtok=6)  # type: ignore[arg-type]


def test_an_escalation_costs_its_uncached_prefix_and_one_token() -> None:
    assert PRICE.cost(input_tokens=1000, output_tokens=1) == Decimal("0.0001506")
    assert PRICE.cost(input_tokens=1000, cached_tokens=900, output_tokens=1) == Decimal("0.0000831")


def test_without_a_cached_price_cached_tokens_cost_as_much_as_others() -> None:
    price = TokenPrice(Decimal(3), Decimal(15))
    assert price.cost(input_tokens=100, cached_tokens=90) == price.cost(input_tokens=100)


def test_cached_tokens_may_be_free() -> None:
    price = TokenPrice(Decimal(2), Decimal(8), cached_input_usd_per_mtok=Decimal(0))
    assert price.cost(input_tokens=1_000_000, cached_tokens=900_000) == Decimal("0.2")


@pytest.mark.parametrize(
    ("counts", "usd"),
    [
        ({}, "0.03"),
        ({"cache_write_tokens": 8000}, "0.036"),  # (2000 * 3 + 8000 * 3.75) / 1e6
        ({"cache_write_tokens": 8000, "cache_write_1h_tokens": 8000}, "0.054"),
        ({"cache_write_tokens": 5000, "cache_write_1h_tokens": 1000, "cached_tokens": 4000}, "0.0252"),
    ],
)
def test_tokens_written_to_the_cache_have_their_own_prices(counts: dict[str, int], usd: str) -> None:
    assert WRITTEN.cost(input_tokens=10_000, **counts) == Decimal(usd)


def test_without_a_price_of_their_own_they_cost_as_those_next_to_them() -> None:
    written = {"input_tokens": 100, "cache_write_tokens": 90, "cache_write_1h_tokens": 50}
    assert PRICE.cost(**written) == PRICE.cost(input_tokens=100)
    one = TokenPrice(Decimal(3), Decimal(15), cache_write_usd_per_mtok=Decimal(4))
    assert one.cost(**written) == one.cost(input_tokens=100, cache_write_tokens=90)


def test_a_long_prompt_can_cost_more_per_token() -> None:
    price = TokenPrice(Decimal(1), Decimal(2), long_prompts=((200, TokenPrice(Decimal(10), Decimal(20))),))
    assert price.cost(input_tokens=200) == Decimal("0.0002")
    assert price.cost(input_tokens=201) == Decimal("0.00201")


@given(st.integers(0, 10**7), st.integers(0, 10**6), st.integers(1, 28))
def test_costs_are_exact_in_any_decimal_context(prompt: int, out: int, precision: int) -> None:
    with decimal.localcontext() as context:
        context.prec = precision
        cost = PRICE.cost(input_tokens=prompt, output_tokens=out)
    assert int(cost.scaleb(12)) == prompt * 150_000 + out * 600_000


def test_prices_are_read_as_they_print_and_checked() -> None:
    assert TokenPrice(0.15, "0.6").input_usd_per_mtok == Decimal("0.15")  # type: ignore[arg-type]
    bad: Any
    for bad in (-1, float("nan"), "3 EUR", True, None):
        with pytest.raises(BadLimit):
            TokenPrice(bad, Decimal(1))
        with pytest.raises(BadLimit):
            DevicePrice(bad)


@pytest.mark.parametrize(
    "tokens",
    [
        {"input_tokens": -1},
        {"input_tokens": 1, "cached_tokens": 2},
        {"input_tokens": 1, "output_tokens": 0.5},
        {"input_tokens": 1, "cache_write_tokens": 2},
        {"input_tokens": 3, "cached_tokens": 2, "cache_write_tokens": 2},
        {"input_tokens": 3, "cache_write_tokens": 1, "cache_write_1h_tokens": 2},
        {"input_tokens": 3, "cache_write_tokens": -1},
    ],
)
def test_token_counts_are_checked(tokens: dict[str, Any]) -> None:
    with pytest.raises(BadLimit):
        PRICE.cost(**tokens)


def test_device_seconds_cost_money() -> None:
    assert DevicePrice(Decimal("3.6")).cost(2.5) == Decimal("0.0025")
    assert DevicePrice(Decimal(1)).cost(1) == Decimal("0.000277777778")
    assert DevicePrice(Decimal(0)).cost(1e6) == 0
    with pytest.raises(BadLimit):
        DevicePrice(Decimal(1)).cost(-1)


def test_a_known_model_has_a_price_with_source_and_date() -> None:
    price = known_price("gpt-4o-mini", "openai")
    assert price is not None
    assert (price.input_usd_per_mtok, price.output_usd_per_mtok) == (Decimal("0.15"), Decimal("0.6"))
    assert price.cached_input_usd_per_mtok == Decimal("0.075")
    assert price.source.startswith("genai-prices")
    assert isinstance(price.as_of, date)


def test_a_model_priced_in_tiers_keeps_them() -> None:
    price = known_price("gemini-2.5-pro")
    assert price is not None
    assert price.cost(input_tokens=300_000) > 2 * price.cost(input_tokens=150_000)


@pytest.mark.parametrize("prompt", [10_000, 300_000])
@pytest.mark.parametrize("model", ["claude-sonnet-4-5", "claude-haiku-4-5", "gemini-2.5-pro", "gpt-4o-mini"])
def test_a_known_models_prompt_costs_what_the_list_says_written_or_read(model: str, prompt: int) -> None:
    price = known_price(model)
    assert price is not None
    counts = {"cache_write_tokens": prompt // 2, "cache_write_1h_tokens": prompt // 5}
    listed = genai_prices.Usage(input_tokens=prompt, output_tokens=9, cache_read_tokens=prompt // 4, **counts)
    cost = price.cost(input_tokens=prompt, output_tokens=9, cached_tokens=prompt // 4, **counts)
    assert cost == genai_prices.calc_price(listed, model_ref=model).total_price


@pytest.mark.parametrize(("model", "provider"), [("my-own-7b", None), ("gpt-4o", "nobody"), ("", None)])
def test_an_unknown_model_has_no_price(model: str, provider: str | None) -> None:
    assert known_price(model, provider) is None
