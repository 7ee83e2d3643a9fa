"""Shadow mode: the small model's own answer goes out, and what would have changed is recorded within the budget."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from s2t_agents import Budget, ChatS2T, Escalation, Ledger, LocalLLM, TokenPrice
from s2t_agents.errors import ConfigError
from s2t_agents.ledger import Recording
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.trace import write_trace
from s2t_agents.triggers import always

PAGE = (Path(__file__).parents[1] / "docs" / "shadow.md").read_text(encoding="utf-8")
TOKENS = 8
SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 3}, {"temperature": 0.7, "top_p": 0.8, "seed": 11}]
LOOK = {
    "name": "look",
    "description": "Look something up.",
    "parameters": {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"]},
}


def plain(**settings: Any) -> ChatS2T:
    return ChatS2T(model=tiny_model(), **{"max_tokens": TOKENS, **settings})


def asking(**settings: Any) -> ChatS2T:
    """Asks the LLM at every step, which picks the SLM's last candidate."""
    llm = ScriptedLLM(last_candidate, price=TokenPrice(Decimal(1), Decimal(5)))
    return plain(trigger=always(), escalation=Escalation(llm, margin=1.0), **settings)


def s2t(answer: Any) -> dict[str, Any]:
    return answer.response_metadata["s2t"]


@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_answer_is_the_small_models_own(sampling: dict[str, Any]) -> None:
    own, shadowed = plain(**sampling).invoke("hello"), asking(shadow=True, **sampling).invoke("hello")
    assert shadowed.content == own.content
    assert asking(**sampling).invoke("hello").content != own.content  # what is not in the shadow changes it
    told = s2t(shadowed)
    assert (told["flips"], told["selections"], told["degraded"]) == (0, 0, False)
    assert told["triggers"] == told["escalations"] == told["tokens"]
    assert told["shadow"] == {"selections": TOKENS, "flips": TOKENS, "llm_flips": TOKENS, "first_flip": 0}
    assert told["cost_usd"]["llm"] > 0
    assert "shadow" not in s2t(own)


def test_streams_calls_and_the_bundled_pair_alike() -> None:
    called = plain(max_tokens=60).bind_tools([LOOK], tool_choice="any").invoke("hello")
    shadowed = asking(max_tokens=60, shadow=True).bind_tools([LOOK], tool_choice="any").invoke("hello")
    assert [call["args"] for call in shadowed.tool_calls] == [call["args"] for call in called.tool_calls]
    streamed = list(asking(shadow=True).stream("hello"))
    assert sum(streamed[1:], streamed[0]).content == plain().invoke("hello").content

    question = "Ann has 37 shells and finds 48 more. How many are there now?"
    demo: dict[str, Any] = {"max_tokens": 48}
    pair = ChatS2T(selector="s2t-demo", escalation=LocalLLM("s2t-demo-llm"), shadow=True, **demo)
    said = pair.invoke(question)
    assert said.content == ChatS2T(**demo).invoke(question).content
    assert s2t(said)["shadow"]["selections"] > 0


def test_it_stays_within_the_budget_and_never_ends_an_answer() -> None:
    own = plain().invoke("hello")
    for mode in ("degrade", "raise", "ask"):
        budget = Budget(escalations=2, on_exhausted=mode)  # type: ignore[arg-type]
        answer = asking(shadow=True, budget=budget).invoke("hello")
        assert answer.content == own.content
        assert (s2t(answer)["escalations"], s2t(answer)["refused"], s2t(answer)["degraded"]) == (2, TOKENS - 2, True)
        assert s2t(answer)["shadow"]["llm_flips"] == 2
        assert budget.state().spent["escalations"] == 2


def test_an_llm_that_fails_changes_nothing() -> None:
    class Broken(ScriptedLLM):
        def ask(self, question: Any) -> Any:
            raise RuntimeError("down")

    model = plain(trigger=always(), escalation=Escalation(Broken(last_candidate), margin=1.0), shadow=True)
    answer = model.invoke("hello")
    assert answer.content == plain().invoke("hello").content
    assert s2t(answer)["shadow"] == {"selections": 0, "flips": 0, "llm_flips": 0, "first_flip": None}


@pytest.mark.parametrize("ending", ["jsonl", "db"])
def test_ledger_receipts_and_page_say_what_would_have_been_picked(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"costs.{ending}"
    ledger = Ledger.open(path, recording=Recording(steps=True, text=True))
    model = asking(shadow=True, ledger=ledger, budget=Budget(escalations=3))
    told = s2t(model.invoke("hello"))
    ledger.close()
    [record] = Ledger.reading(path)
    assert record.shadow is not None
    assert record.shadow.model_dump() == told["shadow"]
    assert record.steps is not None
    for receipt, step in zip(record.receipts, record.steps, strict=True):
        assert receipt.pick == receipt.wanted == step.token
        if receipt.outcome == "picked":
            assert receipt.would_pick == receipt.candidates[-1].token_id == step.shadow
            assert step.shadow_by == "llm"
        else:
            assert receipt.would_pick == receipt.wanted
            assert step.shadow is None
    assert write_trace(path, tmp_path / "page.html") == 1
    assert "would have taken" in (tmp_path / "page.html").read_text()


def test_the_cache_and_a_copy_keep_shadow_and_light_apart() -> None:
    from langchain_core.caches import InMemoryCache

    cache = InMemoryCache()
    light, shadowed = asking(cache=cache), asking(cache=cache, shadow=True)
    assert light.invoke("hello").content != shadowed.invoke("hello").content
    copied = shadowed.model_copy(update={"shadow": False, "cache": None})
    assert copied.invoke("hello").content == light.invoke("hello").content


def test_a_selector_inside_the_models_server_cannot_be_shadowed() -> None:
    with pytest.raises(ConfigError, match="picks the tokens itself"):
        plain(selector="server", shadow=True)


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_the_pages_examples_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "docs/shadow.md", "exec"), {})
    assert "first_flip" in capsys.readouterr().out
