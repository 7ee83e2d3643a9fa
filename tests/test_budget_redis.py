"""A Redis server that goes away, forgets or answers too late: nothing is spent, nothing is booked twice."""

# ruff: noqa: F811  (fixtures are imported by name)

from __future__ import annotations

import itertools
import socketserver
import threading
import uuid
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


def test_what_a_server_may_have_done_is_sent_to_it_once() -> None:
    sent: list[bytes] = []

    class HangsUp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(65_536):
                if b"EVAL" in data:
                    sent.append(data)
                    return
                self.request.sendall(b"+OK\r\n" * (1 + data.count(b"\r\n*")))

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), HangsUp) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        store = RedisStore(f"redis://127.0.0.1:{server.server_address[1]}/0?protocol=2", timeout_s=2)
        with pytest.raises(StoreUnavailable):
            store.release("run/a hold")
        store.close()
        server.shutdown()
    assert len(sent) == 1


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
    with pytest.raises(StoreUnavailable):
        Budget(usd=1, store=RedisStore("redis://127.0.0.1:1/0"))
