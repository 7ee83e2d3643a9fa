"""Secrets: no dump, pickle, repr, trace or cache key contains one, at any depth."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from langchain_core.load import dumpd, dumps
from observers import cache_key, traced
from pydantic import SecretStr

from s2t_agents import ChatS2T, LocalLLM
from s2t_agents.redaction import without_secrets

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


def test_a_name_with_credentials_is_shown_without() -> None:
    model = ChatS2T(model=f"https://user:{KEY}@hub/model")
    said = written(model)
    assert [name for name in ("repr", "str", "dict", "cache key", "trace", "dumps") if KEY in said[name]] == []


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
    }
    assert without_secrets(plain) is plain
    assert pickle.loads(pickle.dumps(ChatS2T(model_kwargs=plain))).model_kwargs == plain


@pytest.mark.parametrize("place", PLACES, ids=lambda place: next(iter(place)))
def test_nor_does_a_local_llm(place: dict[str, Any]) -> None:
    llm = LocalLLM("s2t-demo-llm", **place)
    assert KEY not in repr(llm)
    assert KEY.encode() not in pickle.dumps(llm)
    assert [name for name, text in written(ChatS2T(escalation=llm)).items() if KEY in text] == []
