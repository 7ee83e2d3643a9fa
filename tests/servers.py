"""Small real HTTP servers on 127.0.0.1, in threads of this process: one that works, and ways to make it fail."""

from __future__ import annotations

import gzip
import itertools
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from s2t_agents.backends.base import Output, StepOutput, Work
from s2t_agents.backends.torch.backend import TorchBackend
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.scheduling.waits import finish
from s2t_agents.selectors.in_logits import LogitSelection
from s2t_agents.training.labels import along

Fault = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """OpenAI's completions, vLLM's way: token ids in, log-probabilities by id out."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as of asyncio's servers; else the second write of an answer waits for 40 ms
    server: CompletionServer

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        if self.server.listing_fault:
            self.server.listing_fault(self, {})
        elif self.path == "/v1/models":
            model = {"id": self.server.model.name, "max_model_len": self.server.model.context_window}
            self.reply({"data": [model]})
        else:
            self.reply({"error": {"message": "no such page"}}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize" and self.server.tokenize:
            self.reply({"tokens": self.server.tokenize(body["prompt"])})
        elif self.path != "/v1/completions":
            self.reply({"error": {"message": "no such page"}}, 404)
        else:
            self.server.asked.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
            self.server.fault(self, body) if self.server.fault else self.complete(body)

    def complete(self, body: dict[str, Any]) -> None:
        """The right answer."""
        if not (self.server.takes_ids or isinstance(body["prompt"], str)):
            self.reply({"error": {"message": "prompt: Input should be a valid string"}}, self.server.refusal)
        elif body.get("stream"):
            self.stream(self.server.events(body))
        else:
            self.reply(self.server.answer(body))

    def stream(self, events: Iterator[dict[str, Any]]) -> None:
        """Server-sent events, until the client hangs up."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in events:
                self.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
                self.server.streamed += 1
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")
        except OSError:
            self.close_connection = True
            self.server.dropped += 1

    def chunk(self, data: bytes) -> None:
        """A piece of a body of unknown length; an empty one ends it."""
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        """A JSON answer; bytes are sent as they are."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


class CompletionServer(ThreadingHTTPServer):
    """Serves one model.

    Attributes:
        lists_prompts: knows ``prompt_logprobs``, as vLLM does.
        by_id: knows ``logprob_token_ids``, as vLLM does; else answers with its best.
        takes_ids: takes token ids as prompt; else text alone, and refuses the rest with ``refusal``.
        refusal: a status; llama-cpp-python's server has 500.
        names_ids: names tokens by their ids, as vLLM does when asked; else by their text.
        fault: takes the place of the right answer.
        listing_fault: takes the place of the list of models.
        asked: bodies of the completions asked for.
        keys: their Authorization headers.
        dropped: clients that hung up in a stream, or while they were kept waiting by ``keeps_waiting``.
        streamed: events sent of streams.
        token_s: seconds that a stream's token takes.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, model: LanguageModel, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.by_id, self.usage, self.lists_prompts = model, True, True, True
        self.takes_ids, self.names_ids, self.refusal = True, True, 422
        self.tokenize: Callable[[str], list[int]] | None = lambda text: model.tokenizer.encode(
            text, add_special_tokens=False
        )
        self.fault: Fault | None = None
        self.listing_fault: Fault | None = None
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.seen: list[str] = []
        self.dropped = self.streamed = 0
        self.token_s = 0.0
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        given = body["prompt"]
        many = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        prompts = [self.model.tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in many]
        reply: dict[str, Any] = {"choices": [self.choice(at, ids, body) for at, ids in enumerate(prompts)][::-1]}
        if self.usage:
            reply["usage"] = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": len(prompts)}
        return reply

    def choice(self, at: int, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        """The completion of one prompt."""
        prefix = TokenSequence(self.model)
        prefix.append(ids)
        scores = prefix.logits.log_softmax(0)
        best = scores.topk(body["logprobs"]).indices.tolist()
        shown = body["logprob_token_ids"] + best[:1] if self.by_id and "logprob_token_ids" in body else best
        top = {self.named(token): float(scores[token]) for token in shown}
        choice: dict[str, Any] = {"index": at, "text": "", "logprobs": {"top_logprobs": [top]}}
        if self.lists_prompts and (count := body.get("prompt_logprobs")):
            choice["prompt_logprobs"] = self.prompt_logprobs(ids, count)
        return choice

    def named(self, token: int) -> str:
        """A token, as a log-probability names it."""
        return f"token_id:{token}" if self.names_ids else str(self.model.tokenizer.decode([token]))

    def prompt_logprobs(self, ids: list[int], count: int) -> list[dict[str, Any] | None]:
        """Of every token of a prompt but the first, with the ``count`` likeliest in its place, as vLLM lists them."""
        listed: list[dict[str, Any] | None] = [None]
        for token, row in zip(ids[1:], along(self.model, [(ids[:1], ids[1:])])[0] if ids[1:] else [], strict=True):
            top = [*row.topk(count).indices.tolist(), token]
            listed.append({str(at): {"logprob": float(row[at]), "rank": 1, "decoded_token": ""} for at in top})
        return listed

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A greedy completion up to an end token, which is shown, an event a token, as vLLM streams it."""
        allowed = body.get("allowed_token_ids")
        with finish(TokenSequence.from_prefix_cache(self.model, body["prompt"])) as sequence:
            pending = body["prompt"][len(sequence) :]
            for left in reversed(range(body["max_tokens"])):
                sequence.append(pending)
                scores = sequence.logits.log_softmax(0)
                token = int(scores.argmax()) if allowed is None else max(allowed, key=lambda each: float(scores[each]))
                shown = {*scores.topk(min(body.get("logprobs", 1), len(scores))).indices.tolist(), token}
                top = {f"token_id:{each}": float(scores[each]) for each in shown}
                logprobs = {"tokens": [f"token_id:{token}"], "top_logprobs": [top]}
                time.sleep(self.token_s)
                ends = "stop" if token in self.model.eos_ids else None if left else "length"
                yield {"choices": [{"index": 0, "text": "", "logprobs": logprobs, "finish_reason": ends}]}
                if ends:
                    return
                pending = [token]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no event."""


def selecting(model: LanguageModel, selection: LogitSelection, name: str = "served") -> LanguageModel:
    """The model with its logits going through a selection, as the vLLM plugin's do."""

    class Selecting(TorchBackend):
        def forward(self, batch: Sequence[Work]) -> list[Output]:
            outputs = super().forward(batch)
            return [
                out._replace(logits=selection(out.hidden[None], out.logits[None])[0])
                for out in outputs
                if isinstance(out, StepOutput)
            ]

    return LanguageModel.on(Selecting(model.model, model.tokenizer, name=name))


@contextmanager
def serving(model: LanguageModel, port: int = 0) -> Iterator[CompletionServer]:
    """A server for the length of a block, on any free port by default."""
    server = CompletionServer(model, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()  # lets hanging and dripping answers end
        server.shutdown()
        server.server_close()
        thread.join()


def with_certificate(server: CompletionServer, certificate: str, key: str) -> str:
    """Put TLS in front of a server that is not asked yet; the URL to ask it by."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return server.url.replace("http://", "https://")


@contextmanager
def deaf() -> Iterator[int]:
    """A port whose backlog is full: handshakes are not answered."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listening.getsockname())
        yield int(listening.getsockname()[1])


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------------- faults


def status(code: int, message: str = "no", **headers: str) -> Fault:
    """Answer with a status."""
    return lambda handler, body: handler.reply({"error": {"message": message}}, code, **headers)


def says(content: Any) -> Fault:
    """Answer 200 with this body."""
    return lambda handler, body: handler.reply(content)


def top(scores: dict[str, Any]) -> Fault:
    """Answer with these log-probabilities."""
    return says({"choices": [{"logprobs": {"top_logprobs": [scores]}}]})


def counts(prompt_tokens: int | None = None, completion_tokens: int = 1) -> Fault:
    """Answer rightly and say that the prompt (None: as it is) and the answer had so many tokens."""

    def fault(handler: Handler, body: dict[str, Any]) -> None:
        prompt = len(body["prompt"]) if prompt_tokens is None else prompt_tokens
        usage = {"prompt_tokens": prompt, "completion_tokens": completion_tokens}
        handler.reply({**handler.server.answer(body), "usage": usage})

    return fault


def candidates_score(score: str) -> Fault:
    """Give every candidate this log-probability, written as it stands."""

    def fault(handler: Handler, body: dict[str, Any]) -> None:
        scores = ", ".join(f'"token_id:{token}": {score}' for token in body["logprob_token_ids"])
        handler.reply(f'{{"choices": [{{"logprobs": {{"top_logprobs": [{{{scores}}}]}}}}]}}'.encode())

    return fault


def hangs(handler: Handler, body: dict[str, Any]) -> None:
    """Begin a body and end it only with the server: who waits for it waits for ever."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.server.over.wait()


def hangs_before_headers(handler: Handler, body: dict[str, Any]) -> None:
    """Take the request and say nothing while the server runs."""
    handler.server.over.wait()


def stalls_after(tokens: int) -> Fault:
    """Stream so many tokens, then say nothing while the server runs."""

    def fault(handler: Handler, body: dict[str, Any]) -> None:
        def events() -> Iterator[dict[str, Any]]:
            yield from itertools.islice(handler.server.events(body), tokens)
            handler.server.over.wait()

        handler.stream(events())

    return fault


def keeps_waiting(handler: Handler, body: dict[str, Any]) -> None:
    """Say nothing until the client hangs up, and count that it did."""
    handler.connection.settimeout(0.05)
    handler.close_connection = True
    while not handler.server.over.is_set():
        try:
            handler.connection.recv(1)
        except TimeoutError:
            continue
        except OSError:
            pass
        handler.server.dropped += 1
        return


def drips(handler: Handler, body: dict[str, Any]) -> None:
    """A header byte now and then: no single read ever times out."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not handler.server.over.wait(0.05):
        handler.wfile.write(b"x")
        handler.wfile.flush()


def drips_body(handler: Handler, body: dict[str, Any]) -> None:
    """A body byte now and then."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while not handler.server.over.wait(0.05):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def hangs_up(handler: Handler, body: dict[str, Any]) -> None:
    """Close the connection without a word."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def breaks_off(handler: Handler, body: dict[str, Any]) -> None:
    """Close the connection in mid-body."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    hangs_up(handler, body)


def breaks_off_a_chunk(handler: Handler, body: dict[str, Any]) -> None:
    """Close the connection in the middle of a chunk."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"ff\r\n{")
    handler.wfile.flush()
    hangs_up(handler, body)


def no_http(handler: Handler, body: dict[str, Any]) -> None:
    """Answer in another protocol."""
    handler.close_connection = True
    handler.wfile.write(b"220 mail.example.com ESMTP\r\n")
    handler.wfile.flush()


def compressed(handler: Handler, body: dict[str, Any]) -> None:
    """The right answer, packed although nobody asked for that."""
    handler.reply(gzip.compress(json.dumps(handler.server.answer(body)).encode()), Content_Encoding="gzip")


def endless(handler: Handler, body: dict[str, Any]) -> None:
    """A body without end, at full speed."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    block = b"10000\r\n" + b" " * 65536 + b"\r\n"
    for _ in range(2000):
        if handler.server.over.is_set():
            return
        handler.wfile.write(block)


def first(times: int, fault: Fault) -> Fault:
    """Fail so often, then answer."""
    left = [fault] * times

    def either(handler: Handler, body: dict[str, Any]) -> None:
        left.pop()(handler, body) if left else handler.complete(body)

    return either


def in_turn(*faults: Fault | None) -> Fault:
    """One after the other, None being the right answer; then answer."""
    left, lock = list(faults), threading.Lock()

    def next_one(handler: Handler, body: dict[str, Any]) -> None:
        with lock:
            fault = left.pop(0) if left else None
        fault(handler, body) if fault else handler.complete(body)

    return next_one


def slow(seconds: float, fault: Fault | None = None) -> Fault:
    """The right answer, or what else is given, late."""

    def late(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(seconds)
        fault(handler, body) if fault else handler.complete(body)

    return late
