"""ChatJudge: a chat model reads previews and chooses one, which is emitted whole."""

import json
import pickle
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import httpx
import pytest
from budget_support import FakeClock
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from pydantic import Field
from sequences import read

from s2t_agents import Budget, ChatS2T, Ledger, LocalLLM, TokenPrice
from s2t_agents.engine.engine import Engine
from s2t_agents.errors import ConfigError
from s2t_agents.escalation import Escalation
from s2t_agents.llms import ChatJudge, Question
from s2t_agents.llms.previews import continuations, previews
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import Trigger, always, when
from s2t_agents.types import Charge, Sampling, Step

PROMPT = [10, 20, 30, 40, 50]
PRICE = TokenPrice(Decimal(3), Decimal(15), Decimal("0.3"))
USAGE = {"input_tokens": 200, "output_tokens": 9, "total_tokens": 209}


class Scripted(BaseChatModel):
    """A chat model that names the continuation a function chooses from the messages, by a tool call."""

    choose: Callable[[str], Any]
    usage: dict[str, Any] | None = USAGE
    asked: list[str] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "scripted-judge"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
        return self.bind(tools=tools)

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        self.asked.append(str(messages[-1].content))
        number = self.choose(str(messages[-1].content))
        call = {"name": "Choice", "args": {"number": number}, "id": "1"}
        message = AIMessage("", tool_calls=[] if number is None else [call], usage_metadata=self.usage)
        return ChatResult(generations=[ChatGeneration(message=message)])


def judge(choose: Callable[[str], Any], **settings: Any) -> ChatJudge:
    usage = settings.pop("usage", USAGE)
    return ChatJudge(Scripted(choose=choose, usage=usage), **{"price": PRICE, "timeout_s": 5.0, **settings})


def first_shown(text: str) -> int:
    return 1


def prefix_of(model: LanguageModel, ids: Sequence[int] = PROMPT) -> TokenSequence:
    return read(model, ids)


def answer(
    llm: ChatJudge, trigger: Trigger, budget: Budget | None = None, model: LanguageModel | None = None
) -> list[Step]:
    engine = Engine(model or tiny_model(), k=4, trigger=trigger, escalation=Escalation(llm, margin=1.0))
    return list(engine.steps(PROMPT, Sampling(max_tokens=20), budget=budget))


@pytest.fixture
def at_start() -> Trigger:
    """Only the first step is critical."""
    return when(lambda proposal: len(proposal.prefix) == len(PROMPT))


# ---------------------------------------------------------------------- one call, one sentence


def test_the_whole_continuation_that_it_names_is_kept(at_start: Trigger) -> None:
    llm = judge(first_shown)
    steps = answer(llm, at_start)
    first = steps[0]
    prefix = prefix_of(tiny_model())
    rows = continuations(prefix, [c.token_id for c in first.candidates], llm.preview_tokens)
    [chosen] = [row for row in rows if row[0] == first.token_id]
    assert len(chosen) > 1
    assert tuple(step.token_id for step in steps[: len(chosen)]) == chosen[: len(steps)]
    assert first.picked_by == "llm"
    kept = steps[1 : len(chosen)]
    assert all(step.picked_by == "slm" and not step.flipped and not step.triggered for step in kept)
    assert len(llm.chat.asked) == 1  # type: ignore[attr-defined]


def test_kept_tokens_cost_no_decision_and_are_read_in_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    llm = judge(first_shown, preview_tokens=6)
    forwards: list[int] = []
    real = model.backend.forward

    answers: list[Any] = []

    def counted(batch: Any) -> Any:
        answers.append(batch[0].cache)
        forwards.extend(len(work.ids) for work in batch if work.cache is answers[0])  # previews have their own
        return real(batch)

    monkeypatch.setattr(model.backend, "forward", counted)
    steps = answer(llm, always(), model=model)
    assert len(steps) == 20
    assert len(llm.chat.asked) == sum(step.triggered for step in steps) == len(forwards)  # type: ignore[attr-defined]
    assert max(forwards[1:]) > 1


def test_what_follows_equals_an_answer_that_had_those_tokens_from_the_start(at_start: Trigger) -> None:
    model = tiny_model()
    tokens = [step.token_id for step in answer(judge(first_shown), at_start)]
    for cut in (1, 5, 12):
        after = Engine(model).steps([*PROMPT, *tokens[:cut]], Sampling(max_tokens=20 - cut))
        assert [step.token_id for step in after] == tokens[cut:]


def test_it_is_shown_the_conversation_and_every_continuation_once(at_start: Trigger) -> None:
    llm = judge(first_shown)
    [first, *_] = answer(llm, at_start)
    prefix = prefix_of(tiny_model())
    [text] = llm.chat.asked  # type: ignore[attr-defined]
    assert json.dumps(prefix.model.tokenizer.decode(PROMPT)) in text
    shown = re.findall(r"^(\d): ", text, re.MULTILINE)
    expected = previews(prefix, [c.token_id for c in first.candidates], llm.preview_tokens)
    assert shown == [str(n) for n in range(1, len(expected) + 1)]


def test_positions_are_shuffled_and_the_seed_repeats_them() -> None:
    prefix = prefix_of(tiny_model())
    question = Question(PROMPT, Proposal(prefix, 8).candidates.tolist(), prefix=prefix)

    def order(seed: int) -> list[int]:
        return [preview.at[0] for preview in judge(first_shown, seed=seed).prompt_for(question).previews]

    orders = [order(seed) for seed in range(80)]
    assert order(1) == orders[1]
    assert len({tuple(each) for each in orders[:20]}) > 10
    starts = [each[0] for each in orders]
    assert all(starts.count(place) < 24 for place in set(starts))  # 8 places: about 10 each


def test_a_judge_that_knows_better_than_the_slm_improves_it(at_start: Trigger) -> None:
    def shortest(text: str) -> int:
        options = re.findall(r"^(\d+): (.*)$", text, re.MULTILINE)
        return int(min(options, key=lambda option: len(option[1]))[0])

    llm = judge(shortest)
    first = answer(llm, at_start)[0]
    assert [c.llm for c in first.candidates].count(None) == 3
    assert next(c for c in first.candidates if c.llm is not None).token_id == first.token_id


def test_candidates_that_all_read_the_same_are_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2t_agents.llms import previews as module

    monkeypatch.setattr(module, "preview_text", lambda prefix, tokens: "the same")
    llm, budget = judge(first_shown), Budget(usd="1", escalations=1)
    steps = answer(llm, always(), budget)
    assert llm.chat.asked == []  # type: ignore[attr-defined]
    assert budget.state().spent["usd"] == 0
    assert all(step.escalation is None and step.token_id == step.wanted_id for step in steps)  # no refusal either
    assert steps[0].candidates


def test_a_budget_that_raises_is_not_asked_for_what_is_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2t_agents.llms import previews as module

    monkeypatch.setattr(module, "preview_text", lambda prefix, tokens: "the same")
    steps = answer(judge(first_shown), always(), Budget(usd="1", escalations=0, on_exhausted="raise"))
    assert all(step.escalation is None and step.token_id == step.wanted_id for step in steps)


def test_another_chats2t_can_judge() -> None:
    other = ChatS2T(model=tiny_model(seed=5, max_position_embeddings=4096), max_tokens=64)
    model = ChatS2T(
        model=tiny_model(), k=3, max_tokens=8, trigger=always(), escalation=Escalation(ChatJudge(other), margin=1.0)
    )
    s2t = model.invoke("hello").response_metadata["s2t"]
    assert s2t["escalations"] >= 1
    assert not s2t["degraded"]  # its grammar lets it name nothing but what it was shown


def test_a_conversation_too_long_for_it_costs_nothing(at_start: Trigger) -> None:
    small = ChatS2T(model=tiny_model(seed=5), max_tokens=64)  # 512 bytes
    report = answer(ChatJudge(small), at_start)[0].escalation
    assert report is not None
    assert (report.outcome, report.actual) == ("failed", None)
    assert "tokens; 511 fit" in report.reason


# ---------------------------------------------------------------------- money


def test_the_price_is_the_judges_own_account(at_start: Trigger) -> None:
    usage = {**USAGE, "input_token_details": {"cache_read": 120}}
    budget = Budget(usd="1")
    report = answer(judge(first_shown, usage=usage), at_start, budget)[0].escalation
    assert report is not None
    assert report.actual.usd == Decimal("0.000411")  # (80 * 3 + 120 * 0.3 + 9 * 15) / 1e6
    assert report.actual.llm_tokens == 89
    assert budget.state().spent["usd"] == report.actual.usd


@pytest.mark.parametrize(
    ("details", "usd"),
    [
        ({"cache_creation": 120}, "0.000825"),  # (80 * 3 + 120 * 3.75 + 9 * 15) / 1e6
        ({"cache_creation": 0, "ephemeral_5m_input_tokens": 120}, "0.000825"),
        ({"cache_creation": 0, "ephemeral_1h_input_tokens": 120}, "0.001095"),
        ({"cache_creation": 0, "ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 100}, "0.00105"),
        ({"cache_creation": 120, "ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 100}, "0.00105"),
        ({"cache_read": 80, "cache_creation": 120}, "0.000609"),
        ({"cache_read": 200, "cache_creation": 120}, "0.000609"),  # more than there is: the dearer is believed
        ({"priority": 200, "priority_cache_read": 80, "priority_cache_creation": 120}, "0.000609"),
        ({"cache_creation": -5}, "0.000735"),
        ({"cache_creation": 10**9}, "0.000885"),
    ],
)
def test_tokens_written_to_the_providers_cache_are_paid_as_such(
    details: dict[str, Any], usd: str, at_start: Trigger
) -> None:
    price = replace(PRICE, cache_write_usd_per_mtok=Decimal("3.75"), cache_write_1h_usd_per_mtok=Decimal(6))
    llm, budget = judge(first_shown, usage={**USAGE, "input_token_details": details}, price=price), Budget(usd="1")
    report = answer(llm, at_start, budget)[0].escalation
    assert report is not None
    assert report.actual.usd == Decimal(usd) == budget.state().spent["usd"]


def test_a_reply_without_an_account_costs_what_was_held(at_start: Trigger) -> None:
    report = answer(judge(first_shown, usage=None), at_start, Budget(usd="1"))[0].escalation
    assert report is not None
    assert report.actual == report.reserved


@pytest.mark.parametrize("choose", [first_shown, lambda text: 99], ids=["picked", "failed"])
@pytest.mark.parametrize("usage", [USAGE, None, {**USAGE, "input_token_details": {"cache_read": 120}}])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_reply_from_langchains_cache_costs_nothing(
    everywhere: bool, usage: Any, choose: Callable[[str], int], at_start: Trigger
) -> None:
    cache, budget = InMemoryCache(), Budget(usd="1", escalations=9)
    llm = judge(choose, usage=usage)
    if everywhere:
        set_llm_cache(cache)
    else:
        llm.chat.cache = cache
    try:
        once, *again = [answer(llm, at_start, budget)[0].escalation for _ in range(3)]
    finally:
        set_llm_cache(None)
    assert len(llm.chat.asked) == 1  # type: ignore[attr-defined]
    assert once is not None
    assert once.actual.escalations == budget.state().spent["escalations"] == 1
    assert once.actual.usd == budget.state().spent["usd"] > 0
    for report in again:
        assert report is not None
        assert (report.outcome, report.actual) == (once.outcome, Charge(Decimal(0), escalations=0))


@pytest.mark.parametrize("output", [-1, 10**9, 10**16])
def test_an_account_that_cannot_be_believed_costs_what_was_held(output: int, at_start: Trigger) -> None:
    usage, budget = {**USAGE, "output_tokens": output}, Budget(llm_tokens=10**6)
    report = answer(judge(first_shown, usage=usage, price=None), at_start, budget)[0].escalation
    assert report is not None
    assert (report.outcome, report.actual) == ("picked", report.reserved)
    assert (budget.state().spent["llm_tokens"], budget.state().holds) == (report.reserved.llm_tokens, 0)


def test_the_hold_covers_every_byte_of_what_is_sent(at_start: Trigger) -> None:
    llm = judge(first_shown)
    report = answer(llm, at_start, Budget(usd="1"))[0].escalation
    assert report is not None
    assert report.reserved.llm_tokens > len(llm.chat.asked[0].encode()) + llm.reply_tokens  # type: ignore[attr-defined]
    closer = judge(first_shown, count_tokens=lambda text: len(text) // 4)
    assert answer(closer, at_start, Budget(usd="1"))[0].escalation.reserved.usd < report.reserved.usd  # type: ignore[union-attr]


def test_a_budget_too_small_for_one_question_asks_none(at_start: Trigger) -> None:
    llm = judge(first_shown)
    step = answer(llm, at_start, Budget(usd="0.0001"))[0]
    assert step.escalation is not None
    assert step.escalation.outcome == "refused"
    assert llm.chat.asked == []  # type: ignore[attr-defined]


def test_a_known_models_price_is_found_by_its_name() -> None:
    class Hosted(Scripted):
        def _get_ls_params(self, stop: Any = None, **kwargs: Any) -> Any:
            return {"ls_model_name": "gpt-4o-mini", "ls_provider": "openai"}

    known = ChatJudge(Hosted(choose=first_shown))
    assert known.name == "gpt-4o-mini"
    assert known.price is not None
    assert ChatJudge(Scripted(choose=first_shown)).price is None

    class Tiered(Hosted):
        service_tier: str | None = None

    for tier, listed in ((None, True), ("auto", True), ("default", True), ("flex", False), ("priority", False)):
        found = ChatJudge(Tiered(choose=first_shown, service_tier=tier))
        assert (found.price is not None) == listed, tier
        assert ChatJudge(Tiered(choose=first_shown, service_tier=tier), price=PRICE).price is PRICE


# ---------------------------------------------------------------------- bad, late and lost answers


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def raises(error: Exception) -> Callable[[str], int]:
    def choose(text: str) -> int:
        raise error

    return choose


class Status(Exception):
    """As providers' clients raise them."""

    def __init__(self, status_code: int) -> None:
        super().__init__("key sk-secret is no good")
        self.status_code = status_code


def lost(error: Exception) -> Exception:
    outer = RuntimeError("connection error")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("choose", "reason", "billed"),
    [
        (lambda text: 0, "named none of them", True),
        (lambda text: 99, "named none of them", True),
        (lambda text: -1, "named none of them", True),
        (lambda text: None, "named none of them", True),
        (lambda text: "two", "named none of them", True),
        (raises(ValueError("sk-secret")), r"failed \(ValueError\)", True),
        (raises(Status(401)), "answered 401", False),
        (raises(Status(429)), "answered 429", False),
        (raises(lost(httpx.ConnectError("refused"))), "cannot be reached", False),
    ],
)
def test_no_usable_answer_keeps_the_local_pick(
    choose: Callable[[str], Any], reason: str, billed: bool, at_start: Trigger
) -> None:
    budget = Budget(usd="1")
    steps = answer(judge(choose), at_start, budget)
    report = steps[0].escalation
    assert report is not None
    assert (report.outcome, report.actual is not None) == ("failed", billed)
    assert re.search(reason, report.reason)
    assert "secret" not in report.reason
    assert steps[0].token_id == steps[0].wanted_id
    assert (budget.state().spent["usd"] > 0, budget.state().holds) == (billed, 0)


def test_a_late_answer_is_no_answer(at_start: Trigger, release: threading.Event) -> None:
    def late(text: str) -> int:
        release.wait()
        return 1

    budget = Budget(usd="1")
    report = answer(judge(late, timeout_s=0.3), at_start, budget)[0].escalation
    assert report is not None
    assert report.outcome == "failed"
    assert report.actual == report.reserved  # it was sent: the provider will bill it
    hurried = answer(judge(late, timeout_s=30), at_start, Budget(seconds=2, clock=FakeClock()))[0].escalation
    assert hurried is not None
    assert "no answer within" in hurried.reason


@pytest.mark.parametrize("limits", [{"escalations": 0}, {"usd": "0.0000001"}, {"usd": "0"}, {"llm_tokens": 100}])
def test_without_room_for_the_least_that_a_question_costs_nothing_is_previewed(
    limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from s2t_agents.llms import judge as module

    made: list[int] = []
    real = module.previews
    monkeypatch.setattr(module, "previews", lambda *given: (made.append(1), real(*given))[1])
    llm, budget = judge(lambda text: 1), Budget(**limits)
    alone = [step.token_id for step in Engine(tiny_model()).steps(PROMPT, Sampling(max_tokens=20))]
    steps = answer(llm, always(), budget)
    assert [step.token_id for step in steps] == alone
    reports = [step.escalation for step in steps]
    assert all(each and each.outcome == "refused" and each.reserved and each.reserved.usd for each in reports)
    assert made == llm.chat.asked == []  # type: ignore[attr-defined]
    assert not any(budget.state().held.values())


def test_the_least_that_a_question_costs_is_no_more_than_its_quote(at_start: Trigger) -> None:
    llm, seen = judge(lambda text: 1, preview_tokens=3), list[tuple[Charge, Charge | None]]()

    class Session(type(llm.open())):  # type: ignore[misc]
        def quote(self, question: Question) -> Charge | None:
            seen.append((self.least(question), super().quote(question)))
            return seen[-1][1]

    llm.open = lambda: Session(llm)  # type: ignore[method-assign]
    answer(llm, always(), Budget(usd="1"))
    assert len(seen) > 1
    for least, quote in seen:
        assert least.usd
        assert quote is None or (least.usd <= quote.usd and least.llm_tokens < quote.llm_tokens)  # type: ignore[operator]


def test_a_judge_that_is_down_is_left_alone_and_nothing_is_previewed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2t_agents.llms import judge as module

    made: list[int] = []
    real = module.previews
    monkeypatch.setattr(module, "previews", lambda *given: (made.append(1), real(*given))[1])
    llm = judge(raises(ConnectionRefusedError()))
    steps = answer(llm, always())
    assert len(steps) == 20
    assert len(made) == len(llm.chat.asked) == 1  # type: ignore[attr-defined]
    assert all(step.escalation and step.escalation.outcome == "failed" for step in steps)


def test_the_answer_says_that_it_is_degraded() -> None:
    llm = judge(lambda text: 99)
    ledger = Ledger()
    model = ChatS2T(
        model=tiny_model(), max_tokens=6, trigger=always(), escalation=Escalation(llm, margin=1.0), ledger=ledger
    )
    s2t = model.invoke("hello").response_metadata["s2t"]
    assert (s2t["degraded"], s2t["escalations"]) == (True, 0)
    assert s2t["cost_usd"]["llm"] > 0  # bad answers are billed all the same
    assert ledger.records()[0].cost_usd.llm == pytest.approx(Decimal(str(s2t["cost_usd"]["llm"])))


def test_its_tokens_stay_out_of_the_callers_stream() -> None:
    from langchain_core.callbacks import BaseCallbackHandler

    seen = []

    class Starts(BaseCallbackHandler):
        def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
            seen.append(str(messages[0][-1].content))

    model = ChatS2T(
        model=tiny_model(), max_tokens=3, trigger=always(), escalation=Escalation(judge(first_shown), margin=1.0)
    )
    model.invoke("hello", {"callbacks": [Starts()]})
    assert seen == ["hello"]


# ---------------------------------------------------------------------- settings


def test_a_chat_model_without_structured_output_is_refused() -> None:
    class Plain(Scripted):
        def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
            raise NotImplementedError

    with pytest.raises(ConfigError, match="Plain has no structured output"):
        ChatJudge(Plain(choose=first_shown))


@pytest.mark.parametrize("setting", [{"timeout_s": 0}, {"preview_tokens": 0}, {"reply_tokens": 0}])
def test_settings_that_can_not_work_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a judge needs"):
        judge(first_shown, **setting)


def test_it_pickles_when_its_chat_model_does(at_start: Trigger) -> None:
    again = pickle.loads(pickle.dumps(judge(first_shown)))
    assert answer(again, at_start)[0].picked_by == "llm"


def test_a_local_llm_and_a_judge_are_asked_through_the_same_door(at_start: Trigger) -> None:
    for llm in (judge(first_shown), LocalLLM(tiny_model(seed=5))):
        assert answer(llm, at_start)[0].picked_by == "llm"  # type: ignore[arg-type]
