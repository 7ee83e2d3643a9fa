"""Every error this package raises on purpose, in one tree.

S2TError (ModelError)
├── ConfigError (ValueError)          a setting that cannot work, found before anything is loaded or spent
│   ├── ModelNotFound (ModelNotFoundError)  no such model path, or the hub cannot be reached
│   ├── UnsafeWeights                 a model whose files are pickled, damaged, or need code of their own to be run
│   ├── AdapterMismatch               a selector trained for another base model or tokenizer
│   ├── TokenizerMismatch             tokens of SLM and LLM cannot be compared
│   ├── UnpricedModel                 a dollar limit over an LLM whose price is unknown
│   ├── BadLimit                      a negative, NaN, infinite or absurd limit
│   ├── BadStore (StoreUnavailable)   a budget store that is corrupt, foreign or of another version; left untouched
│   ├── BadSchema                     a tool or output schema that no answer can fit, or that is not JSON
│   └── ExposedServer                 a server for other machines that asks for no key
├── InputError (ValueError, ModelInvalidRequestError)  messages that cannot be rendered
│   ├── ContextOverflow (ContextOverflowError)  the prompt does not fit the context window
│   └── BadRequest                    a request to the server with a parameter that is missing, malformed or unknown
│       └── UnknownModel              it names a model that is not served
├── UnknownKey (ModelAuthenticationError)  a request to the server without a valid key
├── BudgetError
│   ├── BudgetExceeded                a reservation did not fit; nothing was spent
│   ├── HoldClosed                    settle or release of a hold that was settled, released or expired before
│   └── StoreUnavailable              the budget store cannot be reached; nothing may be spent (retryable)
├── Overloaded (ModelRateLimitError)  too many generations at once; nothing has run (retryable)
├── AnswerTimeout (ModelTimeoutError)  an answer was not whole within ``timeout=`` (retryable)
├── FolderInUse                       another run holds the lock of the folder; nothing was changed (retryable)
├── LedgerError                       a ledger file that is corrupt, foreign or cannot be written
├── ModelServerError                  the server of the model itself (``vllm://...``) gave no usable answer (retryable)
│   ├── ModelServerDown (ModelConnectionError)         not reached, or failed just before and left alone for a while
│   ├── ModelServerBusy (ModelRateLimitError)          it declined for now (429, 503, ...)
│   └── ModelServerRefused (ModelInvalidRequestError)  it refused the request: any other status
└── EscalationFailed                  the LLM gave no usable answer; the caller keeps the local pick (retryable)
    ├── EndpointDown                  its server cannot be reached: no connection, no TLS, no such host
    ├── EndpointBusy                  its server declined for now (429, 503, ...); nothing was spent
    ├── EndpointRefused               its server refused the request: any other status; nothing was spent
    │   └── QuestionRefused           it refused this question (too long, say) and may take another; nothing was spent
    └── OutOfTime                     the caller's deadline passed before the LLM's; not a failure of the LLM

Each message names the value, the limit and the way out; ``hint`` holds the way out alone, ``retryable`` says
whether the same call may work later. In brackets: the class of Python or LangChain that it also is. LangChain's
retries (``ModelRetryMiddleware``) leave a ``ModelError`` alone that is not retryable.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from langchain_core.exceptions import (
    ContextOverflowError,
    ModelAuthenticationError,
    ModelConnectionError,
    ModelError,
    ModelInvalidRequestError,
    ModelNotFoundError,
    ModelRateLimitError,
    ModelTimeoutError,
)


class S2TError(ModelError):
    """Root of the tree.

    Args:
        message: the value and the limit.
        hint: what to do about it; appended to the message.
    """

    retryable = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.hint = hint

    def __init_subclass__(cls) -> None:
        """``is_retryable``: what LangChain calls ``retryable``."""
        cls.is_retryable = cls.retryable

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies with all fields; Exception's default would call ``__init__`` without the keywords."""
        return _revived, (type(self), self.args, self.__dict__)


def _revived(kind: type[S2TError], args: tuple[Any, ...], fields: dict[str, Any]) -> S2TError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class ConfigError(S2TError, ValueError):
    """A setting that cannot work."""


class ModelNotFound(ConfigError, ModelNotFoundError):
    """No model at this path, and the hub did not give one."""


class UnsafeWeights(ConfigError):
    """A model whose files are no valid safetensors, GGUF, config or tokenizer, or need code that is not permitted."""


class AdapterMismatch(ConfigError):
    """A selector that was trained for another base model or tokenizer."""


class TokenizerMismatch(ConfigError):
    """Two models whose token ids do not mean the same text, or a tokenizer that cannot be followed byte by byte."""


class UnpricedModel(ConfigError):
    """A dollar limit over an LLM whose price is unknown."""


class BadLimit(ConfigError):
    """A limit that is negative, NaN, infinite or absurdly precise."""


class BadSchema(ConfigError):
    """A JSON schema that no answer can fit, or that is not JSON."""


class ExposedServer(ConfigError):
    """A server that listens to other machines and asks for no key."""


class InputError(S2TError, ModelInvalidRequestError, ValueError):
    """Messages that cannot be rendered into a prompt."""


class ContextOverflow(InputError, ContextOverflowError):
    """A prompt longer than the model's context window (also LangChain's own ``ContextOverflowError``)."""


class BadRequest(InputError):
    """A request to the server with a parameter that is missing, malformed, unknown or not supported.

    Args:
        message: one line for people.
        param: the parameter's path, as ``messages.0.role``; None if it is the request as a whole.
        code: OpenAI's code of the error; None has none.
        hint: the way out.
    """

    def __init__(self, message: str, *, param: str | None, code: str | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.param, self.code = param, code


class UnknownModel(BadRequest):
    """A request that names a model which is not served."""


class UnknownKey(S2TError, ModelAuthenticationError):
    """A request to the server without a valid key; the key itself is in no message."""


class BudgetError(S2TError):
    """Root of everything a budget raises."""


class BudgetExceeded(BudgetError):
    """A reservation that did not fit. Nothing was spent.

    Args:
        message: one line for people.
        unit: ``"usd" | "escalations" | "llm_tokens" | "answers" | "answer_tokens" | "seconds"``.
        limit: the limit that was met, in the unit.
        spent: settled so far, in the unit.
        held: reserved by others at this moment, in the unit.
        wanted: amount of this reservation, in the unit.
        budget: the path of the budget in the chain that refused, as ``fleet/run``.
        hint: the way out.
    """

    def __init__(
        self,
        message: str,
        *,
        unit: str,
        limit: Decimal | int | float,
        spent: Decimal | int | float,
        held: Decimal | int | float,
        wanted: Decimal | int | float,
        budget: str,
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.unit, self.limit, self.spent, self.held = unit, limit, spent, held
        self.wanted, self.budget = wanted, budget


class HoldClosed(BudgetError):
    """A hold that was settled, released or expired before."""


class StoreUnavailable(BudgetError):
    """The budget store cannot be reached: nothing may be spent.

    Args:
        message: one line for people.
        hint: the way out.
        untouched: whether it is certain that the operation had no effect, so that there is nothing to undo.
    """

    retryable = True

    def __init__(self, message: str, *, hint: str = "", untouched: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.untouched = untouched


class BadStore(ConfigError, StoreUnavailable):
    """A budget store that is corrupt, not a budget store, or written by another version. It was not changed.

    Also a ``StoreUnavailable``: nothing may be spent, and a running answer continues locally.
    """

    retryable = False


class Overloaded(S2TError, ModelRateLimitError):
    """Too many generations at once: the queue is full, or the wait was too long. Nothing has run."""

    retryable = True


class AnswerTimeout(S2TError, ModelTimeoutError):
    """An answer that was not whole within its ``timeout``; what it cost is in the ledger and in the budget."""

    retryable = True


class FolderInUse(S2TError):
    """Another run holds the lock of the folder."""

    retryable = True


class LedgerError(S2TError):
    """A ledger file that is corrupt, foreign or cannot be written."""


class ModelServerError(S2TError):
    """The server of the model itself gave no usable answer: it broke off, was too late, or sent what cannot be."""

    retryable = True


class ModelServerDown(ModelServerError, ModelConnectionError):
    """The model's server cannot be reached, or failed just before and is left alone for a while.

    Args:
        message: one line for people.
        wait_s: seconds for which it is left alone; None where that is not known.
        hint: the way out.
    """

    def __init__(self, message: str, *, wait_s: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.wait_s = wait_s


class ModelServerBusy(ModelServerError, ModelRateLimitError):
    """The model's server declined for now.

    Args:
        message: one line for people.
        wait_s: seconds until a retry, by the server's Retry-After; None if it gave none.
        hint: the way out.
    """

    def __init__(self, message: str, *, wait_s: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.wait_s = wait_s


class ModelServerRefused(ModelServerError, ModelInvalidRequestError):
    """The model's server refused the request, and asking again will not help."""

    retryable = False


class EscalationFailed(S2TError):
    """The LLM gave no usable answer; the local pick stands."""

    retryable = True


class EndpointDown(EscalationFailed):
    """The LLM's server cannot be reached; nothing was spent.

    Args:
        message: one line for people.
        wait_s: seconds for which it is left alone; None where that is not known.
    """

    def __init__(self, message: str, *, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class EndpointBusy(EscalationFailed):
    """The LLM's server declined for now; nothing was spent.

    Args:
        message: one line for people.
        wait_s: seconds until a retry, by the server's Retry-After; None if it gave none.
        status: of the HTTP response; None where it is not known.
    """

    def __init__(self, message: str, *, wait_s: float | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.wait_s, self.status = wait_s, status


class EndpointRefused(EscalationFailed):
    """The LLM's server refused the request, or there is no key to ask it with; nothing was spent, and asking again will
    not help.

    Args:
        message: one line for people.
        status: of the HTTP response; None where it is not known.
    """

    retryable = False

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class QuestionRefused(EndpointRefused):
    """The LLM refused this question, for example because it is too long; another question may succeed."""


class OutOfTime(EscalationFailed):
    """The caller's deadline passed before the LLM's time limit; not a failure of the LLM."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for use inside another message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and lines[1:] else lines[0]
    return reason.rstrip(".")


def is_rust_panic(error: BaseException) -> bool:
    """Whether it is a panic of Rust code, which pyo3 raises as a ``BaseException``."""
    return type(error).__name__ == "PanicException"
