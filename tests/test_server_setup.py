"""The options of ``s2t serve`` together, before anything is loaded."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `server`")

from s2t_agents.budget import TokenPrice
from s2t_agents.errors import S2TError
from s2t_agents.server.setup import Setup
from s2t_agents.server.tenants import new_key

KEY, LINE = new_key()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"budgets": Path("spent.db")},
            r"--budgets .* nothing limits .* Give --usd, --escalations or --keys",
        ),
        ({"budgets": Path("spent.db"), "llm": "s2t-demo-llm"}, "--budgets was given"),
        ({"trace": True}, r"--trace need a ledger\. Give --ledger"),
        ({"record_text": True}, "--record-text and"),
        ({"record_steps": True}, "--record-steps"),
        ({"llm_price": "1/2"}, r"--llm-price was given, and no LLM is asked\. Give --llm"),
        ({"llm": "s2t-demo-llm", "llm_price": "1"}, "--llm-price is '1'"),
        ({"llm": "s2t-demo-llm", "llm_price": "a/b"}, "--llm-price"),
        ({"llm": "s2t-demo-llm", "usd": "1"}, "'s2t-demo-llm' has no known price"),
        ({"usd": "moon"}, "--usd"),
        ({"device_price": "moon"}, "--device-price"),
        ({"running": 0}, "running is 0"),
        ({"escalations": 5, "keys": Path("none.toml")}, "the key file none.toml"),
        ({"selector": "server", "shadow": True}, "shadow=True"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_and_leave_nothing(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(S2TError, match=message):
        Setup(**options).build()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [{"usd": "5"}, {"escalations": 5}, {"keys": True}], ids=str)
def test_what_was_spent_is_kept_wherever_something_is_limited(limit: dict[str, Any], tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[agents.ann]\nkeys = ["{LINE}"]\nbudget = {{ escalations = 3 }}\n')
    options: dict[str, Any] = {**limit, **({"keys": keys} if "keys" in limit else {})}
    chat_model, tenants = Setup(budgets=tmp_path / "spent.db", **options).build()
    assert (tmp_path / "spent.db").exists()
    assert (chat_model.budget is None) == ("keys" in limit)
    assert tenants.with_keys == ("keys" in limit)
    assert [budget.state().limit for budget in tenants.budgets] == [{"escalations": 3}] * len(tenants.budgets)


def test_every_option_arrives(tmp_path: Path) -> None:
    chat_model, tenants = Setup(
        selector="s2t-demo",
        llm="s2t-demo-llm",
        llm_price="0.50/1.50",
        usd="5",
        escalations=7,
        device_price="1.20",
        ledger=tmp_path / "costs.jsonl",
        shadow=True,
        record_text=True,
        max_tokens=9,
        running=2,
        waiting=3,
    ).build()
    assert (chat_model.model, chat_model.selector, chat_model.shadow, chat_model.max_tokens) == (
        "s2t-demo",
        "s2t-demo",
        True,
        9,
    )
    assert chat_model.escalation.price == TokenPrice("0.50", "1.50")
    assert chat_model.budget is not None
    assert chat_model.budget.state().limit == {"usd": Decimal(5), "escalations": 7}
    assert chat_model.ledger is not None
    assert (chat_model.ledger.recording.steps, chat_model.ledger.recording.text) == (True, True)
    assert chat_model.concurrency is not None
    assert (chat_model.concurrency.running, chat_model.concurrency.waiting) == (2, 3)
    assert not tenants.with_keys
