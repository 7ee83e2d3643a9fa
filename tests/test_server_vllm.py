"""``s2t serve`` asked as a vLLM server is: ``ChatS2T(model="vllm://...")``, ``OpenAILLM``, and the fields they send."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_support import QUESTION, STOCK_QUESTION, STOCK_TOOL, demo_model, serving_chat

from s2t_agents import ChatS2T, Ledger, OpenAILLM
from s2t_agents.server import Tenants
from s2t_agents.server.tenants import AgentEntry, new_key

FORM = {
    "type": "object",
    "properties": {"total": {"type": "integer"}, "unit": {"enum": ["shells", "lamps"]}, "remark": {"type": "string"}},
    "required": ["total", "unit", "remark"],
    "additionalProperties": False,
}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "text": (QUESTION, {}),
    "a call, if it wants": (STOCK_QUESTION, {"tools": [STOCK_TOOL]}),
    "a call": (QUESTION, {"tools": [STOCK_TOOL], "tool_choice": "any"}),
    "a form": (QUESTION, {"response_format": {"type": "json_object", "schema": FORM}}),
    "with log-probabilities": (QUESTION, {"logprobs": True, "top_logprobs": 3}),
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving_chat(ChatS2T(model="s2t-demo")) as url:
        yield url


def remote(url: str, **settings: Any) -> ChatS2T:
    address = url.removeprefix("http://").removesuffix("/v1")
    kwargs = {"tokenizer": "s2t-demo", "read_ahead": 32}
    return ChatS2T(model=f"vllm://{address}/s2t-demo", model_kwargs=kwargs, max_tokens=60, **settings)


def local(**settings: Any) -> ChatS2T:
    return ChatS2T(model="s2t-demo", max_tokens=60, **settings)


@pytest.mark.parametrize("kind", ASKED)
def test_a_chat_model_over_it_answers_as_the_local_one_token_for_token(url: str, kind: str) -> None:
    question, call = ASKED[kind]
    here, there = list[int](), list[int]()
    ours = local(on_step=lambda _, step: here.append(step.token_id)).invoke(question, **call)
    theirs = remote(url, on_step=lambda _, step: there.append(step.token_id)).invoke(question, **call)
    assert there == here
    assert (theirs.text, [each["args"] for each in theirs.tool_calls]) == (
        ours.text,
        [each["args"] for each in ours.tool_calls],
    )
    assert theirs.response_metadata["finish_reason"] == ours.response_metadata["finish_reason"]


def test_an_answer_in_words_is_one_request() -> None:
    ledger = Ledger()
    with serving_chat(ChatS2T(model="s2t-demo", ledger=ledger)) as url:
        said = remote(url).invoke(QUESTION)
    assert said.response_metadata["finish_reason"] == "stop"
    [record] = ledger.records()
    assert record.completion_tokens == said.usage_metadata["output_tokens"]


@pytest.mark.parametrize("stop", [["5"], ["37 + ", "="], ["The answer"]])
def test_stop_strings_of_the_served_model_cut_nothing_off_a_chat_model_over_it(stop: list[str]) -> None:
    here, there = list[int](), list[int]()
    local(on_step=lambda _, step: here.append(step.token_id)).invoke(QUESTION)
    with serving_chat(ChatS2T(model="s2t-demo", stop=stop)) as url:
        remote(url, on_step=lambda _, step: there.append(step.token_id)).invoke(QUESTION)
    assert there == here


def test_an_llm_behind_it_scores_the_candidates_as_the_local_one() -> None:
    local_steps, served_steps = list[Any](), list[Any]()
    demo_model(on_step=lambda _, step: local_steps.append(step), selector=None).invoke(QUESTION)
    with serving_chat(ChatS2T(model="s2t-demo-llm")) as url:
        llm = OpenAILLM(url, "s2t-demo-llm")
        demo_model(escalation=llm, on_step=lambda _, step: served_steps.append(step), selector=None).invoke(QUESTION)
    assert [step.token_id for step in served_steps] == [step.token_id for step in local_steps]
    asked = [step for step in served_steps if step.escalation is not None]
    assert asked
    assert {step.escalation.outcome for step in asked} == {"picked"}
    for step, same in zip(served_steps, local_steps, strict=True):
        scores = [each.llm for each in same.candidates]
        assert [each.llm for each in step.candidates] == pytest.approx(scores, abs=1e-3)


def completed(url: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}/completions", json={"model": "s2t-demo", **body}, timeout=60)
    assert response.status_code == 200, response.text
    return dict(response.json())


def refused(url: str, **body: Any) -> str:
    response = httpx.post(f"{url}/completions", json={"model": "s2t-demo", **body}, timeout=60)
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["param"])


def test_tokens_come_as_ids_with_twenty_likeliest_or_those_asked_for(url: str) -> None:
    ids = local().get_token_ids("Ann has 37 shells and finds 48")
    body = {"prompt": ids, "max_tokens": 4, "temperature": 0, "logprobs": 20, "return_tokens_as_token_ids": True}
    found = completed(url, **body)["choices"][0]["logprobs"]
    for token, top in zip(found["tokens"], found["top_logprobs"], strict=True):
        assert token == max(top, key=top.get)
        assert len(top) == 20
    wanted = [3, 5, 300]
    some = completed(url, **body, logprob_token_ids=wanted)["choices"][0]["logprobs"]
    assert some["tokens"] == found["tokens"]
    for token, score, top in zip(some["tokens"], some["token_logprobs"], some["top_logprobs"], strict=True):
        assert set(top) == {token, *(f"token_id:{each}" for each in wanted)}
        assert top[token] == score


def test_only_allowed_tokens_come(url: str) -> None:
    model = local()
    ids = model.get_token_ids("Ann has 37 shells and finds")
    digits = sorted({token for digit in "0123456789" for token in model.get_token_ids(digit)})
    body = {"prompt": ids, "max_tokens": 5, "temperature": 0, "allowed_token_ids": digits}
    told = completed(url, **body, logprobs=20, return_tokens_as_token_ids=True)["choices"][0]
    assert told["text"].isdigit()
    allowed = {f"token_id:{each}" for each in digits}
    assert all(set(top) <= allowed for top in told["logprobs"]["top_logprobs"])


def test_end_tokens_end_nothing_where_they_are_ignored_and_are_shown_if_wanted(url: str) -> None:
    tokenizer = local().engine.slm.tokenizer
    chat = [{"role": "user", "content": "Good morning"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    body = {"prompt": prompt, "max_tokens": 40, "temperature": 0}
    plain = completed(url, **body)
    assert plain["choices"][0]["finish_reason"] == "stop"
    on = completed(url, **body, ignore_eos=True)
    assert on["usage"]["completion_tokens"] == 40
    assert on["choices"][0]["finish_reason"] == "length"
    assert on["choices"][0]["text"].startswith(plain["choices"][0]["text"])
    shown = completed(url, **body, ignore_eos=True, skip_special_tokens=False)["choices"][0]["text"]
    assert shown.startswith(plain["choices"][0]["text"] + tokenizer.eos_token)


def test_the_end_token_is_named_by_its_id_as_others_are(url: str) -> None:
    tokenizer = local().engine.slm.tokenizer
    chat = [{"role": "user", "content": "Good morning"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    body = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "logprobs": 1}
    by_id = completed(url, **body, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]["tokens"]
    by_text = completed(url, **body)["choices"][0]["logprobs"]["tokens"]
    assert by_id[-1] == f"token_id:{tokenizer.eos_token_id}"
    assert len(by_text) == len(by_id) - 1
    after = completed(url, **{**body, "prompt": [*prompt, *(int(each[9:]) for each in by_id[:-1])]})
    assert after["choices"][0]["text"] == ""


def test_what_happens_anyway_may_be_said(url: str) -> None:
    body = {"prompt": "hello", "max_tokens": 2, "temperature": 0}
    said = completed(url, **body, repetition_penalty=1.0, top_k=-1, min_p=0.0, min_tokens=0, n=1, frequency_penalty=0)
    assert said["choices"][0]["text"] == completed(url, **body)["choices"][0]["text"]
    assert refused(url, **body, repetition_penalty=1.1) == "repetition_penalty"
    assert refused(url, **body, top_k=5) == "top_k"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"logprob_token_ids": [-1], "logprobs": 1}, "logprob_token_ids"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"bad_words": ["x"]}, "bad_words"),
    ],
)
def test_what_cannot_be_is_refused_by_name(url: str, given: dict[str, Any], param: str) -> None:
    assert refused(url, prompt="hello", **given) == param


def test_its_tokenizer_and_its_window_are_told_to_those_with_a_key() -> None:
    model, text = local(), "37 shells <|im_end|> naïve"
    key, line = new_key()
    tenants = Tenants({"ann": AgentEntry(keys=[line])})
    with serving_chat(model, tenants=tenants) as url:
        root, headers = url.removesuffix("/v1"), {"Authorization": f"Bearer {key}"}
        body = {"model": "s2t-demo", "prompt": text, "add_special_tokens": False}
        assert httpx.post(f"{root}/tokenize", json=body).status_code == 401
        told = httpx.post(f"{root}/tokenize", json=body, headers=headers).json()
        assert told["tokens"] == model.engine.slm.tokenizer.encode(text, add_special_tokens=False)
        [listed] = httpx.get(f"{url}/models", headers=headers).json()["data"]
        assert listed["max_model_len"] == told["max_model_len"] == model.engine.slm.context_window
        other = httpx.post(f"{root}/tokenize", json={**body, "model": "gpt"}, headers=headers)
        assert other.status_code == 404
