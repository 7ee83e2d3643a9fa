"""The page of ``s2t trace`` in a real headless Chromium: opened, clicked, filtered, by keyboard; nothing executes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browsing

from s2t_agents.ledger import GenerationRecord, Ledger, Receipt, ReceiptCandidate, StepRecord, StepTimes
from s2t_agents.ledger.record import Cost, Latency
from s2t_agents.trace import write_trace
from s2t_agents.types import Charge

ENTER, ESCAPE, RIGHT = "\ue007", "\ue00c", "\ue014"
HOSTILE = (
    "</script><script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "<svg onload=window.hit=1>",
    "{{constructor.constructor('window.hit=1')()}}",
)


def candidates() -> tuple[ReceiptCandidate, ...]:
    return (
        ReceiptCandidate(token_id=1, text=" a", slm=-0.5, selector=-1.0, llm=-2.0),
        ReceiptCandidate(token_id=2, text=HOSTILE[1], slm=-1.5, selector=-0.25, llm=float("-inf")),
    )


def record(at: int, **fields: Any) -> GenerationRecord:
    steps = (
        StepRecord(token=7, by="slm", text=f"word{at} ", entropy=0.1, ms=StepTimes(propose=3.0)),
        StepRecord(token=1, by="llm", text=" a", wanted=2, triggered=True, entropy=1.25, candidates=candidates()),
        StepRecord(token=9, by="grammar", text="}"),
    )
    receipt = Receipt(
        step=1,
        prefix_tokens=9,
        candidates=candidates(),
        pick=1,
        outcome="picked",
        actual=Charge(None, 11),
        wait_ms=42.0,
        reason=HOSTILE[2],
    )
    known: dict[str, Any] = {
        "agent": "ann" if at % 2 else "bob",
        "completion_tokens": 3,
        "flips": 1,
        "escalations": 1,
        "finish_reason": "stop",
        "receipts": (receipt,),
        "steps": steps,
        "cost_usd": Cost(local=None, llm="0.25"),
        "latency_ms": Latency(propose=3.0, escalate=42.0, total=50.0),
        "budget": {"limit": {"escalations": 100}, "left": {"escalations": 100 - at}},
    }
    return GenerationRecord(**{**known, **fields})


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Browser:
    ledger = Ledger.open(tmp_path / "costs.jsonl")
    for at in range(60):
        ledger.record(record(at))
    plain = {"steps": None, "receipts": (), "flips": 0, "escalations": 0, "degraded": True}
    ledger.record(record(1, thread_id="plain", error=HOSTILE[0], **plain))
    ledger.record(record(1, agent=HOSTILE[0], thread_id=HOSTILE[1], run_id=HOSTILE[2], prompt=HOSTILE[3]))
    write_trace(tmp_path / "costs.jsonl", tmp_path / "page.html")
    browser.size(1180, 900)
    browser.open(tmp_path / "page.html")
    return browser


def nothing_ran(browser: Browser) -> None:
    assert browser.run("return window.hit") is None
    assert browser.run("return document.querySelectorAll('img, script[src], iframe, link').length") == 0
    assert [message for message in browser.log() if message["level"] == "SEVERE"] == []


def test_a_token_tells_its_candidates_scores_price_and_wait(page: Browser) -> None:
    page.type("#search", "word58")
    assert page.texts(".answer .name") == ["bob"]
    page.click(".answer > button")
    assert page.texts(".token") == ["word58 ", " a", "}"]
    page.click(".token.llm")
    detail = " ".join(page.texts(".detail"))
    for told in ("entropy 1.250", "picked by the LLM", "wait 42 ms", "11 tokens", "-1.000", "-0.250", "-∞", HOSTILE[2]):
        assert told in detail, told
    assert page.texts(".detail tr.llm td")[1] == "1"
    page.click(".token.grammar")
    assert "Nothing else was legal" in " ".join(page.texts(".detail"))
    nothing_ran(page)


def test_hostile_text_is_text_everywhere(page: Browser) -> None:
    page.click(".answer > button")
    page.click(".token.llm")
    shown = " ".join(page.texts("body *"))
    assert all(text in shown for text in HOSTILE)
    page.click(".answer > button", 1)
    assert HOSTILE[0] in " ".join(page.texts(".inside"))
    nothing_ran(page)


def test_filters_narrow_and_pages_turn(page: Browser) -> None:
    assert len(page.texts(".answer")) == 25
    assert page.texts("#page") == ["page 1 of 3"]
    page.click("#forth")
    page.click("#forth")
    assert len(page.texts(".answer")) == 12
    assert page.run("return document.getElementById('forth').disabled") is True
    page.click("#trouble")
    assert page.texts("#found") == ["1 of 62 answers"]
    page.click("#trouble")
    page.run("const s = document.getElementById('agent'); s.value = 'ann'; s.dispatchEvent(new Event('change'))")
    assert set(page.texts(".answer .name")) == {"ann"}
    page.type("#search", "no such words")
    assert page.texts("#found") == ["0 of 62 answers"]
    nothing_ran(page)


def test_everything_is_reached_by_keyboard(page: Browser) -> None:
    page.press("/")
    assert page.run("return document.activeElement.id") == "search"
    page.press(ESCAPE)
    for shown in (1, 0):  # the answer that is marked, before any other key
        page.press(ENTER)
        assert page.run("return document.querySelectorAll('.inside').length") == shown
    page.press("j")
    page.press("j")
    page.press(ENTER)
    assert page.run("return document.querySelectorAll('.inside').length") == 1
    page.press("n")
    assert page.run("return document.activeElement.className").startswith("token llm critical")
    page.press(RIGHT)
    assert page.run("return document.activeElement.textContent") == "}"
    page.press("]")
    assert page.texts("#page") == ["page 2 of 3"]
    nothing_ran(page)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1180])
def test_it_fits_in_light_and_dark_and_narrow_windows(page: Browser, theme: str, width: int) -> None:
    page.size(width, 844)
    page.theme(theme)
    page.click(".answer > button")
    page.click(".token.llm")
    assert page.run("return document.documentElement.scrollWidth") <= width
    script = "return getComputedStyle(document.body)[arguments[0]].match(/[\\d.]+/g).slice(0, 3).map(Number)"
    ground, ink = (sum(page.run(script, name)) for name in ("backgroundColor", "color"))
    assert (ground > ink) == (theme == "light")
    before = page.run(script, "backgroundColor")
    page.click("#theme")
    assert page.run(script, "backgroundColor") != before
    nothing_ran(page)


def test_budget_lines_are_drawn(page: Browser) -> None:
    assert page.run("return document.querySelectorAll('.chart polyline').length") >= 2
    assert any("left" in text for text in page.texts(".chart"))
    assert page.texts("#agents tbody td:first-child")[:2] == ["bob", "ann"]
