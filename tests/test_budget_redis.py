"""A Redis server that goes away, forgets or answers too late: nothing is spent, nothing is booked twice."""

# ruff: noqa: F811  (fixtures are imported by name)

from __future__ import annotations

import itertools
import socket
import socketserver
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from budget_support import RedisServer, need_redis, redis_server  # noqa: F401

from s2t_agents.budget import Budget, Charge, RedisStore
from s2t_agents.errors import ConfigError, StoreUnavailable

CENT = Charge(Decimal("0.01"), escalations=0)


def store_on(server: RedisServer, prefix: str = "") -> RedisStore:
    return RedisStore(server.url, prefix=prefix or uuid.uuid4().hex, timeout_s=2)


def test_a_server_that_is_down_refuses_and_what_was_spent_is_booked_when_it_is_back(tmp_path: Path) -> None:
    need_redis()
    server = RedisServer(tmp_path)
    server.start()
    try:
        budget = Budget(usd=1, store=store_on(server))
        hold = budget.reserve(CENT)
        server.stop()
        with pytest.raises(StoreUnavailable, match="cannot be used") as down:
            budget.reserve(CENT)
        assert down.value.retryable
        with pytest.raises(StoreUnavailable):
            hold.settle(CENT)
        with pytest.raises(StoreUnavailable):
            budget.state()
        server.start()
        budget.reserve(CENT).release()
        assert budget.state().spent["usd"] == CENT.usd
        assert budget.state().holds == 0
    finally:
        server.stop()


def test_a_server_that_forgot_refuses(redis_server: RedisServer) -> None:
    budget = Budget(usd=1, store=store_on(redis_server, prefix="forgotten"))
    agent = budget.child("agent", escalations=5)
    client = redis.Redis.from_url(redis_server.url)
    for key in client.scan_iter("forgotten:*"):
        client.delete(key)
    client.close()
    views = (budget.final(), budget.view(on_exhausted="raise"), agent.final())
    reserving = [partial(each.reserve, CENT) for each in (budget, agent, *views)]
    for use in (*reserving, budget.state, lambda: budget.extend(usd=1)):
        with pytest.raises(StoreUnavailable, match="no longer has"):
            use()


def test_an_answer_lost_on_the_way_is_not_booked_twice(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(usd=1, store=store_on(redis_server))
    hold = budget.reserve(CENT)
    through = redis.Redis.execute_command

    def lost(*args: Any, **options: Any) -> None:
        through(*args, **options)
        raise redis.TimeoutError("Timeout reading from socket")

    with monkeypatch.context() as network:
        network.setattr(redis.Redis, "execute_command", lost)
        with pytest.raises(StoreUnavailable):
            hold.settle(CENT)
        with pytest.raises(StoreUnavailable):
            budget.reserve(CENT)
    budget.reserve(CENT).release()
    assert budget.state().spent["usd"] == CENT.usd


def test_a_reservation_whose_answer_was_lost_is_given_back(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(usd=1, store=store_on(redis_server))
    through, calls = redis.Redis.execute_command, itertools.count()

    def first_lost(*args: Any, **options: Any) -> Any:
        answer = through(*args, **options)
        if next(calls) == 0:
            raise redis.TimeoutError("Timeout reading from socket")
        return answer

    with monkeypatch.context() as network:
        network.setattr(redis.Redis, "execute_command", first_lost)
        with pytest.raises(StoreUnavailable):
            budget.reserve(Charge(Decimal(1)))
    assert budget.state().holds == 0
    budget.reserve(Charge(Decimal(1)))


@contextmanager
def answering(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server on a free loopback port that treats every connection so."""

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            handle(self.request)

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_what_a_server_may_have_done_is_sent_to_it_once() -> None:
    sent: list[bytes] = []

    def hang_up(client: socket.socket) -> None:
        while data := client.recv(65_536):
            if b"EVAL" in data:
                sent.append(data)
                return
            client.sendall(b"+OK\r\n" * (1 + data.count(b"\r\n*")))

    with answering(hang_up) as address:
        store = RedisStore(f"redis://{address}/0?protocol=2", timeout_s=2)
        with pytest.raises(StoreUnavailable):
            store.release("run/a hold")
        store.close()
    assert len(sent) == 1


@pytest.mark.parametrize("options", ["", "?protocol=2"])
@pytest.mark.parametrize(
    "reply",
    [
        *(b"", b"+OK\r\n", b":1\r\n", b"*0\r\n", b"*1\r\n:1\r\n", b"#t\r\n", b"~1\r\n*0\r\n", b"%1\r\n*0\r\n:3\r\n"),
        *(b"%1\r\n+proto\r\n:3\r\n", b"$-1\r\n", b"$abc\r\n", b"*1\r\n" * 3000, b"\xff\xfe\r\n", b"-ERR unknown\r\n"),
        *(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n"),
    ],
    ids=lambda reply: repr(reply[:20]),
)
def test_what_is_no_redis_server_is_a_store_that_cannot_be_used_at_its_address(reply: bytes, options: str) -> None:
    def answer(client: socket.socket) -> None:
        while reply and client.recv(65_536):
            client.sendall(reply)

    with answering(answer) as address:
        store = RedisStore(f"redis://user:secret@{address}/0{options}", timeout_s=0.05)
        for _ in range(2):  # no connection is kept that was greeted in vain
            with pytest.raises(StoreUnavailable, match=address) as caught:
                Budget(usd=1, store=store)
            assert "secret" not in str(caught.value)
        store.close()


def test_the_servers_own_clock_lets_a_hold_lapse(redis_server: RedisServer) -> None:
    import time

    budget = Budget(usd="0.01", store=store_on(redis_server))
    budget.reserve(CENT, ttl_s=0.2)
    time.sleep(0.3)
    budget.reserve(CENT)


def test_a_url_that_can_not_be_and_a_secret_that_is_not_shown() -> None:
    with pytest.raises(ConfigError, match="Redis URL"):
        RedisStore("http://localhost")
    assert "secret" not in repr(RedisStore("redis://user:secret@127.0.0.1:1/0"))


def test_no_server_at_all() -> None:
    with pytest.raises(StoreUnavailable, match="Redis at 127.0.0.1:1 "):
        Budget(usd=1, store=RedisStore("redis://127.0.0.1:1/0"))
