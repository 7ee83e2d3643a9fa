"""Keys of ``s2t serve``: whose request it is, what it may spend, and what never shows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_support import QUESTION, demo_model, serving_chat

from s2t_agents import Budget, ChatS2T, Escalation, Ledger
from s2t_agents.budget import SQLiteStore
from s2t_agents.errors import BadLimit, BadRequest, ConfigError, UnknownKey, UnpricedModel
from s2t_agents.server import Tenants, create_app
from s2t_agents.server.tenants import new_key
from s2t_agents.testing import ScriptedLLM
from s2t_agents.triggers import when

ASK: dict[str, Any] = {"model": "s2t-demo", "messages": [{"role": "user", "content": QUESTION}]}
ANN, ANN_LINE = new_key()
BOB, BOB_LINE = new_key()
BOB_TOO, BOB_TOO_LINE = new_key()
KEYS = f"""
[agents.ann]
keys = ["{ANN_LINE}"]
budget = {{ escalations = 2 }}

[agents.bob]
keys = ["{BOB_LINE}", "{BOB_TOO_LINE}"]
budget = {{ escalations = 3, window = "day" }}
"""


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture(scope="module")
def model(ledger: Ledger) -> ChatS2T:
    llm = ScriptedLLM(lambda ids, candidates: [-0.1 * at for at in range(len(candidates))])
    return demo_model(
        escalation=Escalation(llm, margin=1.0), trigger=when(lambda proposal: True), ledger=ledger, max_tokens=8
    )


@pytest.fixture(scope="module")
def client(model: ChatS2T, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(KEYS)
    with serving_chat(model, tenants=Tenants.from_file(file)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def asked(client: httpx.Client, key: str, **headers: str) -> dict[str, Any]:
    response = client.post("/chat/completions", json=ASK, headers={**bearer(key), **headers})
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_agents_share_neither_prefixes_nor_budgets(client: httpx.Client, ledger: Ledger) -> None:
    first = asked(client, ANN)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert first["s2t"]["budget"]["left"] == {"escalations": 0}
    again = asked(client, ANN)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert (again["s2t"]["escalations"], again["s2t"]["degraded"]) == (0, True)
    other = asked(client, BOB)
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert other["s2t"]["escalations"] == 3
    same = asked(client, BOB_TOO)
    assert same["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert same["s2t"]["budget"]["left"] == {"escalations": 0}
    assert [record.agent for record in ledger.records()] == ["ann", "ann", "bob", "bob"]


def test_a_header_names_a_part_of_the_keys_agent_and_no_other(client: httpx.Client, ledger: Ledger) -> None:
    found = asked(client, ANN, **{"X-S2T-Agent": "bob"})
    assert ledger.records()[-1].agent == "ann/bob"
    assert found["s2t"]["budget"]["limit"] == {"escalations": 2}


@pytest.mark.parametrize("path", ["/chat/completions", "/models", "/models/s2t-demo"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("s2t-wrong"),
        {"Authorization": "Bearer"},
        bearer(ANN[:-1]),
        bearer(f"{ANN}x"),
        bearer(ANN_LINE),
        {"Authorization": ANN},
        {"Authorization": f"Basic {ANN}"},
        bearer("x" * 10_000),
        {"X-Api-Key": ANN},
    ],
)
def test_no_other_key_is_one(client: httpx.Client, path: str, headers: dict[str, str]) -> None:
    send = client.get if path.startswith("/models") else client.post
    response = send(path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert client.get(str(client.base_url).replace("/v1/", "/health")).status_code == 200


def test_no_key_is_in_a_log_an_error_or_a_record(
    client: httpx.Client, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "s2t-this-one-is-mistyped"
    answers = [
        client.post("/chat/completions", json=ASK, headers=bearer(ANN)),
        client.post("/chat/completions", json=ASK, headers=bearer(wrong)),
        client.post("/chat/completions", json={"model": 1}, headers=bearer(ANN)),
        client.post("/chat/completions", content=b"x", headers=bearer(ANN)),
        client.post("/chat/completions", json=ASK, headers={**bearer(ANN), "X-S2T-Agent": "/"}),
        client.get("/nothing", headers=bearer(ANN)),
    ]
    logs = "".join(
        record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))
    )
    told = "".join(f"{answer.headers}{answer.text}" for answer in answers)
    kept = "".join(record.model_dump_json() for record in ledger.records())
    for key in (ANN, wrong):
        assert key not in logs + told + kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "agents"),
        ("agents = 1", "agents"),
        ("[agents.ann]\n", "agents.ann.keys"),
        ("[agents.ann]\nkeys = []\n", "agents.ann.keys"),
        (f'[agents.ann]\nkeys = ["{ANN}"]\n', "agents.ann.keys.0"),
        (f'[agents.ann]\nkeys = ["{ANN_LINE}"]\nbudgets = 1\n', "agents.ann.budgets"),
        (f'[agents.ann]\nkeys = ["{ANN_LINE}"]\nbudget = {{ dollars = 1 }}\n', "budget.dollars"),
        (f'[agents.ann]\nkeys = ["{ANN_LINE}"]\nbudget = {{ usd = -1 }}\n', "usd"),
        (f'[agents.ann]\nkeys = ["{ANN_LINE}"]\nbudget = {{ usd = 1, on_exhausted = "ask" }}\n', "budget.on_exhausted"),
        (f'[agents."a b"]\nkeys = ["{ANN_LINE}"]\n', "a b"),
        ("[[[", "line 1"),
    ],
    ids=[f"file {number}" for number in range(11)],  # the texts hold new keys, and every test process must say the same
)
def test_a_key_file_that_is_none_is_refused_with_the_place_and_without_its_keys(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises((ConfigError, BadLimit), match=message) as caught:
        Tenants.from_file(file)
    assert ANN not in str(caught.value)
    assert ANN not in repr(caught.value.__context__)


def test_a_key_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="s2t key"):
        Tenants.from_file(tmp_path / "none.toml")


def test_what_was_spent_outlives_the_server(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(KEYS)
    for left in (3, 2):
        tenants = Tenants.from_file(file, store=SQLiteStore(tmp_path / "budgets.db"))
        budget = tenants.tenant_of({"authorization": f"Bearer {BOB}"}).budget
        assert budget is not None
        assert budget.state().left == {"escalations": left}
        with budget.reserve(_one()) as hold:
            hold.settle(_one())


def _one() -> Any:
    from s2t_agents.budget import Charge

    return Charge(escalations=1)


def test_agents_are_below_the_servers_own_budget(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(KEYS)
    whole = Budget(escalations=4, name="server")
    tenants = Tenants.from_file(file, parent=whole)
    for key in (ANN, BOB):
        budget = tenants.tenant_of({"authorization": f"Bearer {key}"}).budget
        assert budget is not None
        assert budget.parent is whole


def test_a_dollar_limit_over_an_llm_without_a_price_is_refused_before_anybody_asks(
    model: ChatS2T, tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[agents.ann]\nkeys = ["{ANN_LINE}"]\nbudget = {{ usd = "1.00" }}\n')
    with pytest.raises(UnpricedModel):
        create_app(model, tenants=Tenants.from_file(file))


def test_without_keys_a_header_alone_separates_caches() -> None:
    tenants = Tenants()
    assert tenants.tenant_of({}).cache_scope is None
    scopes = {tenants.tenant_of({"x-s2t-agent": name}).cache_scope for name in ("a", "b")}
    assert len(scopes) == 2
    with pytest.raises(BadRequest):
        tenants.tenant_of({"x-s2t-agent": "a/b"})
    with pytest.raises(UnknownKey):
        Tenants({}).tenant_of({})


def test_local_work_is_limited_for_both_kinds_of_completion(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[agents.ann]\nkeys = ["{ANN_LINE}"]\nbudget = {{ answer_tokens = 20, window = "day" }}\n')
    plain = {"model": "s2t-demo", "prompt": "Ann has", "max_tokens": 8}
    with (
        serving_chat(demo_model(escalation=None, max_tokens=8), tenants=Tenants.from_file(file)) as url,
        httpx.Client(base_url=url, timeout=60, headers=bearer(ANN)) as client,
    ):
        got = [client.post("/completions", json=plain).json(), client.post("/chat/completions", json=ASK).json()]
        assert [each["usage"]["completion_tokens"] for each in got] == [8, 8]
        last = client.post("/completions", json=plain).json()
        assert (last["usage"]["completion_tokens"], last["choices"][0]["finish_reason"]) == (4, "length")
        assert last["s2t"]["stopped_by"]["unit"] == "answer_tokens"
        for path, body in (("/completions", plain), ("/chat/completions", ASK)):
            refused = client.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
