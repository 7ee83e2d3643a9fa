"""Arguments of a call and settings of the model: which are accepted, and which refused."""

import asyncio
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumps
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.runnables import RunnableLambda
from observers import cache_key, traced

from s2t_agents import Budget, ChatS2T, Ledger, LocalLLM
from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.errors import ConfigError, ModelNotFound
from s2t_agents.escalation import Escalation
from s2t_agents.testing import CHATML, ScriptedLLM, last_candidate, tiny_model, tiny_tokenizer
from s2t_agents.triggers import always


def chat(**settings: Any) -> ChatS2T:
    """Escalates at each of its four tokens, as far as the budget goes."""
    llm = Escalation(ScriptedLLM(last_candidate), margin=1.0)
    model = tiny_model(max_position_embeddings=4096)
    return ChatS2T(**{"model": model, "max_tokens": 4, "trigger": always(), "escalation": llm, **settings})


def by_invoke(model: Any, config: Any, /, **call: Any) -> BaseMessage:
    return model.invoke("hello", config, **call)


def by_ainvoke(model: Any, config: Any, /, **call: Any) -> BaseMessage:
    return asyncio.run(model.ainvoke("hello", config, **call))


def by_stream(model: Any, config: Any, /, **call: Any) -> BaseMessage:
    first, *rest = model.stream("hello", config, **call)
    return sum(rest, first)


def by_astream(model: Any, config: Any, /, **call: Any) -> BaseMessage:
    async def drain() -> BaseMessage:
        first, *rest = [chunk async for chunk in model.astream("hello", config, **call)]
        return sum(rest, first)

    return asyncio.run(drain())


def by_batch(model: Any, config: Any, /, **call: Any) -> BaseMessage:
    return model.batch(["hello"], config, **call)[0]


def by_abatch(model: Any, config: Any, /, **call: Any) -> BaseMessage:
    return asyncio.run(model.abatch(["hello"], config, **call))[0]


def by_events(model: Any, config: Any, /, **call: Any) -> BaseMessage:
    async def drain() -> BaseMessage:
        events = [event async for event in model.astream_events("hello", config, version="v2", **call)]
        return events[-1]["data"]["output"]

    return asyncio.run(drain())


def by_events_v3(model: Any, config: Any, /, **call: Any) -> BaseMessage:
    return model.stream_events("hello", config, version="v3", **call).output


def by_aevents_v3(model: Any, config: Any, /, **call: Any) -> BaseMessage:
    async def drain() -> BaseMessage:
        stream = await model.astream_events("hello", config, version="v3", **call)
        return await stream.output

    return asyncio.run(drain())


WAYS: list[Callable[..., BaseMessage]] = [
    by_invoke,
    by_ainvoke,
    by_stream,
    by_astream,
    by_batch,
    by_abatch,
    by_events,
    by_events_v3,
    by_aevents_v3,
]


# ---------------------------------------------------------------------- from the config


@pytest.mark.filterwarnings("ignore:.*is in beta")
@pytest.mark.parametrize("call", WAYS)
def test_a_config_handed_to_the_model_carries_budget_and_agent(call: Callable[..., BaseMessage]) -> None:
    model, own = chat(ledger=Ledger()), Budget(escalations=1)
    answer = call(model, {"configurable": {"s2t_budget": own, "s2t_agent": "critic"}})
    assert answer.response_metadata["s2t"]["escalations"] == own.state().spent["escalations"] == 1
    assert list(model.ledger.totals("agent")) == ["critic"]


@pytest.mark.parametrize("wrap", ["with_config", "bind", "bind_tools", "sequence"])
def test_it_does_so_through_what_langchain_makes_of_the_model(wrap: str) -> None:
    model, own = chat(), Budget(escalations=1)
    config = {"configurable": {"s2t_budget": own}}
    chains = {
        "with_config": lambda: model.with_config(config).invoke("hello"),
        "bind": lambda: model.bind(stop=["zzz"]).invoke("hello", config),
        "bind_tools": lambda: model.bind_tools([]).invoke("hello", config),
        "sequence": lambda: (RunnableLambda(lambda text: text) | model).invoke("hello", config),
    }
    chains[wrap]()
    assert own.state().spent["escalations"] == 1


def test_the_call_goes_before_the_config_and_the_config_before_the_node_around_it() -> None:
    model, node, config, call = chat(), *(Budget(escalations=1, name=name) for name in ("node", "config", "call"))
    given = {"configurable": {"s2t_budget": config}}

    def inside(how: Callable[[], object]) -> list[object]:
        RunnableLambda(lambda _: how()).invoke("", {"configurable": {"s2t_budget": node}})
        return [budget.state().spent["escalations"] for budget in (node, config, call)]

    assert inside(lambda: model.invoke("hello", given, s2t_budget=call)) == [0, 0, 1]
    assert inside(lambda: model.invoke("hello", given)) == [0, 1, 1]
    assert inside(lambda: model.invoke("hello", {"configurable": {"thread_id": "t"}})) == [1, 1, 1]


def test_a_configs_cache_scope_keeps_tenants_apart() -> None:
    model, text = chat(escalation=None), "hello " * 40
    reused = [
        model.invoke(text, {"configurable": {"s2t_cache_scope": scope}}).response_metadata["s2t"]["reused_tokens"]
        for scope in ("one", "two", "one")
    ]
    assert reused[:2] == [0, 0]
    assert reused[2] > 0


@pytest.mark.parametrize("call", [by_invoke, by_stream])
@pytest.mark.parametrize("said", ["config", "call"])
def test_tracers_and_caches_get_no_budget(call: Callable[..., BaseMessage], said: str) -> None:
    class Tracer(BaseCallbackHandler):
        def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
            seen.append(repr((args, kwargs)))

    seen: list[str] = []
    model, own = chat(callbacks=[Tracer()]), Budget(escalations=1)
    if said == "call":
        call(model, None, s2t_budget=own)
    else:
        call(model, {"configurable": {"s2t_budget": own}})
    assert len(seen) == 1
    assert "Budget" not in seen[0]


# ---------------------------------------------------------------------- of a call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"max_token": 3}, r"max_token is no argument of a call\. Did you mean max_tokens\?"),
        ({"tempreature": 1.0}, r"Did you mean temperature\?"),
        ({"functions": []}, r"functions is no argument of a call\. Calls take logprobs, max_tokens, .*tools"),
        ({"budget": Budget()}, r"budget is a setting of the model, not of a call\. Per call, use s2t_budget\."),
        ({"cache_scope": "a"}, r"Per call, use s2t_cache_scope\."),
        (
            {"ledger": Ledger()},
            r"ledger is a setting of the model, not of a call\. Say it in ChatS2T\(ledger=\.\.\.\)\.",
        ),
        ({"s2t_budget": 3}, r"s2t_budget is 3; it must be a Budget"),
        ({"s2t_budget": {"usd": 1}}, r"s2t_budget is \{'usd': 1\}"),
        ({"s2t_cache_scope": ["a"]}, r"s2t_cache_scope is \['a'\]; it must be a text"),
        ({"temperature": "0.5"}, r"temperature is '0\.5'; it must be 0 \(greedy\) or a positive number"),
        ({"top_p": "1"}, r"top_p is '1'; it must lie in \(0, 1\]"),
        ({"max_tokens": "3"}, r"max_tokens is '3'; at least 1 token"),
        ({"max_tokens": 2.5}, r"max_tokens is 2\.5"),
        ({"seed": 2**70}, r"seed is 1180591620717411303424; it must be a whole number of 64 bits"),
        ({"seed": "a"}, r"seed is 'a'"),
        ({"model": 3}, r"model is a int"),
        *(
            ({"logprobs": wrong}, rf"logprobs is {wrong!r}; it must be True or False.*logprobs=True, top_logprobs=")
            for wrong in (5, 0, 1, 2.5, "yes")
        ),
        ({"logprobs": 5, "top_logprobs": 5}, r"logprobs is 5; it must be True or False"),
        ({"top_logprobs": 3}, r"top_logprobs=3 needs logprobs=True"),
        ({"logprobs": False, "top_logprobs": 3}, r"top_logprobs=3 needs logprobs=True"),
        ({"logprobs": True, "top_logprobs": 21}, r"top_logprobs is 21; it must be a whole number from 0 to 20"),
        ({"logprobs": True, "top_logprobs": True}, r"top_logprobs is True; it must be a whole number from 0 to 20"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("how", [by_invoke, by_stream])
def test_what_a_call_cannot_mean_is_refused(
    how: Callable[..., BaseMessage], call: dict[str, Any], message: str
) -> None:
    model = chat(ledger=Ledger())
    with pytest.raises(ConfigError, match=message):
        how(model, None, **call)
    assert model.ledger.records() == []


def test_a_budget_in_the_config_must_be_one_too() -> None:
    with pytest.raises(ConfigError, match="s2t_budget is 'run'"):
        chat().invoke("hello", {"configurable": {"s2t_budget": "run"}})


def test_what_cannot_be_bound_beside_tools_is_refused_there() -> None:
    with pytest.raises(ConfigError, match="parallel_tool_call is no argument of a call"):
        chat().bind_tools([], parallel_tool_call=False)


@pytest.mark.parametrize(
    "call",
    [
        {"stream": False},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream_usage": True},
        {"strict": True},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False, "response_format": {"type": "text"}},
        {"ls_structured_output_format": {"kwargs": {"method": "json_mode"}, "schema": {"title": "t"}}},
        {"stop": ["zzz"], "max_tokens": 2, "temperature": 1, "top_p": 0.5, "seed": -1},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 0},
        {"logprobs": False, "top_logprobs": None},
        {"top_logprobs": 0},
        {"template_args": {"tools": None, "max_length": 7}},
        {"s2t_budget": None, "s2t_agent": None, "s2t_cache_scope": None, "temperature": None, "max_tokens": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("how", [by_invoke, by_ainvoke, by_stream])
def test_what_langchain_and_its_users_pass_is_accepted(how: Callable[..., BaseMessage], call: dict[str, Any]) -> None:
    assert how(chat(), None, **call).response_metadata["s2t"]["tokens"]


RESERVED = ("add_generation_prompt", "chat_template", "continue_final_message", "messages", "tokenize", "tools")


@pytest.mark.parametrize("name", RESERVED)
def test_template_args_that_are_no_variables_of_the_template_are_refused(name: str) -> None:
    """They name what a call gives itself, or switches of ``apply_chat_template``."""
    wrong = {"enable_thinking": False, name: True}
    message = f"template_args holds {name!r}"
    with pytest.raises(ConfigError, match=message):
        ChatS2T(model="never/loaded", template_args=wrong)
    model = chat(ledger=Ledger())
    for how in (by_invoke, by_stream):
        with pytest.raises(ConfigError, match=message):
            how(model, None, template_args=wrong)
    with pytest.raises(ConfigError, match=message):
        PromptEncoder(tiny_tokenizer(), template_args=wrong)
    assert model.ledger is not None
    assert model.ledger.records() == []


def test_documents_are_variables_of_the_template() -> None:
    source = CHATML + "{% for d in documents or [] %}{{ d.text }}{% endfor %}"
    encoder = PromptEncoder(
        tiny_tokenizer(), chat_template=source, template_args={"documents": [{"text": "Lamps: 85."}]}
    )
    assert "Lamps: 85." in encoder.render([HumanMessage("hello")])


# ---------------------------------------------------------------------- of a model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modle": 1}, r"ChatS2T takes no modle\. Did you mean model\?"),
        ({"s2t_budget": Budget()}, r"ChatS2T takes no s2t_budget"),
        ({"max_tokens": "many"}, r"max_tokens is 'many': Input should be a valid integer"),
        ({"budget": 3}, r"budget is 3: Input should be an instance of Budget"),
        ({"model": 3}, r"model is a int\. Give a directory, a hub id or a LanguageModel"),
        ({"device": "gpu"}, r"device is 'gpu'\. Say \"cpu\", \"cuda\""),
        ({"dtype": 3}, r"dtype is 3; it must name a floating torch dtype"),
        ({"seed": 2**70}, r"seed is 1180591620717411303424"),
        ({"selector": 3}, r"selector is a int"),
        ({"trigger": 3}, r"trigger is a int"),
        ({"api_key": ["sk-SECRET"]}, r"api_key is no such value: Input should be a valid string"),
        ({"model_kwargs": "hf_SECRET"}, r"model_kwargs is no such value: Input should be a valid dictionary"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_setting_cannot_be_is_one_line_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        ChatS2T(**{"model": "never/loaded", **settings})
    assert "\n" not in str(refused.value)
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize("name", ["gpt-4o-mini", "openai:gpt-4o", "anthropic/some-model", "llama3:8b"])
def test_a_name_of_no_model_here_says_how_those_elsewhere_are_named(name: str) -> None:
    here = r"a directory, a hub id .*, a \.gguf file, or vllm://host:port/name"
    elsewhere = r'ChatJudge\(init_chat_model\("openai:gpt-4o-mini"\)\).* OpenAILLM\(url, name\)'
    for model in (ChatS2T(model=name), chat().bind(model=name)):
        with pytest.raises(ModelNotFound, match=here) as refused:
            model.invoke("hello")
        assert "ChatJudge" not in str(refused.value)
    for llm in (name, LocalLLM(name), Escalation(LocalLLM(name))):
        with pytest.raises(ModelNotFound, match=elsewhere):
            chat(escalation=llm).invoke("hello")


@pytest.mark.parametrize("setting", ["model", "escalation"])
def test_a_path_where_nothing_is_remains_a_path(setting: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"Check that the directory holds") as refused:
        ChatS2T(**{"model": tiny_model(), setting: str(tmp_path / "nothing")}).invoke("hello")
    assert "ChatJudge" not in str(refused.value)


def test_none_is_the_default_and_a_path_is_a_path(tmp_path: Path) -> None:
    slm = tiny_model()
    slm.model.save_pretrained(tmp_path)
    slm.tokenizer.save_pretrained(tmp_path)
    model = ChatS2T(model=tmp_path, escalation=tmp_path, max_tokens=None, temperature=None, top_p=None)
    assert (model.max_tokens, model.temperature, model.top_p) == (512, 0.0, 1.0)
    assert model.model_name == str(tmp_path)
    assert model.invoke("hello", max_tokens=2).response_metadata["model_name"] == str(tmp_path)
    assert model.invoke("hello", max_tokens=2, model=tmp_path).response_metadata["model_name"] == str(tmp_path)
    assert len(model.runtimes) == 1
    assert pickle.loads(pickle.dumps(model)).model_name == str(tmp_path)


def test_secrets_are_neither_shown_nor_traced_nor_pickled_nor_in_cache_keys() -> None:
    kwargs = {"token": "hf_SECRET", "use_auth_token": "hf_SECRET", "revision": "main", "eos_token_id": 7}
    model = ChatS2T(model="never/loaded", model_kwargs=kwargs, api_key="sk-SECRET")
    trace = str(traced(model))
    for shown in (repr(model), str(model), dumps(model), trace, cache_key(model)):
        assert "SECRET" not in shown
    assert "'revision': 'main'" in trace
    assert "'eos_token_id': 7" in trace
    assert b"SECRET" not in pickle.dumps(model)
    assert pickle.loads(pickle.dumps(model)).model_kwargs == {"revision": "main", "eos_token_id": 7}
    assert model.model_copy().api_key == model.api_key


def test_the_models_own_listener_is_not_shown() -> None:
    assert "CallerHandler" not in repr(ChatS2T(model="never/loaded"))
