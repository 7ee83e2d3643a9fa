"""Secrets: no dump, pickle, repr, trace or cache key contains one, at any depth."""

from __future__ import annotations

import copy
import json
import pickle
import traceback
from collections import UserList, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.load import dumpd, dumps
from observers import cache_key, traced
from pydantic import SecretStr

from s2t_agents import ChatJudge, ChatS2T, Escalation, LocalLLM, OpenAILLM, triggers
from s2t_agents.errors import ConfigError
from s2t_agents.redaction import without_secrets
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import tiny_model

KEY = "S3CRET"
PLACES: list[dict[str, Any]] = [
    {"token": KEY},
    {"use_auth_token": KEY},
    {"hf_token": KEY},
    {"proxies": {"https": f"http://user:{KEY}@proxy:80"}},
    {"proxies": {"https": f"http://{KEY}@proxy"}},
    {"proxies": {"https": f"http://us@er:{KEY}@proxy"}},
    {"headers": {"Authorization": f"Bearer {KEY}"}},
    {"headers": [{"X-Api-Key": KEY}, {"Cookie": KEY}, {"Proxy-Authorization": KEY}]},
    {"storage_options": {"key": "id", "secret": KEY, "account_key": KEY, "sas_token": KEY}},
    {"a": ({"b": [{"password": KEY}]},)},
    {"config": {"tokens": {"access_token": KEY}}},
    {"endpoint": f"https://hub/?token={KEY}&x=1"},
    {"credentials": {"user": "u", "pass": KEY}},
    {"held": SecretStr(KEY)},
    {"pairs": [("Authorization", f"Bearer {KEY}"), ["x-api-key", KEY], (b"Cookie", KEY.encode())]},
    {"sent": {b"Authorization": KEY.encode(), "X-Custom": f"Bearer {KEY}"}},
    {"line": f"Authorization: Bearer {KEY}", "other": [f"X-Api-Key: {KEY}".encode()]},
    {"headers": {"X-Anything": KEY}, "extra_headers": [("X-Any", KEY)], "cookies": {"sid": KEY}},
    {"https": f"user:{KEY}@proxy:80"},
    {"url": f"http://user:{KEY}@proxy".encode()},
    {"url": f"http://user:a/{KEY}@proxy", "other": f"http://user:a#{KEY}@proxy", "third": f"http://user:a?{KEY}@proxy"},
    {"url": f"https://hub/?auth={KEY}&pass={KEY};pwd={KEY}#access_token={KEY}"},
    {"url": f"https://hub/?tok%65n={KEY}&X-Amz-Credential={KEY}&jwt={KEY}&code={KEY}"},
    {"environment": {"DB_PASS": KEY, "GITHUB_PAT": KEY, "JWT": KEY, "HF_TOKEN": KEY}},
    {"passphrase": KEY, "pwd": KEY, "signing_key": KEY, "ssh_key": KEY, "session_id": KEY, "service_account_json": KEY},
    {f"https://user:{KEY}@hub": 1},
    {"refreshToken": KEY, "idToken": KEY, "githubToken": KEY, "csrfToken": KEY, "dbPass": KEY, "proxyPass": KEY},
    {"apiKeys": [KEY], "api_keys": {"a": KEY}, "access_tokens": [KEY], "creds": KEY, "sas": KEY, "jwts": KEY},
    {"tokens": [KEY], "clientCredentials": KEY, "dbPwd": KEY},
    {"named headers": 1, "headers": [{"name": "X-Any", "value": KEY}]},
    {"env": [{"name": "TOKEN", "value": KEY}, {"key": "DB_PASS", "value": KEY}], "cookies": f"a={KEY}"},
    {"queue": deque([{"token": KEY}], 3), "list": UserList([{"a": deque([f"Bearer {KEY}"])}])},
    {"odd url": f"https://hub/?pw={KEY}&dbPass={KEY}", "a": f"https://u:{KEY} x@hub", "b": f"https://u:x\n{KEY}@hub"},
    {"aws_secret_access_key": KEY, "client_secret": [KEY], "apikey": KEY, "private_key": KEY.encode()},
]


def written(model: ChatS2T) -> dict[str, str]:
    """Everything that leaves the process."""
    return {
        "dump": repr(model.model_dump()),
        "json dump": repr(model.model_dump(mode="json", warnings=False, fallback=repr)),
        "json": model.model_dump_json(warnings=False, fallback=repr),
        "repr": repr(model),
        "str": str(model),
        "pickle": repr(pickle.dumps(model)),
        "copied": repr(pickle.dumps(copy.deepcopy(model))),
        "cache key": cache_key(model),
        "trace": repr(traced(model)),
        "dumpd": repr(dumpd(model)),
        "dumps": dumps(model),
        "dict": repr(model.dict()),
    }


@pytest.mark.parametrize("field", ["model_kwargs", "template_args", "metadata"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: next(iter(place)))
def test_no_writing_holds_a_secret(field: str, place: dict[str, Any]) -> None:
    model = ChatS2T(**{field: place})
    assert [name for name, text in written(model).items() if KEY in text] == []
    assert KEY in repr(getattr(model.model_copy(), field)) or "held" in place  # here it is still of use


class OwnSelector:
    """Without a repr of its own, which would show an address."""

    needs = ()

    def scores(self, proposal: Any) -> Any:
        return proposal.logits


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"escalation": LocalLLM("s2t-demo-llm", token=KEY)}, "LocalLLM('s2t-demo-llm')"),
        ({"escalation": Escalation(LocalLLM("s2t-demo-llm", token=KEY))}, "Escalation(llm=LocalLLM('s2t-demo-llm'), "),
        ({"escalation": OpenAILLM("https://h/v1", "m", api_key=KEY)}, "OpenAILLM("),
        ({"escalation": ChatJudge(ChatS2T(model="x", model_kwargs={"token": KEY}))}, "ChatJudge("),
        ({"escalation": Path("llm")}, "llm"),
        ({"selector": OwnSelector()}, "OwnSelector#"),
        ({"selector": Path("selector")}, "selector"),
        ({"trigger": triggers.entropy(above=0.5)}, "entropy(above=0.5)"),
        ({"trigger": triggers.when(lambda proposal: True) & triggers.entropy(above=0.5)}, "when("),
        ({"model": tiny_model()}, "LanguageModel("),
        ({"dtype": torch.bfloat16}, "torch.bfloat16"),
        ({"model_kwargs": {"quantization_config": OwnSelector(), "token": KEY}}, "OwnSelector#"),
        ({"model_kwargs": {"device_map": {"": torch.device("cpu")}, "max_memory": {0: "1GB"}}}, "device(type='cpu')"),
        ({"template_args": {"style": {"a", "b"}, "of": OwnSelector()}}, "OwnSelector#"),
    ],
)
def test_settings_that_are_objects_are_json_by_their_names(settings: dict[str, Any], shown: str) -> None:
    model = ChatS2T(**{"model": "/never/loaded", **settings})
    text = model.model_dump_json()
    (name,) = settings
    assert shown in str(json.loads(text)[name])
    assert json.loads(text) == model.model_dump(mode="json")
    assert KEY not in text
    assert "0x" not in text


def test_a_name_with_credentials_is_shown_without() -> None:
    model = ChatS2T(model=f"https://user:{KEY}@hub/model")
    said = written(model)
    assert [name for name in ("repr", "str", "dict", "cache key", "trace", "dumps") if KEY in said[name]] == []


URLS = [
    f"https://user:{KEY}@hub/v1",
    f"https://hub/v1?api_key={KEY}",
    f"vllm://user:{KEY}@127.0.0.1:1/m",
    f"vllm://{KEY}@127.0.0.1:1/m",
    f"vllm://127.0.0.1:1/m?token={KEY}",
]
MALFORMED_URLS = [
    f"https://hub:{KEY}/v1",
    f"https://hub/{KEY}/v1",
    f"https://[{KEY}]/v1",
    f"https://{KEY}/x.gguf",
    f"https://user:{KEY}@hub/v1#m",
    f"vllm://127.0.0.1:{KEY}/m",
    f"vllm://127.0.0.1:1/m#{KEY}",
    f"vllm://{KEY}",
    f"vllm://[{KEY}/m",
    f"vllm://127.0.0.1:1 {KEY}/m",
    f"vllm://127.0.0.1:1:{KEY}/m",
]
USES: dict[str, Callable[[str], Any]] = {
    "model": lambda url: ChatS2T(model=url).invoke("x"),
    "model with a file": lambda url: ChatS2T(model=url, model_kwargs={"gguf_file": "x.gguf"}).invoke("x"),
    "model on a device": lambda url: ChatS2T(model=url, device="cpu").invoke("x"),
    "selector": lambda url: ChatS2T(selector=url).invoke("x"),
    "escalation": lambda url: ChatS2T(escalation=url).invoke("x"),
    "local LLM": lambda url: ChatS2T(escalation=LocalLLM(url)).invoke("x"),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("url", [*URLS, *MALFORMED_URLS])
def test_a_url_that_is_refused_is_not_quoted(url: str, use: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        use(url)
    assert KEY not in str(caught.value)
    frames = traceback.TracebackException.from_exception(caught.value)
    while frames is not None:
        assert KEY not in str(frames)
        frames = frames.__cause__ or frames.__context__  # type: ignore[assignment]


@pytest.mark.parametrize("field", ["model", "selector"])
@pytest.mark.parametrize("url", URLS)
def test_no_writing_holds_what_is_secret_in_a_url(url: str, field: str) -> None:
    model = ChatS2T(**{field: url})
    assert [name for name, text in written(model).items() if KEY in text] == []
    assert KEY.encode() not in pickle.dumps(LocalLLM(url))


@pytest.mark.parametrize("url", [f"https://u:{KEY}@host/x?token={KEY}", *URLS])
def test_a_loaded_model_shows_its_name_without(url: str) -> None:
    loaded = tiny_model()
    model = LanguageModel(loaded.model, loaded.given_tokenizer, name=url)
    assert model.name == url
    assert KEY not in repr(model)
    assert KEY not in repr(ChatS2T(model=model))


def test_names_and_addresses_without_secrets_are_pickled_as_they_are() -> None:
    for name in ("acme/model@main", "/data/a;token=x/m", "vllm://127.0.0.1:1/acme/model@v2", "https://hub/v1"):
        model = pickle.loads(pickle.dumps(ChatS2T(model=name, selector=name)))
        assert (model.model, model.selector) == (name, name)


def test_what_is_no_secret_stays() -> None:
    plain = {
        "trust_remote_code": True,
        "token": True,
        "revision": "main",
        "max_tokens": 5,
        "tokenizer": "fast",
        "attn_implementation": "sdpa",
        "quantization_config": {"bits": 4, "tokenizer": "c4"},
        "url": "https://hub/a@b?x=1",
        "mail": "ann@example.org",
        "link": "mailto:ann@example.org",
        "server": "http://127.0.0.1:8000/a@b",
        "text": "Basic arithmetic: see http://hub:80/ and write to ann@example.org; token=5",
        "short": "Basic arithmetic",
        "pair": ("token", 5),
        "names": ["token", "key", "secret"],
        "labels": ["pass", "fail"],
        "headers": ["name", "age"],
        "padding_key": "right",
        "lines": "Note: bearer of good news",
        "bytes": b"abc",
        "keys": ("a", "b"),
        "bos_token_id": 3,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "suppress_tokens": [1, 2],
        "stop_tokens": ["x"],
        "extra_special_tokens": ["<a>"],
        "maxNewTokens": 5,
        "tokens": 7,
        "params": [{"name": "size", "value": "large"}],
        "queue": deque(["a"]),
        "said": "https://hub: mail ann@example.org, or http://hub:80 and write to ann@example.org",
    }
    assert without_secrets(plain) is plain
    assert pickle.loads(pickle.dumps(ChatS2T(model_kwargs=plain))).model_kwargs == plain


@pytest.mark.parametrize("place", PLACES, ids=lambda place: next(iter(place)))
def test_nor_does_a_local_llm(place: dict[str, Any]) -> None:
    llm = LocalLLM("s2t-demo-llm", **place)
    assert KEY not in repr(llm)
    assert KEY.encode() not in pickle.dumps(llm)
    assert [name for name, text in written(ChatS2T(escalation=llm)).items() if KEY in text] == []
