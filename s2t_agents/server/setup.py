"""The settings of ``s2t serve``, checked before anything is loaded: its chat model and who may ask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..budget import Budget, DevicePrice, SQLiteStore, TokenPrice, money
from ..chat.chat_model import ChatS2T
from ..errors import ConfigError
from ..ledger import Ledger, Recording
from ..llms.base import LLMSelector
from ..llms.front import llm_of
from ..scheduling.admission import Concurrency
from .tenants import Tenants


@dataclass(frozen=True)
class Setup:
    """What the options of ``s2t serve`` say, by their names; ``build`` checks them together."""

    model: str = "s2t-demo"
    selector: str | None = None
    llm: str | None = None
    keys: Path | None = None
    usd: str | None = None
    escalations: int | None = None
    llm_price: str | None = None
    device_price: str | None = None
    budgets: Path | None = None
    ledger: Path | None = None
    shadow: bool = False
    record_steps: bool = False
    record_text: bool = False
    trace: bool = False
    max_tokens: int = 512
    running: int = 32
    waiting: int = 256

    def build(self) -> tuple[ChatS2T, Tenants]:
        """The chat model, whose weights are not loaded yet, and who may ask it.

        Raises:
            ConfigError: options that cannot work, alone or together; the message names them.
            S2TError: a key file, a ledger or a file of budgets that cannot be used.
        """
        recording = Recording(steps=self.record_steps or self.record_text, text=self.record_text)
        if self.ledger is None and (recording.steps or self.trace):
            raise ConfigError("--record-steps, --record-text and --trace need a ledger.", hint="Give --ledger FILE.")
        limited = self.usd is not None or self.escalations is not None
        if self.budgets is not None and not limited and self.keys is None:
            raise ConfigError(
                "--budgets was given, and nothing limits what is spent.",
                hint="Give --usd, --escalations or --keys, or leave --budgets out.",
            )
        usd = money.dollars(self.usd, "--usd") if self.usd is not None else None
        hourly = money.dollars(self.device_price, "--device-price") if self.device_price is not None else None
        llm, concurrency = self._llm(), Concurrency(self.running, self.waiting)
        store = SQLiteStore(self.budgets) if self.budgets is not None else None
        whole = Budget(name="server", usd=usd, escalations=self.escalations, store=store) if limited else None
        tenants = Tenants.from_file(self.keys, parent=whole, store=store) if self.keys is not None else Tenants()
        chat_model = ChatS2T(
            model=self.model,
            selector=self.selector,
            escalation=llm,
            device_price=DevicePrice(hourly) if hourly is not None else None,
            budget=whole,
            ledger=Ledger.open(self.ledger, recording=recording) if self.ledger is not None else None,
            max_tokens=self.max_tokens,
            shadow=self.shadow,
            concurrency=concurrency,
        )
        return chat_model, tenants

    def _llm(self) -> LLMSelector | None:
        """The LLM that is asked, with its price."""
        if self.llm is None:
            if self.llm_price is not None:
                raise ConfigError("--llm-price was given, and no LLM is asked.", hint="Give --llm.")
            return None
        llm = llm_of(self.llm)
        if self.llm_price is not None:
            llm.price = token_price(self.llm_price)
        if self.usd is not None and llm.price is None:
            raise ConfigError(
                f"--usd was given, and {llm.name!r} has no known price.",
                hint="Give --llm-price, or limit --escalations instead.",
            )
        return llm


def token_price(text: str) -> TokenPrice:
    """A price in USD per million tokens read and written, as ``0.50/1.50``.

    Raises:
        ConfigError: another form.
        BadLimit: no amount of dollars.
    """
    read, slash, written = text.partition("/")
    if not slash:
        raise ConfigError(f"--llm-price is {text!r:.80}.", hint="Give USD per million tokens read/written: 0.50/1.50.")
    return TokenPrice(money.dollars(read, "--llm-price"), money.dollars(written, "--llm-price"))
