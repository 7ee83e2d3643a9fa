"""The API key in a server's responses: redacted in errors, records and logs."""

from __future__ import annotations

import json
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any
from urllib.parse import quote

import pytest
from observers import cache_key
from servers import CompletionServer, Handler, serving

from s2t_agents import Budget, ChatS2T, Escalation, Ledger, OpenAILLM
from s2t_agents.errors import ConfigError, EscalationFailed, ModelNotFound
from s2t_agents.llms import CircuitBreaker, Question
from s2t_agents.testing import tiny_model
from s2t_agents.training.remote import RemoteTeacher
from s2t_agents.triggers import always

KEYS = ["sk-do-not-tell-2f9c", r"sk-\odd'key\x", "k"]
PROMPT = [10, 20, 30, 40, 50]


def key_of(handler: Handler) -> str:
    return str(handler.headers["Authorization"]).removeprefix("Bearer ")


def reason(status: int) -> Callable[[Handler, Any], None]:
    def fault(handler: Handler, body: Any) -> None:
        handler.send_response(status, f"unknown key {key_of(handler)}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return fault


def said(make: Callable[[str], Any], status: int = 401, **headers: str) -> Callable[[Handler, Any], None]:
    def fault(handler: Handler, body: Any) -> None:
        key = key_of(handler)
        handler.reply(make(key), status, **{name: value.format(key=key) for name, value in headers.items()})

    return fault


def raw(make: Callable[[str], str]) -> Callable[[Handler, Any], None]:
    def fault(handler: Handler, body: Any) -> None:
        handler.wfile.write(make(key_of(handler)).encode())
        handler.close_connection = True

    return fault


def completion(top: Any) -> Any:
    return {"choices": [{"logprobs": {"top_logprobs": [top]}}]}


ECHOES: dict[str, Callable[[Handler, Any], None]] = {
    "reason phrase 401": reason(401),
    "reason phrase 500": reason(500),
    "reason phrase 422": reason(422),
    "reason phrase 302": reason(302),
    "openai's error": said(lambda key: {"error": {"message": f"Incorrect API key provided: {key}."}}),
    "error text": said(lambda key: {"error": key}),
    "plain text": said(lambda key: f"no such key: {key}".encode()),
    "json text": said(lambda key: key),
    "deep": said(lambda key: {"error": {"detail": {key: [key]}}}),
    "as a field": said(lambda key: {key: key}),
    "after much white": said(lambda key: b" " * 4080 + key.encode()),
    "redirect": said(lambda key: {}, 307, Location="http://127.0.0.1:1/{key}?key={key}"),
    "headers": said(lambda key: {}, 429, Retry_After="{key}", X_Key="{key}", WWW_Authenticate="Bearer {key}"),
    "encoding": said(lambda key: {}, 200, Content_Encoding="{key}"),
    "a reply of keys": said(lambda key: {key: key}, 200),
    "no json": said(lambda key: key.encode(), 200),
    "a token's name": said(lambda key: completion({key: "x"}), 200),
    "a token's name alone": said(lambda key: completion({key: -0.1}), 200),
    "a score": said(lambda key: completion({"token_id:65": key}), 200),
    "usage": said(lambda key: {**completion({"token_id:65": -1.0}), "usage": {"prompt_tokens": key}}, 200),
    "no http": raw(lambda key: f"{key}\r\n\r\n"),
    "no status": raw(lambda key: f"HTTP/1.1 {key}\r\n\r\n"),
    "no header": raw(lambda key: f"HTTP/1.1 200 OK\r\n{key}\r\n\r\n"),
    "bad length": raw(lambda key: f"HTTP/1.1 200 OK\r\nContent-Length: {key}\r\n\r\n"),
    "bad chunk": raw(lambda key: f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{key}\r\n"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[CompletionServer]:
    with serving(tiny_model()) as server:
        yield server


def clean(key: str, *shown: str) -> None:
    for text in shown:
        for form in (key, repr(key)[1:-1]):
            assert form not in text, text


def everything(error: BaseException) -> str:
    """What a careless logger would print of an error: the whole chain, arguments and fields."""
    told, at = [], [error]
    while at:
        each = at.pop()
        told += [repr(each), str(each), repr(vars(each))]
        told += traceback.format_exception_only(each)
        at += [link for link in (each.__cause__, each.__context__) if link is not None]
    return "\n".join(told)


@pytest.mark.parametrize("key", KEYS[:2])
@pytest.mark.parametrize("echo", ECHOES)
def test_no_echo_of_the_key_comes_through(server: CompletionServer, key: str, echo: str, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    server.fault = ECHOES[echo]
    llm = OpenAILLM(server.url, server.model.name, api_key=key, attempts=1)
    try:
        with pytest.raises(EscalationFailed) as caught:
            llm.open().ask(Question(PROMPT, [65, 66]))
    finally:
        server.fault = None
        llm.close()
    assert server.keys[-1] == f"Bearer {key}"
    clean(key, everything(caught.value), caplog.text, repr(llm))
    assert key.encode() not in pickle.dumps(caught.value)
    assert "s2t" not in caplog.text or caught.value


SPELLINGS: dict[str, Callable[[str], str]] = {
    "verbatim": str,
    "quoted for a URL": lambda key: quote(key, safe=""),
    "percent-encoded": lambda key: "".join(f"%{ord(char):02x}" for char in key),
    "as JSON": lambda key: json.dumps(key)[1:-1],
    "as JSON in JSON": lambda key: json.dumps(json.dumps(key)[1:-1])[1:-1],
    "with JSON's slash": lambda key: json.dumps(key)[1:-1].replace("/", r"\/"),
    "as JSON's code units": lambda key: "".join(f"\\u{ord(char):04X}" for char in key),
    "as a repr": lambda key: repr(key)[1:-1],
}
FORMS = ["{}", '{{"error": {{"message": "{}"}}}}', '{{"error": "{}", ']


@pytest.mark.parametrize(("fill", "end"), [("", 0), ("x", 200), (" ", 4096), ("\n\t", 1 << 16)])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_part_of_the_key_comes_through_wherever_a_text_is_cut(
    server: CompletionServer, spelling: str, fill: str, end: int
) -> None:
    key = "sk+live/4f9A7c\\2E'8b1D6h3K."
    spelled = SPELLINGS[spelling](key)
    llm = OpenAILLM(server.url, server.model.name, api_key=key, attempts=1, breaker=CircuitBreaker(failures=99))
    for form, cut in product(FORMS, (len(spelled) // 2, -1)):  # so much of the key stands before the end
        before = max(0, end - form.index("{}") - len(spelled[:cut]))
        body = form.format((fill * end)[:before] + spelled + "!").encode()
        server.fault = said(lambda _, body=body: body, 403)
        try:
            with pytest.raises(EscalationFailed, match="answered 403") as caught:
                llm.open().ask(Question(PROMPT, [65, 66]))
        finally:
            server.fault = None
        shown = everything(caught.value)
        assert not [at for at in range(len(key) - 4) if key[at : at + 5] in shown], shown
    llm.close()


@pytest.mark.parametrize("ends", ["", ".", "...", "'", "\\"])
def test_nor_a_key_that_ends_as_a_sentence_does(server: CompletionServer, ends: str) -> None:
    key = KEYS[0] + ends
    llm = OpenAILLM(server.url, server.model.name, api_key=key, attempts=1, breaker=CircuitBreaker(failures=99))
    for echo in ("no http", "no status", "bad chunk", "reason phrase 401", "plain text"):
        server.fault = ECHOES[echo]
        try:
            with pytest.raises(EscalationFailed) as caught:
                llm.open().ask(Question(PROMPT, [65, 66]))
        finally:
            server.fault = None
        clean(KEYS[0], everything(caught.value))
    llm.close()


@pytest.mark.parametrize("echo", ["reason phrase 401", "openai's error", "a token's name", "no status"])
def test_nor_into_messages_receipts_and_the_ledger(server: CompletionServer, echo: str, tmp_path: Any) -> None:
    key = KEYS[0]
    llm = OpenAILLM(server.url, server.model.name, api_key=key, attempts=1)
    ledger = Ledger.open(tmp_path / "costs.jsonl")
    chat = ChatS2T(
        model=tiny_model(), escalation=Escalation(llm, margin=1.0), trigger=always(), max_tokens=3, ledger=ledger,
        budget=Budget(escalations=9),
    )  # fmt: skip
    chat.engine  # noqa: B018 - its checks come before the fault
    server.fault = ECHOES[echo]
    try:
        answer = chat.invoke("hi")
    finally:
        server.fault = None
        llm.close()
    assert answer.response_metadata["s2t"]["degraded"]
    clean(key, repr(answer), (tmp_path / "costs.jsonl").read_text(), cache_key(chat))
    [record] = ledger.records()
    assert record.receipts[0].outcome == "failed"
    assert record.receipts[0].reason


class OtherModels(Handler):
    """Lists the key among its models."""

    def do_GET(self) -> None:
        self.reply({"data": [{"id": f"model-of-{key_of(self)}"}]})


def test_a_list_of_models_may_not_repeat_it(server: CompletionServer) -> None:
    server.RequestHandlerClass = OtherModels
    try:
        with pytest.raises(ModelNotFound, match=r"model-of-\*\*\*") as caught:
            OpenAILLM(server.url, "m", api_key=KEYS[0]).check(tiny_model())
    finally:
        server.RequestHandlerClass = Handler
    clean(KEYS[0], everything(caught.value))


def test_the_packages_own_logs_and_those_of_others_stay_readable(server: CompletionServer, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    llm = OpenAILLM(server.url, server.model.name, api_key=KEYS[0])
    llm.open().ask(Question(PROMPT, [65, 66]))
    llm.close()
    clean(KEYS[0], caplog.text)
    assert "HTTP Request: POST" in caplog.text
    logging.getLogger("httpx").info("%d of %s", 3, "four")
    assert "3 of four" in caplog.text


@pytest.mark.parametrize("path", ["sk-secret/v1", "v1/sk-secret", "a/b/c"])
def test_a_path_that_may_hold_a_key_is_not_shown_and_still_tells_servers_apart(path: str) -> None:
    one, other = OpenAILLM(f"https://h.example/{path}", "m"), OpenAILLM(f"https://h.example/{path}x", "m")
    assert path not in repr(one)
    assert "h.example" in repr(one)
    assert repr(one) == repr(OpenAILLM(f"https://h.example/{path}/", "m")) != repr(other)
    assert repr(OpenAILLM("https://h.example/v1", "m")) == "OpenAILLM('https://h.example/v1/', 'm')"


@pytest.mark.parametrize(
    "url", ["http://user:secret@127.0.0.1:1/v1", "http://127.0.0.1:secret/v1", "http://[secret/v1"]
)
def test_a_training_servers_url_is_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RemoteTeacher(url, "m", tiny_model(), tokenizer="s2t-demo")
    assert "secret" not in everything(caught.value)
