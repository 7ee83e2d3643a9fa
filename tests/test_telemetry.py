"""Spans and metrics of answers, as a real OTLP exporter sends them to a receiver on loopback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest
from otlp import Receiver, attributes, receiving

pytest.importorskip("opentelemetry.sdk", reason="needs the extra `otel`")
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from s2t_agents import Budget, ChatS2T, Escalation, TokenPrice
from s2t_agents.budget import DevicePrice
from s2t_agents.errors import BudgetExceeded
from s2t_agents.telemetry import names
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always

SECRET = "the lighthouse keeper's password"
CLIENT, INTERNAL, ERROR = 3, 1, 2
"""OTLP's numbers of span kinds and of the status."""


class Breaking(SpanProcessor):
    """Raises while ``on``."""

    on = False

    def on_end(self, span: Any) -> None:
        if self.on:
            raise RuntimeError("a processor that is broken")


@pytest.fixture(scope="module")
def providers() -> Iterator[tuple[Receiver, TracerProvider, MeterProvider]]:
    with receiving() as receiver:
        traces, breaking = TracerProvider(), Breaking()
        traces.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{receiver.url}/v1/traces", timeout=5)))
        traces.add_span_processor(breaking)
        reader = PeriodicExportingMetricReader(
            OTLPMetricExporter(f"{receiver.url}/v1/metrics", timeout=5), export_interval_millis=3_600_000
        )
        meters = MeterProvider([reader])
        chat().invoke("before anybody listens")  # instruments that are older than the SDK
        trace.set_tracer_provider(traces)
        metrics.set_meter_provider(meters)
        yield receiver, traces, meters
        traces.shutdown()
        meters.shutdown()


@pytest.fixture
def receiver(providers: tuple[Receiver, TracerProvider, MeterProvider]) -> Receiver:
    providers[0].clear()
    return providers[0]


def chat(**settings: Any) -> ChatS2T:
    return ChatS2T(**{"model": tiny_model(), "max_tokens": 6, **settings})


def asking(budget: Budget | None = None, **settings: Any) -> ChatS2T:
    llm = ScriptedLLM(last_candidate, price=TokenPrice(Decimal(1), Decimal(5)))
    return chat(
        trigger=always(),
        escalation=Escalation(llm, margin=1.0),
        budget=budget,
        device_price=DevicePrice(Decimal("3.6")),
        **settings,
    )


def one(receiver: Receiver, name: str) -> Any:
    [span] = receiver.named(name)
    return span


def test_an_answer_is_a_span_below_the_callers_with_its_figures(receiver: Receiver) -> None:
    model = asking(Budget(escalations=2, name="run"))
    with trace.get_tracer("the application").start_as_current_span("the agent"):
        answer = model.invoke("hello", s2t_agent="clerk", stop=["zzz"], seed=7)
    s2t, usage = answer.response_metadata["s2t"], answer.usage_metadata
    span, parent = one(receiver, "chat tiny-qwen3-0"), one(receiver, "the agent")
    assert (span.parent_span_id, span.trace_id, span.kind) == (parent.span_id, parent.trace_id, INTERNAL)
    told = attributes(span)
    assert told[names.OPERATION] == "chat"
    assert told[names.PROVIDER] == "s2t"
    assert told[names.REQUEST_MODEL] == told[names.RESPONSE_MODEL] == "tiny-qwen3-0"
    assert (told[names.MAX_TOKENS], told[names.TEMPERATURE], told[names.SEED]) == (6, 0.0, 7)
    assert told[names.STOP_SEQUENCES] == ["zzz"]
    assert (told[names.AGENT], told[names.RESPONSE_ID]) == ("clerk", s2t["trace_id"])
    assert (told[names.INPUT_TOKENS], told[names.OUTPUT_TOKENS]) == (usage["input_tokens"], usage["output_tokens"])
    assert told[names.CACHED_TOKENS] == s2t["reused_tokens"]
    assert told[names.FINISH_REASONS] == [answer.response_metadata["finish_reason"]]
    counted = (names.TRIGGERS, names.SELECTIONS, names.FLIPS, names.ESCALATIONS, names.REFUSED, names.DEGRADED)
    assert [told[name] for name in counted] == [s2t[name.removeprefix("s2t.")] for name in counted]
    assert told[names.COST] == pytest.approx(s2t["cost_usd"]["total"])
    assert told[names.COST_LLM] == pytest.approx(s2t["cost_usd"]["llm"])
    assert (told[names.BUDGET], told[f"{names.BUDGET_LEFT}.escalations"]) == ("run", 0.0)
    assert span.end_time_unix_nano - span.start_time_unix_nano >= s2t["latency_ms"]["total"] * 0.9e6
    assert not {names.STREAM, names.INPUT_MESSAGES, names.OUTPUT_MESSAGES, names.STOPPED_BY_UNIT} & set(told)


def test_questions_to_the_llm_are_spans_below_and_refused_ones_events(receiver: Receiver) -> None:
    answer = asking(Budget(escalations=2, name="run")).invoke("hello")
    span = one(receiver, "chat tiny-qwen3-0")
    asked = receiver.named(f"chat {attributes(span)[names.LLM]}")
    assert len(asked) == 2
    for at, question in enumerate(asked):
        told = attributes(question)
        assert (question.parent_span_id, question.kind) == (span.span_id, CLIENT)
        assert span.start_time_unix_nano <= question.start_time_unix_nano <= question.end_time_unix_nano
        assert (told[names.ESCALATION_STEP], told[names.ESCALATION_OUTCOME]) == (at, "picked")
        assert told[names.ESCALATION_TOKENS] > 0
        assert told[names.ESCALATION_USD] > 0
        assert names.OUTPUT_TOKENS not in told  # an instrumented client counts them: here they would count twice
    refused = [event for event in span.events if event.name == names.REFUSED_EVENT]
    assert len(refused) == answer.response_metadata["s2t"]["refused"] == 4
    assert attributes(refused[0])[names.BUDGET_UNIT] == "escalations"


async def test_streams_say_so_and_when_their_first_chunk_came(receiver: Receiver) -> None:
    async for _ in chat().astream("hello"):
        pass
    told = attributes(one(receiver, "chat tiny-qwen3-0"))
    assert told[names.STREAM] is True
    assert 0 < told[names.TIME_TO_FIRST_CHUNK] < 60
    assert names.COST not in told  # unknown is not 0
    assert names.COST_LOCAL not in told


def test_what_ends_with_an_error_names_its_kind_alone(receiver: Receiver) -> None:
    with pytest.raises(BudgetExceeded):
        asking(Budget(escalations=1, on_exhausted="raise")).invoke("hello")
    span = one(receiver, "chat tiny-qwen3-0")
    assert attributes(span)[names.ERROR_TYPE] == span.status.message == "BudgetExceeded"
    assert span.status.code == ERROR
    assert attributes(span)[names.OUTPUT_TOKENS] == 1


def test_a_reader_who_leaves_ends_the_span(receiver: Receiver) -> None:
    stream = chat().stream("hello")
    next(stream)
    stream.close()
    told = attributes(one(receiver, "chat tiny-qwen3-0"))
    assert told[names.FINISH_REASONS] == ["aborted"]
    assert names.ERROR_TYPE not in told


def test_an_answer_that_the_budget_ends_says_which_limit(receiver: Receiver) -> None:
    chat(budget=Budget(answer_tokens=3, name="small")).invoke("hello")
    told = attributes(one(receiver, "chat tiny-qwen3-0"))
    assert (told[names.STOPPED_BY_BUDGET], told[names.STOPPED_BY_UNIT]) == ("small", "answer_tokens")


CONVERSATION = [
    SystemMessage("Be brief."),
    HumanMessage([{"type": "text", "text": SECRET}]),
    AIMessage("", tool_calls=[{"name": "look", "args": {"n": 1}, "id": "call_1"}]),
    ToolMessage("seven", tool_call_id="call_1"),
]


def test_no_text_leaves_unless_it_is_asked_for(receiver: Receiver, providers: Any) -> None:
    answer = chat().invoke(CONVERSATION)
    providers[2].force_flush()
    sent = b"".join(receiver.raw)
    assert answer.text
    assert SECRET.encode() not in sent
    assert answer.text.encode() not in sent
    assert b"seven" not in sent


def test_content_is_recorded_where_the_shared_variable_says_so(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(names.CAPTURE_CONTENT, "SPAN_ONLY")
    answer = chat().invoke(CONVERSATION)
    told = attributes(one(receiver, "chat tiny-qwen3-0"))
    system, user, assistant, tool = json.loads(told[names.INPUT_MESSAGES])
    assert system == {"role": "system", "parts": [{"type": "text", "content": "Be brief."}]}
    assert user["parts"] == [{"type": "text", "content": SECRET}]
    assert assistant["parts"] == [{"type": "tool_call", "id": "call_1", "name": "look", "arguments": {"n": 1}}]
    assert tool["parts"] == [{"type": "tool_call_response", "id": "call_1", "response": "seven"}]
    [said] = json.loads(told[names.OUTPUT_MESSAGES])
    assert said["role"] == "assistant"
    assert said["parts"] == [{"type": "text", "content": answer.text}]
    assert said["finish_reason"] == answer.response_metadata["finish_reason"]


def test_metrics_have_the_conventions_names_units_and_sums(receiver: Receiver, providers: Any) -> None:
    agent = "counted"
    model = asking(Budget(escalations=2, name="metered"))
    s2t = model.invoke("hello", s2t_agent=agent).response_metadata["s2t"]
    providers[2].force_flush()
    assert receiver.unit("gen_ai.client.token.usage") == "{token}"
    assert receiver.unit("gen_ai.client.operation.duration") == "s"
    kinds = {told[names.TOKEN_TYPE] for told, _ in receiver.points("gen_ai.client.token.usage")}
    assert kinds == {"input", "output"}
    for told, (count, total) in receiver.points("gen_ai.client.operation.duration"):
        assert {names.OPERATION, names.PROVIDER, names.REQUEST_MODEL, names.RESPONSE_MODEL} <= set(told)
        assert count >= 1
        assert total > 0

    def mine(metric: str, **more: str) -> Any:
        [value] = [
            value
            for told, value in receiver.points(metric)
            if told.get(names.AGENT) == agent and more.items() <= told.items()
        ]
        return value

    assert mine("s2t.triggers") == s2t["triggers"]
    assert mine("s2t.flips") == s2t["flips"]
    assert mine("s2t.escalations", **{names.ESCALATION_OUTCOME: "picked"}) == 2
    assert mine("s2t.escalations", **{names.ESCALATION_OUTCOME: "refused"}) == s2t["refused"]
    assert mine("s2t.cost", **{names.COST_PART: "llm"}) == pytest.approx(s2t["cost_usd"]["llm"])
    left = {(t[names.BUDGET], t[names.BUDGET_UNIT]): value for t, value in receiver.points("s2t.budget.left")}
    assert left["metered", "escalations"] == 0


def test_times_are_seconds_failures_say_their_kind_and_only_streams_have_a_first_chunk(
    receiver: Receiver, providers: Any
) -> None:
    slm = tiny_model(seed=9)
    whole = chat(model=slm).invoke("hello").response_metadata["s2t"]
    streamed: Any = reduce(add, chat(model=slm).stream("hello")).response_metadata["s2t"]  # type: ignore[arg-type]
    with pytest.raises(BudgetExceeded):
        asking(Budget(escalations=0, on_exhausted="raise"), model=slm).invoke("hello")
    providers[2].force_flush()

    def mine(metric: str) -> dict[Any, Any]:
        points = receiver.points(metric)
        return {told.get(names.ERROR_TYPE): value for told, value in points if told[names.REQUEST_MODEL] == slm.name}

    took = mine("gen_ai.client.operation.duration")
    assert set(took) == {None, "BudgetExceeded"}
    assert took[None][1] * 1000 == pytest.approx(whole["latency_ms"]["total"] + streamed["latency_ms"]["total"])
    count, first = mine("gen_ai.client.operation.time_to_first_chunk")[None]
    assert receiver.unit("gen_ai.client.operation.time_to_first_chunk") == "s"
    assert (count, first * 1000) == (1, pytest.approx(streamed["latency_ms"]["ttft"]))
    spans = [attributes(span) for span in receiver.named(f"chat {slm.name}")]
    assert [told.get(names.TIME_TO_FIRST_CHUNK) for told in spans] == [None, pytest.approx(first), None]


def test_a_name_that_no_exporter_takes_is_escaped(receiver: Receiver) -> None:
    chat().invoke("hello", s2t_agent="odd \udcff")
    assert attributes(one(receiver, "chat tiny-qwen3-0"))[names.AGENT] == "odd \\udcff"


def test_a_broken_processor_takes_no_answer_down(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breaking, "on", True)
    assert chat().invoke("hello").text


def test_a_servers_completion_is_a_text_completion(receiver: Receiver) -> None:
    httpx = pytest.importorskip("httpx")
    from server_support import serving_chat

    with serving_chat(chat(), names=["tiny"]) as url:
        asked = {"model": "tiny", "prompt": "hello", "max_tokens": 4}
        response = httpx.post(f"{url}/completions", json=asked, timeout=60)
        assert response.status_code == 200, response.text
    told = attributes(one(receiver, "text_completion tiny-qwen3-0"))
    assert (told[names.OPERATION], told[names.OUTPUT_TOKENS]) == ("text_completion", 4)


ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ImportError(name)

if "absent" in sys.argv:
    sys.meta_path.insert(0, Absent())
from s2t_agents import ChatS2T
from s2t_agents.telemetry import answers
from s2t_agents.testing import tiny_model

answers.AnswerTelemetry.end = None  # whoever calls it fails
assert ChatS2T(model=tiny_model(), max_tokens=4).invoke("hello").text
print("quiet")
"""


@pytest.mark.parametrize("case", ["absent", pytest.param("without an SDK", marks=pytest.mark.slow)])
def test_nothing_happens_where_nobody_listens(case: str) -> None:
    done = subprocess.run([sys.executable, "-c", ALONE, case], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("quiet", 0), done.stderr


@pytest.mark.slow
def test_the_pages_example_prints_a_span() -> None:
    page = (Path(__file__).parents[1] / "docs" / "observability.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("chat s2t-demo "), done.stderr
    values = [value for key, value in vars(names).items() if key.isupper()]
    known = {value if isinstance(value, str) else value[0] for value in values if isinstance(value, str | tuple)}
    for named in re.findall(r"`((?:gen_ai|s2t)\.[a-z_.]+[a-z])`", page):
        assert any(str(name) == named or str(name).startswith(f"{named}.") for name in known), named
