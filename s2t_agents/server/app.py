"""The ASGI application: routes of OpenAI's API over one ``ChatS2T``.

request -> Tenants (who asks) -> chat_requests (messages, arguments) -> ChatS2T -> chat_answers (JSON, events)
                                 completions (text, token ids)  -> Engine     exchange (ends if the client leaves)
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..chat.chat_model import ChatS2T
from ..endpoints.loopback import is_loopback
from ..errors import ConfigError, UnknownModel
from .chat_answers import chat_completion, chat_events
from .chat_requests import chat_request
from .completions import Completion, TokenizeRequest, completion_request
from .error_responses import CLOSING, CLOSING_TEXT, body_of, error_body, headers_of, shape_of
from .exchange import EventStream, log_error, while_connected
from .live_trace import LiveTrace
from .parameters import parse
from .request_bodies import BodyLimits, json_object
from .tenants import Tenants


@dataclass(frozen=True)
class ServerLimits:
    """Limits of one request.

    Attributes:
        body: its body's.
        send_s: seconds that a client may stop reading a stream before its generation ends.
    """

    body: BodyLimits = field(default_factory=BodyLimits)
    send_s: float = 30.0


def create_app(
    chat_model: ChatS2T,
    *,
    tenants: Tenants | None = None,
    names: Sequence[str] = (),
    limits: ServerLimits | None = None,
    trace: bool = False,
) -> Starlette:
    """The application; weights are loaded here.

    Args:
        chat_model: answers every request.
        tenants: who may ask; everybody by default. Without keys, the application answers to this machine's own
            names alone, so that no web page reaches it through a name of its own.
        names: what clients may call the model; its own name by default.
        limits: of one request.
        trace: show the chat model's ledger at ``/trace``, to whoever may ask; a key's page has its own agent's answers.

    Raises:
        ConfigError: as the chat model, whose engine is built; its message names the setting. A trace without a ledger.
        UnpricedModel: a dollar budget of an agent over an LLM without a price.
    """
    tenants = Tenants() if tenants is None else tenants
    engine = chat_model.engine
    if engine.escalation is not None:
        for budget in tenants.budgets:
            engine.escalation.check_price(budget)
    service = Service(
        chat_model, tenants, list(names) or [served_name(chat_model.model_name)], limits or ServerLimits()
    )
    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/models/{name:path}", service.model, methods=["GET"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route("/tokenize", service.tokenize, methods=["POST"]),
    ]
    if trace:
        if chat_model.ledger is None:
            raise ConfigError("A trace was to be shown, and there is no ledger.", hint="Give --ledger FILE.")
        live = LiveTrace(chat_model.ledger, tenants, service.names[0])
        routes.append(Route("/trace", live.show, methods=["GET"]))
    middleware = [Middleware(ErrorsAsJson, any_host=tenants.with_keys)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: http_error})


def served_name(name: str) -> str:
    """A model's name as clients see it: of a path, the last part only."""
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name


async def health(request: Request) -> Response:
    """Whether it serves; needs no key and tells nothing else."""
    return JSONResponse({"status": "ok"})


async def http_error(request: Request, error: Exception) -> Response:
    """404, 405, 408, 413 and 415 in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    body = body_of(str(error.detail), "invalid_request_error", None)
    return JSONResponse(body, error.status_code, headers=error.headers)


class Service:
    """The endpoints.

    Args:
        chat_model: answers.
        tenants: who may ask.
        names: of the model.
        limits: of one request.
    """

    def __init__(self, chat_model: ChatS2T, tenants: Tenants, names: Sequence[str], limits: ServerLimits) -> None:
        self._chat_model, self._tenants, self.names, self._limits = chat_model, tenants, names, limits
        self._since = int(time.time())

    async def models(self, request: Request) -> Response:
        """``/v1/models``."""
        self._tenants.tenant_of(request.headers)
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self.names]})

    async def model(self, request: Request) -> Response:
        """``/v1/models/NAME``."""
        self._tenants.tenant_of(request.headers)
        return JSONResponse(self._described(self._checked(request.path_params["name"])))

    async def chat(self, request: Request) -> Response | EventStream:
        """``/v1/chat/completions``."""
        tenant = self._tenants.tenant_of(request.headers)
        asked = chat_request(await json_object(request, self._limits.body))
        model = self._checked(asked.model)
        messages = asked.langchain_messages()
        call = {**asked.call_arguments(), **tenant.call_arguments()}
        if asked.tools:
            bound: Any = await asyncio.to_thread(self._chat_model.bind_tools, asked.offered_tools())
            call |= bound.kwargs
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        if asked.stream:

            def events() -> AsyncIterator[bytes]:
                chunks = self._chat_model.astream(messages, stop=asked.stops, **call)
                return chat_events(chunks, answer_id=answer_id, model=model, with_usage=asked.with_usage)

            return EventStream(events, request.state.request_id, send_s=self._limits.send_s)
        answer: AIMessage = await while_connected(
            request.receive, self._chat_model.ainvoke(messages, stop=asked.stops, **call)
        )
        return JSONResponse(chat_completion(answer, answer_id=answer_id, model=model))

    async def complete(self, request: Request) -> Response | EventStream:
        """``/v1/completions``."""
        tenant = self._tenants.tenant_of(request.headers)
        asked = completion_request(await json_object(request, self._limits.body))
        self._checked(asked.model)
        completion = Completion(self._chat_model, asked, tenant)
        if asked.stream:
            return EventStream(completion.events, request.state.request_id, send_s=self._limits.send_s)
        return JSONResponse(await while_connected(request.receive, completion.whole()))

    async def tokenize(self, request: Request) -> Response:
        """``/tokenize``, as vLLM has it: by which its clients tell another tokenizer. Control tokens are such here."""
        self._tenants.tenant_of(request.headers)
        asked = parse(TokenizeRequest, await json_object(request, self._limits.body))
        self._checked(asked.model)
        slm = self._chat_model.engine.slm
        ids = await asyncio.to_thread(slm.tokenizer.encode, asked.prompt, add_special_tokens=asked.add_special_tokens)
        return JSONResponse({"count": len(ids), "max_model_len": slm.context_window, "tokens": ids})

    def _described(self, name: str) -> Mapping[str, Any]:
        window = self._chat_model.engine.slm.context_window
        described = {"id": name, "object": "model", "created": self._since, "owned_by": "s2t-agents"}
        return {**described, "max_model_len": window}

    def _checked(self, name: str) -> str:
        if name not in self.names:
            raise UnknownModel(
                f"The model {name!r:.120} is not served.",
                param="model",
                hint=f"Served: {', '.join(map(repr, self.names))}.",
            )
        return name


class ErrorsAsJson:
    """Outermost: a request id for every response, and every error in OpenAI's shape.

    Args:
        app: the application.
        any_host: whether it answers to any Host; else to this machine's loopback names.
    """

    def __init__(self, app: ASGIApp, *, any_host: bool) -> None:
        self._app, self._any_host = app, any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            if self._any_host or is_loopback(_host_name(scope)):
                await self._app(scope, receive, send_with_id)
                return
            error: Exception = HTTPException(421, "Without keys, only this machine's own names are served.")
            response = await http_error(Request(scope), error)
        except ClientDisconnect:
            return
        except asyncio.CancelledError:  # the server closes; the request's task ends here in any case
            if begun:
                return
            body = body_of(CLOSING_TEXT, CLOSING.kind, CLOSING.code)
            response = JSONResponse(body, CLOSING.status, headers=dict(CLOSING.headers))
        except Exception as failed:  # noqa: BLE001 - whatever it was, the client gets an answer
            log_error(failed, request_id)
            if begun:
                return
            response = JSONResponse(error_body(failed, request_id), shape_of(failed).status, headers=headers_of(failed))
        await response(scope, receive, send_with_id)


def _host_name(scope: Scope) -> str:
    """The name in the Host header, without port and brackets; "" if it is malformed."""
    found = _HOST.fullmatch(Request(scope).headers.get("host", ""))
    return (found["address"] or found["name"]) if found else ""


_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[^\[\]:/@?#\s]+))(?::\d{1,5})?")
