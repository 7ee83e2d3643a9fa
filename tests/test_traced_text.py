"""Taint tracking of templates: the text equals Jinja's, and the origin of each character is right."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from s2t_agents.errors import ConfigError
from s2t_agents.tokenization.chat_template import ChatTemplate
from s2t_agents.tokenization.traced_text import Sources, template_spans

OUTSIDE = "ab<>/ \n\"'\\{}%\u00e9"  # no letter of these is written by a template below: they write X, Y and Z

EXACT = [
    "X{{ c }}Y",
    "{{ 'X' + c | trim + 'Y' }}",
    "{{ 'X' ~ c ~ 1 ~ 'Y' }}",
    "{{ 'X%sY' % c }}{{ '%s%dZ' % (c, 3) }}",
    "{{ 'X{}Y'.format(c) }}{{ 'X{k}Z'.format(k=c) }}",
    "{{ ['X', c] | join('Y') }}{{ 'Y'.join(['X', c]) }}",
    "{{ [{'k': c}, {'k': 'X'}] | join('Y', attribute='k') }}",
    "{{ (c + 'X' + c).split('X') | join('Z') }}",
    "{{ c.split('<')[-1] }}X{{ c.split()[0] if c.split() }}Y{{ c.rsplit('a', 1)[0] }}Z{{ c.split('<', 1)[0] }}",
    "{{ c.partition('a')[2] }}X{{ c.rpartition('a')[0] }}",
    "{{ c.splitlines() | join('X') }}{{ c.splitlines(True) | join('Y') }}",
    "{{ c.replace('a', 'X').replace('X', c) }}{{ ('X' + c) | replace('b', 'Y') }}",
    "{% set s %}X{{ c }}{% endset %}{{ s | trim }}Y",
    "{% macro say(role, text) %}X{{ role }}{{ text }}{{ caller() if caller }}{% endmacro %}{{ say('Y', c) | trim }}"
    "{% call say('Z', c) %}Y{{ c }}{% endcall %}",
    "{{ ('X' + c + 'Y')[1:] }}{{ ('X' + c)[:3] }}{{ c[::-1] }}{{ c[0] }}{{ c[-1] }}",
    "{% for x in c %}{{ x }}Z{% endfor %}",
    "{{ c.strip('<a') }}X{{ c.lstrip() }}Y{{ c.rstrip('>') }}",
    "{{ c.removeprefix('a') }}X{{ c.removesuffix('b') }}",
    "{% set ns = namespace(s='X') %}{% for i in range(2) %}{% set ns.s = ns.s + c %}{% endfor %}{{ ns.s }}",
    "{% generation %}X{{ c }}{% endgeneration %}",
    "{{ c * 2 }}X{{ c | default('Y') }}{{ none_such | default('Y') }}{{ c | first }}{{ c | last }}",
    "{{ c if '<' in c and c.startswith('a') or c == ' ' else 'X' }}{{ c | length }}",
    "{{ dict(k=c).k }}X{{ {'k': c}['k'] }}{% for k, v in {c: 'Y'}.items() %}{{ k }}{{ v }}{% endfor %}",
    "{{ [c, 'X'] | map('trim') | join }}{{ [c, c] | unique | join('Y') }}",
    "{% filter trim %}X{{ c }}{% endfilter %}",
]
WHOLE = [
    "{{ c | upper }}{{ c.upper() }}{{ c | title }}{{ c | indent(2) }}{{ c.center(40) }}",
    "{{ c | tojson }}{{ {c: [c, 1]} | tojson(indent=2) }}{{ [c] | tojson(ensure_ascii=True) }}",
    "{{ {'k': c} }}{{ [c] | string }}{{ (c,) }}",
    "{{ c | e }}{{ c | truncate(5) }}{{ '%5s' % c }}{{ c.zfill(9) }}{{ c | urlencode }}",
]


def rendered(template, text):
    return ChatTemplate(template).render({"c": Sources().text(text, "The text"), "messages": []})


@pytest.mark.parametrize("template", EXACT + WHOLE)
@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet=OUTSIDE, min_size=1, max_size=12))
def test_the_text_is_jinjas_and_each_character_has_its_origin(template, text):
    template += "-"  # a template that writes nothing is refused
    said = rendered(template, text)
    [[expected], _] = render_jinja_template(conversations=[[]], chat_template=template, c=text)
    assert said == expected
    as_traced = {at for start, end in template_spans(said) for at in range(start, end)}
    assert not any(char in OUTSIDE for at, char in enumerate(expected) if at in as_traced and not char.isspace())
    if template.removesuffix("-") in EXACT:
        assert all(at in as_traced for at, char in enumerate(expected) if char in "XYZ")


@given(text=st.text(alphabet=OUTSIDE, min_size=1, max_size=12), low=st.integers(0, 12), high=st.integers(0, 12))
def test_what_a_template_leaves_out_is_known(text, low, high):
    sources = Sources()
    template = ChatTemplate(f"{{{{ c[:{low}] }}}}-{{{{ c[{high}:] }}}}")
    said = template.render({"c": sources.text(text, "It")})
    assert sources.left_out(said) == (["It"] if text[low:high].strip() else [])


def test_equal_texts_are_told_apart():
    sources = Sources()
    first, _second = sources.text("same", "First"), sources.text("same", "Second")
    assert sources.left_out(ChatTemplate("{{ c }}{{ c }}same").render({"c": first})) == ["Second"]


def test_white_space_and_what_is_not_needed_may_be_left_out():
    sources = Sources()
    thought = sources.text("<think>x</think>y", "It", needed_from=16)
    space = sources.text(" \n", "Space")
    said = ChatTemplate("{{ c.split('</think>')[-1] }}{{ s | trim }}").render({"c": thought, "s": space})
    assert sources.left_out(said) == []
    assert sources.left_out("") == ["It"]


@pytest.mark.parametrize("template", ["{{ c.__class__ }}", "{{ c._runs }}", "{{ c.split.__globals__ }}"])
def test_templates_stay_in_the_sandbox(template):
    with contextlib.suppress(TemplateError):
        assert rendered(template, "a") == ""


@pytest.mark.parametrize(
    "template", ["{% set ns = namespace(_x=1) %}", "{{ [].append(1) }}", "{{ raise_exception('x') }}"]
)
def test_what_the_sandbox_forbids_is_an_error(template):
    with pytest.raises(TemplateError):
        rendered(template, "a")


def test_text_does_not_become_the_templates_own_through_bytes():
    with pytest.raises(TemplateError, match="bytes"):
        rendered("{{ c.encode().decode() }}", "a")


def test_a_template_that_does_not_compile_is_a_config_error():
    with pytest.raises(ConfigError, match="cannot be compiled"):
        ChatTemplate("{% for %}")
