"""From a schema to the one that the grammar enforces: equal where llguidance can express it, looser elsewhere. A
string's ``format`` stays where llguidance knows it (``FORMATS``) or ``schema_rules`` has a pattern for it.

Every value that fits the original fits the relaxed schema, with two exceptions: an object schema that names properties
permits no others unless it says so ("closed"), and an integer has 64 bits unless the schema has larger numbers. What is
not enforced is noted by path and keyword; ``validation`` checks the finished answer against the whole schema, but for
what is noted as not checked.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from ..errors import BadSchema
from ..redaction import one_line
from .canonical_schema import (
    TYPES,
    Schema,
    canonicalize,
    check_json,
    definition,
    format_path,
    format_value,
    literals_of,
    map_subschemas,
    resolved,
    rewritten,
    subschemas,
    types_of,
)
from .schema_rules import FORMAT_PATTERNS, MAX_VALUE_BYTES
from .shortest_value import (
    ShortestValue,
    Unsatisfiable,
    excluding_count,
    shortest_value,
)
from .trial_relaxation import grammar_error, relax_by_trial
from .validation import CHECKED_FORMATS, is_pattern

_log = logging.getLogger(__name__)

FORMATS = ("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Formats that the grammar enforces by llguidance's rules, besides ``FORMAT_PATTERNS``."""

MAX_INTEGER = 2**63 - 1
"""Largest integer that the grammar writes, unless the schema itself has a larger number: checkpointers and most JSON
readers hold 64 bits."""

MIN_INTEGER = -(2**63) + 1024
"""The smallest one: llguidance bounds integers by doubles."""

MAX_COUNTED_LENGTH = 20_000
"""Longest string length that the grammar enforces, in characters."""

MAX_ENUM_BYTES = 100_000
"""Largest enum that the grammar enforces; of a larger one only the types."""

MAX_OPTIONAL_PROPERTIES = 500
"""Optional properties of one object that the grammar names, the first ones."""

MAX_TRIED_BYTES = 2**16
"""Shortest value, in bytes, beyond which a schema is not compiled by trial."""

_SHARED_PREFIX = "s2t.shared-"
"""Names of definitions that no canonical schema has."""

_MATCH_ALL_PATTERNS = ("", ".*", "^.*$", "^.*", ".*$", "^", "$")
_NOT_ENFORCED = ("uniqueItems", "dependentRequired", "dependentSchemas")
_FINITE_TYPES = {"null": 1, "boolean": 2}
_IN_PLACE = ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas")
_OBJECT_KEYWORDS = (
    "properties",
    "required",
    "additionalProperties",
    "patternProperties",
    "minProperties",
    "maxProperties",
)
_NUMBER_KEYWORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


@dataclass(frozen=True)
class RelaxedSchema:
    """A schema for the grammar and for validation.

    Attributes:
        schema: what the grammar enforces.
        whole: the original in canonical form, for validation.
        shortest_value: the shortest value of ``schema``.
        notes: what the grammar does not enforce, as ``path: keyword``.
    """

    schema: Schema
    whole: Schema
    shortest_value: ShortestValue
    notes: tuple[str, ...] = ()


def relax_schema(schema: Mapping[str, Any], what: str, *, only_objects: bool = False) -> RelaxedSchema:
    """Relax a schema for the grammar; what is not enforced is logged once per schema.

    Args:
        schema: of any draft.
        what: what it is for, in errors and in the log.
        only_objects: whether the value must be an object, as tool arguments are.

    Raises:
        BadSchema: it is not JSON, or no answer can fit it.
    """
    check_json(schema, what)
    return _relax_json(json.dumps(schema), what, only_objects)


@lru_cache(maxsize=256)  # an agent binds the same tools before every call
def _relax_json(text: str, what: str, only_objects: bool) -> RelaxedSchema:
    whole = canonicalize(json.loads(text), what)
    if only_objects:
        _as_object(whole.schema, what)
    relaxer = _SchemaRelaxer(whole.schema, list(whole.notes))
    done, shortest = relaxer.compile(what)
    notes = tuple(dict.fromkeys(relaxer.notes))
    if notes:
        _log.warning("%s: the grammar does not enforce %s; answers are checked.", what, one_line("; ".join(notes)))
    return RelaxedSchema(done, whole.schema, shortest, notes)


def _as_object(schema: Schema, what: str) -> None:
    """Restrict a schema to objects.

    Raises:
        BadSchema: it permits no objects.
    """
    here = resolved(schema, schema)
    types = types_of(here) if isinstance(here, dict) else None
    if types is not None and "object" not in types:
        raise BadSchema(f"No answer can fit {what}: arguments are objects, not type {format_value(here['type'])}.")
    if here is schema and "$ref" not in here:
        rest = {key: schema[key] for key in schema if key != "type"}
        schema.clear()
        schema.update({"type": "object", **rest})


class _SchemaRelaxer:
    """Relaxes one schema: by keyword, then by trial what llguidance still refuses."""

    def __init__(self, whole: Schema, notes: list[str]) -> None:
        self.whole, self.notes = whole, notes
        self.defs: Mapping[str, Any] = whole.get("$defs", {})
        self.open_definitions = self._open_definitions()
        self.has_large_numbers = _has_large_numbers(whole)
        self.long = False

    def compile(self, what: str) -> tuple[Schema, ShortestValue]:
        """A relaxed schema that llguidance compiles, and its shortest value.

        Raises:
            BadSchema: no answer fits.
        """
        before = list(self.notes)
        root = self.root(close=True)
        found, error = self._try(root)
        if isinstance(found, Unsatisfiable) or error.startswith("Unsatisfiable"):
            self.notes = before
            root = self.root(close=False)
            found, error = self._try(root)
        if isinstance(found, Unsatisfiable):
            raise BadSchema(f"No answer can fit {what}: {found.describe()}.", hint="Correct that part of the schema.")
        if found.size > MAX_VALUE_BYTES:
            raise BadSchema(
                f"No model's window holds an answer that fits {what}: it has {found.size} bytes or more"
                f"{f', of which {found.describe_blame()}' if found.blame else ''}.",
                hint="Ask for less.",
            )
        if error.startswith("Unsatisfiable"):
            raise BadSchema(f"No answer can fit {what}: {error}.", hint="Correct that part of the schema.")
        return (relax_by_trial(root, what, self.note), found) if error else (root, found)

    def _try(self, root: Schema) -> tuple[ShortestValue | Unsatisfiable, str]:
        found, excluded = shortest_value(root)
        if isinstance(found, Unsatisfiable):
            return found, ""
        for name in excluded:
            root["$defs"][name] = False
        shared: Schema = {}
        root.update(rewritten(root, (), partial(_share_leaves, shared)))
        if shared:
            root["$defs"] = {**root.get("$defs", {}), **shared}
        if self.long:  # after the search, so that errors give the true shortest value
            root.update(rewritten(root, (), _cap_min_length))
        return found, grammar_error(root) if found.size <= MAX_TRIED_BYTES else ""

    def root(self, *, close: bool) -> Schema:
        """The whole schema, relaxed by keyword."""
        self.close = close
        body = {key: value for key, value in self.whole.items() if key != "$defs"}
        done = self.relax(body, (), joined="#" in self.open_definitions)
        root: Schema = done if isinstance(done, dict) else ({} if done else {"enum": []})
        if self.defs:
            root["$defs"] = {
                name: self.relax(inner, (f"$defs.{name}",), joined=name in self.open_definitions)
                for name, inner in self.defs.items()
            }
        return root

    def note(self, path: tuple[str, ...], what: str) -> None:
        """Note what is not enforced."""
        self.notes.append(f"{format_path(path)}: {what}")

    def relax(self, node: Any, path: tuple[str, ...], *, joined: bool = False) -> Any:
        """Relax one subschema; ``joined`` if its objects must fit other schemas too, so that they stay open."""
        if not isinstance(node, dict):
            return node
        out = dict(node)
        within = joined or _is_conjunction(node)
        self._strings(out, path)
        self._numbers(out, path)
        self._enum(out, path)
        if not self._negations(out, path):
            return False
        self._conditions(out, path)
        self._property_names(out, path)

        def relax(each: Any, at: tuple[str, ...], key: str) -> Any:
            return self.relax(each, at, joined=key == "allOf" or (within and key in ("anyOf", "oneOf")))

        out = map_subschemas(out, path, relax)
        self._one_of(out, path)
        self._deduplicate_all_of(out)
        self._patterns(out, path)
        self._objects(node, out, path, joined)
        return out

    def _strings(self, out: Schema, path: tuple[str, ...]) -> None:
        if "pattern" in out and (error := grammar_error({"type": "string", "pattern": out["pattern"]})):
            unchecked = "" if is_pattern(out["pattern"]) else ", not checked"
            self.note(path, f"pattern {format_value(out.pop('pattern'))} ({error}{unchecked})")
        self._format(out, path)
        if out.get("maxLength", 0) > MAX_COUNTED_LENGTH:
            self.note(path, f"maxLength {out.pop('maxLength')}")
        for min_key, max_key in (("minLength", "maxLength"), ("minItems", "maxItems")):
            if out.get(min_key, 0) > MAX_VALUE_BYTES:
                out[max_key] = 0  # no context window holds it: no value fits
                return
        if out.get("minLength", 0) > MAX_COUNTED_LENGTH:
            self.note(path, f"minLength {out['minLength']}")
            self.long = True

    def _format(self, out: Schema, path: tuple[str, ...]) -> None:
        """A format by llguidance's rule or by a pattern; left to a pattern beside it if both are too much."""
        name = out.pop("format", None)
        if name is None or "enum" in out or "const" in out:  # an annotation of values that are given
            return
        rule: Schema = {"format": name} if name in FORMATS else {}
        if name in FORMAT_PATTERNS:
            rule = {"pattern": FORMAT_PATTERNS[name]}
            rule = {"allOf": [rule]} if "pattern" in out else rule
        if not rule or ("pattern" in out and grammar_error({"type": "string", "pattern": out["pattern"], **rule})):
            unchecked = "" if name in CHECKED_FORMATS else " (not checked)"
            self.note(path, f"format {format_value(name)}{unchecked}")
        elif "allOf" in rule:
            out["allOf"] = [*out.get("allOf", []), *rule["allOf"]]
        else:
            out.update(rule)

    def _numbers(self, out: Schema, path: tuple[str, ...]) -> None:
        keys = [key for key in _NUMBER_KEYWORDS if key in out]
        types = types_of(out)
        for kind in ("number", "integer"):
            while keys and (types is None or kind in types):
                error = grammar_error({"type": kind, **{key: out[key] for key in keys}})
                if not error or error.startswith("Unsatisfiable"):
                    break
                worst = max(keys, key=lambda key: (key == "multipleOf", abs(out[key])))
                keys.remove(worst)
                self.note(path, f"{worst} {format_value(out.pop(worst))}")
        only_integers = types is not None and "integer" in types and "number" not in types
        if not only_integers or {"enum", "const"} & out.keys() or self.has_large_numbers:
            return
        if not {"minimum", "exclusiveMinimum"} & out.keys():
            out["minimum"] = MIN_INTEGER
        if not {"maximum", "exclusiveMaximum"} & out.keys():
            out["maximum"] = MAX_INTEGER

    def _enum(self, out: Schema, path: tuple[str, ...]) -> None:
        if "enum" not in out or len(json.dumps(out["enum"])) <= MAX_ENUM_BYTES:
            return
        values = out.pop("enum")
        self.note(path, f"enum of {len(values)} values")
        if "type" not in out:
            out["type"] = sorted({_kind(each) for each in values})

    def _negations(self, out: Schema, path: tuple[str, ...]) -> bool:
        """Drop ``not``; False if it excludes every value."""
        if "not" not in out:
            return True
        inner = out.pop("not")
        if inner is True or inner == {}:
            return False
        if inner is not False:
            self.note(path, "not")
        return True

    def _conditions(self, out: Schema, path: tuple[str, ...]) -> None:
        condition = [key for key in ("if", "then", "else") if out.pop(key, None) is not None]
        if len(condition) > 1:
            self.note(path, "if")
        if "uniqueItems" in out and (values := self._count_of(out.get("items"))) is not None:
            most = values + len(out.get("prefixItems", ()))
            out["maxItems"] = min(out.get("maxItems", most), most)
        for key in _NOT_ENFORCED:
            if key in out:
                del out[key]
                self.note(path, key)
        if "contains" in out:
            wanted = out.get("minContains", 1)
            del out["contains"]
            self.note(path, "contains")
            if wanted > out.get("minItems", 0) and out.get("type") == "array":
                out["minItems"] = wanted
        for key in ("minContains", "maxContains"):
            out.pop(key, None)
        for key, plain in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
            if key in out:
                inner = out.pop(key)
                if inner is True:
                    continue
                if any(each in out for each in _IN_PLACE) or plain in out:
                    if plain not in out or any(each in out for each in _IN_PLACE):
                        self.note(path, key)
                else:
                    out[plain] = inner

    def _property_names(self, out: Schema, path: tuple[str, ...]) -> None:
        """``propertyNames`` as properties or patterns where equivalent."""
        names = out.pop("propertyNames", True)
        names = {"enum": []} if names is False else names
        if names is True or names in ({}, {"type": "string"}):
            return
        rules = {key: value for key, value in names.items() if key != "type"} if isinstance(names, dict) else {}
        others = out.get("additionalProperties", True)
        plain = "patternProperties" not in out and not any(key in out for key in _IN_PLACE)
        if plain and set(rules) in ({"enum"}, {"const"}):
            known = [each for each in rules.get("enum", [rules.get("const")]) if isinstance(each, str)]
            own = out.get("properties", {})
            out["properties"] = {
                **{name: inner if name in known else False for name, inner in own.items()},
                **{name: others for name in known if name not in own},
            }
            out["additionalProperties"] = False
        elif plain and set(rules) == {"pattern"} and not out.get("properties"):
            out["patternProperties"], out["additionalProperties"] = {rules["pattern"]: others}, False
        else:
            self.note(path, "propertyNames")

    def _one_of(self, out: Schema, path: tuple[str, ...]) -> None:
        """``oneOf`` as ``anyOf``, which is equivalent if no value fits two alternatives."""
        if "oneOf" not in out:
            return
        options = out.pop("oneOf")
        if not self._are_disjoint(options):
            self.note(path, "oneOf")
        if "anyOf" in out:
            out["allOf"] = [*out.get("allOf", []), {"anyOf": options}]
        else:
            out["anyOf"] = options

    def _deduplicate_all_of(self, out: Schema) -> None:
        """Remove assertions that members of ``allOf`` repeat, which llguidance would evaluate for each."""
        if "allOf" not in out:
            return
        kept: list[Any] = []
        for each in out["allOf"]:
            if isinstance(each, dict):
                for other in kept:
                    known = resolved(other, self.whole)
                    if isinstance(known, dict):
                        each = {key: each[key] for key in each if not _implied_by(known, each, key)}
            if each not in ({}, True) and each not in kept:
                kept.append(each)
        out["allOf"] = kept
        if not kept:
            del out["allOf"]
        elif len(kept) == 1 and isinstance(kept[0], dict) and not kept[0].keys() & out.keys():
            del out["allOf"]
            out.update(kept[0])

    def _are_disjoint(self, options: list[Any]) -> bool:
        known = [resolved(each, self.whole) for each in options]
        if len(known) > 40:
            return False
        return all(_disjoint(a, b) for at, a in enumerate(known) for b in known[at + 1 :])

    def _patterns(self, out: Schema, path: tuple[str, ...]) -> None:
        """Keep ``patternProperties`` that llguidance supports; merge overlapping patterns, or drop them."""
        given = out.get("patternProperties")
        if not given:
            out.pop("patternProperties", None)
            return
        every = next((name for name in given if name in _MATCH_ALL_PATTERNS), None)
        if every is not None and len(given) == 1:  # equivalent to additionalProperties
            out["additionalProperties"] = out.pop("patternProperties")[every]
            if any(each != given[every] for each in out.get("properties", {}).values()):
                self.note(path, f"patternProperties {format_value(every)} of named properties")
            return
        loose = {name for name in given if grammar_error({"type": "object", "patternProperties": {name: True}})}
        kept = {name: inner for name, inner in given.items() if name not in loose}
        if loose:
            self.note(path, f"patternProperties {format_value(sorted(loose)[0])}")
        if len(kept) > 1 and grammar_error({"type": "object", "patternProperties": dict.fromkeys(kept, True)}):
            self.note(path, "patternProperties that overlap")
            joined = "|".join(f"(?:{name})" for name in kept)
            kept = {joined: {"anyOf": list(kept.values())}}
            if grammar_error({"type": "object", "patternProperties": {joined: True}}):
                loose, kept = {*given}, {}
        if loose:
            others = out.get("additionalProperties", True)
            choices = [each for each in (others, *(given[name] for name in loose)) if each is not False]
            out["additionalProperties"] = True if True in choices else {"anyOf": choices} if choices else False
        out["patternProperties"] = kept
        if not kept:
            del out["patternProperties"]

    def _objects(self, node: Schema, out: Schema, path: tuple[str, ...], joined: bool) -> None:
        properties, required = out.get("properties"), out.get("required", [])
        if properties is not None and len(properties) - len(required) > MAX_OPTIONAL_PROPERTIES:
            needed = set(required)
            optional = [name for name in properties if name not in needed]
            gone = set(optional[MAX_OPTIONAL_PROPERTIES:])
            self.note(path, f"properties beyond the first {MAX_OPTIONAL_PROPERTIES} of {len(properties)}")
            properties = out["properties"] = {name: each for name, each in properties.items() if name not in gone}
            out["additionalProperties"] = True
        alone = not joined and not any(key in node for key in (*_IN_PLACE, "patternProperties", "propertyNames"))
        closes = self.close and alone and properties is not None and "additionalProperties" not in out
        if closes and properties is not None and out.get("minProperties", 0) <= len(properties):
            missing = {name: True for name in required if name not in properties}
            out["properties"], out["additionalProperties"] = {**properties, **missing}, False
            if not {"type", "enum", "const"} & out.keys():
                out["type"] = "object"
        self._property_counts(out, path)

    def _property_counts(self, out: Schema, path: tuple[str, ...]) -> None:
        """Drop property counts unless no named property is optional, or the count is at most one (llguidance)."""
        least, most = out.get("minProperties", 0), out.get("maxProperties")
        optional = set(out.get("properties", ())) - set(out.get("required", ()))
        if not optional or (not least and most is None) or excluding_count(out):
            return
        few = least <= 1 and most in (None, 1) and len(optional) <= 40 and not out.get("required")
        if few and out.get("additionalProperties") is False and "patternProperties" not in out:
            return
        for key in ("minProperties", "maxProperties"):
            if key in out:
                self.note(path, f"{key} {out.pop(key)}")

    def _count_of(self, node: Any) -> int | None:
        """How many values fit a schema, at most; None if they are not counted."""
        node = resolved(node, self.whole)
        if not isinstance(node, dict):
            return None
        if (values := _values(node)) is not None:
            return len(values)
        types = types_of(node)
        counts = [_FINITE_TYPES.get(kind) for kind in (TYPES if types is None else set(types))]
        return None if None in counts else sum(each or 0 for each in counts)

    def _open_definitions(self) -> set[str]:
        """Definitions whose objects must fit other schemas too somewhere: these stay open."""
        open_definitions: set[str] = set()
        waiting: list[tuple[Any, bool]] = [(self.whole, False)]
        while waiting:
            node, joined = waiting.pop()
            if not isinstance(node, dict):
                continue
            within = joined or _is_conjunction(node)
            reference = node.get("$ref", "")
            name = reference.removeprefix("#/$defs/")
            if name and within and name not in open_definitions:
                open_definitions.add(name)
                waiting.append((definition(self.whole, reference), True))
            for key, inner in subschemas(node):
                waiting.append((inner, (within or key == "allOf") if key in (*_IN_PLACE, "then", "else") else False))
        return open_definitions


def _share_leaves(shared: Schema, node: Schema, path: tuple[str, ...]) -> Schema:
    """Move a bounded number or a pattern to a definition, which is compiled once: half a millisecond each."""
    if not path or "type" not in node or len(node) == 1 or node.keys() - {"type", "pattern", *_NUMBER_KEYWORDS}:
        return node
    known = next((name for name, each in shared.items() if each == node), f"{_SHARED_PREFIX}{len(shared)}")
    shared[known] = node
    return {"$ref": f"#/$defs/{known}"}


def _has_large_numbers(schema: Any) -> bool:
    """Whether a number in a schema is beyond 64 bits."""
    waiting = [schema]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict | list):
            waiting += here.values() if isinstance(here, dict) else here
        elif isinstance(here, int | float) and abs(here) > MAX_INTEGER:
            return True
    return False


def _cap_min_length(node: Schema, path: tuple[str, ...]) -> Schema:
    return {**node, "minLength": MAX_COUNTED_LENGTH} if node.get("minLength", 0) > MAX_COUNTED_LENGTH else node


def _implied_by(known: Schema, other: Schema, key: str) -> bool:
    """Whether one schema implies another's assertion for a keyword."""
    if key not in known or key in ("$ref", "anyOf"):
        return False
    if key == "type":
        return set(types_of(known) or ()) <= set(types_of(other) or ())
    if key == "additionalProperties" and not {"properties", "patternProperties"} & other.keys():
        named = [*known.get("properties", {}).values(), *known.get("patternProperties", {}).values()]
        return all(each == other[key] for each in [known[key], *named])
    beside = ("properties", "patternProperties") if key == "additionalProperties" else ()
    return all(known.get(each) == other.get(each) for each in (key, *beside))


def _is_conjunction(node: Schema) -> bool:
    """Whether a schema applies several subschemas in place, which must all fit."""
    in_place = [key for key in _IN_PLACE if key in node]
    return len(in_place) > 1 or "if" in node or (bool(in_place) and any(key in node for key in _OBJECT_KEYWORDS))


def _kind(value: Any) -> str:
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "object"


def _types(node: Any) -> set[str] | None:
    """The types that a schema permits; None if it does not restrict them."""
    if not isinstance(node, dict):
        return None
    if (values := literals_of(node)) is not None:
        return set(map(_kind, values))
    types = types_of(node)
    return None if types is None else set(types)


def _values(node: Any) -> set[str] | None:
    values = literals_of(node) if isinstance(node, dict) else None
    return None if values is None else {json.dumps(each, sort_keys=True) for each in values}


def _disjoint(a: Any, b: Any) -> bool:
    """Whether no value fits both schemas, judged by types and constants."""
    if a is False or b is False:
        return True
    first, second = _types(a), _types(b)
    if first and second:
        alike = {"integer", "number"}
        if not first & second and not (first & alike and second & alike):
            return True
    first, second = _values(a), _values(b)
    if first is not None and second is not None:
        return not first & second
    if not (isinstance(a, dict) and isinstance(b, dict) and _types(a) == _types(b) == {"object"}):
        return False
    shared = a.get("properties", {}).keys() & b.get("properties", {}).keys()
    needed = {*a.get("required", ()), *b.get("required", ())}
    for name in shared & needed:
        first, second = _values(a["properties"][name]), _values(b["properties"][name])
        if first is not None and second is not None and not first & second:
            return True
    return False
