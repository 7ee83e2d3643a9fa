"""``/trace`` of ``s2t serve``: who sees what, and the page in a real headless Chromium while answers come."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Browser, browsing
from server_support import QUESTION, demo_model, serving_chat, until

from s2t_agents import Ledger
from s2t_agents.errors import ConfigError
from s2t_agents.ledger import Recording
from s2t_agents.server import Tenants, create_app, live_trace
from s2t_agents.server.tenants import AgentEntry, new_key

TEXT = Recording(steps=True, text=True)
EVE, EVE_LINE = new_key()
EVELYN, EVELYN_LINE = new_key()
HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=1>"


@pytest.fixture(scope="module", autouse=True)
def _soon() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_trace, "RELOAD_S", 0.3)
        yield


def ask(url: str, question: str = QUESTION, *, key: str | None = None, agent: str | None = None) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    headers |= {"X-S2T-Agent": agent} if agent else {}
    body = {"model": "s2t-demo", "messages": [{"role": "user", "content": question}]}
    httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=60).raise_for_status()


def shown(response: httpx.Response) -> dict[str, Any]:
    """The data in a page."""
    assert response.status_code == 200, response.text
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', response.text, re.DOTALL)
    return dict(json.loads(found))


@pytest.mark.parametrize("ending", ["jsonl", "db"])
def test_it_shows_the_ledger_as_it_is_now_and_text_where_that_was_recorded(tmp_path: Path, ending: str) -> None:
    for recording in (None, TEXT):
        ledger = Ledger.open(tmp_path / f"{recording is None}.{ending}", recording=recording)
        with serving_chat(demo_model(ledger=ledger), trace=True) as url:
            page = url.replace("/v1", "/trace")
            assert shown(httpx.get(page))["records"] == []
            ask(url)
            ask(url, "Good morning", agent="max")
            told = shown(httpx.get(page))
            assert [each["agent"] for each in told["records"]] == ["default", "max"]
            assert [each["name"] for each in told["agents"]] == ["default", "max"]
            assert ("37 shells" in httpx.get(page).text) == (recording is TEXT)
            assert len(shown(httpx.get(page, params={"last": 1}))["records"]) == 1
            for wrong in ("0", "-1", "x", "1" * 30, "100001"):
                assert httpx.get(page, params={"last": wrong}).status_code == 400
            assert httpx.post(page).status_code == 405


def test_it_is_there_only_where_it_is_wanted() -> None:
    with serving_chat(demo_model(ledger=Ledger())) as url:
        assert httpx.get(url.replace("/v1", "/trace")).status_code == 404
    with pytest.raises(ConfigError, match="--ledger"):
        create_app(demo_model(), trace=True)


def test_no_page_from_elsewhere_reads_or_frames_it() -> None:
    with serving_chat(demo_model(ledger=Ledger()), trace=True) as url:
        page = url.replace("/v1", "/trace")
        assert httpx.get(page, headers={"Host": "evil.example.com"}).status_code == 421
        headers = httpx.get(page).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"


def test_a_key_shows_its_own_agent_and_nothing_of_others() -> None:
    tenants = Tenants({"eve": AgentEntry(keys=[EVE_LINE]), "evelyn": AgentEntry(keys=[EVELYN_LINE])})
    ledger = Ledger(recording=TEXT)
    with serving_chat(demo_model(ledger=ledger, max_tokens=8), tenants=tenants, trace=True) as url:
        page = url.replace("/v1", "/trace")
        ask(url, "EVE'S SECRET", key=EVE)
        ask(url, "EVE'S WRITER", key=EVE, agent="writer")
        ask(url, "EVELYN'S SECRET", key=EVELYN)
        for refused in (None, ("eve", "wrong"), ("eve", ""), (EVE, "eve")):
            response = httpx.get(page, auth=refused)
            assert response.status_code == 401
            assert response.headers["www-authenticate"].startswith("Basic ")
            assert "SECRET" not in response.text
        assert httpx.get(page, headers={"Authorization": "Basic %%%"}).status_code == 401
        for response in (
            httpx.get(page, headers={"Authorization": f"Bearer {EVE}"}),
            httpx.get(page, auth=("anything", EVE)),  # as a browser sends a password
        ):
            told = shown(response)
            assert [each["agent"] for each in told["records"]] == ["eve", "eve/writer"]
            assert {each["name"] for each in told["agents"]} == {"eve", "eve/writer"}
            assert told["total"] == 2
            assert "EVELYN" not in response.text.upper()
        assert [each["agent"] for each in shown(httpx.get(page, auth=("", EVELYN)))["records"]] == ["evelyn"]
        assert httpx.get(f"{url}/models", auth=("", EVE)).status_code == 401  # a password is a key here alone


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


def test_answers_appear_in_an_open_page_which_keeps_its_filters_and_what_is_read(browser: Browser) -> None:
    with serving_chat(demo_model(ledger=Ledger(recording=TEXT)), trace=True) as url:
        ask(url, agent="eve")
        ask(url, HOSTILE, agent="max")
        browser.open(url.replace("/v1", "/trace"))
        assert browser.texts("#found") == ["2 of 2 answers"]
        assert "live" in " ".join(browser.texts("#live"))
        browser.run("const s = document.getElementById('agent'); s.value = 'eve'; s.dispatchEvent(new Event('change'))")
        browser.click("#theme")
        theme = browser.run("return document.documentElement.dataset.theme")
        ask(url, agent="eve")
        until(lambda: browser.texts("#found") == ["2 of 3 answers"])
        assert set(browser.texts(".answer .name")) == {"eve"}
        assert browser.run("return document.documentElement.dataset.theme") == theme
        browser.click(".answer > button")
        browser.click(".token")
        ask(url, agent="eve")
        time.sleep(1.0)  # three reloads would have come
        assert browser.texts("#found") == ["2 of 3 answers"]
        assert browser.texts(".detail")
        browser.click(".answer > button")
        until(lambda: browser.texts("#found") == ["3 of 4 answers"])
        browser.click("#follow")
        ask(url, agent="eve")
        time.sleep(1.0)
        assert browser.texts("#found") == ["3 of 4 answers"]
        assert browser.run("return window.hit") is None
        assert [message for message in browser.log() if message["level"] == "SEVERE"] == []


def test_a_file_does_not_load_itself_again(browser: Browser, tmp_path: Path) -> None:
    from s2t_agents.trace import write_trace

    path = tmp_path / "costs.jsonl"
    demo_model(ledger=Ledger.open(path), max_tokens=4).invoke("Good morning")
    write_trace(path, tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    assert browser.texts("#live") == []
    browser.run("window.here = 1")
    time.sleep(0.8)
    assert browser.run("return window.here") == 1
