"""ChatS2T as a LangChain chat model: answers, and metadata of steps, costs and picks."""

import asyncio
import decimal
import threading
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
from budget_support import CONTEXTS, FULL
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.runnables import RunnableLambda

from s2t_agents import Budget, ChatS2T, DevicePrice, Ledger, LocalLLM, TokenPrice
from s2t_agents.budget import Charge, SQLiteStore, money
from s2t_agents.errors import (
    BudgetExceeded,
    ConfigError,
    ContextOverflow,
    InputError,
    ModelNotFound,
    UnpricedModel,
    UnsafeWeights,
)
from s2t_agents.escalation import Escalation
from s2t_agents.ledger.report import Format, report
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always
from s2t_agents.types import RefusedBy

S2T_KEYS = {
    "tokens",
    "reused_tokens",
    "thought",
    "triggers",
    "selections",
    "flips",
    "escalations",
    "refused",
    "degraded",
    "cost_usd",
    "latency_ms",
    "budget",
    "trace_id",
}


def chat(**settings: Any) -> ChatS2T:
    return ChatS2T(**{"model": tiny_model(), "max_tokens": 12, **settings})


def escalating(limit: int | None, **settings: Any) -> ChatS2T:
    llm = ScriptedLLM(last_candidate, price=settings.pop("price", None))
    budget = None if limit is None else Budget(escalations=limit)
    return chat(trigger=always(), escalation=Escalation(llm, margin=1.0), budget=budget, **settings)


def test_without_selector_and_llm_it_is_a_plain_local_chat_model() -> None:
    answer = chat().invoke([SystemMessage("Be brief."), HumanMessage("hello")])
    s2t = answer.response_metadata["s2t"]
    assert (s2t["triggers"], s2t["selections"], s2t["escalations"], s2t["degraded"]) == (0, 0, 0, False)
    assert answer.response_metadata["model_name"] == "tiny-qwen3-0"


def test_the_metadata_has_the_published_keys() -> None:
    s2t = escalating(2).invoke("hello").response_metadata["s2t"]
    assert set(s2t) == S2T_KEYS
    assert set(s2t["cost_usd"]) == {"local", "llm", "total"}
    assert set(s2t["latency_ms"]) == {"queue", "ttft", "propose", "grammar", "select", "escalate", "total"}
    assert set(s2t["budget"]) == {"path", "limit", "held", "spent", "left"}


def test_a_spent_budget_degrades_in_mid_answer_and_says_so() -> None:
    s2t = escalating(2).invoke("hello").response_metadata["s2t"]
    assert (s2t["escalations"], s2t["refused"], s2t["degraded"]) == (2, s2t["tokens"] - 2, True)
    assert s2t["budget"]["left"]["escalations"] == 0


def test_a_budget_that_says_raise_raises_through_langchain() -> None:
    model = chat(
        trigger=always(),
        escalation=Escalation(ScriptedLLM(last_candidate), margin=1.0),
        budget=Budget(escalations=1, on_exhausted="raise"),
        ledger=Ledger(),
    )
    with pytest.raises(BudgetExceeded):
        model.invoke("hello")
    [record] = model.ledger.records()  # what was done is billed all the same
    assert (record.escalations, record.finish_reason) == (1, "aborted")
    assert record.error is not None
    assert "BudgetExceeded" in record.error


def test_a_budget_store_that_goes_away_takes_neither_the_answer_nor_its_record(tmp_path: Path) -> None:
    model = escalating(None, ledger=Ledger())
    model.budget = Budget(escalations=50, store=SQLiteStore(tmp_path / "budget.db"))
    chunks = []
    for chunk in model.stream("hello"):
        chunks.append(chunk)
        for file in tmp_path.iterdir():
            file.unlink()
    s2t = sum(chunks[1:], chunks[0]).response_metadata["s2t"]
    assert (s2t["budget"], s2t["degraded"], s2t["escalations"]) == (None, True, 1)
    [record] = model.ledger.records()
    assert (record.budget, record.degraded, record.error) == (None, True, None)
    assert len(record.receipts) == s2t["tokens"]


def test_the_message_and_the_record_tell_the_same_figures() -> None:
    model = escalating(3, ledger=Ledger())
    s2t = model.invoke("hello").response_metadata["s2t"]
    [record] = model.ledger.records()
    assert record.budget == s2t["budget"]
    assert record.latency_ms.model_dump() == s2t["latency_ms"]


def test_costs_are_known_only_where_prices_are() -> None:
    free = chat().invoke("hello").response_metadata["s2t"]["cost_usd"]
    assert free == {"local": None, "llm": 0.0, "total": None}
    unpriced = escalating(1).invoke("hello").response_metadata["s2t"]["cost_usd"]
    assert unpriced["llm"] is None
    seconds: list[float] = []
    priced = escalating(
        1,
        price=TokenPrice(Decimal(1), Decimal(5)),
        device_price=DevicePrice(Decimal("3.6")),
        on_step=lambda trace, step: seconds.append(step.timings.compute),
    )
    answer = priced.invoke("hello")
    cost, tokens = answer.response_metadata["s2t"]["cost_usd"], answer.usage_metadata["input_tokens"]
    assert cost["llm"] == pytest.approx((tokens + 5) / 1e6)
    assert all(each > 0 for each in seconds)
    assert cost["local"] == pytest.approx(sum(seconds) * 3.6 / 3600)
    assert cost["total"] == pytest.approx(cost["local"] + cost["llm"])


@pytest.mark.parametrize("name", CONTEXTS)
def test_every_account_of_an_answer_is_the_same_in_any_decimal_context(name: str) -> None:
    price = TokenPrice(Decimal("0.151234"), Decimal("0.601234"))
    budget, ledger = Budget(usd=1), Ledger()
    model = escalating(None, price=price, device_price=DevicePrice(Decimal("123.456")), ledger=ledger)
    with decimal.localcontext(CONTEXTS[name]):
        answer = model.invoke("hello", s2t_budget=budget)
        costs = ledger.total().cost_usd
        shown = [report(ledger, format=format) for format in get_args(Format)]
        again = ledger.what_if(Budget(usd=1))
    [record] = ledger.records()
    asked = [receipt.actual for receipt in record.receipts if receipt.actual]
    spent = budget.state().spent["usd"]
    assert len(asked) > 2
    assert sum(Fraction(charge.usd or 0) for charge in asked) == Fraction(spent or 0) > 0
    assert costs.llm.usd == record.cost_usd.llm == again.spent.usd == spent
    assert costs.total.usd == money.add(costs.local.known, costs.llm.known)
    assert answer.response_metadata["s2t"]["cost_usd"]["llm"] == float(spent or 0)
    assert "ledger_error" not in answer.response_metadata["s2t"]
    assert shown == [report(ledger, format=format) for format in get_args(Format)]


def test_a_charge_beyond_all_that_a_budget_counts_costs_the_llm_and_not_the_answer() -> None:
    budget = Budget()
    for _ in range(3):
        budget.reserve(Charge(Decimal(0))).settle(Charge(Decimal(FULL)))
    s2t = escalating(None, price=TokenPrice(Decimal(1), Decimal(5))).invoke("hello", s2t_budget=budget)
    assert s2t.response_metadata["s2t"]["tokens"] == 12
    assert s2t.response_metadata["s2t"]["degraded"]
    assert (budget.state().holds, budget.state().spent["usd"]) == (0, 3 * FULL)


def test_streaming_says_the_same_and_reports_on_the_last_chunk_alone() -> None:
    model = chat()
    whole = model.invoke("hello")
    chunks = list(model.stream("hello"))
    joined = sum(chunks[1:], chunks[0])
    assert isinstance(joined, AIMessageChunk)
    assert joined.content == whole.content
    for usage in (joined.usage_metadata, whole.usage_metadata):
        usage.pop("input_token_details")  # how much of the prompt an earlier turn had left differs
    assert joined.usage_metadata == whole.usage_metadata
    assert [bool(c.usage_metadata) for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [bool(c.response_metadata) for c in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_async_and_batch_say_the_same() -> None:
    model = chat()
    whole = model.invoke("hello").content
    assert (await model.ainvoke("hello")).content == whole
    assert "".join([c.text async for c in model.astream("hello")]) == whole
    assert [m.content for m in await model.abatch(["hello"] * 3)] == [whole] * 3
    assert [m.content for m in model.batch(["hello"] * 3)] == [whole] * 3


def test_closing_a_stream_early_stops_the_model_bills_what_was_done_and_holds_nothing() -> None:
    model = escalating(50, ledger=Ledger())
    stream = model.stream("hello")
    next(stream)
    stream.close()
    [record] = model.ledger.records()
    assert record.finish_reason == "aborted"
    assert record.completion_tokens < 12
    assert record.escalations == record.completion_tokens == model.budget.state().spent["escalations"]
    assert model.budget.state().held["escalations"] == 0


def test_calls_override_settings_and_stop_strings_cut() -> None:
    model = chat()
    whole = model.invoke("hello")
    assert model.bind(max_tokens=3).invoke("hello").usage_metadata["output_tokens"] == 3
    stop = str(whole.content)[1:3]
    cut = model.invoke("hello", stop=[stop])
    assert cut.content == str(whole.content).split(stop)[0]
    assert cut.response_metadata["finish_reason"] == "stop"
    assert whole.response_metadata["finish_reason"] == "length"


def test_a_calls_own_budget_takes_the_models_place() -> None:
    model, own = escalating(0), Budget(escalations=5)
    answer = model.invoke("hello", s2t_budget=own)
    assert answer.response_metadata["s2t"]["escalations"] == 5


def test_the_enclosing_nodes_config_may_carry_budget_and_agent() -> None:
    model, own = escalating(0, ledger=Ledger()), Budget(escalations=1)
    node = RunnableLambda(lambda text: model.invoke(text))
    answer = node.invoke("hello", {"configurable": {"s2t_budget": own, "s2t_agent": "critic"}})
    assert answer.response_metadata["s2t"]["escalations"] == own.state().spent["escalations"] == 1
    assert list(model.ledger.totals("agent")) == ["critic"]


def test_sampling_repeats_with_a_seed() -> None:
    model = chat(temperature=1.0, seed=4)
    assert model.invoke("hello").content == model.invoke("hello").content
    assert model.invoke("hello").content != model.bind(seed=5).invoke("hello").content


def test_the_ledger_has_one_record_per_generation_and_a_receipt_per_escalation() -> None:
    model = escalating(2, ledger=Ledger(), price=TokenPrice(Decimal(1), Decimal(5)))
    answer = model.invoke("hello", s2t_agent="critic")
    [record] = model.ledger.records(agent="critic")
    assert record.trace_id == answer.response_metadata["s2t"]["trace_id"]
    assert record.completion_tokens == answer.usage_metadata["output_tokens"]
    assert [r.outcome for r in record.receipts][:3] == ["picked", "picked", "refused"]
    first = record.receipts[0]
    assert first.prefix_tokens == answer.usage_metadata["input_tokens"]
    assert first.pick == first.candidates[-1].token_id != first.wanted
    assert first.actual.usd == record.cost_usd.llm / 2 - Decimal("0.0000005")  # the second read one token more
    refused = record.receipts[2]
    assert refused.reserved == Charge(first.reserved.usd + Decimal("0.000002"), first.reserved.llm_tokens + 2)
    assert (refused.actual, refused.refused_by) == (None, RefusedBy("run", "escalations", 2))


def test_a_larger_budget_is_rehearsed_on_what_was_refused() -> None:
    model = escalating(2, ledger=Ledger(), price=TokenPrice(Decimal(1), Decimal(5)))
    model.invoke("hello")
    [record] = model.ledger.records()
    enough = model.ledger.what_if(Budget(escalations=99))
    assert (enough.unknown, enough.newly_allowed, enough.allowed) == (0, record.refused, len(record.receipts))


def test_threads_share_one_budget_without_overrun() -> None:
    model = escalating(10, max_tokens=4)
    threads = [threading.Thread(target=model.invoke, args=("hello",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.budget.state().spent["escalations"] == 10


async def test_tasks_share_one_budget_without_overrun() -> None:
    model = escalating(10, max_tokens=4)
    await asyncio.gather(*(model.ainvoke("hello") for _ in range(8)))
    assert model.budget.state().spent["escalations"] == 10


def test_weights_are_shared_between_models_that_name_the_same(tmp_path: Path) -> None:
    slm = tiny_model()
    slm.model.save_pretrained(tmp_path)
    slm.tokenizer.save_pretrained(tmp_path)
    one, two = ChatS2T(model=str(tmp_path)), ChatS2T(model=str(tmp_path), temperature=1.0)
    assert one.engine.slm is two.engine.slm
    assert one.engine is not two.engine
    assert ChatS2T(model=str(tmp_path), dtype="bfloat16").engine.slm is not one.engine.slm


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k is 0; between 1 and 64"),
        ({"k": 65}, "k is 65"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"dtype": "int7"}, "dtype is 'int7'"),
        ({"trigger": "entropy"}, "trigger is a str"),
        ({"selector": 3}, "selector is a int"),
        ({"escalation": 3}, "escalation is a int"),
    ],
)
def test_settings_that_can_not_work_are_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        chat(**settings)


def test_an_unpriced_llm_under_a_dollar_limit_is_refused_at_construction() -> None:
    with pytest.raises(UnpricedModel, match="no known price"):
        chat(escalation=LocalLLM("anything"), budget=Budget(usd="0.01"))
    model = escalating(3)
    with pytest.raises(UnpricedModel, match="no known price"):
        model.invoke("hello", s2t_budget=Budget(usd="0.01"))


def test_files_that_are_not_there_are_named() -> None:
    with pytest.raises(ModelNotFound, match="'/no/such/model'"):
        ChatS2T(model="/no/such/model").invoke("hello")
    with pytest.raises(ModelNotFound, match=r"no selector at .*selector\.json is missing"):
        chat(selector="/no/such/selector").invoke("hello")
    with pytest.raises(ModelNotFound, match="'/no/such/llm'"):
        chat(escalation="/no/such/llm").invoke("hello")


def test_pickled_corrupt_and_incomplete_weights_are_refused(tmp_path: Path) -> None:
    slm = tiny_model()
    slm.model.save_pretrained(tmp_path)
    slm.tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnsafeWeights, match="cannot be read"):
        ChatS2T(model=str(tmp_path)).invoke("hello")
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UnsafeWeights, match=r"only pytorch_model\.bin; only safetensors"):
        ChatS2T(model=str(tmp_path)).invoke("hello")


def test_prompts_that_can_not_be_answered_are_refused_and_cost_nothing() -> None:
    model = escalating(5, ledger=Ledger())
    with pytest.raises(ContextOverflow, match=r"511"):
        model.invoke("x" * 600)
    with pytest.raises(InputError):
        model.invoke([])
    with pytest.raises(InputError):
        model.invoke([HumanMessage([{"type": "image", "url": "http://127.0.0.1/x.png"}])])
    assert model.ledger.records() == []
    assert model.budget.state().spent["escalations"] == 0


def test_history_with_a_calls_result_is_read() -> None:
    answer = chat().invoke(
        [
            HumanMessage("hello"),
            AIMessage("", tool_calls=[{"name": "f", "args": {"x": 1}, "id": "a"}]),
            {"role": "tool", "content": "2", "tool_call_id": "a"},
        ]
    )
    assert isinstance(answer, AIMessage)


def test_log_probabilities_change_no_greedy_answer_and_are_those_of_the_likeliest_tokens() -> None:
    model = chat()
    plain, told = model.invoke("hi"), model.invoke("hi", logprobs=True, top_logprobs=1)
    assert told.content == plain.content
    content = told.response_metadata["logprobs"]["content"]
    assert content
    assert all(each["logprob"] == each["top_logprobs"][0]["logprob"] <= 0 for each in content)
