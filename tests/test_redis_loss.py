"""A Redis that loses some of a budget's keys, or holds something else in them: less is given out, never more."""

# ruff: noqa: F811  (fixtures are imported by name)

from __future__ import annotations

import contextlib
import itertools
import pickle
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any

import pytest
import redis
from budget_support import FakeClock, RedisServer, redis_server  # noqa: F401

from s2t_agents import ChatS2T, Escalation
from s2t_agents.budget import Budget, Charge, RedisStore
from s2t_agents.errors import BadStore, BudgetExceeded, ConfigError, HoldClosed, S2TError, StoreUnavailable
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always

ONE = Charge(Decimal("0.01"), 5)
LIMIT = 10
KEYS = ("meters", "holds", "expiry")
SUBSETS = [subset for n in (1, 2, 3) for subset in itertools.combinations(KEYS, n)]


class Tree:
    """One budget tree on the server, on a clock of its own, and a hand at the server's console."""

    def __init__(self, server: RedisServer) -> None:
        self.prefix, self.url, self.clock = uuid.uuid4().hex, server.url, FakeClock()
        self.console = redis.Redis.from_url(server.url)
        self.stores: list[RedisStore] = []

    def open(self) -> Budget:
        store = RedisStore(self.url, prefix=self.prefix, timeout_s=5, clock=self.clock)
        self.stores.append(store)
        return Budget(escalations=LIMIT, name="P", store=store).child("agent", escalations=LIMIT)

    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def key(self, name: str) -> str:
        return f"{self.prefix}:{{P}}:{name}"

    def lose(self, names: Sequence[str]) -> None:
        self.console.delete(*map(self.key, names))


@pytest.fixture
def tree(redis_server: RedisServer) -> Iterator[Tree]:
    tree = Tree(redis_server)
    yield tree
    for store in tree.stores:
        store.close()
    tree.console.close()


def fill(budget: Budget) -> int:
    """Reserve and settle until it refuses; how many it gave."""
    given = 0
    while given <= 2 * LIMIT:
        try:
            budget.reserve(ONE).settle(ONE)
        except BudgetExceeded:
            return given
        given += 1
    raise AssertionError("more than twice the limit")


def sound(budget: Budget) -> None:
    for each in budget.chain:
        state = each.state()
        assert all(value >= 0 for value in state.held.values())
        assert state.holds >= 0
        over = state.overrun.get("escalations", 0)
        spent = state.spent["escalations"]
        assert spent is not None
        assert spent - over + state.held["escalations"] <= LIMIT


@pytest.mark.parametrize("lost", SUBSETS, ids="+".join)
@pytest.mark.parametrize("reopened", [True, False])
@pytest.mark.parametrize("lapses", ["before", "after", "never"])
def test_whatever_is_lost_no_more_than_the_limit_is_given_out(
    tree: Tree, lost: Sequence[str], reopened: bool, lapses: str
) -> None:
    budget = tree.open()
    holds = [budget.reserve(ONE, ttl_s=1) for _ in range(4)]
    budget.reserve(ONE).settle(ONE)
    if lapses == "before":
        tree.wait(2)
    tree.lose(lost)
    gone = "meters" in lost
    if reopened:
        budget = tree.open()
    if lapses == "after":
        tree.wait(2)
    if gone and not reopened:
        for step in (lambda: budget.reserve(ONE), budget.state, lambda: holds[0].settle(ONE)):
            with pytest.raises((StoreUnavailable, HoldClosed)):
                step()
        budget = tree.open()
    late = 0
    for hold in holds[:2]:
        try:
            hold.settle(ONE)
        except (HoldClosed, StoreUnavailable):
            late += 1
        sound(budget)
    spent_before = 0 if gone else 1
    given = fill(budget)
    sound(budget)
    assert given + spent_before <= LIMIT
    if lapses == "before" and "holds" not in lost and not gone:
        assert given + spent_before + 2 == LIMIT  # the index alone is made again: nothing stays held
    tree.wait(700_000)
    sound(budget)
    assert budget.state().limit == {"escalations": LIMIT}


@pytest.mark.parametrize("lost", SUBSETS, ids="+".join)
def test_a_settled_cost_counts_whatever_was_lost_between(tree: Tree, lost: Sequence[str]) -> None:
    budget = tree.open()
    hold = budget.reserve(ONE)
    tree.lose(lost)
    again = tree.open()
    with contextlib.suppress(HoldClosed):
        hold.settle(ONE)
    counted = (again.state().spent["escalations"] or 0) + again.state().held["escalations"]
    assert counted == (0 if {"meters", "holds"} <= set(lost) else 1)


def test_one_lost_meter_of_a_tree_is_opened_again_and_its_old_holds_take_nothing_back(tree: Tree) -> None:
    budget = tree.open()
    [budget.reserve(ONE, ttl_s=1) for _ in range(4)]
    tree.console.hdel(tree.key("meters"), "P/agent")
    with pytest.raises(StoreUnavailable, match="no longer has"):
        budget.reserve(ONE)
    budget = tree.open()
    mine = [budget.reserve(ONE, ttl_s=60) for _ in range(3)]
    tree.wait(2)  # the four of before lapse
    sound(budget)
    assert budget.state().held == {"escalations": 3}
    for hold in mine:
        hold.settle(ONE)
    assert fill(budget) == LIMIT - 3


def test_a_random_life_with_losses_never_gives_more_than_it_has(redis_server: RedisServer) -> None:
    for seed in range(12):
        dice = random.Random(seed)
        tree = Tree(redis_server)
        budget, holds, given = tree.open(), [], 0
        for _ in range(60):
            act = dice.choice(["reserve", "reserve", "settle", "release", "wait", "lose", "open", "read"])
            try:
                if act == "reserve":
                    holds.append(budget.reserve(ONE, ttl_s=dice.choice([1, 60])))
                elif act == "settle" and holds:
                    holds.pop(dice.randrange(len(holds))).settle(ONE)
                    given += 1
                elif act == "release" and holds:
                    holds.pop(dice.randrange(len(holds))).release()
                elif act == "wait":
                    tree.wait(dice.choice([0.5, 2, 100]))
                elif act == "lose":
                    lost = dice.choice(SUBSETS)
                    tree.lose(lost)
                    given = 0 if "meters" in lost else given
                    budget = tree.open()
                elif act == "open":
                    budget = tree.open()
                sound(budget)
            except BadStore:
                raise
            except (BudgetExceeded, HoldClosed, StoreUnavailable):
                continue
        fill(budget)
        sound(budget)
        for store in tree.stores:
            store.close()
        tree.console.close()


# ---------------------------------------------------------------------- something else in the keys


def bad_meters() -> dict[str, bytes]:
    import struct

    nan, minus = b"\xcb" + struct.pack(">d", float("nan")), b"\xff"

    def meter(
        spent: bytes = b"\x95\0\0\0\0\0", held: bytes = b"\x95\0\0\0\0\0", limit: bytes = b"\x94\xc2\xc2\x0a\xc2"
    ) -> bytes:
        terms = b'{"x": 1}'
        packed = bytes([0xA0 + len(terms)]) + terms
        return b"\x9b" + packed + limit + spent + held + b"\x95\0\0\0\0\0" + b"\xc2\xc2\xc2\xc2\xc2\x00"

    return {
        "nothing": b"",
        "text": b"not a meter",
        "a number": b"\x07",
        "an empty list": b"\x90",
        "a list": b"\x93\x01\x02\x03",
        "torn": meter()[:9],
        "nan spent": meter(spent=b"\x95\0\0" + nan + b"\0\0"),
        "nan held": meter(held=b"\x95\0\0" + nan + b"\0\0"),
        "less than nothing": meter(spent=b"\x95\0\0" + minus + b"\0\0"),
        "text for a number": meter(spent=b"\x95\0\0\xa1x\0\0"),
        "digits as text": meter(spent=b"\x95\0\0\xa10\0\0"),
        "half": meter(spent=b"\x95\0\0\xcb" + struct.pack(">d", 0.5) + b"\0\0"),
        "endless": meter(spent=b"\x95\0\0\xcb" + struct.pack(">d", float("-inf")) + b"\0\0"),
        "no limit where there was one": meter(limit=b"\x94\xc2\xc2"),
        "nan limit": meter(limit=b"\x94\xc2\xc2" + nan + b"\xc2"),
        "other terms": meter(),
    }


STEPS: dict[str, Callable[[Budget, Any], Any]] = {
    "reserve": lambda budget, hold: budget.reserve(ONE),
    "settle": lambda budget, hold: hold.settle(ONE),
    "release": lambda budget, hold: hold.release(),
    "read": lambda budget, hold: budget.state(),
    "extend": lambda budget, hold: budget.extend(escalations=1, once="x"),
    "open": lambda budget, hold: budget.child("agent", escalations=LIMIT),
}


@pytest.mark.parametrize("step", ["reserve", "read", "extend", "open"])
@pytest.mark.parametrize("what", bad_meters())
def test_what_is_no_meter_is_a_bad_store_and_nothing_is_given(tree: Tree, what: str, step: str) -> None:
    parent = tree.open().parent
    assert parent is not None
    budget = parent.child("agent", escalations=LIMIT)
    hold = budget.reserve(ONE)
    tree.console.hset(tree.key("meters"), "P/agent", bad_meters()[what])
    before = tree.console.hgetall(tree.key("meters"))
    if what == "other terms" and step != "open":
        return
    with pytest.raises(BadStore, match="something else than the budget 'P'") as caught:
        STEPS[step](parent if step == "open" else budget, hold)
    assert not caught.value.retryable
    assert tree.console.hgetall(tree.key("meters")) == before


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", ["string", "list", "set", "hash", "sorted set", "stream"])
def test_keys_of_another_type_are_a_bad_store_or_no_matter(tree: Tree, key: str, kind: str, step: str) -> None:
    budget = tree.open()
    hold = budget.reserve(ONE)
    console, name = tree.console, tree.key(key)
    console.delete(name)
    make: dict[str, Callable[[], Any]] = {
        "string": lambda: console.set(name, "x"),
        "list": lambda: console.rpush(name, "x"),
        "set": lambda: console.sadd(name, "x"),
        "hash": lambda: console.hset(name, "x", "y"),
        "sorted set": lambda: console.zadd(name, {"x": 1, "\0y": 2}),
        "stream": lambda: console.xadd(name, {"x": "y"}),
    }
    make[kind]()
    before = console.hgetall(tree.key("meters")) if key != "meters" else None
    try:
        STEPS[step](budget.parent if step == "open" else budget, hold)
    except (StoreUnavailable, HoldClosed):
        assert before is None or console.hgetall(tree.key("meters")) == before
    if key != "meters":
        sound_or_refused(budget)


def sound_or_refused(budget: Budget) -> None:
    with contextlib.suppress(StoreUnavailable):
        sound(budget)


@pytest.mark.parametrize(
    "packed", [b"", b"x", b"\x90", b"\x93\0\0\0", b"\x94\x00\x95\0\0\xff\0\0\x91\xa1P\x01", b"\x94\x05\x90\x90\x01"]
)
@pytest.mark.parametrize("step", ["settle", "release", "lapse"])
def test_what_is_no_hold_is_a_bad_store_and_takes_nothing_back(tree: Tree, packed: bytes, step: str) -> None:
    budget = tree.open()
    hold = budget.reserve(ONE, ttl_s=1)
    tree.console.hset(tree.key("holds"), hold.id, packed)
    before = tree.console.hgetall(tree.key("meters"))
    if step == "lapse":
        tree.wait(2)
    with pytest.raises(BadStore):
        budget.state() if step == "lapse" else STEPS[step](budget, hold)
    assert tree.console.hgetall(tree.key("meters")) == before


def test_damage_in_the_middle_of_an_answer_costs_the_llm_not_the_answer(tree: Tree) -> None:
    def answers(ids: Sequence[int], candidates: Sequence[int]) -> list[float]:
        if len(llm.asked) == 2:
            tree.console.hset(tree.key("meters"), mapping={"P": "x", "P/agent": "y"})
        return last_candidate(ids, candidates)

    llm = ScriptedLLM(answers)
    chat = ChatS2T(model=tiny_model(), escalation=Escalation(llm, margin=1.0), trigger=always(), max_tokens=6)
    told = chat.invoke("hi", s2t_budget=tree.open()).response_metadata["s2t"]
    assert (told["tokens"], told["degraded"], told["budget"], told["escalations"]) == (6, True, None, 2)


def test_budgets_of_the_release_before_go_on(tree: Tree) -> None:
    """A meter without a birth and a hold without its meters' births, as they were written then."""
    import struct

    budget = tree.open()
    for path in ("P", "P/agent"):
        packed = tree.console.hget(tree.key("meters"), path)
        assert packed[0] == 0x9C  # an array of 12: the last is the birth, a double or 64-bit number
        tree.console.hset(tree.key("meters"), path, b"\x9b" + packed[1:-9])
    assert budget.state().limit == {"escalations": LIMIT}
    old = budget.reserve(ONE, ttl_s=1)
    held = tree.console.hget(tree.key("holds"), old.id)
    assert held[0] == 0x95
    tree.console.hset(tree.key("holds"), old.id, b"\x94" + held[1:-3])  # without [0, 0]
    tree.wait(2)
    assert budget.state().held == {"escalations": 0}
    assert fill(budget) == LIMIT
    assert struct


# ---------------------------------------------------------------------- URLs and passwords


@pytest.mark.parametrize(
    "url",
    [
        *(
            "redis://:SeKr3t/word@127.0.0.1:6379/0",
            "redis://:SeKr3t#word@127.0.0.1/0",
            "redis://:SeKr3t?word@127.0.0.1/0",
        ),
        *(
            "redis://:12/SeKr3t@127.0.0.1:6379/0",
            "redis://:12#SeKr3t@127.0.0.1:6379/0",
            "redis://:12?SeKr3t@127.0.0.1/0",
        ),
        *("redis://user:SeKr3t@[::1/0", "redis://user:SeKr3t@127.0.0.1:port/0", "redis://u:SeKr3t@127.0.0.1:99999/0"),
        *("redis://u:SeKr3t@127.0.0.1:1/db", "redis://u:SeKr3t@127.0.0.1:1/0/SeKr3t", "redis://u:SeKr3t@:1/0"),
        *("http://u:SeKr3t@127.0.0.1", "SeKr3t", "redis:SeKr3t@127.0.0.1", "redis://SeKr3t\n@127.0.0.1", ""),
        *("redis://u:SeKr3t@127.0.0.1:1/0?nonsense=SeKr3t", "redis://127.0.0.1:1/0?SeKr3t=1", "redis://h/0?db=SeKr3t"),
        *("redis://u:SeKr3t@h/0?socket_timeout=1", "redis://u:SeKr3t@h/0?decode_responses=0", "redis://h/0?db=1&db=2"),
        *("redis://u:SeKr3t@h/0?protocol=SeKr3t", "redis://u:Se Kr3t@h/0", None, 7, b"redis://SeKr3t@h"),
    ],
)
def test_a_url_that_cannot_be_read_is_refused_at_once_and_not_repeated(url: Any) -> None:
    with pytest.raises(ConfigError, match="Redis URL") as caught:
        RedisStore(url)
    told = "".join(map(repr, (caught.value, caught.value.args, caught.value.__cause__, caught.value.__context__)))
    for part in ("SeKr3t", "word", "nonsense"):
        assert part not in told


@pytest.mark.parametrize(
    "option",
    [
        *("socket_type=9", "socket_keepalive_options=5", "redis_connect_func=x", "credential_provider=x"),
        *("event_dispatcher=1", "command_packer=1", "parser_class=x", "cache=1", "host=x", "retry=5", "driver_info=x"),
        *("ssl_password=SeKr3t", "ssl_keyfile=/x", "ssl_keyfile=/x&ssl_password=SeKr3t", "ssl_ocsp_context=x"),
        *("ssl_min_version=5", "maintenance_state=x", "legacy_responses=0", "protocol=9", "ssl_cert_reqs=zz"),
    ],
)
def test_an_option_that_no_text_can_give_is_refused_at_once(option: str) -> None:
    for scheme in ("redis", "rediss"):
        with pytest.raises(ConfigError, match="Redis URL") as caught:
            RedisStore(f"{scheme}://127.0.0.1:1/0?{option}")
        assert "SeKr3t" not in str(caught.value)


OPTIONS_TAKEN = ["", "ssl_certfile=/x", "ssl_certfile=/x&ssl_keyfile=/x", "ssl_ca_certs=/x", "ssl_ca_path=/x"]
OPTIONS_TAKEN += ["ssl_ca_data=x", "ssl_ciphers=x", "ssl_check_hostname=0", "ssl_cert_reqs=none", "protocol=3"]
OPTIONS_TAKEN += ["socket_keepalive=1", "socket_read_size=0", "health_check_interval=5", "max_connections=2"]
OPTIONS_TAKEN += ["client_name=a%20b", "username=%20"]


@pytest.mark.parametrize("option", OPTIONS_TAKEN)
def test_an_option_that_is_taken_is_at_worst_a_store_that_cannot_be_used(
    option: str, redis_server: RedisServer
) -> None:
    """The server speaks no TLS: the errors of certificates come before that."""
    scheme = "rediss" if option.startswith("ssl") else "redis"
    store = RedisStore(f"{scheme}://127.0.0.1:{redis_server.port}/0?{option}", prefix=uuid.uuid4().hex, timeout_s=5)
    with contextlib.suppress(StoreUnavailable):
        Budget(escalations=1, store=store).state()
    store.close()


@pytest.mark.parametrize("byte", [0xC0, 0xC2, 0xFF, 0x00, 0xA0, 0xCB], ids=hex)
def test_a_meter_with_any_damaged_byte_is_read_or_is_a_bad_store(tree: Tree, byte: int) -> None:
    """MessagePack's nil, false, -1, 0, an empty text, a double."""
    store = RedisStore(tree.url, prefix=tree.prefix, timeout_s=5, clock=tree.clock)
    tree.stores.append(store)
    for limits in ({"usd": 1}, {"escalations": 3, "answers": 2, "seconds": 60.0}):
        name = f"meter-{len(limits)}"
        budget = Budget(name=name, store=store, **limits)  # type: ignore[arg-type]
        budget.reserve(ONE)
        key = f"{tree.prefix}:{{{name}}}:meters"
        whole = tree.console.hget(key, name)
        assert isinstance(whole, bytes)
        for at in range(len(whole)):
            tree.console.hset(key, name, whole[:at] + bytes([byte]) + whole[at + 1 :])
            with contextlib.suppress(S2TError):
                budget.state()
            with contextlib.suppress(S2TError):
                budget.reserve(ONE).release()


def test_urls_that_can_be_read_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (
        *("redis://localhost", "redis://localhost:6379/0", "rediss://u:p%2Fw@h.example:6380/3", "redis://[::1]:6379/0"),
        *(
            "redis://:p%23w@127.0.0.1/0?client_name=x",
            "unix:///tmp/redis.sock?db=2",
            "redis://h/0?health_check_interval=3",
        ),
    ):
        RedisStore(url).close()


@pytest.fixture
def locked(redis_server: RedisServer) -> Iterator[tuple[RedisServer, str]]:
    """The server, behind a user's password."""
    console = redis.Redis.from_url(redis_server.url)
    password = "SeKr3t/wo#rd"
    console.acl_setuser("agent", enabled=True, passwords=[f"+{password}"], keys=["*"], commands=["+@all"])
    yield redis_server, password
    console.acl_deluser("agent")
    console.close()


def test_a_pickle_holds_no_password_and_finds_it_in_the_environment(
    locked: tuple[RedisServer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, password = locked
    quoted = "SeKr3t%2Fwo%23rd"
    url = f"redis://agent:{quoted}@127.0.0.1:{server.port}/0"
    budget = Budget(escalations=3, name=uuid.uuid4().hex, store=RedisStore(url))
    budget.reserve(ONE).settle(ONE)
    packed = pickle.dumps(budget)
    assert b"SeKr3t" not in packed
    monkeypatch.delenv("S2T_REDIS_PASSWORD", raising=False)
    with pytest.raises(ConfigError, match="S2T_REDIS_PASSWORD"):
        pickle.loads(packed)
    monkeypatch.setenv("S2T_REDIS_PASSWORD", password)
    again = pickle.loads(packed)
    assert again.state().spent["escalations"] == 1
    assert b"SeKr3t" not in pickle.dumps(again)


def test_a_password_from_the_environment_travels_as_its_variables_name(
    locked: tuple[RedisServer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, password = locked
    monkeypatch.setenv("MY_REDIS", password)
    store = RedisStore(f"redis://agent@127.0.0.1:{server.port}/0", password_env="MY_REDIS")
    budget = Budget(escalations=3, name=uuid.uuid4().hex, store=store)
    assert pickle.loads(pickle.dumps(budget)).state().limit == {"escalations": 3}
    with pytest.raises(ConfigError, match="Drop one"):
        RedisStore("redis://agent:x@127.0.0.1/0", password_env="MY_REDIS")
    with pytest.raises(ConfigError, match="NOT_THERE"):
        RedisStore("redis://agent@127.0.0.1/0", password_env="NOT_THERE")


def test_a_wrong_password_is_not_repeated(locked: tuple[RedisServer, str]) -> None:
    server, _ = locked
    for store in (
        RedisStore(f"redis://agent:wr0ng@127.0.0.1:{server.port}/0"),
        RedisStore(f"redis://127.0.0.1:{server.port}/0?username=agent&password=wr0ng"),
    ):
        with pytest.raises(StoreUnavailable) as caught:
            Budget(escalations=1, store=store)
        error: BaseException = caught.value
        assert "wr0ng" not in f"{error!r}{error}{vars(error)}{store!r}"
        assert error.__cause__ is None
        assert error.__context__ is None
        assert b"wr0ng" not in pickle.dumps(store)
    assert isinstance(caught.value, S2TError)
