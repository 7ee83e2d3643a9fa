"""A budget: limits, a place in a tree, and reservations that hold on the whole chain or not at all."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from dataclasses import replace
from decimal import Decimal
from typing import Any, Self, Unpack, cast, get_args

from ..errors import BadLimit, ConfigError, StoreUnavailable, UnpricedModel
from ..types import Charge
from . import money
from .clock import Clock
from .hold import Hold
from .limit_warnings import WARN_AT, OnWarning, Warner, checked_share
from .memory_store import MemoryStore
from .meter_handle import MeterHandle
from .quantities import UNITS, Quantities, quantities_of
from .refusals import budget_exceeded
from .state import BudgetState, Number
from .store import BudgetStore, Link, Terms
from .terms import LimitsGiven, OnExhausted, micros_of, terms_of
from .window import Window

_hold_numbers = itertools.count()
_process_key = secrets.token_hex(8)


def _new_process_key() -> None:
    global _process_key
    _process_key = secrets.token_hex(8)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_process_key)


class Budget:
    """A promise about spending that holds across threads, tasks and, with a shared store, processes.

    ::

        run = Budget(usd="0.05", escalations=20, answer_tokens=20_000, seconds=30)
        agent = run.child("researcher", escalations=5, answers=10)
        with agent.reserve(Charge(Decimal("0.001"), llm_tokens=901)) as hold:
            ...
            hold.settle(actual)

    Reserving and settling are synchronous and quick (memory: microseconds; SQLite: a fraction of a
    millisecond; Redis: one round trip), so async code calls them directly: nothing is awaited in between,
    and a cancelled task cannot tear one.

    Limits are ``usd`` (US dollars; Decimal, or a number or string that prints as one), ``escalations``,
    ``llm_tokens``, and of local work ``answers``, ``answer_tokens`` (generated, reasoning included) and ``seconds`` (a
    deadline that runs from when the budget is first made; nothing is reserved after it, and an answer that is being
    generated ends within a step). Leaving one out, or None, is no limit; 0 means nothing may be spent.

    Args:
        on_exhausted: what a caller does when this budget refuses: ``"degrade"`` answers locally and ends an answer
            where local work has a limit, ``"raise"`` lets BudgetExceeded out, ``"ask"`` interrupts a LangGraph run for
            more (see :meth:`extend`). An answer that cannot even begin raises BudgetExceeded in any case.
        reserve_for_final: kept back for :meth:`final` alone, so that a last answer can still be paid for.
        window: spending starts afresh with every window, as ``PER_DAY``.
        on_warning: called with a ``LimitWarning``, once for each limit here and below of which a share is spent, by the
            one of all processes that settles it. A pickle does not hold it.
        warn_at: that share.
        name: the meter's name; in a shared store, budgets of one name are one budget.
        store: where the meter lives; by default this process's memory.
        clock: the time, for the default store; tests hand in their own.

    Raises:
        BadLimit: a limit that cannot be meant, or other limits than the meter in the store already has.
        StoreUnavailable: the store cannot be reached.
    """

    def __init__(
        self,
        *,
        usd: money.Dollars | None = None,
        escalations: int | None = None,
        llm_tokens: int | None = None,
        answers: int | None = None,
        answer_tokens: int | None = None,
        seconds: float | None = None,
        on_exhausted: OnExhausted = "degrade",
        reserve_for_final: Charge | None = None,
        window: Window | None = None,
        on_warning: OnWarning | None = None,
        warn_at: float = WARN_AT,
        name: str = "run",
        store: BudgetStore | None = None,
        clock: Clock | None = None,
    ) -> None:
        if store is not None and clock is not None:
            raise ConfigError("Both store and clock were given, and a store has its own clock.", hint="Drop one.")
        terms = terms_of(
            {
                "usd": usd,
                "escalations": escalations,
                "llm_tokens": llm_tokens,
                "answers": answers,
                "answer_tokens": answer_tokens,
                "seconds": seconds,
                "reserve_for_final": reserve_for_final,
                "window": window,
            }
        )
        mode, warner = _checked_mode(on_exhausted), _warner(on_warning, warn_at)
        handle = MeterHandle.open_root(name, terms, MemoryStore(clock) if store is None else store)
        self._set_up(handle, None, mode, final=False, warner=warner)

    def _set_up(
        self,
        meter: MeterHandle,
        parent: Budget | None,
        on_exhausted: OnExhausted,
        *,
        final: bool,
        warner: Warner | None = None,
    ) -> Self:
        self.name, self.path, self.parent, self.on_exhausted = meter.name, meter.path, parent, on_exhausted
        self._meter, self._final, self._warner = meter, final, warner
        link = Link(meter.path, final)
        self._chain: tuple[Link, ...] = (*parent._chain, link) if parent else (link,)
        return self

    def child(
        self,
        name: str,
        *,
        on_exhausted: OnExhausted | None = None,
        on_warning: OnWarning | None = None,
        warn_at: float = WARN_AT,
        **limits: Unpack[LimitsGiven],
    ) -> Budget:
        """A budget under this one: what it reserves is reserved here too.

        The same name under the same parent is the same meter. Leaving all limits out takes it as it is.

        Args:
            name: unique among its siblings.
            on_exhausted: as this budget's, unless given.
            on_warning, warn_at: as this budget's, unless given.
            **limits: as for :class:`Budget`; None or left out is no limit of its own.

        Raises:
            BadLimit: a limit that cannot be meant, or other limits than this child already has.
        """
        mode = _checked_mode(on_exhausted or self.on_exhausted)
        terms = terms_of(limits) if any(value is not None for value in limits.values()) else None
        warner = _warner(on_warning, warn_at) or self._warner
        return Budget.__new__(Budget)._set_up(
            self._meter.open_child(name, terms), self, mode, final=False, warner=warner
        )

    def final(self) -> Budget:
        """This same meter, for the last answer: its finalization reserve may be used (its parents' may not)."""
        return self.view(final=True)

    def view(self, *, on_exhausted: OnExhausted | None = None, final: bool | None = None) -> Budget:
        """The same meter with another ``on_exhausted``, or with its finalization reserve. The store is not asked."""
        mode = _checked_mode(on_exhausted or self.on_exhausted)
        as_final = self._final if final is None else final
        return Budget.__new__(Budget)._set_up(self._meter, self.parent, mode, final=as_final, warner=self._warner)

    def fresh(self, clock: Clock | None = None) -> Budget:
        """The limits as they are now, from the root down to here, on new meters in memory: for what-if replays.

        Raises:
            StoreUnavailable: the store cannot be reached.
        """
        store: BudgetStore = MemoryStore(clock)
        copy: Budget | None = None
        for budget in self.chain:
            terms = replace(budget._meter.terms, limits=terms_of(cast(LimitsGiven, budget.state().limit)).limits)
            copy = _opened(copy, budget.name, terms, budget.on_exhausted, store, budget._final)
        return copy or self

    @property
    def chain(self) -> tuple[Budget, ...]:
        """The budgets a reservation here must satisfy: the root first, this one last."""
        return (*self.parent.chain, self) if self.parent else (self,)

    @property
    def run(self) -> object:
        """An object that the root, its views and all budgets below them share, and no others: the identity of a run."""
        return self._meter.unsettled

    @property
    def windowed(self) -> bool:
        """Whether this budget or one above it starts afresh with time."""
        return any(budget._meter.terms.window is not None for budget in self.chain)

    @property
    def in_dollars(self) -> bool:
        """Whether this budget or one above it limits dollars, so that an unknown price is refused."""
        return self._meter.priced

    @property
    def limits_local_work(self) -> bool:
        """Whether this budget or one above it limits answers, their tokens, or time."""
        return self._meter.local

    def reserve(self, charge: Charge, *, ttl_s: float = 60.0) -> Hold:
        """Hold a charge, here and in every parent, or nowhere.

        Args:
            charge: the most the call can cost.
            ttl_s: seconds after which the hold lapses if its process dies. Choose it longer than the call.

        Raises:
            BadLimit: no charge that can be counted, alone or with all that is spent and held.
            BudgetExceeded: it does not fit; says which unit of which budget.
            UnpricedModel: ``charge.usd`` is None under a dollar limit.
            StoreUnavailable: the store cannot be reached, so nothing may be spent.
        """
        meter = self._meter
        want = quantities_of(charge)
        if meter.priced and want.unpriced:
            raise UnpricedModel(
                f"Budget {self.path!r} is limited in dollars, and the price of {charge} is unknown.",
                hint="Give the model a TokenPrice, or DevicePrice(0) if it costs nothing.",
            )
        if meter.unsettled:
            meter.unsettled.settle_all(meter.store)
        ttl_us = 60_000_000 if ttl_s == 60.0 else _ttl(ttl_s)
        hold_id = f"{self._chain[0].path}/{_process_key}-{next(_hold_numbers)}"
        try:
            refused = meter.store.reserve(self._chain, hold_id, want, ttl_us)
            if refused is None:
                return Hold(meter, hold_id, charge, want, None if self._warner is None else self.warn)
        except BaseException as error:  # also Ctrl-C after the store held it: it would never be settled
            if isinstance(error, StoreUnavailable) and error.untouched:
                raise
            with contextlib.suppress(StoreUnavailable):
                meter.store.release(hold_id)
            raise
        raise budget_exceeded(refused, self.on_exhausted)

    def extend(
        self,
        *,
        usd: money.Dollars | None = None,
        escalations: int | None = None,
        llm_tokens: int | None = None,
        answers: int | None = None,
        answer_tokens: int | None = None,
        seconds: float | None = None,
        once: str = "",
    ) -> bool:
        """Raise limits while running: ``extend(escalations=3)`` allows three more. Parents stay as they are.

        More seconds count from now if the deadline has passed, otherwise from the deadline.

        Args:
            usd, escalations, llm_tokens, answers, answer_tokens, seconds: so much more.
            once: names this grant: the store remembers it, and of all calls with the same name, in any process, the
                first alone counts, whatever the others allow.

        Returns:
            Whether this call counted.

        Raises:
            BadLimit: as for :class:`Budget`, also for the limit as it would be; or a unit that has no limit here.
        """
        more = terms_of(
            {
                "usd": usd,
                "escalations": escalations,
                "llm_tokens": llm_tokens,
                "answers": answers,
                "answer_tokens": answer_tokens,
                "seconds": seconds,
            }
        ).limits
        for unit, limit, wanted in zip(UNITS, self._meter.terms.limits, more, strict=False):
            if wanted is not None and limit is None:
                raise BadLimit(
                    f"Budget {self.path!r} has no limit in {unit} to extend.", hint="Extend the one that refused."
                )
        return self._meter.store.extend(self.path, Quantities(*(wanted or 0 for wanted in more)), once)

    def seconds_left(self) -> float | None:
        """Seconds to the nearest deadline in the chain, never below 0; None without one."""
        timed = (budget for budget in self.chain if budget._meter.terms.limits.seconds is not None)
        return min((float(budget.state().left["seconds"]) for budget in timed), default=None)

    def warn(self) -> None:
        """Call ``on_warning`` for every limit of the chain that is due; settling does it."""
        for budget in self.chain:
            if budget._warner is not None:
                budget._warner.look(budget._meter)

    def seconds_to_next(self) -> float | None:
        """Seconds until a deadline of the chain or the warning of it, whichever is next; 0 after the first deadline.

        Raises:
            StoreUnavailable: the store cannot be reached.
        """
        nearest = self.seconds_left()
        if nearest is None:
            return None
        warned = (budget._warner.seconds_to(budget.state()) for budget in self.chain if budget._warner is not None)
        return min((nearest, *(seconds for seconds in warned if seconds is not None)))

    def state(self) -> BudgetState:
        """This budget now: limits, held, spent, left. Parents may have less left: see :meth:`available`."""
        return self._meter.store.read_state(self.path)

    def available(self) -> dict[str, Number]:
        """What a reservation here could still get: the least left in the chain, finalization reserves kept back."""
        least: dict[str, Number] = {}
        for budget in self.chain:
            state = budget.state()
            for unit, left in state.left.items():
                kept = 0 if budget._final else state.kept.get(unit, 0)
                free = _less(left, kept)
                least[unit] = min(least[unit], free, key=float) if unit in least else free
        return least

    def __copy__(self) -> Budget:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Budget:
        """The same meter: a copied agent state must not double the money."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._meter.store.shared:
            raise TypeError(
                f"Budget {self.path!r} lives in this process's memory and cannot be pickled. "
                "Give it a SQLiteStore or RedisStore, which processes can share."
            )
        return _opened, (self.parent, self.name, self._meter.terms, self.on_exhausted, self._meter.store, self._final)

    def __repr__(self) -> str:
        return f"<Budget {self.path!r}{' (final)' if self._final else ''} on_exhausted={self.on_exhausted!r}>"


def _less(left: Number, kept: Number) -> Number:
    if isinstance(left, Decimal) or isinstance(kept, Decimal):
        return max(money.subtract(Decimal(left), Decimal(kept)), Decimal(0))
    return max(left - kept, 0)


def _opened(
    parent: Budget | None, name: str, terms: Terms, on_exhausted: OnExhausted, store: BudgetStore, final: bool
) -> Budget:
    """Under a parent the store is the parent's."""
    meter = parent._meter.open_child(name, terms) if parent else MeterHandle.open_root(name, terms, store)
    return Budget.__new__(Budget)._set_up(meter, parent, on_exhausted, final=final)


def _warner(on_warning: OnWarning | None, warn_at: float) -> Warner | None:
    share = checked_share(warn_at)  # also where no warning is wanted
    return None if on_warning is None else Warner(on_warning, share)


def _checked_mode(on_exhausted: OnExhausted) -> OnExhausted:
    if on_exhausted not in get_args(OnExhausted):
        raise ConfigError(f"on_exhausted={on_exhausted!r}.", hint='Use "degrade", "raise" or "ask".')
    return on_exhausted


def _ttl(ttl_s: float) -> int:
    ttl_us = micros_of(ttl_s, "ttl_s")
    if ttl_us == 0:
        raise BadLimit(f"ttl_s={ttl_s!r} would lapse at once.", hint="Give more seconds than the call takes.")
    return ttl_us
