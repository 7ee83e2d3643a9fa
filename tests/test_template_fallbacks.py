"""Template fallbacks: every given text is in the prompt, in another form if needed, or the call is refused."""

import copy
import json
from functools import cache

import pytest
from conversations import PLACES, control_ids, conversation, hostile_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from templates import FAMILIES, family

from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.errors import InputError
from s2t_agents.testing import CHATML, tiny_tokenizer

ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
TEMPLATES = {
    "keeps the last system": (
        "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.s = m.content %}"
        "{% endif %}{% endfor %}{{ ns.s }}{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}"
        "{% endfor %}<bot>"
    ),
    "keeps the first system": (
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}<bot>"
    ),
    "drops systems": "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}<bot>",
    "drops a system alone": (
        "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}<{{ m.role }}>"
        "{{ first if loop.first }}{{ m.content }}{% endfor %}<bot>"
    ),
    "alternates": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) or m.role == 'system' %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}<bot>"
    ),
    "pairs user and assistant": (
        "{% for m in messages[::2] %}{% if m.role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        "[{{ m.content }}]{% if messages[loop.index0 * 2 + 1] %}{{ messages[loop.index0 * 2 + 1].content }}{% endif %}"
        "{% endfor %}"
    ),
    "ends with a user": (
        "{% if messages[-1].role == 'assistant' %}{{ raise_exception('last must be user') }}{% endif %}" + ROLES
    ),
    "parts": (
        "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
        "{% endfor %}{% endfor %}<bot>"
    ),
    "parts of users, words of others": (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' %}{{ m.content[0].text }}{% else %}"
        "{{ m.content.strip() }}{% endif %}{% endfor %}<bot>"
    ),
    "no words beside calls": (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>"
        "{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
        "{% else %}{{ m.content }}{% endif %}{% endfor %}<bot>"
    ),
    "no arguments of calls": (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {"x": {{ c.function.arguments.x or 0 }}}}\n</tool_call>'
        "{% endfor %}{% endfor %}<bot>"
    ),
    "tools by name alone": (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}<{{ m.role }}>"
        "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
        "{% endfor %}<bot>"
    ),
}
CALL = {"id": "1", "name": "look", "args": {"where": "Oslo"}}
HISTORIES = {
    "late system": [SystemMessage("RULES"), HumanMessage("One"), AIMessage("Two"), SystemMessage("LATER"),
                    HumanMessage("Three")],
    "greeting first": [AIMessage("Hello!"), HumanMessage("A joke")],
    "greeting after the system": [SystemMessage("RULES"), AIMessage("Hello!"), HumanMessage("A joke")],
    "one system message": [SystemMessage("RULES")],
    "two system messages": [SystemMessage("RULES"), SystemMessage("LATER")],
    "one assistant message": [AIMessage("Hello!")],
    "neighbours": [HumanMessage("One"), HumanMessage("Two"), AIMessage("Three"), AIMessage("Four"),
                   HumanMessage("Five")],
    "assistant last": [HumanMessage("One"), AIMessage("Two")],
    "calls": [HumanMessage("One"),
              AIMessage("Looking", tool_calls=[CALL, {**CALL, "id": "2", "args": {"where": "Rome"}}]),
              ToolMessage("cold", tool_call_id="1"), ToolMessage("hot", tool_call_id="2"), AIMessage("So."),
              HumanMessage("Two")],
    "answered twice": [HumanMessage("One"), AIMessage("Looking", tool_calls=[CALL]),
                       ToolMessage("cold", tool_call_id="1"), ToolMessage("icy", tool_call_id="1")],
    "never answered": [HumanMessage("One"), AIMessage("", tool_calls=[CALL]), HumanMessage("Two")],
}  # fmt: skip


HARMLESS = dict.fromkeys(PLACES, "ok") | {"property": "p", "argument": "q", "call_id": "c", "choice": "r"}


@cache
def encoder(template, tokenizer=None):
    tokenizer = copy.deepcopy(tokenizer or tiny_tokenizer())
    tokenizer.chat_template = template
    return PromptEncoder(tokenizer)


def texts_of(messages):
    yield from (message.text for message in messages if message.text)
    for message in messages:
        for call in getattr(message, "tool_calls", ()):
            yield from (call["name"], *call["args"], *call["args"].values())


@pytest.mark.parametrize("template", [*TEMPLATES.values(), *FAMILIES], ids=[*TEMPLATES, *FAMILIES])
@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("with_tools", [False, True])
def test_every_text_is_in_the_prompt_once(template, history, with_tools):
    used = PromptEncoder(family(template)) if template in FAMILIES else encoder(template)
    _, tools = conversation()
    said = used.render(history, tools if with_tools else [])
    for text in texts_of(history):
        assert said.count(text) >= 1, said
    for message in history:
        assert said.count(message.text) == 1 or not message.text, said
    if with_tools:
        assert all(PLACES[place] in said for place in ("tool", "description", "property", "about", "choice"))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_arrangement_is_what_apply_chat_template_takes(template):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    own = PromptEncoder(tokenizer)
    messages, tools = conversation()
    used = own.render_conversation(messages, tools)
    expected = tokenizer.apply_chat_template(used.turns, tools=used.tools or None, add_generation_prompt=True)
    assert own.encode(messages, tools) == expected["input_ids"]


def test_a_template_that_takes_the_conversation_gets_it_as_it_is():
    messages, tools = conversation()
    used = encoder((family("qwen2_5")).chat_template, family("qwen2_5")).render_conversation(messages, tools)
    assert [turn["role"] for turn in used.turns] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert [turn["content"] for turn in used.turns] == [message.text for message in messages]
    assert used.tools == tools


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", r"Message 1 \(AIMessage\)"),
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", r"Message 0 \(HumanMessage\), Message 1"),
        ("Hello", r"Message 0 \(HumanMessage\), Message 1 \(AIMessage\), Message 2 \(HumanMessage\)"),
    ],
)
def test_what_no_form_shows_is_refused_by_name(template, says):
    talk = [HumanMessage("How are you?"), AIMessage("I am well."), HumanMessage("Good day")]
    with pytest.raises(InputError, match=f"leaves out text of: {says}"):
        encoder(template).encode(talk)


def test_a_text_is_missed_even_where_the_prompt_holds_the_same_words():
    with pytest.raises(InputError, match="Message 0"):
        encoder("system: {{ messages[-1].content }}").encode(
            [SystemMessage("system"), AIMessage("y"), HumanMessage("x")]
        )


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_hostile_text_in_any_place_leaves_the_control_tokens_as_they_are(name, data):
    tokenizer = with_more_tokens(name)
    used = encoder(tokenizer.chat_template, tokenizer)
    places = data.draw(st.sets(st.sampled_from(sorted(PLACES)), min_size=1), label="places")
    texts = {place: data.draw(hostile_texts(tokenizer), label=place) for place in sorted(places)}
    ids = used.encode(*conversation(**texts))
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, used.encode(*conversation(**HARMLESS)))


@cache
def with_more_tokens(name):
    tokenizer = copy.deepcopy(family(name))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|repo_name|>", "<file_sep>", "[INST]", "<table>"]})
    return tokenizer


def test_keys_that_a_template_looks_up_stay_as_they_are():
    template = (
        "{% for t in tools or [] %}{{ t.function.name }}{{ t.function.parameters.properties | join(',') }}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
        "{{ c.function.arguments.name }}{% endfor %}<|im_end|>{% endfor %}"
    )
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|name|>", "name", "function", "<|type|>"]})
    call = {"id": "1", "name": "name", "args": {"name": "<|name|>"}}
    talk = [HumanMessage("x"), AIMessage("", tool_calls=[call]), ToolMessage("function", tool_call_id="1")]
    own = encoder(template, tokenizer)
    said = own.render(talk)
    assert '{"name": "name", "arguments": {"name": "<|name|>"}}\n</tool_call><|name|>' in said
    names = tokenizer.convert_tokens_to_ids(["<|name|>", "function"])
    assert not set(names) & set(own.encode(talk))


def test_whole_messages_that_are_pieces_of_a_control_token_cost_nothing(monkeypatch):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|repo_name|>"]})
    own = encoder(CHATML, tokenizer)
    monkeypatch.setattr("s2t_agents.tokenization.safe_encoding.Tokenizer", None)  # the careful way needs it
    for word in ("x", "n", "name", "<", "im_end", "|"):
        assert (
            own.encode([HumanMessage(word)])
            == tokenizer.apply_chat_template([{"role": "user", "content": word}], add_generation_prompt=True)[
                "input_ids"
            ]
        )
    with pytest.raises(AttributeError):
        own.encode([HumanMessage("<|repo_name|>")])


def test_a_call_that_spells_the_end_of_a_thought_is_not_cut_there():
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and '</think>' in m.content %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    call = {"id": "1", "name": "write", "args": {"text": "Close it with </think>, then answer."}}
    history = [HumanMessage("x"), AIMessage("Writing.", tool_calls=[call]), ToolMessage("a</think>b", tool_call_id="1")]
    said = encoder(template).render(history)
    assert "Writing." in said
    assert '{"name": "write", "arguments": {"text": "Close it with <\\/think>, then answer."}}' in said
    assert "a</think>b" in said


RAW = (
    "{% if tools %}<tools>{% for t in tools %}\n{{ t.function.name }}: {{ t.function.description }}"
    "{% for k, v in t.function.parameters.properties.items() %}{{ k }}={{ v }}{% endfor %}\n\n"
    "{{ t | tojson }}\n{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>\n{{ m.name }}: {{ m.content }}\n</tool_response>"
    "{% else %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Prints definitions, calls and results as they are, beside their JSON."""
TEXTUAL = [CHATML, TEMPLATES["keeps the first system"], RAW]


@pytest.mark.parametrize("template", ["hermes", *TEXTUAL])
@pytest.mark.parametrize("closing", ["</tools>", "</ tools >", "< /TOOLS>", "</tool_call>", "</tool_response>"])
def test_no_text_closes_a_frame_of_letters(template, closing):
    """A tool's definition, a call's arguments and a result stay in their frames, and are the same JSON."""
    tokenizer = copy.deepcopy(family("llama3"))
    tokenizer.chat_template = family("qwen2_5").chat_template if template == "hermes" else template
    own = PromptEncoder(tokenizer)
    places = dict.fromkeys(("description", "about", "choice", "value", "result", "tool"), f"a{closing}b")
    evil, harmless = (own.render(*conversation(**texts)) for texts in (places, {}))
    assert own.features.supports_hermes_tools == (template in ("hermes", RAW))
    for tag in ("</tools>", "</tool_call>", "</tool_response>"):
        assert evil.lower().replace(" ", "").count(tag) == harmless.count(tag)
    signature = next(line for line in evil.splitlines() if line.startswith('{"type"'))
    assert json.loads(signature)["function"]["description"] == f"a{closing}b"
