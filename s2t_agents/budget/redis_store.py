"""Meters in Redis: the store for several machines. Time is the server's own.

Every operation is one script on the server, atomic there. The server must not evict keys
(``maxmemory-policy noeviction``) and keeps spending across its own restart only as well as its persistence does
(``appendonly yes``; ``appendfsync everysec`` may lose the last second). A meter that is gone refuses everything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from ..errors import BadLimit, BadStore, ConfigError, StoreUnavailable
from .clock import Clock
from .quantities import (
    COUNTED,
    LARGEST_LIMIT,
    LARGEST_TOTAL,
    NOTHING,
    UNITS,
    Counts,
    Limits,
    Quantities,
    check_limits,
    check_total,
    plus,
)
from .redis_script import DAMAGED, PART, SCRIPTS
from .redis_url import FORM, PASSWORD_ENV, address_of, password_in
from .state import BudgetState, state_of
from .store import Chain, Closing, Refusal, Terms
from .window import Window

if TYPE_CHECKING:
    import redis


NO_LIMIT = False
"""What the scripts take for no limit."""
_SHA = {op: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest() for op, script in SCRIPTS.items()}


class RedisStore:
    """Meters on a Redis server (7 or newer; anything that speaks its protocol and scripts).

    The server's clock decides what has lapsed. Set back, it keeps holds longer; set forward, it lets them
    lapse early, and settling them then books them as overrun: neither makes money.

    Args:
        url: as ``redis://localhost:6379/0`` or ``rediss://user:secret@host:6380/0``. A pickle holds it without the
            password.
        password_env: the environment variable that holds the password instead. A pickle holds its
            name; one of a store whose password was in the URL names ``S2T_REDIS_PASSWORD``.
        prefix: put before every key, to keep programs apart on one server.
        timeout_s: seconds to wait for the server, to connect and to answer, before refusing.
        clock: instead of the server's own, which is one for all processes; tests hand in theirs.

    Raises:
        ConfigError: the redis package is not installed, the URL cannot be read or has unknown options (no part of it
            is repeated), or there is no password where there should be one.
    """

    shared = True

    def __init__(
        self,
        url: str = "redis://localhost:6379/0",
        *,
        password_env: str | None = None,
        prefix: str = "s2t",
        timeout_s: float = 1.0,
        clock: Clock | None = None,
    ) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ConfigError("The redis package is not installed.", hint="pip install s2t-agents[redis]") from None
        self._address, password = address_of(url)
        parts = urlsplit(self._address)
        self._place = parts.netloc.rpartition("@")[2] or parts.path
        if password_env is not None:
            password = password_in(password_env, also=password)
        self._protected, self._password_env = password is not None, password_env
        self._prefix, self._timeout_s = prefix, timeout_s
        self._error: type[Exception] = redis.RedisError
        self._clock = clock
        self._keep: dict[str, Counts] = {}
        usable = False
        with contextlib.suppress(Exception):  # its message may quote a part of the URL
            self._client: redis.Redis = redis.Redis.from_url(
                self._address,
                password=password,
                decode_responses=True,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),  # a settle that got through must not be sent twice
            )
            pool = self._client.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # connects nowhere, and refuses unknown options
            usable = True
        if not usable:
            raise ConfigError("the Redis URL has an option that cannot be used.", hint=FORM)
        self._unknown: type[Exception] = redis.exceptions.NoScriptError
        self._keys: dict[str, tuple[str, str, str]] = {}

    def open_meter(self, path: str, terms: Terms) -> Terms:
        """Make the meter unless it is there; the terms it has."""
        usd, escalations, tokens, answers, answer_tokens, micros, _ = terms.limits
        dollars = (NO_LIMIT, NO_LIMIT) if usd is None else divmod(usd, PART)
        counted = [_or_no_limit(limit) for limit in (escalations, tokens, None, answers, answer_tokens)]
        limits, window = [*dollars, *counted], terms.window
        span = [NO_LIMIT, NO_LIMIT] if window is None else [window.seconds * 1_000_000, window.offset_s * 1_000_000]
        found = self._run(path, "open", path, _terms_text(terms), limits, _or_no_limit(micros), *span)
        return self._noted_terms(path, cast(str, found))

    def find_terms(self, path: str) -> Terms | None:
        """The terms of a meter, if there is one."""
        found = self._run(path, "find_terms", path)
        return None if found is None else self._noted_terms(path, cast(str, found))

    def reserve(self, chain: Chain, hold_id: str, want: Counts, ttl_us: int) -> Refusal | None:
        """Hold on the whole chain, or say why not."""
        links: list[Any] = []
        for path, final in chain:
            need = want if final else plus(want, self._keep[path])
            links += [path, _amount(need)]
        answer = cast(list[Any], self._run(hold_id, "reserve", hold_id, ttl_us, _amount(want), _LARGEST_TOTAL, *links))
        if answer[0] == "held":
            return None
        if answer[0] == "above":
            check_total(cast(Counts, _numbers(answer[1])))
        if answer[0] == "missing":
            raise self._missing(answer[1])
        path, i = answer[1], int(answer[2]) - 1
        if i < 0:
            limit, passed = (int(number) for number in answer[3])
            return Refusal(path, "seconds", limit, passed, 0, 0, 0)
        limit, spent, held = (_numbers(texts)[i] or 0 for texts in answer[3:])
        kept = 0 if any(link.final for link in chain if link.path == path) else self._keep[path][i]
        return Refusal(path, UNITS[i], limit, spent, held, want[i], kept)

    def settle(self, hold_id: str, actual: Counts) -> Closing:
        """Replace the hold by what was used."""
        return self._closing(self._run(hold_id, "finish", hold_id, _amount(actual), _LARGEST_TOTAL))

    def release(self, hold_id: str) -> Closing:
        """Give the hold back."""
        return self._closing(self._run(hold_id, "finish", hold_id))

    def extend(self, path: str, more: Counts, once: str = "") -> bool:
        """Raise the limits."""
        largest = (_amount(LARGEST_LIMIT), LARGEST_LIMIT.seconds)
        said = self._run(path, "extend", path, _amount(more), more.seconds, once, *largest)
        if said == "missing":
            raise self._missing(path)
        if isinstance(said, list):
            check_limits(_numbers(said[1], None)._replace(seconds=int(said[2]), unpriced=None))
        return said == "done"

    def read_state(self, path: str) -> BudgetState:
        """The meter now."""
        found = cast(list[list[str]], self._run(path, "read_state", path))
        if not found:
            raise self._missing(path)
        micros, left, holds, window = (int(number) if number else None for number in found[4])
        limits = _numbers(found[0], None)._replace(seconds=micros, unpriced=None)
        spent, held, over = (cast(Counts, _numbers(texts)) for texts in found[1:4])
        passed = spent._replace(seconds=(micros or 0) - (left or 0))
        return state_of(path, limits, self._keep.get(path, NOTHING), passed, held, over, holds or 0, window or 0)

    def close(self) -> None:
        """Close the connections; the next use opens new ones."""
        self._client.close()

    def __reduce__(self) -> tuple[Any, ...]:
        name = self._password_env or (PASSWORD_ENV if self._protected else None)
        return _opened, (self._address, self._prefix, self._timeout_s, name)

    def __repr__(self) -> str:
        return f"RedisStore(prefix={self._prefix!r})"

    def _run(self, path: str, op: str, *args: object) -> object:
        root = path.partition("/")[0]
        keys = self._keys.get(root)
        if keys is None:
            tree = f"{self._prefix}:{{{root}}}"
            keys = self._keys[root] = (f"{tree}:meters", f"{tree}:holds", f"{tree}:expiry")
        fault: StoreUnavailable
        try:
            return self._script(op, keys, json.dumps((op, self._now_us(), *args)))
        except self._error as error:
            fault = self._fault(root, str(error))
        except ValueError:  # a reply that is no text
            fault = self._damaged(root)
        except Exception:  # noqa: BLE001 - redis-py checks few of the replies that it reads
            self._client.connection_pool.disconnect(inuse_connections=False)  # this one too: it was greeted in vain
            fault = BadStore(f"What answers at {self._place} is no Redis server.", hint="Check the address.")
        raise fault  # out here it carries no chain: what a server says may have the password in it

    def _now_us(self) -> int:
        """False is the server's own time."""
        return False if self._clock is None else int(self._clock.wall() * 1e6)

    def _fault(self, root: str, said: str) -> StoreUnavailable:
        if DAMAGED in said or said.startswith(("WRONGTYPE", "ERR user_script", "user_script")):
            return self._damaged(root)
        password = self._client.connection_pool.connection_kwargs.get("password")
        shown = said.replace(password, "***") if password else said
        return StoreUnavailable(
            f"The budget store on Redis at {self._place} cannot be used: {shown}.",
            hint="Nothing may be spent until it is back.",
        )

    def _damaged(self, root: str) -> BadStore:
        return BadStore(
            f"Redis at {self._place} holds something else than the budget {root!r} under {self._prefix}:{{{root}}}:*.",
            hint="Use another prefix, or delete these keys: what was spent is then forgotten.",
        )

    def _script(self, op: str, keys: tuple[str, str, str], args: str) -> object:
        send = cast(Callable[..., object], self._client.execute_command)
        try:
            return send("EVALSHA", _SHA[op], 3, *keys, args)
        except self._unknown:  # a new server, or one that was started again
            return send("EVAL", SCRIPTS[op], 3, *keys, args)

    def _closing(self, said: object) -> Closing:
        if isinstance(said, list):
            if said[0] == "above":
                check_total(cast(Counts, _numbers(said[1])))
            raise self._missing(str(said[1]))
        return Closing(said)

    def _noted_terms(self, path: str, text: str) -> Terms:
        terms = None
        with contextlib.suppress(ValueError, TypeError, LookupError, BadLimit):
            terms = _terms_from(text)
        if terms is None:
            raise self._damaged(path.partition("/")[0])
        self._keep[path] = terms.keep
        return terms

    def _missing(self, path: str) -> StoreUnavailable:
        return StoreUnavailable(f"Redis no longer has the budget {path!r}.", hint="Was it flushed? Open it again.")


def _amount(counted: Counts) -> tuple[int, ...]:
    """As the scripts count: micro-dollars, the pico-dollars below, and the rest."""
    usd, escalations, llm_tokens, answers, answer_tokens, _, unpriced = counted
    return (*divmod(usd, PART), escalations, llm_tokens, unpriced, answers, answer_tokens)


_LARGEST_TOTAL = _amount(LARGEST_TOTAL)


def _numbers(texts: list[str], missing: int | None = 0) -> Limits:
    """The inverse of :func:`_amount`.

    Args:
        texts: seven.
        missing: what an empty one is: there is no limit, or the meter is from before answers were counted.
    """
    high, low, escalations, llm_tokens, unpriced, answers, answer_tokens = (
        int(text) if text else missing for text in texts
    )
    usd = None if high is None or low is None else high * PART + low
    return Quantities(usd, escalations, llm_tokens, answers, answer_tokens, 0, unpriced)


def _or_no_limit(limit: int | None) -> int:
    return NO_LIMIT if limit is None else limit


def _opened(url: str, prefix: str, timeout_s: float, password_env: str | None = None) -> RedisStore:
    return RedisStore(url, password_env=password_env, prefix=prefix, timeout_s=timeout_s)


def _terms_text(terms: Terms) -> str:
    limits, keep, micros, window = terms.parts()
    return json.dumps([limits, keep, micros, None if window is None else [window.seconds, window.offset_s]])


def _terms_from(text: str) -> Terms:
    limits, keep, micros, window = json.loads(text)
    if not all(number is None or (type(number) is int and number >= 0) for number in (*limits, *keep, micros)):
        raise ValueError("terms are whole numbers")
    if len(limits) != len(keep) or len(limits) not in (3, len(COUNTED)) or None in keep:
        raise ValueError("terms are for all units, or for the three that there were")
    span = None if window is None else Window(*window)
    return Terms.of(limits, keep, micros, span)
