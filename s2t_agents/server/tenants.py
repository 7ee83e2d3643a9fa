"""Who asks: a key (``Authorization: Bearer``), or a header on this machine alone, gives the agent, its budget and its
cache scope.

The key file holds hashes, so that its readers learn no key::

    [agents.researcher]
    keys = ["sha256:6f1c...:0a9b..."]
    budget = { usd = "5.00", escalations = 200, window = "day" }
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..budget import PER_DAY, PER_HOUR, PER_WEEK, Budget, BudgetStore
from ..errors import BadRequest, ConfigError, UnknownKey

AGENT_HEADER = "x-s2t-agent"
MAX_KEY = 512
"""Characters of a key; more is none."""

_AGENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,99}")
_WINDOWS = {"hour": PER_HOUR, "day": PER_DAY, "week": PER_WEEK}


@dataclass(frozen=True)
class Tenant:
    """Who asks.

    Attributes:
        agent: to whom the ledger charges the answer; None leaves the chat model's own.
        budget: what its answers may spend; None leaves the chat model's own.
        cache_scope: prefixes are shared within it; None leaves the chat model's own.
    """

    agent: str | None = None
    budget: Budget | None = None
    cache_scope: str | None = None

    def call_arguments(self) -> dict[str, object]:
        """As arguments of a call of ``ChatS2T``."""
        found = {"s2t_agent": self.agent, "s2t_budget": self.budget, "s2t_cache_scope": self.cache_scope}
        return {name: value for name, value in found.items() if value is not None}


class AgentLimits(BaseModel):
    """A key file's limits of one agent; as for ``Budget``, but that no request can ask a person for more."""

    model_config = ConfigDict(extra="forbid", strict=True)

    usd: str | int | float | None = None
    escalations: int | None = None
    llm_tokens: int | None = None
    answers: int | None = None
    answer_tokens: int | None = None
    window: Literal["hour", "day", "week"] | None = None
    on_exhausted: Literal["degrade", "raise"] = "degrade"

    def open(self, name: str, parent: Budget | None, store: BudgetStore | None) -> Budget:
        """The agent's budget: below the parent, or a root of its own.

        Raises:
            BadLimit: a limit that cannot be meant, or other limits than the store already has.
        """
        given = self.model_dump(exclude={"window", "on_exhausted"}, exclude_none=True)
        window = _WINDOWS[self.window] if self.window is not None else None
        if parent is not None:
            return parent.child(name, on_exhausted=self.on_exhausted, window=window, **given)
        return Budget(name=name, on_exhausted=self.on_exhausted, window=window, store=store, **given)


class AgentEntry(BaseModel):
    """A key file's entry of one agent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    keys: list[Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{32,64}:[0-9a-f]{64}$")]] = Field(min_length=1)
    budget: AgentLimits | None = None


class KeyFile(BaseModel):
    """A key file."""

    model_config = ConfigDict(extra="forbid")

    agents: dict[str, AgentEntry] = Field(min_length=1)


class Tenants:
    """All who may ask.

    Args:
        entries: agents by name with hashes of their keys; None takes everybody, who may name an agent in a header.
        parent: a budget above all of theirs.
        store: keeps the budgets of agents where there is no budget above them.

    Raises:
        ConfigError: an agent's name that no header could carry.
        BadLimit: as ``AgentLimits.open``.
    """

    def __init__(
        self,
        entries: Mapping[str, AgentEntry] | None = None,
        *,
        parent: Budget | None = None,
        store: BudgetStore | None = None,
    ) -> None:
        self.with_keys = entries is not None
        self._keys: list[tuple[bytes, bytes, Tenant]] = []
        for name, entry in (entries or {}).items():
            if not _AGENT.fullmatch(name):
                raise ConfigError(f"the agent's name {name!r:.200} is not usable.", hint=_NAMES)
            limits = entry.budget or (AgentLimits() if parent is not None else None)
            budget = limits.open(name, parent, store) if limits is not None else None
            tenant = Tenant(name, budget, f"agent {name}")
            for each in entry.keys:
                _, salt, digest = each.split(":")
                self._keys.append((bytes.fromhex(salt), bytes.fromhex(digest), tenant))

    @classmethod
    def from_file(cls, path: str | Path, *, parent: Budget | None = None, store: BudgetStore | None = None) -> Self:
        """Read a key file.

        Raises:
            ConfigError: it cannot be read, or is no key file; the message says where.
            BadLimit: as ``AgentLimits.open``.
        """
        found = _read_key_file(Path(path))
        if isinstance(found, str):  # raised out here: an exception's context would hold what the file holds
            raise ConfigError(f"the key file {path}{found}.", hint="s2t key NAME prints an entry for it.")
        return cls(found.agents, parent=parent, store=store)

    @property
    def budgets(self) -> list[Budget]:
        """The agents' own budgets."""
        return [tenant.budget for _, _, tenant in self._keys if tenant.budget is not None]

    def tenant_of(self, headers: Mapping[str, str]) -> Tenant:
        """Who sent these headers.

        Behind a key, the agent header names a part of the key's agent ("team/writer"): it shares budget and cache.

        Raises:
            UnknownKey: keys are asked for, and the request has none that is known.
            BadRequest: an agent's name that is not usable.
        """
        named = headers.get(AGENT_HEADER)
        if named is not None and not _AGENT.fullmatch(named):
            raise BadRequest(f"X-S2T-Agent is {named!r:.120}.", param="X-S2T-Agent", hint=_NAMES)
        if not self.with_keys:
            return Tenant(named, None, f"agent {named}") if named is not None else Tenant()
        tenant = self._tenant_of_key(headers.get("authorization", ""))
        return Tenant(f"{tenant.agent}/{named}", tenant.budget, tenant.cache_scope) if named is not None else tenant

    def _tenant_of_key(self, authorization: str) -> Tenant:
        scheme, _, key = authorization.partition(" ")
        given = key.strip().encode(errors="surrogateescape")[: MAX_KEY + 1]
        found: Tenant | None = None
        for salt, digest, tenant in self._keys:  # all of them: the time taken says nothing about which one it was
            if hmac.compare_digest(hashlib.sha256(salt + given).digest(), digest):
                found = tenant
        if found is None or scheme.lower() != "bearer" or len(given) > MAX_KEY:
            raise UnknownKey(
                "No such API key." if authorization else "No API key was given.",
                hint="Send one of this server's keys as Authorization: Bearer KEY.",
            )
        return found


_NAMES = "Use 1 to 100 letters, digits and . _ : @ -"


def _read_key_file(path: Path) -> KeyFile | str:
    """The file, or what is wrong with it; a key may stand where its hash belongs, so no value is quoted."""
    try:
        return KeyFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        return f": {error}"
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        return f", {'.'.join(map(str, first['loc']))}: {first['msg']}"


def new_key() -> tuple[str, str]:
    """A new key and the line for it in a key file. Keys are 256 random bits: one round of SHA-256 is enough."""
    key = f"s2t-{secrets.token_urlsafe(32)}"
    salt = secrets.token_bytes(16)
    return key, f"sha256:{salt.hex()}:{hashlib.sha256(salt + key.encode()).hexdigest()}"
