"""Dollars as numbers or text, of limits, prices, key files and the command line, read in one place (``dollars``).
Inside they are whole pico-dollars (1e-12 USD): integers add exactly, in any order, on every store.

A price per million tokens with six decimals is a whole number of pico-dollars per token, so nothing is lost
for any price list known today. 64-bit stores hold 9.2 million dollars of them.
"""

from __future__ import annotations

import decimal
from collections.abc import Iterable
from decimal import Decimal
from functools import reduce

from ..errors import BadLimit

DECIMALS = 12
MAX_USD = Decimal(1_000_000)
MAX_COUNT = 10**15
MAX_PICO = 2**62  # 4.6 million dollars in one amount; stores add 64-bit integers

_EXACT = decimal.Context(  # never the caller's thread-wide context; what is left out here comes from DefaultContext
    prec=60,
    rounding=decimal.ROUND_HALF_EVEN,
    Emin=decimal.MIN_EMIN,
    Emax=decimal.MAX_EMAX,
    capitals=1,
    clamp=0,
    flags=[],
    traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow],
)
_ONE_PICO = Decimal((0, (1,), -DECIMALS))
_MOST_USD = _EXACT.scaleb(Decimal(MAX_PICO), -DECIMALS)

Dollars = float | str | int | Decimal
_DOLLARS = (float, str, int, Decimal)


def dollars(value: Dollars, what: str) -> Decimal:
    """Read a dollar figure; a float means what it prints as.

    Args:
        value: USD, as Decimal, int, float or a plain number in a string.
        what: the name of the setting, for the error.

    Raises:
        BadLimit: not a number of dollars, negative, NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, _DOLLARS):
        raise BadLimit(f"{what}={value!r} is not an amount of dollars.", hint="Give a number, such as 0.05.")
    try:
        amount = value if isinstance(value, Decimal) else Decimal(str(value).strip())
    except decimal.InvalidOperation:
        raise BadLimit(
            f"{what}={value!r} is not a number of dollars.",
            hint="Only US dollars are counted: give a plain number such as 0.05, without a currency.",
        ) from None
    if not amount.is_finite():
        raise BadLimit(f"{what}={value!r} must be finite.", hint="Leave it out (None) for no limit.")
    if amount < 0:
        raise BadLimit(f"{what}={value!r} is below 0.", hint="Give 0 or more; 0 means nothing may be spent.")
    return amount


def limit_pico(value: Dollars, what: str) -> int:
    """A dollar limit as whole pico-dollars.

    Raises:
        BadLimit: as in :func:`dollars`, or finer than a pico-dollar, or above a million dollars.
    """
    amount = _up_to_max(value, what, "Leave it out (None) for no limit.")
    whole = pico(amount)
    if usd(whole) != amount:
        raise BadLimit(
            f"{what}={value!r} is finer than the {_ONE_PICO} USD that are counted.",
            hint=f"Round it: {round_usd(amount)} would do.",
        )
    return whole


def price(value: Dollars, what: str) -> Decimal:
    """Read a price, in USD per million tokens or per hour.

    Raises:
        BadLimit: as in :func:`dollars`, or above a million dollars.
    """
    return _up_to_max(value, what, "Prices are in USD per million tokens, or per hour.")


def _up_to_max(value: Dollars, what: str, hint: str) -> Decimal:
    amount = dollars(value, what)
    if amount > MAX_USD:
        raise BadLimit(f"{what}={value!r} is above {MAX_USD:,} USD.", hint=hint)
    return amount


def pico(amount: Decimal) -> int:
    """Whole pico-dollars, rounded up: a fraction is never given away.

    Raises:
        BadLimit: more than any budget can hold.
    """
    if amount > _MOST_USD:  # before it is computed with: any exponent can be compared
        raise BadLimit(
            f"{amount} USD is more than can be counted: {_MOST_USD:,} in one amount.",
            hint="Check the price and the token count.",
        )
    return int(_EXACT.scaleb(amount.quantize(_ONE_PICO, decimal.ROUND_CEILING, _EXACT), DECIMALS))


def usd(whole: int) -> Decimal:
    """Dollars from pico-dollars, without trailing zeros and never as ``1E+1``."""
    amount = _EXACT.scaleb(Decimal(whole), -DECIMALS).normalize(_EXACT)
    exponent = amount.as_tuple().exponent
    return amount.quantize(Decimal(1), context=_EXACT) if isinstance(exponent, int) and exponent > 0 else amount


def written(whole: int, exponent: int) -> Decimal:
    """Dollars from pico-dollars, with ``-exponent`` digits after the point."""
    return rounded(_EXACT.scaleb(Decimal(whole), -DECIMALS), exponent)


def rounded(amount: Decimal, exponent: int) -> Decimal:
    """Dollars to the nearest that has ``-exponent`` digits after the point."""
    return amount.quantize(Decimal((0, (1,), exponent)), context=_EXACT)


def total(amounts: Iterable[Decimal]) -> Decimal:
    """Exact sum of any number of amounts, whatever precision the caller's decimal context has."""
    return reduce(add, amounts, Decimal(0))


def add(a: Decimal, b: Decimal) -> Decimal:
    """Exact sum, whatever precision the caller's decimal context has."""
    return _EXACT.add(a, b)


def subtract(a: Decimal, b: Decimal) -> Decimal:
    """Exact difference, whatever precision the caller's decimal context has."""
    return _EXACT.subtract(a, b)


def multiply(a: Decimal, b: Decimal | int) -> Decimal:
    """Exact product, whatever precision the caller's decimal context has."""
    return _EXACT.multiply(a, Decimal(b))


def divide(a: Decimal, b: Decimal | int) -> Decimal:
    """Quotient to 60 digits; round it with :func:`round_usd` before it is booked."""
    return _EXACT.divide(a, Decimal(b))


def round_usd(amount: Decimal) -> Decimal:
    """To the nearest pico-dollar, without trailing zeros."""
    return usd(int(_EXACT.scaleb(amount, DECIMALS).to_integral_value(decimal.ROUND_HALF_EVEN, _EXACT)))


def count(value: int, what: str) -> int:
    """Read a whole number of escalations or tokens.

    Raises:
        BadLimit: not a whole number, negative or above 10**15.
    """
    if type(value) is not int:
        raise BadLimit(f"{what}={value!r} is not a whole number.", hint="Give an int, such as 3.")
    if value < 0:
        raise BadLimit(f"{what}={value!r} is below 0.", hint="Give 0 or more; 0 means nothing may be spent.")
    if value > MAX_COUNT:
        raise BadLimit(f"{what}={value!r} is above {MAX_COUNT:,}.", hint="Leave it out (None) for no limit.")
    return value
