"""JSON schemas of all drafts: enforced as far as a grammar can, relaxed and noted beyond, validated as a whole."""

import copy
import json
import random
from typing import Any

import jsonschema
import pytest
from random_schemas import object_schema, schema
from templates import family

from s2t_agents.errors import BadSchema, ConfigError
from s2t_agents.grammar.canonical_schema import canonicalize
from s2t_agents.grammar.grammar import json_grammar
from s2t_agents.grammar.relaxation import relax_schema
from s2t_agents.grammar.shortest_value import ShortestValue, shortest_value
from s2t_agents.grammar.validation import SchemaValidator
from s2t_agents.grammar.vocabulary import cached_vocabulary

TAGGED = "qwen2_5"
STRING: dict[str, Any] = {"type": "string"}


def of(field: Any, **more: Any) -> dict[str, Any]:
    """An object whose one property is asked for."""
    return {"type": "object", "properties": {"x": field}, "required": ["x"], **more}


def takes(asked: dict[str, Any], value: Any) -> bool:
    """Whether the grammar of a schema takes a value, as ``json.dumps`` writes it."""
    grammar = json_grammar(cached_vocabulary(family(TAGGED)), asked)
    state = grammar.start()
    for token in grammar.vocabulary.encode_answers([[json.dumps(value, ensure_ascii=False)]])[0]:
        if not state.takes(token):
            return False
        state.accept(token)
    return bool(state.finished or state.allowed()[list(grammar.vocabulary.eos_ids)].any())


def fits(asked: dict[str, Any], value: Any) -> bool:
    return not SchemaValidator(canonicalize(asked).schema).error_of(value)


RELAXED = {
    "uniqueItems": ({"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True}, ["a", "b"], ["a", "a"]),
    "not": ({**STRING, "not": {"const": ""}}, "a", ""),
    "if": ({"type": "integer", "if": {"minimum": 5}, "then": {"multipleOf": 5}}, 10, 7),
    "contains": ({"type": "array", "items": STRING, "contains": {"const": "a"}}, ["b", "a"], ["b"]),
    "dependentRequired": (
        {"type": "object", "properties": {"a": STRING, "b": STRING}, "dependentRequired": {"a": ["b"]}},
        {"a": "", "b": ""},
        {"a": ""},
    ),
    "dependentSchemas": (
        {"type": "object", "properties": {"a": STRING, "b": STRING}, "dependencies": {"a": {"required": ["b"]}}},
        {"a": "", "b": ""},
        {"a": ""},
    ),
    "oneOf": ({"oneOf": [STRING, {"type": "string", "maxLength": 3}]}, "long enough", "ab"),
    "propertyNames": (
        {"type": "object", "propertyNames": {"maxLength": 2}, "additionalProperties": STRING},
        {"ab": ""},
        {"abc": ""},
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"a": STRING, "b": {"maxLength": 2}}, "additionalProperties": False},
        {"ab": "xy"},
        {"ab": "xyz"},
    ),
    "minProperties": ({"type": "object", "properties": {"a": STRING, "b": STRING}, "minProperties": 2},
                      {"a": "", "b": ""}, {"a": ""}),
    "unevaluatedProperties": (
        {"type": "object", "allOf": [{"properties": {"a": STRING}}], "unevaluatedProperties": False},
        {"a": ""},
        {"a": "", "b": 1},
    ),
    "lookahead": ({**STRING, "pattern": r"^(?!.*\.\.)[\w./]+$"}, "a/b.txt", "a/../b"),
    "backreference": ({**STRING, "pattern": r"^(a|b)\1$"}, "aa", "ab"),
    "word boundary": ({**STRING, "pattern": r"\bcat\b"}, "a cat", "concat"),
    "format": ({**STRING, "format": "path"}, "a/b", 3),
}  # fmt: skip


@pytest.mark.parametrize("name", RELAXED)
def test_what_a_grammar_can_not_enforce_is_relaxed_told_and_checked(name: str) -> None:
    field, good, bad = RELAXED[name]
    ready = relax_schema(of(field), "it")
    assert takes(of(field), {"x": good})
    assert fits(of(field), {"x": good})
    assert not fits(of(field), {"x": bad})
    assert takes(of(field), {"x": bad}) == (name != "format" and bool(ready.notes))
    assert all(note.endswith("(not checked)") == (name == "format") for note in ready.notes)
    if ready.notes:
        assert all(note.startswith("x") for note in ready.notes)


@pytest.mark.parametrize(
    ("field", "place"),
    [
        ({"type": "array", "items": {"type": "array", "uniqueItems": True}}, "x[]: uniqueItems"),
        ({"type": "object", "properties": {"y": {"not": {"type": "null"}}}}, "x.y: not"),
        ({"anyOf": [{"type": "null"}, {**STRING, "format": "color"}]}, 'x: format "color"'),
        ({"$ref": "#/$defs/n"}, 'n.t: format "tag"'),
        ({"$ref": "https://example.com/schema"}, 'x: $ref "https://example.com/schema"'),
        ({"$ref": "#/$defs/nowhere"}, 'x: $ref "#/$defs/nowhere"'),
        ({"type": "no-such-type"}, 'x: type "no-such-type"'),
        ({**STRING, "pattern": "(?=a)b"}, 'x: pattern "(?=a)b" (look-around'),
    ],
)
def test_notes_name_the_place_the_keyword_and_the_value(field: dict[str, Any], place: str) -> None:
    defs = {"n": {"type": "object", "properties": {"t": {**STRING, "format": "tag"}}}}
    assert any(place in note for note in relax_schema(of(field, **{"$defs": defs}), "it").notes)


def test_it_is_told_in_the_log_once_per_schema(caplog: pytest.LogCaptureFixture) -> None:
    asked = of({"type": "array", "uniqueItems": True, "title": "of this test alone"})
    for _ in range(3):
        relax_schema(asked, "the arguments of tool 'once'")
    (told,) = [record.getMessage() for record in caplog.records if "'once'" in record.getMessage()]
    assert "x: uniqueItems" in told


@pytest.mark.parametrize(
    "field",
    [
        {"type": "array", "items": STRING, "uniqueItems": False},
        {
            "type": "number",
            "default": float("inf"),
            "minimum": float("-inf"),
            "title": "t",
            "examples": [1],
            "x-own": 3,
        },
        {**STRING, "deprecated": True, "contentEncoding": "base64", "readOnly": True, "$comment": "c"},
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "integer"}},
        {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": {"type": "integer"}},
        {"oneOf": [STRING, {"type": "integer"}]},
        {"type": "array", "items": [STRING], "additionalItems": False},
        {"type": "number", "minimum": 1, "exclusiveMinimum": True},
        {**STRING, "nullable": True},
        {"type": "dict", "properties": {"a": {"type": "float"}, "b": {"type": "tuple", "items": {"type": "any"}}}},
        {"type": "OBJECT", "properties": {"a": {"type": "STRING"}}},
        {"type": "object", "unevaluatedProperties": False, "properties": {"a": STRING}},
    ],
)
def test_what_says_nothing_or_can_be_said_otherwise_is_no_relaxation(field: dict[str, Any]) -> None:
    assert relax_schema(of(field), "it").notes == ()


def test_older_spellings_mean_what_they_mean() -> None:
    asked = of({"type": "number", "minimum": 1, "exclusiveMinimum": True})
    assert takes(asked, {"x": 2})
    assert not takes(asked, {"x": 1})
    asked = of({"type": "array", "items": [STRING, {"type": "integer"}], "additionalItems": False})
    assert takes(asked, {"x": ["a", 1]})
    assert not takes(asked, {"x": ["a", 1, 2]})
    asked = of({**STRING, "nullable": True})
    assert takes(asked, {"x": None})
    asked = {"type": "object", "properties": {"a": {**STRING, "required": True}, "b": STRING}}  # draft 3
    assert not takes(asked, {"b": "x"})
    asked = of({"type": "dict", "properties": {"a": {"type": "float"}}, "required": ["a"]})
    assert takes(asked, {"x": {"a": 1.5}})
    assert not takes(asked, {"x": {"a": "1.5"}})


@pytest.mark.parametrize("reference", ["#/$defs/n", "#n", "https://example.com/own.json#/$defs/n", "own.json#n"])
def test_references_are_followed_however_they_are_written(reference: str) -> None:
    node = {"$anchor": "n", "type": "object", "properties": {"next": {"$ref": reference}, "v": {"type": "integer"}}}
    asked = of({"$ref": reference}, **{"$defs": {"n": node}, "$id": "https://example.com/own.json"})
    assert relax_schema(asked, "it").notes == ()
    assert takes(asked, {"x": {"next": {"next": {}, "v": 1}}})
    assert not takes(asked, {"x": {"next": {"next": 3}}})
    assert not fits(asked, {"x": {"next": {"v": "3"}}})


def test_a_circle_of_references_with_keywords_beside_them_binds() -> None:
    node = {"type": "object", "properties": {"child": {"$ref": "#/$defs/node", "minProperties": 1}, "v": STRING}}
    asked = of({"$ref": "#/$defs/node"}, **{"$defs": {"node": node}})
    assert takes(asked, {"x": {"child": {"v": "a"}}})
    assert not fits(asked, {"x": {"child": {}}})


def test_objects_that_must_fit_several_schemas_are_not_closed_against_each_other() -> None:
    base = {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}
    asked = of({"allOf": [{"$ref": "#/$defs/base"}, {"properties": {"name": STRING}, "required": ["name"]}]})
    asked["$defs"] = {"base": base}
    assert takes(asked, {"x": {"id": 1, "name": "a"}})
    assert not takes(asked, {"x": {"id": 1}})
    asked = of({**base, "anyOf": [{"properties": {"b": STRING}, "required": ["b"]}, {"required": ["c"]}]})
    assert takes(asked, {"x": {"id": 1, "b": "a"}})


def test_a_required_name_without_a_property_takes_any_value() -> None:
    asked = {"type": "object", "properties": {"a": STRING}, "required": ["a", "b"]}
    assert takes(asked, {"a": "", "b": [1]})
    assert not takes(asked, {"a": ""})


@pytest.mark.parametrize("block", range(4))
def test_whatever_fits_the_original_fits_the_grammar(block: int) -> None:
    """Values drawn from schemas, with keywords on top that a grammar cannot enforce."""
    words = cached_vocabulary(family(TAGGED))
    for seed in range(25 * block, 25 * block + 25):
        r = random.Random(f"superset {seed}")
        asked = spoilt(r, schema(r) if r.random() < 0.5 else object_schema(r, 1))
        try:
            grammar = json_grammar(words, asked)
        except BadSchema:
            continue
        plain = json_grammar(words, {key: asked[key] for key in asked if key not in SPOILERS})
        text = words.llguidance_tokenizer.decode_str(plain.shortest(400) or [])
        if text and fits(asked, json.loads(text)):
            state = grammar.start()
            for token in words.encode_answers([[text]])[0]:
                assert state.takes(token), (asked, text)
                state.accept(token)


SPOILERS: dict[str, Any] = {
    "not": {"const": "never"},
    "uniqueItems": True,
    "if": {"type": "null"},
    "then": {"enum": [None]},
    "dependentRequired": {"name": ["city"]},
    "propertyNames": {"maxLength": 60},
    "contains": {},
    "minProperties": 0,
    "x-own": 1,
}


def spoilt(r: random.Random, asked: dict[str, Any]) -> dict[str, Any]:
    return {**copy.deepcopy(asked), **{key: SPOILERS[key] for key in SPOILERS if r.random() < 0.3}}


FORMATS = {
    "date": (["2024-02-29", "2000-02-29", "0004-02-29", "9999-12-31"], ["2023-02-29", "1900-02-29", "0000-01-01"]),
    "time": (["23:59:59Z", "00:00:00.125+23:59"], ["10:00:60Z", "24:00:00Z", "10:00:00"]),
    "date-time": (
        ["2024-02-29T10:00:00Z", "0001-01-01t00:00:00.5-01:00"],
        ["2023-02-29T10:00:00Z", "0000-01-01T00:00:00Z", "2023-01-01T10:00:60Z", "2023-01-01"],
    ),
    "uuid1": (["00000000-0000-1000-8000-00000000000a"], ["00000000-0000-4000-8000-000000000000", "a"]),
    "uuid4": (["00000000-0000-4000-b000-00000000000A"], ["00000000-0000-1000-8000-000000000000", "a"]),
    "uuid8": (["00000000-0000-8000-8000-000000000000"], ["00000000-0000-8000-7000-000000000000", "a"]),
    "base64": (["", "YQ==", "YWI=", "YWJj"], ["Y", "YQ=", "Y Q="]),
    "base64url": (["YQ==", "YQ", "_-8="], ["Y", "/w=="]),
    "json-pointer": (["", "/a~1b/0"], ["a", "/~2"]),
    "relative-json-pointer": (["0#", "1/a"], ["/a", "01"]),
    "idn-email": (["ä@ö"], ["ä", "@"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_held_by_the_grammar_and_by_the_check(name: str) -> None:
    good, bad = FORMATS[name]
    for asked in (of({**STRING, "format": name}), of({**STRING, "format": name, "pattern": "^(?:.|\\n)*$"})):
        assert relax_schema(asked, "it").notes == ()
        for text in (*good, *bad):
            assert takes(asked, {"x": text}) == (text in good), text
            assert fits(asked, {"x": text}) == (text in good), text


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("regex", "^(?<year>[0-9]+)$", "("),
        ("ipv4network", "10.0.0.0/8", "10.0.0.1/8"),
        ("ipv6network", "fe80::/10", "fe80"),
        ("ipvanyaddress", "::1", "1.2.3"),
        ("ipv4interface", "10.0.0.1/8", "10.0.0.1/99"),
    ],
)
def test_formats_beyond_the_grammar_are_told_and_checked(name: str, good: str, bad: str) -> None:
    asked = of({**STRING, "format": name})
    assert relax_schema(asked, "it").notes == (f'x: format "{name}"',)
    assert takes(asked, {"x": bad})
    assert fits(asked, {"x": good})
    assert not fits(asked, {"x": bad})


def test_a_format_says_nothing_of_values_that_are_given() -> None:
    asked = of({**STRING, "format": "date", "enum": ["today"]})
    assert takes(asked, {"x": "today"})
    assert fits(asked, {"x": "today"})


def test_a_format_that_is_an_expression_without_end_is_read_not_compiled() -> None:
    assert fits(of({**STRING, "format": "regex"}), {"x": "((((a{1000}){1000}){1000}){1000})"})
    assert fits(of({**STRING, "pattern": "^((a{1000}){1000}){1000}$"}), {"x": "a"})  # which cannot be checked


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "field",
    [
        {"type": "integer"},
        {"type": ["integer", "null"]},
        {"type": "integer", "minimum": -(10**18)},
        {"type": "integer", "exclusiveMaximum": 2**62 + 10**18},
        {"type": "integer", "multipleOf": 1},
        {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        {"allOf": [{"type": "integer"}, {"minimum": -(10**18)}]},
    ],
)
def test_integers_have_64_bits(field: dict[str, Any]) -> None:
    assert relax_schema(of(field), "it").notes == ()
    for asked, wrapped in ((of(field), lambda n: n), (of({"type": "array", "items": field}), lambda n: [n])):
        for good in (0, -7, 10**17, -(10**18), 2**62):
            assert takes(asked, {"x": wrapped(good)}), good
        for bad in (2**63, -(2**63) - 2048, 10**19, 10**400):
            assert not takes(asked, {"x": wrapped(bad)}), bad


@pytest.mark.parametrize(
    "field",
    [
        {"type": "integer", "minimum": 10**20},
        {"allOf": [{"type": "integer"}, {"minimum": 10**20}]},
    ],
)
def test_a_schema_with_larger_numbers_gets_them(field: dict[str, Any]) -> None:
    assert takes(of(field), {"x": 10**30})
    assert fits(of(field), {"x": 10**30})


@pytest.mark.parametrize("field", [{}, {"type": "number"}, {"type": "number", "minimum": 0}, {"type": "integer"}])
@pytest.mark.parametrize("text", ["1e999", "-1e999", "1" + "0" * 400])
def test_a_number_that_no_double_holds_is_no_valid_answer(field: dict[str, Any], text: str) -> None:
    said = SchemaValidator(canonicalize(of({"type": "array", "items": field})).schema)
    assert said.error_of({"x": [1e300, json.loads(text)]}).startswith("x[1]: ")
    assert not said.error_of({"x": [3]})


# ---------------------------------------------------------------------- wrong values of keywords

KEYWORDS = [
    "$anchor",
    "$defs",
    "$dynamicRef",
    "$id",
    "$recursiveRef",
    "$ref",
    "$schema",
    "additionalItems",
    "additionalProperties",
    "allOf",
    "anyOf",
    "const",
    "contains",
    "default",
    "definitions",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "description",
    "else",
    "enum",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "if",
    "items",
    "maxContains",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minContains",
    "minItems",
    "minLength",
    "minProperties",
    "minimum",
    "multipleOf",
    "not",
    "nullable",
    "oneOf",
    "pattern",
    "patternProperties",
    "prefixItems",
    "properties",
    "propertyNames",
    "required",
    "then",
    "title",
    "type",
    "unevaluatedItems",
    "unevaluatedProperties",
    "uniqueItems",
]
BASES: list[dict[str, Any]] = [
    {},
    {"type": "object", "dependencies": {"a": ["b"]}, "properties": {"a": STRING}, "if": True, "required": ["a"]},
    {"type": "array", "contains": True, "items": {"type": "boolean"}},
    {"type": ["integer", "number", "string"], "minimum": 1},
]
ANYTHING: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 10**30, 10**400, -(10**400), 1e300, 1e-300, float("inf"), float("-inf")),
    *("", "a", "#", "(", [], [1], [[]], [None], ["a"], [{}], {}, {"a": 5}, {"a": "b"}, {"a": [1]}, {"a": {"a": []}}),
    *({"a": None}, {"(": True}, {"$ref": 5}),
]


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_a_keyword_with_any_value_is_taken_noted_or_refused_as_ours(keyword: str) -> None:
    for base in BASES:
        for value in ANYTHING:
            asked = of({**base, keyword: value})
            try:
                ready = relax_schema(asked, "it")
            except BadSchema:
                continue
            check = SchemaValidator(ready.whole)
            for each in ({"a": "b"}, [True], 3, 1.5, "a", None):
                assert isinstance(check.error_of({"x": each}), str), (asked, each)


# ---------------------------------------------------------------------- checks


def test_a_check_names_the_place_the_keyword_and_what_it_asks_for() -> None:
    asked = of({"type": "array", "items": {"type": "object", "properties": {"n": {"maximum": 3}}}})
    told = SchemaValidator(canonicalize(asked).schema).error_of({"x": [{"n": 1}, {"n": 7}]})
    assert told.startswith("x[1].n: ")
    assert "(maximum: 3)" in told


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ({**STRING, "pattern": "^(x+x+)+y$"}, "x" * 4000),
        ({**STRING, "pattern": r"^(([a-z])+.)+[A-Z]([a-z])+$"}, "a" * 4000),
        ({"type": "object", "patternProperties": {"^(a|a)*$": STRING}}, {"a" * 60 + "!": 1}),
    ],
)
def test_patterns_that_never_end_are_bounded(field: dict[str, Any], value: Any) -> None:
    said = SchemaValidator(canonicalize(of(field)).schema).error_of({"x": value})
    assert "could not be checked" in said or "does not match" in said


def test_alternatives_that_multiply_and_references_without_end_are_no_valid_answer() -> None:
    twice = {"properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["z"]}
    asked = {"$defs": {"a": {"anyOf": [twice, twice]}}, "$ref": "#/$defs/a"}
    value = json.loads('{"x":' * 60 + "1" + "}" * 60)
    assert "could not be checked" in SchemaValidator(canonicalize(asked).schema).error_of(value)
    endless = {"$defs": {"a": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}
    assert "could not be checked" in SchemaValidator(canonicalize(endless).schema).error_of("x")


@pytest.mark.parametrize("seed", range(40))
def test_the_check_agrees_with_the_validator_that_nothing_was_changed_for(seed: int) -> None:
    r = random.Random(f"check {seed}")
    asked = spoilt(r, object_schema(r, 1))
    check, other = SchemaValidator(canonicalize(asked).schema), jsonschema.Draft202012Validator(asked)
    for value in ({}, {"name": "a"}, {"x": 1, "n": None}, {"city": "red", "name": [1, 1]}, [1], "x", None):
        assert bool(check.error_of(value)) == (not other.is_valid(value)), (asked, value)


# ---------------------------------------------------------------------- the shortest answer


@pytest.mark.parametrize(
    ("field", "most"),
    [
        ({**STRING, "format": "email"}, 6),
        ({**STRING, "format": "uri"}, 6),
        ({**STRING, "format": "date"}, 12),
        ({**STRING, "pattern": r"^[a-z\-\/]+\@x\!$"}, 6),
        ({**STRING, "pattern": "foo$"}, 5),
        ({**STRING, "pattern": "^[A-Z]{3}-[0-9]{4}$"}, 10),
        ({**STRING, "pattern": "^(red|magenta|ox)+$"}, 4),
        ({**STRING, "minLength": 7}, 9),
        ({"type": "integer", "minimum": 95, "multipleOf": 10}, 3),
        ({"enum": ["a long one", "short"]}, 7),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 3}, 18),
    ],
)
def test_the_shortest_answer_is_found(field: dict[str, Any], most: int) -> None:
    found, _ = shortest_value(relax_schema(of(field), "it").schema)
    assert isinstance(found, ShortestValue)
    assert found.text is not None
    assert len(json.dumps(json.loads(found.text)["x"])) <= most
    assert fits(of(field), json.loads(found.text))
    grammar = json_grammar(cached_vocabulary(family(TAGGED)), of(field))
    assert grammar.shortest_tokens <= len(found.text)
    grammar.start(grammar.shortest_tokens)
    with pytest.raises(ConfigError):
        grammar.start(grammar.shortest_tokens - 1)


NAMES = [f"p{i}" for i in range(3000)]
HUGE = {
    "minItems": ({"type": "array", "items": STRING, "minItems": 10**9}, "x: minItems 1000000000"),
    "minItems that a window might hold": ({"type": "array", "items": STRING, "minItems": 20_000}, "x: minItems 20000"),
    "minLength": ({**STRING, "minLength": 10**5}, "x: minLength 100000"),
    "nested": ({"type": "array", "minItems": 3000, "items": {"type": "array", "minItems": 3000}}, "x: minItems 3000"),
    "required": (
        {"type": "object", "properties": dict.fromkeys(NAMES, STRING), "required": NAMES},
        "x: required",
    ),
    "pattern": ({**STRING, "pattern": "^a{5000}$"}, "x: pattern"),
    "pattern of alternatives": ({**STRING, "pattern": "^(a|b|c){3000}x$"}, "x: pattern"),
    "pattern of patterns": ({**STRING, "pattern": "^(a{1000}){1000}$"}, "x: pattern"),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_what_no_limit_holds_is_refused_and_the_culprit_named(name: str) -> None:
    field, said = HUGE[name]
    words = cached_vocabulary(family(TAGGED))
    with pytest.raises((BadSchema, ConfigError), match=said):
        json_grammar(words, of(field)).start(512)


@pytest.mark.parametrize(
    "field",
    [
        {**STRING, "maxLength": 10**9},
        {"type": "array", "items": STRING, "maxItems": 10**9},
        {"enum": [f"value {i}" for i in range(10**5)]},
        {"type": "object", "properties": {f"p{i}": STRING for i in range(10**4)}},
        {**STRING, "pattern": "^((a{1,100}){1,100}){1,100}$"},
        {"type": "number", "minimum": -1e308, "maximum": 1e300, "multipleOf": 1e-300},
        {"type": "integer", "minimum": -(2**63), "maximum": 2**64},
    ],
)
def test_what_is_only_large_binds(field: dict[str, Any]) -> None:
    json_grammar(cached_vocabulary(family(TAGGED)), of(field)).start(512)


def test_an_optional_part_that_no_window_holds_is_never_begun() -> None:
    asked = {"type": "object", "properties": {"x": {"type": "array", "minItems": 10**9}, "y": STRING}}
    assert takes(asked, {"y": ""})
    state = json_grammar(cached_vocabulary(family(TAGGED)), asked).start()
    for token in state.forced():
        state.accept(token)
    (x,) = cached_vocabulary(family(TAGGED)).encode_answers([["x"]])[0]
    assert not state.takes(x)


def test_a_pattern_for_every_name_is_the_rule_for_all_properties() -> None:
    content = {"type": "object", "properties": {"promo": {"$ref": "#/$defs/promo"}, "v": {"type": "integer"}}}
    either = {"anyOf": [{"$ref": "#/$defs/content"}, {"type": "null"}]}
    promo = {"type": "object", "properties": {"basic": either}, "patternProperties": {".*": either}}
    asked = of({"$ref": "#/$defs/content"}, **{"$defs": {"content": content, "promo": promo}})
    assert relax_schema(asked, "it").notes == ()
    assert takes(asked, {"x": {"promo": {"basic": {"v": 1}, "other": None}, "v": 1}})
    assert not takes(asked, {"x": {"promo": {"basic": {"v": 1}, "other": 3}}})


def test_a_definition_that_holds_itself_through_another_in_place_binds() -> None:
    a = {"allOf": [{"$ref": "#/$defs/b"}, {"type": "object", "properties": {"next": {"$ref": "#/$defs/a"}}}]}
    b = {"allOf": [{"$ref": "#/$defs/c"}, {"type": "object", "properties": {"v": STRING}}]}
    c = {"type": "object", "properties": {"up": {"allOf": [{"$ref": "#/$defs/a"}, {"required": ["v"]}]}}}
    asked = of({"$ref": "#/$defs/a"}, **{"$defs": {"a": a, "b": b, "c": c}})
    assert takes(asked, {"x": {"up": {"v": "a"}, "v": "b", "next": {}}})
    assert not fits(asked, {"x": {"up": {}}})


def test_what_several_members_say_alike_is_followed_once() -> None:
    names = [f"n{i}" for i in range(12)]
    defs: dict[str, Any] = {"n12": STRING}
    for at, name in enumerate(names):
        below = {"$ref": f"#/$defs/n{at + 1}"}
        two = {f"p{i}": {"allOf": [{"$ref": f"#/$defs/m{at}"}, {"additionalProperties": below}]} for i in range(3)}
        defs[f"m{at}"] = {"type": "object", "patternProperties": {"^[a-z]+$": below}, "additionalProperties": below}
        defs[name] = {"type": "object", "properties": two}
    assert takes(of({"$ref": "#/$defs/n0"}, **{"$defs": defs}), {"x": {"p0": {"a": {}}}})


@pytest.mark.parametrize(
    ("field", "said"),
    [
        (
            {"type": "object", "properties": {"a": {}}, "additionalProperties": False, "minProperties": 3},
            "minProperties 3",
        ),
        ({"type": "object", "propertyNames": {"enum": ["a"]}, "minProperties": 2}, "minProperties 2"),
        ({"type": "object", "propertyNames": {"const": "a"}, "minProperties": 2}, "minProperties 2"),
        ({"type": "object", "propertyNames": False, "minProperties": 1}, "minProperties 1"),
        (
            {"properties": {"a": {}, "b": False}, "type": "object", "additionalProperties": False, "minProperties": 2},
            "",
        ),
        ({"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "required": ["a", "b"], "maxProperties": 1}, ""),
        ({"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True, "minItems": 3}, "maxItems 2"),
        ({"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 3}, "maxItems 2"),
        ({"type": "array", "items": {"$ref": "#/$defs/w"}, "uniqueItems": True, "minItems": 2}, "maxItems 1"),
        (
            {"type": "array", "prefixItems": [{}], "items": {"const": 1}, "uniqueItems": True, "minItems": 3},
            "maxItems 2",
        ),
    ],
)
def test_counts_that_no_value_reaches_are_refused(field: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSchema, match=f"No answer can fit it: x: {said}"):
        relax_schema(of(field, **{"$defs": {"w": {"enum": ["one"]}}}), "it")


def test_unique_items_of_few_values_end_with_the_last_value() -> None:
    asked = of({"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True})
    assert takes(asked, {"x": ["a", "b"]})
    assert not takes(asked, {"x": ["a", "b", "a"]})


def test_a_grammar_that_failed_is_refused_and_not_finished() -> None:
    grammar = json_grammar(cached_vocabulary(family(TAGGED)), of(STRING))
    state = grammar.start()
    (illegal,) = grammar.vocabulary.encode_answers([["}"]])[0]
    with pytest.raises(ValueError, match="not legal"):
        state.accept(illegal)  # llguidance's matcher fails with it, as it does where a grammar grows too large
    assert not state.finished
    with pytest.raises(BadSchema, match="too large to follow"):
        state.allowed()
