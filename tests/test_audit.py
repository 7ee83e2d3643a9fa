"""``s2t audit``: logs of both forms, broken, hostile and huge ones; figures that can be checked by hand."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from s2t_agents import ChatS2T
from s2t_agents.audit import audit, logs
from s2t_agents.audit.logs import MAX_LINE, read_answer
from s2t_agents.budget import TokenPrice
from s2t_agents.cli import app
from s2t_agents.errors import ConfigError

QUESTION = "Ann has 37 shells and finds 48 more. How many are there now?"
USAGE = {"prompt_tokens": 40, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 0}}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def own() -> str:
    """What the bundled small model itself says."""
    return ChatS2T(max_tokens=100).invoke(QUESTION).text


def openai(answer: str, model: str = "gpt-4o-mini", **more: Any) -> dict[str, Any]:
    request = {"model": model, "messages": [{"role": "user", "content": QUESTION}], **more}
    message = {"role": "assistant", "content": answer}
    return {"request": request, "response": {"choices": [{"message": message}], "usage": USAGE, "model": model}}


def langsmith(answer: str, **more: Any) -> dict[str, Any]:
    human = {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", "HumanMessage"]}
    ai = {**human, "id": ["langchain", "schema", "messages", "AIMessage"]}
    usage = {"input_tokens": 40, "output_tokens": 10, "total_tokens": 50}
    said = {**ai, "kwargs": {"content": answer, "type": "ai", "usage_metadata": usage}}
    return {
        "run_type": "llm",
        "inputs": {"messages": [[{**human, "kwargs": {"content": QUESTION, "type": "human"}}]]},
        "outputs": {"generations": [[{"text": answer, "message": said}]]},
        "extra": {"metadata": {"ls_model_name": "gpt-4o-mini"}},
        **more,
    }


def written(path: Path, lines: Sequence[Any]) -> Path:
    path.write_bytes(
        b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)
    )
    return path


def value(found: Any, name: str) -> Any:
    return found.figures[name].value


@pytest.mark.parametrize("form", [openai, langsmith])
def test_what_the_small_model_would_have_said_itself_is_as_logged(tmp_path: Path, own: str, form: Any) -> None:
    found = audit(written(tmp_path / "log.jsonl", [form(own)] * 12))
    assert (found.lines, found.answers, found.replayed, found.left_out) == (12, 12, 12, {})
    assert found.models == {"gpt-4o-mini": 12}
    assert value(found, "as_logged_slm") == value(found, "same_answers_slm") == 1
    assert found.figures["same_answers_slm"].low < 1  # 12 of 12 is not always
    assert 0 < value(found, "triggered") < 1
    per_answer = Decimal(40) * Decimal("0.15") / 10**6 + Decimal(10) * Decimal("0.60") / 10**6
    assert found.logged_usd == 12 * per_answer
    assert value(found, "logged_usd") == pytest.approx(float(per_answer))
    for kind in ("cached", "uncached"):
        saved = value(found, "logged_usd") - value(found, f"asking_usd_{kind}")
        assert value(found, f"saved_usd_{kind}") == pytest.approx(saved)
    assert value(found, "asking_usd_cached") <= value(found, "asking_usd_uncached")


def test_another_answer_differs_and_the_selector_and_questions_count(tmp_path: Path) -> None:
    log = written(tmp_path / "log.jsonl", [openai("Perhaps ninety, perhaps not; who counts shells?")] * 10)
    found = audit(log, selector="s2t-demo")
    assert value(found, "same_answers_slm") == 0
    assert 0 < found.figures["same_answers_slm"].high < 0.5
    assert value(found, "as_logged_slm") < 1
    assert (
        value(found, "as_logged_asked") >= value(found, "as_logged_local") or value(found, "questions_an_answer") == 0
    )
    assert value(found, "asked") <= value(found, "triggered")
    few = audit(written(tmp_path / "few.jsonl", [openai("no")] * 3))
    assert few.figures["triggered"].low is None  # too few for an interval


def test_forms_that_are_read(tmp_path: Path, own: str) -> None:
    message = {"role": "assistant", "content": own}
    asked = {"role": "user", "content": QUESTION}
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    batch = {
        "body": {"messages": [asked]},
        "response": {"status_code": 200, "body": {"choices": [{"message": message}]}},
    }
    wrapped = {
        "run_type": "llm",
        "inputs": {"messages": [asked], "tools": [LOOK]},
        "outputs": {"choices": [{"message": calling}], "usage": USAGE},
    }
    found = audit(
        written(tmp_path / "log.jsonl", [{"messages": [asked, message]}, batch, wrapped, openai(own, tools=[LOOK])])
    )
    assert (found.answers, found.replayed) == (4, 4)
    assert found.logged_usd is None  # who answered, or how much, is not logged: unknown is not 0
    assert found.unpriced == 3
    assert value(found, "saved_usd_cached") is None


WRITTEN = TokenPrice(
    Decimal(3), Decimal(15), Decimal("0.3"), cache_write_usd_per_mtok=Decimal(4), cache_write_1h_usd_per_mtok=Decimal(6)
)


def logged_cost(line: dict[str, Any]) -> Decimal | None:
    return read_answer(json.dumps(line).encode()).cost(WRITTEN)


@pytest.mark.parametrize(
    ("details", "usd"),
    [
        ({}, "0.003"),
        ({"cached_tokens": None, "cache_write_tokens": None}, "0.003"),
        ({"cached_tokens": 200, "cache_write_tokens": 500}, "0.00296"),  # 300 * 3 + 200 * 0.3 + 500 * 4
        ({"cache_read": 200, "cache_creation": 500}, "0.00296"),
        ({"cache_creation": 0, "ephemeral_5m_input_tokens": 500}, "0.0035"),
        ({"cache_creation": 0, "ephemeral_1h_input_tokens": 500}, "0.0045"),
        ({"cache_creation": 500, "ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 400}, "0.0043"),
        ({"cache_read": 900, "cache_creation": 500}, "0.00215"),
        ({"cache_creation": "many"}, None),
        ({"cached_tokens": True}, None),
    ],
)
def test_a_prompt_costs_what_the_cache_had_and_was_written(details: dict[str, Any], usd: str | None) -> None:
    plain, run = openai("yes"), langsmith("yes")
    plain["response"]["usage"] = {"prompt_tokens": 1000, "completion_tokens": 0, "prompt_tokens_details": details}
    usage = {"input_tokens": 1000, "output_tokens": 0, "total_tokens": 1000, "input_token_details": details}
    run["outputs"]["generations"][0][0]["message"]["kwargs"]["usage_metadata"] = usage
    assert logged_cost(plain) == logged_cost(run) == (None if usd is None else Decimal(usd))


def test_a_provider_that_caches_questions_is_paid_for_what_it_writes(
    tmp_path: Path, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing_alone = TokenPrice(Decimal(0), Decimal(0), Decimal(0), cache_write_usd_per_mtok=Decimal(1))
    monkeypatch.setattr(logs, "known_price", lambda name: writing_alone)
    found = audit(written(tmp_path / "log.jsonl", [openai(own)]))
    assert value(found, "asking_usd_cached") > 0
    assert value(found, "asking_usd_uncached") == 0


def batch(form: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"body": form["request"], "response": {"status_code": 200, "body": form["response"]}, **more}


def tiered(asked: Any, told: Any, usage: dict[str, Any] | None = None) -> dict[str, Any]:
    """An answer that was requested in one service tier and given in another; "" is not stated."""
    line = openai("yes")
    line["request"] |= {"service_tier": asked} if asked != "" else {}
    line["response"] |= {"service_tier": told} if told != "" else {}
    line["response"]["usage"] = {**USAGE, **(usage or {})}
    return line


def ran(**parts: Any) -> dict[str, Any]:
    """A LangSmith run with parameters, metadata of the response or details of its usage."""
    line = langsmith("yes")
    line["extra"]["invocation_params"] = parts.get("parameters", {})
    said = line["outputs"]["generations"][0][0]["message"]["kwargs"]
    said["response_metadata"] = parts.get("response", {})
    said["usage_metadata"]["input_token_details"] = parts.get("details", {})
    return line


@pytest.mark.parametrize(
    ("line", "tier"),
    [
        (openai("yes"), None),
        (batch(openai("yes")), "batch"),
        (batch(openai("yes"), custom_id="1", method="POST", url="/v1/chat/completions"), "batch"),
        (batch(tiered("", "default")), "batch"),
        ({**openai("yes"), "custom_id": "1"}, "batch"),
        ({"request": {"body": openai("yes")["request"]}, "response": batch(openai("yes"))["response"]}, None),
        *((tiered("", told), None) for told in ("default", "auto", "standard", "on_demand", None, 7, {})),
        *((tiered(asked, ""), None) for asked in ("auto", "default", "standard_only", None)),
        (tiered("flex", "flex"), "flex"),
        (tiered("flex", ""), "flex"),
        (tiered("auto", "priority"), "priority"),
        (tiered("priority", "default"), None),  # what was given counts
        (tiered("", "scale"), "scale"),
        (tiered("", "", {"service_tier": "batch"}), "batch"),  # Anthropic's place for it
        (tiered("", "", {"service_tier": "standard"}), None),
        (ran(), None),
        (ran(parameters={"service_tier": "flex"}), "flex"),
        (ran(parameters={"service_tier": "flex"}, response={"service_tier": "default"}), None),
        (ran(response={"service_tier": "priority"}), "priority"),
        (ran(response={"usage": {"service_tier": "batch"}}), "batch"),
        (ran(response="standard"), None),
        (ran(details={"flex": 40, "flex_cache_read": 0}), "flex"),
        (ran(details={"priority": 40}), "priority"),
    ],
)
def test_what_no_list_prices_has_no_known_cost_unless_it_is_logged(line: dict[str, Any], tier: str | None) -> None:
    found = read_answer(json.dumps(line).encode())
    assert found.tier == tier
    assert (found.cost(WRITTEN) is None) == (tier is not None)
    if "run_type" in line:
        assert logged_cost({**line, "total_cost": "0.25"}) == Decimal("0.25")


def test_the_report_names_what_no_list_prices(tmp_path: Path, own: str) -> None:
    odd = tiered("", "\x1b[31mred\n" + "x" * 500)
    lines = [
        openai(own),
        batch(openai(own)),
        batch(openai(own)),
        tiered("", "flex"),
        odd,
        {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": own}]},
    ]
    log = written(tmp_path / "log.jsonl", lines)
    found = audit(log)
    assert (found.answers, found.unpriced, found.logged_usd) == (6, 5, None)
    assert list(found.off_list.items())[:2] == [("batch", 2), ("flex", 1)]
    assert all(name.isprintable() and len(name) <= 80 for name in found.off_list)
    assert value(found, "logged_usd") is value(found, "saved_usd_cached") is None
    told = " ".join(CliRunner().invoke(app, ["audit", str(log)], env={"COLUMNS": "200"}).output.split())
    assert "5 have no known price" in told
    assert "batch (2), flex (1)" in told
    assert json.loads(json.dumps(found.as_json()))["off_list"]["batch"] == 2


HOSTILE: dict[str, Any] = {
    "no JSON": b"{'single': 'quotes'}",
    "no JSON ": b"\xff\xfe\x00garbage",
    "no JSON  ": b"[" * 100_000,
    "no JSON object": b"[1, 2]",
    "no messages": {"request": {"messages": []}},
    "no answer": {"messages": [{"role": "user", "content": "hi"}]},
    "an empty answer": openai(""),
    "a failed request": {"body": {"messages": [{"role": "user", "content": "hi"}]}, "response": {"status_code": 429}},
    "a piece of a stream": {
        "request": {"messages": [{"role": "user", "content": "hi"}]},
        "response": {"object": "chat.completion.chunk", "choices": []},
    },
    "not a model's run": {"run_type": "chain", "inputs": {}, "outputs": {}},
    "messages that cannot be read": {
        "messages": [{"role": "no such role", "content": {"a": 1}}, {"role": "assistant"}]
    },
    "messages that cannot be read ": langsmith(
        "x", inputs={"messages": [[{"lc": 1, "id": ["os", "system"], "kwargs": {}}]]}
    ),
    "messages that cannot be read  ": {"request": {"messages": "text"}, "response": {"choices": 7}},
    f"longer than {MAX_LINE >> 20} MB": b'{"messages": "' + b"x" * (MAX_LINE + 10) + b'"}',
}


def test_what_cannot_be_read_is_counted_with_its_place_and_the_rest_is_read(tmp_path: Path, own: str) -> None:
    lines = [openai(own), *HOSTILE.values(), b"", langsmith(own)]
    found = audit(written(tmp_path / "log.jsonl", lines))
    assert (found.answers, found.replayed) == (2, 2)
    assert sum(n for n, _ in found.left_out.values()) == len(HOSTILE)
    for why in HOSTILE:
        assert why.strip() in found.left_out or why.startswith("messages"), why
    assert found.left_out["no JSON"] == (3, 2)  # three lines, the first is line 2


def test_names_and_figures_that_lie_are_not_believed(tmp_path: Path, own: str) -> None:
    odd = openai(own, model="\x1b[31mred\x1b[0m\n" + "x" * 500)
    odd["response"]["usage"] = {"prompt_tokens": -5, "completion_tokens": 10**30}
    lying = langsmith(own, total_cost="NaN")
    found = audit(written(tmp_path / "log.jsonl", [odd, lying, langsmith(own, total_cost="0.25")]))
    assert all(name.isprintable() and len(name) <= 80 for name in found.models)
    assert found.logged_usd is None
    assert found.unpriced == 1
    shown = CliRunner().invoke(app, ["audit", str(tmp_path / "log.jsonl")])
    assert shown.exit_code == 0, shown.output
    assert "\x1b[31m" not in shown.output


def test_a_huge_log_is_read_once_in_bounded_memory(tmp_path: Path, own: str) -> None:
    path = tmp_path / "log.jsonl"
    with path.open("wb") as file:
        line = json.dumps(openai(own, metadata="x" * 4000)).encode() + b"\n"
        for _ in range(6000):  # 27 MB
            file.write(line)
        file.write(b"y" * (3 * MAX_LINE) + b"\n")
    tracemalloc.start()
    found = audit(path, answers=4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found.answers, found.replayed) == (6000, 4)
    assert peak < 100 << 20


def test_a_file_without_answers_and_wrong_settings_are_one_clear_line(tmp_path: Path, own: str) -> None:
    log = written(tmp_path / "log.jsonl", [openai(own)])
    with pytest.raises(ConfigError, match="there is no such file"):
        audit(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"none of 2 lines holds an answer \(2 no JSON\)"):
        audit(written(tmp_path / "bad.jsonl", [b"a", b"b"]))
    with pytest.raises(ConfigError, match="one JSON array"):
        audit(written(tmp_path / "array.json", [[openai(own)]]))
    with pytest.raises(ConfigError, match="its price is not known"):
        audit(log, asked="no-such-model-at-all")
    with pytest.raises(ConfigError, match="answers is 0"):
        audit(log, answers=0)


def test_a_conversation_that_does_not_fit_is_said(tmp_path: Path, own: str) -> None:
    long = openai(own)
    long["request"]["messages"][0]["content"] = "shells " * 5000
    found = audit(written(tmp_path / "log.jsonl", [openai(own), long]))
    assert found.replayed == 1
    assert found.not_replayed == {"longer than the model's context of 1,024 tokens": 1}


def test_the_command_prints_tables_or_json_and_what_cannot_be_known(tmp_path: Path, own: str) -> None:
    log = written(tmp_path / "log.jsonl", [openai(own), langsmith(own), b"broken"])
    runner = CliRunner()
    table = runner.invoke(app, ["audit", str(log), "--selector", "s2t-demo"], env={"COLUMNS": "150"})
    assert table.exit_code == 0, table.output
    said = " ".join(table.output.split())
    assert "2 answers in 3 lines" in said
    assert "left out: 1 lines, no JSON (the first is line 3)" in said
    assert "What cannot be known from a log" in said
    assert "agreement with the log is not correctness" in said
    told = json.loads(runner.invoke(app, ["audit", str(log), "--json", "--asked", "gpt-4o"]).stdout)
    assert told["left_out"] == {"no JSON": {"lines": 1, "first": 3}}
    assert told["figures"]["as_logged_slm"]["value"] == 1
    assert len(told["unknown"]) >= 5
    helped = re.sub(r"\s+", " ", runner.invoke(app, ["audit", "--help"], env={"COLUMNS": "150"}).output)
    assert "What no log can say" in helped
