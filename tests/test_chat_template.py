"""Chat templates: rendered as by transformers, within limits of time and memory; templates given by the user."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from observers import cache_key

from s2t_agents import ChatS2T
from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.errors import ConfigError, InputError
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import CHATML, tiny_model, tiny_tokenizer
from s2t_agents.tokenization import bounded_jinja
from s2t_agents.tokenization.chat_template import ChatTemplate

TEMPLATES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
CALL = {"type": "function", "id": "call00001", "function": {"name": "get", "arguments": {"x": "<é>", "y": [1, None]}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "hi <b>"},
    {"role": "assistant", "content": "", "reasoning_content": "why", "tool_calls": [CALL]},
    {"role": "tool", "content": "r", "name": "get", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "done"},
    {"role": "user", "content": "again"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get",
        "description": "gets",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
    },
}
ODD = {
    "generation": "{% for m in messages %}{% generation %}{% set x=1 %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "loops": "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{{ loop.length,m.role }}{% endfor %}",
    "recursive": "{% for m in [[1, [2, 3]], 4] recursive %}{{ loop(m) if m is iterable else m }}{% endfor %}",
    "macros": "{% macro f(x, y='z') %}{{ x ~ y ~ 1 ~ none }}{% endmacro %}{{ f('a') }}",
    "callers": "{% macro g() %}{{ caller() }}{% endmacro %}{% call g() %}in{{ messages[0].role }}{% endcall %}",
    "blocks": "{% set x %}{{ messages[0].content }}{% endset %}{{ x | upper }}{{ {'a': (1, 'é')} | tojson }}",
    "names": "{% set n = namespace(a=[]) %}{% for m in messages %}{% set n.a = n.a + [m.role] %}{% endfor %}{{ n.a }}",
    "formats": "{{ '%-5s|%03d' % ('a', 7) }}{{ '{:>4}'.format('x') }}{{ 'a\nb' | indent(2) }}{{ 1.55 | round(1) }}",
    "methods": "{{ ' a-b '.strip().split('-') | join(', ') }}{{ 'aXa'.replace('X', 'YY') }}{{ (1, 2) + (7 // 2,) }}",
    "undefined": "{{ nothing }}{{ bos_token }}{{ eos_token }}{% if messages[0].name is defined %}x{% endif %}.",
    "tuples": "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{% set a, b = 1, 2 %}{{ a + b }}{{ -a }}",
    "unpacked": "{{ dict(a=1, **{'b': 2}) }}{{ messages | map(attribute='role') | unique | list }}{{ [1, 2] | sum }}",
}


@pytest.mark.parametrize("source", [*[path.read_text() for path in TEMPLATES], *ODD.values()])
@pytest.mark.parametrize("tools", [[], [TOOL]], ids=["", "tools"])
def test_it_renders_what_transformers_renders(source: str, tools: list[Any]) -> None:
    tokenizer = tiny_tokenizer()
    refused = 0
    for turns in (CONVERSATION, CONVERSATION[:1], [{"role": "system", "content": "s"}, *CONVERSATION]):
        given = {"tools": tools or None, "add_generation_prompt": True}
        try:
            theirs = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=source, **given)
        except Exception:  # noqa: BLE001  whatever a template does
            refused += 1
            with pytest.raises(TemplateError):
                rendered(source, turns, tools, documents=None, add_generation_prompt=True)
        else:
            assert rendered(source, turns, tools, documents=None, add_generation_prompt=True) == theirs
    assert refused < 3


def grows(step: str, start: str = "'ab'") -> str:
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range(999) %}}{step}{{% endfor %}}{{{{ ns.x }}}}"


ENDLESS = {
    "power": "{{ 9**999999999 }}",
    "power of powers": "{{ 9**(9**(9**9)) }}",
    "squares": grows("{% set ns.x = ns.x * ns.x %}", "10"),
    "loops in loops": "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4,
    "a loop in itself": "{% for a in range(9) recursive %}{{ loop(range(9)) if loop.depth < 99 }}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "joined": grows("{% set ns.x = ns.x ~ ns.x %}"),
    "added": grows("{% set ns.x = ns.x + ns.x %}"),
    "written": grows("{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}"),
    "lists of themselves": grows("{% set ns.x = [ns.x, ns.x] %}"),
    "mappings of themselves": grows("{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    "views of themselves": grows("{% set ns.x = {'a': ns.x, 'b': ns.x}.items() %}"),
    "repeated": "{{ 'a' * 10**12 }}",
    "a list repeated": "{{ 10**12 * [1] }}",
    "padded": "{{ 'a'.ljust(10**10) }}",
    "padded by filter": "{{ 'a' | center(10**10) }}",
    "padded by printf": "{{ '%9999999999d' % 1 }}",
    "padded by argument": "{{ '%*d' | format(999999999, 1) }}",
    "padded by format": "{{ '{:9999999999}'.format(1) }}",
    "padded by map": "{{ '{0:{1}}'.format(1, 9999999999) }}",
    "replaced": "{% set x = 'a' * 9999 %}{{ x.replace('a', x).replace('a', x) }}",
    "interleaved": "{% set x = 'a' * 9999 %}{{ x.join(x.join(x)) }}",
    "filled up": "{{ [1] | batch(10**10, 'x') | list }}",
    "indented": "{{ [[1]] | tojson(indent=10**10) }}",
    "tabs": "{{ '\t'.expandtabs(10**10) }}",
    "rounded": "{{ 1.5 | round(10**9, 'ceil') }}",
    "summed": "{{ range(99999) | batch(1) | sum(start=[]) }}",
    "selected": "{{ range(99999) | select('in', range(99999) | map('string') | list) | list }}",
    "raw text": "{% for i in range(99999) %}" + "x" * 99_999 + "{% endfor %}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_what_would_not_end_is_one_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_jinja, "MAX_CPU_SECONDS", 0.25)
    with pytest.raises(ConfigError, match=r"The chat template .* chat_template="):
        ChatS2T(model=tiny_model(), chat_template=source + "{{ messages[0].content }}").invoke("hello")


@pytest.mark.parametrize(
    "source",
    [
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ messages[7].x.y }}",
        "{{ messages + 1 }}",
        "{% include 'other' %}",
        "{{ raise_exception('no') }}",
        "{# says nothing #}",
        "{{ messages.__class__.__mro__ }}",
    ],
)
def test_a_template_that_fails_on_every_arrangement_refuses_the_messages(source: str) -> None:
    with pytest.raises(InputError, match="The chat template refuses these messages"):
        ChatS2T(model=tiny_model(), chat_template=source).invoke("hello")


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ 'open", "{{ x | no_such_filter }}", "{{ " + "(" * 9999 + " }}", "{#" * 300_000]
)
def test_a_template_that_does_not_parse_is_refused_at_once(source: str) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        ChatS2T(model="/never/loaded", chat_template=source)


def rendered(source: str, turns: Any, tools: Any = (), **more: Any) -> str:
    special = tiny_tokenizer().special_tokens_map
    return str(ChatTemplate(source).render({**special, "messages": turns, "tools": list(tools) or None, **more}))


def test_a_long_conversation_is_within_the_bounds() -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": "word " * 2000} for i in range(400)]  # 4 MB
    for path in TEMPLATES:
        assert len(rendered(path.read_text(), turns)) > 4_000_000


# ------------------------------------------------------------------ chat_template=


def base(template: Any = None, *, name: str = "base") -> LanguageModel:
    """A model with this template of its tokenizer's own, by default none, as a base model."""
    import copy

    tokenizer = copy.copy(tiny_tokenizer())
    tokenizer.chat_template = template
    return LanguageModel(tiny_model().model, tokenizer, name=name)


def test_a_base_model_says_what_it_needs_and_runs_with_it() -> None:
    with pytest.raises(ConfigError, match="no chat template.*chat_template="):
        ChatS2T(model=base()).invoke("hello")
    with_it = ChatS2T(model=base(), chat_template=CHATML, max_tokens=8)
    assert with_it.invoke("hello").content == ChatS2T(model=tiny_model(), max_tokens=8).invoke("hello").content


def test_it_takes_the_place_of_the_tokenizers_own_in_counting_as_in_running() -> None:
    shouting = CHATML.replace("m.content", "m.content | upper")
    encoder = PromptEncoder(tiny_tokenizer(), chat_template=shouting)
    assert "HELLO" in encoder.render([HumanMessage("hello")])
    messages = [SystemMessage("s"), HumanMessage("hello"), AIMessage("x")]
    longer = ChatS2T(model=tiny_model(), chat_template=CHATML.replace("\n", "\n\n"))
    plain = ChatS2T(model=tiny_model())
    assert longer.get_num_tokens_from_messages(messages) > plain.get_num_tokens_from_messages(messages)
    assert (
        longer.invoke(messages).usage_metadata["input_tokens"] > plain.invoke(messages).usage_metadata["input_tokens"]
    )


def test_a_calls_own_variables_reach_it() -> None:
    said = CHATML.replace("assistant\n{%", "{{ 'assistant' if not loud else 'ASSISTANT' }}\n{%")
    chat = ChatS2T(model=base(), chat_template=said, max_tokens=4, temperature=1.0, seed=1)
    plain = ChatS2T(model=tiny_model(), max_tokens=4, temperature=1.0, seed=1)
    assert chat.invoke("hello").content == plain.invoke("hello").content
    assert chat.invoke("hello", template_args={"loud": True}).content != plain.invoke("hello").content


HERMES = (Path(__file__).parent / "templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
OTHER_CALLS = CHATML.replace("m.content }}", "m.content }}{% for c in m.tool_calls or [] %}[CALL]{% endfor %}")
NAMED = {
    "in another form": ({"default": CHATML, "tool_use": "{{ tools | tojson }}" + OTHER_CALLS}, True),
    "calls in another form": ({"default": HERMES, "tool_use": "{{ tools | tojson }}" + OTHER_CALLS}, True),
    "no tools at all": ({"default": HERMES, "tool_use": CHATML}, True),
    "refuses": ({"default": CHATML, "tool_use": "{{ raise_exception('no') }}"}, True),
    "the form of Hermes": ({"default": CHATML, "tool_use": HERMES}, False),
    "another name": ({"default": CHATML, "rag": OTHER_CALLS}, False),
    "one template": (OTHER_CALLS, False),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_template_for_tools_that_is_passed_over_is_named_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    template, passed_over = NAMED[name]
    for _ in range(2):
        ChatS2T(model=base(template, name=name), max_tokens=1).bind_tools([TOOL]).invoke("hello")
    warnings = [record.getMessage() for record in caplog.records if "'tool_use'" in record.getMessage()]
    assert len(warnings) == passed_over
    assert all("Hermes" in warning and "chat_template=" in warning for warning in warnings)


def test_a_template_for_tools_in_the_place_of_a_given_one_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    model = base(NAMED["in another form"][0], name="given another")
    ChatS2T(model=model, chat_template=HERMES, max_tokens=1).bind_tools([TOOL]).invoke("hello")
    assert "'tool_use'" not in caplog.text


def test_a_file_is_read_once_and_travels_as_text(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(CHATML, encoding="utf-8")
    models = [ChatS2T(model="x", chat_template=file), ChatS2T(model="x", chat_template=str(file))]
    file.unlink()
    again = pickle.loads(pickle.dumps(models[0]))
    assert {model.chat_template for model in [*models, again]} == {CHATML}


def test_another_template_is_another_model_to_a_cache() -> None:
    keys = [cache_key(ChatS2T(model="x", chat_template=source)) for source in (None, CHATML, CHATML + "\n")]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("given", ["/no/such.jinja", Path("/no/such"), "", Path("/dev/zero"), Path("/")])
def test_what_is_neither_a_template_nor_a_file_is_refused_by_name(given: Any) -> None:
    with pytest.raises(ConfigError, match="chat_template is"):
        ChatS2T(model="/never/loaded", chat_template=given)
