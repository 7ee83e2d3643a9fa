"""OpenAILLM: the picks of the same model in this process, one request per question, and the key stays secret."""

import logging
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal

import pytest
import servers
from pydantic import SecretStr
from servers import CompletionServer, serving

from s2t_agents.budget import Budget, TokenPrice
from s2t_agents.engine.engine import Engine
from s2t_agents.errors import (
    ConfigError,
    EscalationFailed,
    ModelNotFound,
    OutOfTime,
    QuestionRefused,
    TokenizerMismatch,
)
from s2t_agents.escalation import Escalation
from s2t_agents.llms import CircuitBreaker, LocalLLM, OpenAILLM, Question
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import always
from s2t_agents.types import Sampling, Step

PROMPT = [10, 20, 30, 40, 50]
KEY = "sk-do-not-tell-2f9c"
PRICE = TokenPrice(Decimal(2), Decimal(10), Decimal(1))


@pytest.fixture
def llm(server: CompletionServer) -> Iterator[OpenAILLM]:
    llm = OpenAILLM(server.url, server.model.name, price=PRICE, api_key=KEY)
    yield llm
    llm.close()


def answer(llm: object, budget: Budget | None = None) -> list[Step]:
    engine = Engine(tiny_model(), trigger=always(), escalation=Escalation(llm, margin=1.0))  # type: ignore[arg-type]
    return list(engine.steps(PROMPT, Sampling(max_tokens=10), budget=budget))


def test_picks_and_scores_equal_the_same_model_in_this_process(server: CompletionServer, llm: OpenAILLM) -> None:
    far, near = answer(llm), answer(LocalLLM(server.model))
    assert [step.token_id for step in far] == [step.token_id for step in near]
    for ours, theirs in zip(far, near, strict=True):
        assert [c.llm for c in ours.candidates] == pytest.approx([c.llm for c in theirs.candidates], abs=1e-4)


def test_one_request_per_escalation(server: CompletionServer, llm: OpenAILLM) -> None:
    steps = answer(llm)
    assert len(server.asked) == len(steps) == 10
    assert server.asked[0]["prompt"] == PROMPT
    assert server.asked[0]["logprob_token_ids"] == [c.token_id for c in steps[0].candidates]
    assert server.asked[0]["max_tokens"] == 1


def test_a_server_without_logprob_token_ids_answers_with_its_best_and_says_who_is_outside(
    server: CompletionServer, llm: OpenAILLM
) -> None:
    server.by_id = False
    inside = outside = 0
    for step in answer(llm):
        report = step.escalation
        assert report is not None
        missing = sum(c.llm is None for c in step.candidates)
        if report.outcome == "failed":
            assert "none of the 8 candidates is among the server's 20 tokens" in report.reason
            assert report.actual == report.reserved  # it was answered, so it is billed
            outside += 1
        elif missing:
            assert report.reason == f"{missing} of 8 candidates outside the server's best 20"
            inside += 1
    assert inside > 0


def test_a_server_that_refuses_unknown_fields_is_asked_without(server: CompletionServer, llm: OpenAILLM) -> None:
    def strict(handler: servers.Handler, body: dict[str, object]) -> None:
        if "logprob_token_ids" in body:
            handler.reply({"error": {"message": "extra fields: logprob_token_ids"}}, 400)
        else:
            handler.complete(body)

    server.fault = strict
    everything = list(range(250))  # some are among the best 20
    assert any(score is not None for score in llm.open().ask(Question(PROMPT, everything)).scores)
    assert ["logprob_token_ids" in body for body in server.asked] == [True, False]
    llm.open().ask(Question(PROMPT, everything))
    assert len(server.asked) == 3  # remembered


def test_questions_that_were_out_together_when_it_refused_the_field_are_all_answered(
    server: CompletionServer, llm: OpenAILLM
) -> None:
    both = threading.Barrier(2)

    def strict(handler: servers.Handler, body: dict[str, object]) -> None:
        if "logprob_token_ids" in body:
            both.wait(10)
            handler.reply({"error": {"message": "extra fields: logprob_token_ids"}}, 400)
        else:
            handler.complete(body)

    server.fault = strict
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: llm.open().ask(Question(PROMPT, list(range(250)))), range(2)))
    assert answers[0].scores == answers[1].scores
    assert ["logprob_token_ids" in body for body in server.asked] == [True, True, False, False]


def test_cached_tokens_are_paid_as_such_and_silence_is_billed_in_full(server: CompletionServer, llm: OpenAILLM) -> None:
    def cached(handler: servers.Handler, body: dict[str, object]) -> None:
        reply = server.answer(body)
        reply["usage"]["prompt_tokens_details"] = {"cached_tokens": 3}
        handler.reply(reply)

    question = Question(PROMPT, [1, 2])
    assert llm.open().quote(question).llm_tokens == 6
    llm.open().ask(question)
    assert question.owed == llm.open().quote(question)
    server.fault = cached
    llm.open().ask(question)
    assert question.owed is not None
    assert (question.owed.llm_tokens, question.owed.usd) == (3, Decimal("0.000017"))  # 2*2 + 3*1 + 1*10
    server.fault, server.usage = None, False
    llm.open().ask(question)
    assert question.owed.llm_tokens == 6


@pytest.mark.parametrize(
    ("counts", "usd"),
    [
        ({"cache_write_tokens": 3}, "0.000029"),  # 2*2 + 3*5 + 1*10
        ({"cached_tokens": 2, "cache_write_tokens": 3}, "0.000027"),
        ({"cache_write_tokens": 99}, "0.000035"),
        ({"cached_tokens": None, "cache_write_tokens": None}, "0.00002"),
    ],
)
def test_tokens_written_to_the_servers_cache_are_paid_as_such_and_held_for(
    server: CompletionServer, llm: OpenAILLM, counts: dict[str, int | None], usd: str
) -> None:
    def written(handler: servers.Handler, body: dict[str, object]) -> None:
        reply = server.answer(body)
        reply["usage"]["prompt_tokens_details"] = counts
        handler.reply(reply)

    llm.price = replace(PRICE, cache_write_usd_per_mtok=Decimal(5))
    server.fault, question = written, Question(PROMPT, [1, 2])
    assert llm.open().quote(question).usd == Decimal("0.000035")
    llm.open().ask(question)
    assert question.owed is not None
    assert question.owed.usd == Decimal(usd)


def test_the_budget_pays_what_the_server_counted(llm: OpenAILLM) -> None:
    budget = Budget(usd="1", escalations=3)
    steps = answer(llm, budget)
    paid = [step.escalation.actual for step in steps if step.escalation and step.escalation.actual]
    assert len(paid) == 3
    assert budget.state().spent["usd"] == sum(charge.usd for charge in paid)
    assert budget.state().held["usd"] == 0


# ---------------------------------------------------------------------- whose fault is it?


def test_a_caller_without_time_does_not_close_the_server_to_others(server: CompletionServer, llm: OpenAILLM) -> None:
    server.fault = servers.slow(0.3)
    for _ in range(3):
        with pytest.raises(OutOfTime, match="no answer within 0"):
            llm.open().ask(Question(PROMPT, [1, 2], seconds=0.05))
    assert llm.open().ask(Question(PROMPT, [1, 2])).scores


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_question_that_is_refused_does_not_close_the_server_to_others(
    server: CompletionServer, llm: OpenAILLM, code: int
) -> None:
    server.fault = servers.first(3, servers.status(code, "maximum context length is 4096"))
    for _ in range(3):
        with pytest.raises(QuestionRefused, match="maximum context length"):
            llm.open().ask(question := Question(PROMPT, [1, 2]))
        assert question.owed is None
    assert llm.open().ask(Question(PROMPT, [1, 2])).scores


# ---------------------------------------------------------------------- is it the right server?


def test_another_model_name_is_refused_and_the_served_ones_are_named(server: CompletionServer) -> None:
    with pytest.raises(ModelNotFound, match="does not serve 'gpt' but tiny-qwen3-5"):
        OpenAILLM(server.url, "gpt").check(tiny_model())


def test_another_tokenizer_is_refused(server: CompletionServer, llm: OpenAILLM) -> None:
    server.tokenize = lambda text: [1, 2, 3]
    with pytest.raises(TokenizerMismatch, match="do not spell a sample text in the same ids"):
        llm.check(tiny_model())


def test_a_server_that_offers_no_such_pages_is_trusted(server: CompletionServer, llm: OpenAILLM) -> None:
    server.tokenize = None
    llm.check(tiny_model())
    assert llm.open().ask(Question(PROMPT, [1, 2])).scores


def test_a_server_that_was_down_is_checked_before_its_first_question() -> None:
    model, port = tiny_model(), servers.free_port()
    breaker = CircuitBreaker(cooldown_s=0.0)
    llm = OpenAILLM(f"http://127.0.0.1:{port}/v1", model.name, connect_s=0.2, breaker=breaker)
    llm.check(model)  # no server: no error
    assert breaker.state == "half-open"
    with servers.serving(model, port) as server:
        server.tokenize = lambda text: [1, 2, 3]
        with pytest.raises(TokenizerMismatch):
            llm.open().ask(Question(PROMPT, [1, 2]))
        assert server.asked == []
    llm.close()


# ---------------------------------------------------------------------- secrets


def test_the_key_is_sent_and_shown_nowhere(
    server: CompletionServer, llm: OpenAILLM, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answer(llm)
    assert server.keys[0] == f"Bearer {KEY}"
    shown = [repr(llm), str(llm), repr(llm.endpoint), repr(vars(llm.endpoint)), repr(Escalation(llm)), caplog.text]
    assert not any(KEY in text for text in shown)


def test_the_key_does_not_travel_in_a_pickle_but_its_variables_name_does(
    server: CompletionServer, llm: OpenAILLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.open().ask(Question(PROMPT, [1, 2]))  # with live connections
    assert KEY.encode() not in pickle.dumps(llm)
    by_name = OpenAILLM(server.url, server.model.name, api_key_env="S2T_TEST_KEY")
    monkeypatch.setenv("S2T_TEST_KEY", KEY)
    again = pickle.loads(pickle.dumps(by_name))
    again.open().ask(Question(PROMPT, [1, 2]))
    assert server.keys[-1] == f"Bearer {KEY}"
    monkeypatch.delenv("S2T_TEST_KEY")
    with pytest.raises(EscalationFailed, match="S2T_TEST_KEY holds no API key"):
        again.open().ask(Question(PROMPT, [1, 2]))


def test_a_server_that_repeats_the_key_does_not_put_it_into_the_ledger(
    server: CompletionServer, llm: OpenAILLM
) -> None:
    server.fault = servers.status(401, f"Incorrect API key: {KEY}")
    with pytest.raises(EscalationFailed, match=r"answered 401: Incorrect API key: \*\*\*") as caught:
        llm.open().ask(Question(PROMPT, [1, 2]))
    assert KEY not in str(caught.value)


def test_the_key_does_not_follow_a_redirect(server: CompletionServer, llm: OpenAILLM) -> None:
    with serving(tiny_model()) as elsewhere:
        server.fault = servers.status(307, Location=f"{elsewhere.url}/completions")
        with pytest.raises(EscalationFailed, match="answered 307"):
            llm.open().ask(Question(PROMPT, [1, 2]))
        assert elsewhere.asked == []


# ---------------------------------------------------------------------- settings that cannot work


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://llm.example.com/v1", "in the clear"),
        ("http://10.0.0.7:8000/v1", "in the clear"),
        ("https://user:secret@llm.example.com/v1", "carries a user"),
        ("https://llm.example.com/v1?key=secret", "carries a user, a query"),
        ("https://llm.example.com/v1#secret", "carries a user, a query"),
        ("https://secret@[::1/v1", "cannot be read"),
        ("https://h:secret/v1", "cannot be read"),
        ("https://secret:99999999/v1", "no http"),
        ("https://user:se/cret@h/v1", "cannot be read|carries a user"),
        ("https://user:se#cret@h/v1", "cannot be read|carries a user"),
        ("https://user:se?cret@h/v1", "cannot be read|carries a user"),
        ("https://:secret@h/v1", "carries a user"),
        ("http://user:1/secret@h/v1", "carries a user"),
        ("https://se\ncret/v1", "cannot be read"),
        ("//secret/v1", "no http"),
        ("secret", "no http"),
        ("", "no http"),
        (None, "cannot be read"),
        (b"https://secret/v1", "cannot be read"),
        ("http://llm.example.com/secret/v1", "in the clear"),
        ("https://llm.example.com:-1/secret", "cannot be read|no http"),
        ("ftp://llm.example.com", "no http"),
        ("llm.example.com/v1", "no http"),
    ],
)
def test_urls_that_can_not_be_trusted_are_refused_and_secrets_in_them_not_repeated(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        OpenAILLM(url, "m")
    assert "secret" not in str(caught.value)


def test_plain_http_needs_a_word_outside_this_machine() -> None:
    here = ("127.0.0.1", "127.9.9.9", "localhost", "LOCALHOST", "[::1]")
    for url in (*(f"http://{host}:1/v1" for host in here), "https://llm.example.com/v1"):
        OpenAILLM(url, "m")
    for host in ("localhost.example.com", "127.0.0.1.example.com", "128.0.0.1", "[::2]"):
        with pytest.raises(ConfigError, match="allow_http"):
            OpenAILLM(f"http://{host}:1/v1", "m")
    OpenAILLM("http://llm.example.com/v1", "m", allow_http=True)


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schlüssel"])
def test_keys_that_no_header_carries_are_refused_without_being_repeated(key: str) -> None:
    with pytest.raises(ConfigError, match="the API key is empty or holds") as caught:
        OpenAILLM("https://llm.example.com/v1", "m", api_key=SecretStr(key))
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    "setting", [{"timeout_s": 0}, {"attempt_s": float("nan")}, {"connect_s": 1e9}, {"attempts": 0}]
)
def test_times_that_can_not_work_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        OpenAILLM("https://llm.example.com/v1", "m", **setting)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SSL_CERT_FILE", "/no/such.pem", "No such file"),
        ("HTTPS_PROXY", "nonsense://user:sk-secret@127.0.0.1:1", "proxy"),
        ("HTTPS_PROXY", "http://127.0.0.1:port", "proxy"),
        ("HTTPS_PROXY", "http://user:sk-secret/x@127.0.0.1:1", "proxy"),
    ],
)
def test_an_environment_that_no_client_can_be_made_in_is_refused_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    llm = OpenAILLM("https://llm.example.invalid/v1", "m")
    with pytest.raises(ConfigError, match=f"no connection to llm.example.invalid can be set up: .*{said}") as caught:
        llm.check(tiny_model())
    assert "SSL_CERT_FILE" in caught.value.hint
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError):
        llm.open().ask(Question(PROMPT, [1, 2]))
