"""The tree of errors: each is a ``ModelError`` of LangChain, whose retries ask again only where that may help."""

import pickle
from typing import Any

import pytest
import servers
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRetryMiddleware
from langchain_core import exceptions
from langchain_core.callbacks import BaseCallbackHandler
from servers import CompletionServer

from s2t_agents import Budget, ChatS2T, errors
from s2t_agents.testing import tiny_model

KINDS = sorted(
    (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.S2TError)),
    key=lambda kind: kind.__name__,
)


class Calls(BaseCallbackHandler):
    """Counts the calls of a model."""

    def __init__(self) -> None:
        self.count = 0

    def on_chat_model_start(self, *_: Any, **__: Any) -> None:
        self.count += 1


def calls_until_it_failed(model: ChatS2T, kind: type[Exception], question: str = "Hello!") -> int:
    """How often an agent that repeats failed calls twice has asked the model, which fails with this kind."""
    calls = Calls()
    retry = ModelRetryMiddleware(max_retries=2, initial_delay=0.0, on_failure="error")
    with pytest.raises(kind):
        create_agent(model, middleware=[retry]).invoke({"messages": question}, {"callbacks": [calls]})
    return calls.count


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_tells_langchain_whether_to_ask_again(kind: type[errors.S2TError]) -> None:
    assert issubclass(kind, exceptions.ModelError)
    error = pickle.loads(pickle.dumps(kind.__new__(kind, "why")))
    assert (error.is_retryable, str(error)) == (kind.retryable, "why")


def test_what_no_second_call_can_change_is_asked_once() -> None:
    broke = ChatS2T(model=tiny_model(), max_tokens=8, budget=Budget(answer_tokens=0, on_exhausted="raise"))
    assert calls_until_it_failed(broke, errors.BudgetExceeded) == 1
    model = ChatS2T(model=tiny_model(), max_tokens=8)
    assert calls_until_it_failed(model, exceptions.ContextOverflowError, "word " * 5000) == 1


@pytest.mark.parametrize(
    ("fault", "kind", "times"),
    [
        (servers.status(429, "full", Retry_After="0"), exceptions.ModelRateLimitError, 3),
        (servers.status(401), exceptions.ModelInvalidRequestError, 1),
        (servers.status(404), exceptions.ModelInvalidRequestError, 1),
        (servers.breaks_off_a_chunk, errors.ModelServerError, 3),
    ],
)
def test_a_models_server_is_asked_again_where_it_may_recover(
    server: CompletionServer, fault: servers.Fault, kind: type[Exception], times: int
) -> None:
    model = ChatS2T(
        model=f"vllm://127.0.0.1:{server.server_port}/{server.model.name}",
        model_kwargs={"tokenizer": server.model.tokenizer, "attempts": 1},
        max_tokens=8,
    )
    server.fault = fault
    assert calls_until_it_failed(model, kind) == times
