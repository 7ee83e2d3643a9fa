"""Reading a Redis URL: no error quotes it, and its password is kept apart from it."""

from __future__ import annotations

import os
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from ..errors import ConfigError

PASSWORD_ENV = "S2T_REDIS_PASSWORD"
"""Where a store that was pickled without its password looks for it."""
FORM = "As redis://localhost:6379/0; inside its parts / is written %2F, # %23, ? %3F, @ %40."
OPTIONS = frozenset(
    {
        *("db", "username", "client_name", "protocol", "max_connections"),
        *("socket_keepalive", "socket_read_size", "health_check_interval"),
        *("ssl_cert_reqs", "ssl_check_hostname", "ssl_ca_certs", "ssl_ca_path", "ssl_ca_data", "ssl_ciphers"),
        *("ssl_certfile", "ssl_keyfile"),
    }
)
"""Options, beside a password, that a URL may have: those that a text can give, without what the store sets itself."""


def address_of(url: str) -> tuple[str, str | None]:
    """A Redis URL without its password, and the password; None where it has none.

    redis-py takes what it cannot read for something else: of ``redis://:12/34@host`` it makes port 12 of this machine.
    Here that is refused.

    Raises:
        ConfigError: it cannot be read; no part of it is repeated, since any may belong to the password.
    """
    try:
        parts = urlsplit(url)
        options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        fits = _fits(url, parts)
    except (ValueError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise ConfigError("the Redis URL cannot be read.", hint=FORM)
    names = [name for name, _ in options]
    if len(set(names)) != len(names) or not OPTIONS.issuperset({*names} - {"password"}):
        raise ConfigError(
            f"the Redis URL repeats an option, or has another one than {', '.join(sorted(OPTIONS))}.",
            hint="Give timeout_s to the store, every option once, and a key file that is not encrypted.",
        )
    given = dict(options)
    if "ssl_keyfile" in given and "ssl_certfile" not in given:
        raise ConfigError("the Redis URL has ssl_keyfile without ssl_certfile.", hint="Give both, or none.")
    in_options = given.pop("password", None)
    password = unquote(parts.password) if parts.password else in_options
    user, at, host = parts.netloc.rpartition("@")
    name = user.partition(":")[0]
    place = f"{name}@{host}" if at and name else host
    return f"{parts.scheme}://{place}{parts.path}{'?' if given else ''}{urlencode(given)}", password


def password_in(variable: str, *, also: str | None) -> str:
    """The password that an environment variable holds.

    Raises:
        ConfigError: it holds none, or the URL has another.
    """
    if also is not None:
        raise ConfigError("the Redis URL has a password, and password_env is given too.", hint="Drop one of them.")
    password = os.environ.get(variable, "")
    if not password:
        raise ConfigError(
            f"the environment variable {variable} holds no password for Redis.",
            hint="A RedisStore is pickled without its password: set this variable in every process that uses it.",
        )
    return password


def _fits(url: str, parts: SplitResult) -> bool:
    """Whether every part is what its place is for."""
    if parts.scheme not in ("redis", "rediss", "unix") or "#" in url or not url.isprintable() or " " in url:
        return False
    if parts.scheme == "unix":
        return bool(parts.path) and parts.hostname is None
    port = parts.port  # raises where it is no number
    base = parts.path.removeprefix("/")
    return bool(parts.hostname) and port != 0 and (not base or (base.isascii() and base.isdecimal()))
