"""From a schema to the one that a grammar keeps to: the same where llguidance can express it, looser elsewhere.

Whatever fits the original fits the relaxed schema, but for what ``closed`` objects do not take: an object that names
its properties takes no others, unless it says that it does. What was given up is noted by place and keyword, and
the whole original is for ``checking`` to hold the finished answer to.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from urllib.parse import unquote

from llguidance import LLMatcher

from ..errors import BadSchema
from ..fork_safety import uncut
from .canonical_schema import Schema, canonical, check_json, place, shown, subschemas
from .schema_rules import LARGEST, json_rule
from .shortest_value import Least, Never, least, nevers

_log = logging.getLogger(__name__)

FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Formats that the grammar keeps to."""

LONGEST = 20_000
"""Characters up to which the grammar counts a string's length."""

ENUM_BYTES = 100_000
"""A larger enum is held to its types alone."""

MOST_PROPERTIES = 500
"""Optional properties of one object that the grammar names, in the schema's order."""

MOST_TRIALS = 400
"""Compilations that may be spent to find what llguidance refuses."""

UNTRIED = 2**16
"""Bytes of a shortest answer from which llguidance is not asked before a model is there."""

_CATCH_ALL = ("", ".*", "^.*$", "^.*", ".*$", "^", "$")
_GIVEN_UP = ("uniqueItems", "dependentRequired", "dependentSchemas")
_IN_PLACE = ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas")
_OF_OBJECTS = ("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties")
_OF_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


@dataclass(frozen=True)
class Relaxed:
    """A schema in two copies.

    Attributes:
        schema: what the grammar keeps to.
        whole: the original in canonical form, for checking.
        least: the shortest value.
        notes: what the grammar gave up, as ``place: keyword``.
    """

    schema: Schema
    whole: Schema
    least: Least
    notes: tuple[str, ...] = ()


def relaxed(schema: Mapping[str, Any], what: str, *, only_objects: bool = False) -> Relaxed:
    """A schema made ready for the grammar; told in the log once per schema.

    Args:
        schema: any draft.
        what: what it is for, in errors and in the log.
        only_objects: whether the value must be an object, as a tool's arguments are.

    Raises:
        BadSchema: it is no JSON, or no answer can fit it.
    """
    check_json(schema, what)
    return _relaxed(json.dumps(schema), what, only_objects)


@lru_cache(maxsize=256)  # an agent binds the same tools before every call
def _relaxed(text: str, what: str, only_objects: bool) -> Relaxed:
    whole = canonical(json.loads(text), what)
    if only_objects:
        _as_object(whole.schema, what)
    work = _Work(whole.schema, list(whole.notes))
    done, shortest = work.compiled(what)
    notes = tuple(dict.fromkeys(work.notes))
    if notes:
        _log.warning("%s: the grammar does not enforce %s; answers are checked.", what, "; ".join(notes))
    return Relaxed(done, whole.schema, shortest, notes)


def _as_object(schema: Schema, what: str) -> None:
    """Rule out all values but objects, where the schema does not say so itself."""
    here, seen = schema, set[str]()
    while set(here) - {"$defs"} == {"$ref"} and here["$ref"] not in seen:
        seen.add(here["$ref"])
        target = schema if here["$ref"] == "#" else schema["$defs"][here["$ref"].removeprefix("#/$defs/")]
        here = target if isinstance(target, dict) else {}
    given = here.get("type", "object")
    if "object" not in (given if isinstance(given, list) else [given]):
        raise BadSchema(f"No answer can fit {what}: arguments are objects, not type {shown(given)}.")
    if here is schema and "$ref" not in here:
        rest = {key: schema[key] for key in schema if key != "type"}
        schema.clear()
        schema.update({"type": "object", **rest})


@lru_cache(maxsize=4096)
def _complaint(source: str) -> str:
    with uncut:
        return str(LLMatcher.validate_grammar(f"start: value\nvalue: {source}\n"))


def complaint(schema: Mapping[str, Any]) -> str:
    """What llguidance says against a schema, in its own words; "" for nothing."""
    error = _complaint(json_rule(schema)).strip()
    lines = error.split("failed to compile JSON schema: ")[-1].splitlines() or [""]
    told = [line.strip() for line in lines if line.strip()]
    if told and told[0] == "regex parse error:":  # the reason comes last, behind the quoted pattern
        why = [line.removeprefix("error: ") for line in told if line.startswith("error: ")]
        return why[0].rstrip(".") if why else "no such expression"
    return told[0].rstrip(".") if told else ""


class _Work:
    """One schema on its way."""

    def __init__(self, whole: Schema, notes: list[str]) -> None:
        self.whole, self.notes = whole, notes
        self.defs: Mapping[str, Any] = whole.get("$defs", {})
        self.opened = self._opened()
        self.trials = MOST_TRIALS
        self.long = False

    # ------------------------------------------------------------------ by keywords

    def root(self, *, close: bool) -> Schema:
        """The whole schema, relaxed by what its keywords are known to need."""
        self.close = close
        body = {key: value for key, value in self.whole.items() if key != "$defs"}
        done = self.relax(body, (), joined="#" in self.opened)
        root: Schema = done if isinstance(done, dict) else ({} if done else {"enum": []})
        if self.defs:
            root["$defs"] = {
                name: self.relax(inner, (f"$defs.{name}",), joined=name in self.opened)
                for name, inner in self.defs.items()
            }
        return root

    def note(self, path: tuple[str, ...], what: str) -> None:
        """Remember what is given up."""
        self.notes.append(f"{place(path)}: {what}")

    def relax(self, node: Any, path: tuple[str, ...], *, joined: bool = False) -> Any:
        """One schema; ``joined`` when its objects must fit other schemas too."""
        if not isinstance(node, dict):
            return node
        out = dict(node)
        within = joined or _is_joined(node)
        self._strings(out, path)
        self._numbers(out, path)
        self._enum(out, path)
        if not self._negations(out, path):
            return False
        self._conditions(out, path)
        self._names(out, path)
        for key in ("allOf", "anyOf", "oneOf"):
            if key in out:
                out[key] = [self.relax(each, path, joined=within or key == "allOf") for each in out[key]]
        self._alternatives(out, path)
        self._once(out)
        if "prefixItems" in out:
            out["prefixItems"] = [self.relax(each, (*path, "[]")) for each in out["prefixItems"]]
        for key, step in (("items", "[]"), ("additionalProperties", ".*")):
            if key in out:
                out[key] = self.relax(out[key], (*path, step))
        for key in ("properties", "patternProperties"):
            if key in out:
                out[key] = {name: self.relax(each, (*path, f".{name}")) for name, each in out[key].items()}
        self._patterns(out, path)
        self._objects(node, out, path, joined)
        return out

    def _strings(self, out: Schema, path: tuple[str, ...]) -> None:
        if "format" in out and out["format"] not in FORMATS:
            self.note(path, f"format {shown(out.pop('format'))}")
        if "pattern" in out and (error := complaint({"type": "string", "pattern": out["pattern"]})):
            self.note(path, f"pattern {shown(out.pop('pattern'))} ({error})")
        if "pattern" in out and "format" in out and complaint({"type": "string", **_of(out, "pattern", "format")}):
            self.note(path, f"format {shown(out.pop('format'))}")  # a pattern says more than an annotation
        if out.get("maxLength", 0) > LONGEST:
            self.note(path, f"maxLength {out.pop('maxLength')}")
        for least_key, most_key in (("minLength", "maxLength"), ("minItems", "maxItems")):
            if out.get(least_key, 0) > LARGEST:
                out[most_key] = 0  # no window holds it: no value fits
                return
        if out.get("minLength", 0) > LONGEST:
            self.note(path, f"minLength {out['minLength']}")
            self.long = True

    def _numbers(self, out: Schema, path: tuple[str, ...]) -> None:
        keys = [key for key in _OF_NUMBERS if key in out]
        for kind in ("number", "integer"):
            while keys and _names_type(out, kind):
                error = complaint({"type": kind, **{key: out[key] for key in keys}})
                if not error or error.startswith("Unsatisfiable"):
                    break
                worst = max(keys, key=lambda key: (key == "multipleOf", abs(out[key])))
                keys.remove(worst)
                self.note(path, f"{worst} {shown(out.pop(worst))}")

    def _enum(self, out: Schema, path: tuple[str, ...]) -> None:
        if "enum" not in out or len(json.dumps(out["enum"])) <= ENUM_BYTES:
            return
        values = out.pop("enum")
        self.note(path, f"enum of {len(values)} values")
        if "type" not in out:
            out["type"] = sorted({_kind(each) for each in values})

    def _negations(self, out: Schema, path: tuple[str, ...]) -> bool:
        """Give up ``not``; False when it leaves nothing."""
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
        for key in _GIVEN_UP:
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

    def _names(self, out: Schema, path: tuple[str, ...]) -> None:
        """Rules for names, as properties or patterns where they can be said so."""
        names = out.pop("propertyNames", True)
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

    def _alternatives(self, out: Schema, path: tuple[str, ...]) -> None:
        """``oneOf`` as ``anyOf``: the same where no value fits two of them."""
        if "oneOf" not in out:
            return
        options = out.pop("oneOf")
        if not self._apart(options):
            self.note(path, "oneOf")
        if "anyOf" in out:
            out["allOf"] = [*out.get("allOf", []), {"anyOf": options}]
        else:
            out["anyOf"] = options

    def _once(self, out: Schema) -> None:
        """Say once what several members of ``allOf`` say alike: llguidance would follow it in each of them."""
        if "allOf" not in out:
            return
        kept: list[Any] = []
        for each in out["allOf"]:
            if isinstance(each, dict):
                for other in kept:
                    known = self._resolved(other)
                    if isinstance(known, dict):
                        each = {key: each[key] for key in each if not _says(known, each, key)}
            if each not in ({}, True) and each not in kept:
                kept.append(each)
        out["allOf"] = kept
        if not kept:
            del out["allOf"]
        elif len(kept) == 1 and isinstance(kept[0], dict) and not kept[0].keys() & out.keys():
            del out["allOf"]
            out.update(kept[0])

    def _apart(self, options: list[Any]) -> bool:
        known = [self._resolved(each) for each in options]
        if len(known) > 40:
            return False
        return all(_disjoint(a, b) for at, a in enumerate(known) for b in known[at + 1 :])

    def _resolved(self, node: Any) -> Any:
        seen = set()
        while isinstance(node, dict) and set(node) == {"$ref"} and node["$ref"] not in seen:
            seen.add(node["$ref"])
            node = self.whole if node["$ref"] == "#" else self.defs.get(node["$ref"].removeprefix("#/$defs/"))
        return node

    def _patterns(self, out: Schema, path: tuple[str, ...]) -> None:
        """Patterns of names that llguidance can tell apart; others join, or give up the names."""
        given = out.get("patternProperties")
        if not given:
            out.pop("patternProperties", None)
            return
        every = next((name for name in given if name in _CATCH_ALL), None)
        if every is not None and len(given) == 1:  # it is the rule for all names; llguidance would follow it twice
            out["additionalProperties"] = out.pop("patternProperties")[every]
            if any(each != given[every] for each in out.get("properties", {}).values()):
                self.note(path, f"patternProperties {shown(every)} of named properties")
            return
        loose = {name for name in given if complaint({"type": "object", "patternProperties": {name: True}})}
        kept = {name: inner for name, inner in given.items() if name not in loose}
        if loose:
            self.note(path, f"patternProperties {shown(sorted(loose)[0])}")
        if len(kept) > 1 and complaint({"type": "object", "patternProperties": dict.fromkeys(kept, True)}):
            self.note(path, "patternProperties that overlap")
            joined = "|".join(f"(?:{name})" for name in kept)
            kept = {joined: {"anyOf": list(kept.values())}}
            if complaint({"type": "object", "patternProperties": {joined: True}}):
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
        if properties is not None and len(properties) - len(required) > MOST_PROPERTIES:
            needed = set(required)
            optional = [name for name in properties if name not in needed]
            gone = set(optional[MOST_PROPERTIES:])
            self.note(path, f"properties beyond the first {MOST_PROPERTIES} of {len(properties)}")
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
        """llguidance counts properties only where none of the named ones is optional, or up to one."""
        least, most = out.get("minProperties", 0), out.get("maxProperties")
        optional = set(out.get("properties", ())) - set(out.get("required", ()))
        if not optional or (not least and most is None):
            return
        least -= len(out.get("required", ()))
        few = least <= 1 and most in (None, 1) and len(optional) <= 40 and not out.get("required")
        if few and out.get("additionalProperties") is False and "patternProperties" not in out:
            return
        for key in ("minProperties", "maxProperties"):
            if key in out:
                self.note(path, f"{key} {out.pop(key)}")

    def _opened(self) -> set[str]:
        """Names of definitions whose objects are joined with other schemas somewhere: these stay open."""
        opened: set[str] = set()
        waiting: list[tuple[Any, bool]] = [(self.whole, False)]
        while waiting:
            node, joined = waiting.pop()
            if not isinstance(node, dict):
                continue
            within = joined or _is_joined(node)
            name = node.get("$ref", "").removeprefix("#/$defs/")
            if name and within and name not in opened:
                opened.add(name)
                waiting.append((self.whole if name == "#" else self.defs.get(name), True))
            for _, key, inner in subschemas(node):
                waiting.append((inner, (within or key == "allOf") if key in (*_IN_PLACE, "then", "else") else False))
        return opened

    # ------------------------------------------------------------------ by trial

    def compiled(self, what: str) -> tuple[Schema, Least]:
        """A relaxed schema that llguidance takes, and its shortest value.

        Raises:
            BadSchema: no answer fits.
        """
        before = list(self.notes)
        root = self.root(close=True)
        found, error = self._tried(root)
        if isinstance(found, Never) or error.startswith("Unsatisfiable"):
            self.notes = before
            root = self.root(close=False)
            found, error = self._tried(root)
        if isinstance(found, Never):
            raise BadSchema(f"No answer can fit {what}: {found.told()}.", hint="Correct that part of the schema.")
        if found.size > LARGEST:
            raise BadSchema(
                f"No model's window holds an answer that fits {what}: it has {found.size} bytes or more"
                f"{f', of which {found.asked()}' if found.blame else ''}.",
                hint="Ask for less.",
            )
        if error.startswith("Unsatisfiable"):
            raise BadSchema(f"No answer can fit {what}: {error}.", hint="Correct that part of the schema.")
        return (self._looser(root, what), found) if error else (root, found)

    def _tried(self, root: Schema) -> tuple[Least | Never, str]:
        found = least(root)
        if isinstance(found, Never):
            return found, ""
        for name in nevers(root):
            root["$defs"][name] = False
        if self.long:  # only now, so that the shortest value is told as it is
            root.update(self._mapped(root, (), _counted))
        return found, complaint(root) if found.size <= UNTRIED else ""

    def _looser(self, root: Schema, what: str) -> Schema:
        """Find what llguidance refuses, in parts and then in the whole, and give that up."""
        stubs = dict.fromkeys(root.get("$defs", {}), True)
        body = {key: value for key, value in root.items() if key != "$defs"}
        parts = {name: self._part(inner, (f"$defs.{name}",), stubs) for name, inner in root.get("$defs", {}).items()}
        done = self._part(body, (), stubs)
        root = done if isinstance(done, dict) else {}
        if parts:
            root["$defs"] = parts
        for way in (self._circles, self._joins, self._depths):
            error = complaint(root)
            if not error:
                return root
            if error.startswith("Unsatisfiable"):
                break
            root = way(root, error)
        error = complaint(root)
        if error.startswith("Unsatisfiable"):
            raise BadSchema(f"No answer can fit {what}: {error}.", hint="Correct that part of the schema.")
        if error:
            self.note((), f"everything ({error})")
            return {"type": root["type"]} if root.get("type") in ("object", "array", "string") else {}
        return root

    def _refused(self, node: Any, stubs: Mapping[str, Any]) -> str:
        self.trials -= 1
        error = complaint({**node, "$defs": stubs} if stubs else node) if isinstance(node, dict) else ""
        return "" if error.startswith("Unsatisfiable") else error

    def _part(self, node: Any, path: tuple[str, ...], stubs: Mapping[str, Any]) -> Any:
        """A schema without what llguidance refuses in it, whatever its references mean."""
        error = self._refused(node, stubs)
        if not error:
            return node
        if self.trials <= 0:
            self.note(path, f"everything in it ({error})")
            return True
        out = dict(node)
        for key in ("properties", "patternProperties"):
            if key in out:
                out[key] = {name: self._part(each, (*path, f".{name}"), stubs) for name, each in out[key].items()}
        for key in ("allOf", "anyOf", "prefixItems"):
            if key in out:
                out[key] = [self._part(each, path, stubs) for each in out[key]]
        for key, step in (("items", "[]"), ("additionalProperties", ".*")):
            if key in out:
                out[key] = self._part(out[key], (*path, step), stubs)
        for key in (
            "",
            "pattern",
            "format",
            "patternProperties",
            "allOf",
            "anyOf",
            "$ref",
            "enum",
            "required",
            "properties",
        ):
            if key and key not in out:
                continue
            if key:
                del out[key]
                self.note(path, f"{key} ({error})")
            if not self._refused(out, stubs):
                return out
        return True

    def _circles(self, root: Schema, error: str) -> Schema:
        """References that hold themselves beside other keywords: the references go, one after the other."""
        for _ in range(len(self.defs) + 1):
            if "circular references" not in error:
                break
            target = f"#{unquote(error.rpartition('#')[2])}"
            before = root
            for targets in ({target}, self._leading_to(target, root)):
                root = dict(self._mapped(root, (), partial(self._without, targets=targets)))
                if root != before:
                    break
            else:
                break
            error = complaint(root)
        return root

    def _leading_to(self, target: str, root: Schema) -> set[str]:
        """References whose definitions come to this one without going into a property or an item."""
        bodies = {f"#/$defs/{name}": inner for name, inner in root.get("$defs", {}).items()}
        known, size = {target}, 0
        while len(known) > size:
            size = len(known)
            known |= {name for name, inner in bodies.items() if known & _in_place(inner)}
        return known

    def _without(self, node: Schema, path: tuple[str, ...], *, targets: set[str]) -> Schema:
        """Keywords beside a reference without it; where there is little beside it, the reference alone."""
        if node.get("$ref") in targets and len(node.keys() - {"$defs"}) > 1:
            little = not node.keys() & {"properties", "required", "allOf", "anyOf", "items"}
            kept = {key: node[key] for key in node if (key == "$ref") == little or key == "$defs"}
            self.note(path, ", ".join(key for key in node if key not in kept))
            return kept
        rest = [each for each in node.get("allOf", ()) if not (isinstance(each, dict) and each.get("$ref") in targets)]
        if len(rest) < len(node.get("allOf", ())):
            self.note(path, "allOf with a $ref that comes back to it")
            return {**{key: node[key] for key in node if key != "allOf"}, **({"allOf": rest} if rest else {})}
        return node

    def _joins(self, root: Schema, error: str) -> Schema:
        """Schemas that must hold together, where that multiplies: the alternatives go."""
        return dict(self._mapped(root, (), self._single))

    def _single(self, node: Schema, path: tuple[str, ...]) -> Schema:
        joined = [key for key in ("allOf", "anyOf", "$ref") if key in node]
        if "allOf" in node or (len(joined) and len(node) > 1):
            self.note(path, joined[0])
            rest = {key: value for key, value in node.items() if key not in joined}
            return rest or {joined[0]: node[joined[0]]} if joined != ["allOf"] else rest
        return node

    def _depths(self, root: Schema, error: str) -> Schema:
        """A schema that is too large as a whole: definitions go, the deepest first."""
        defs = root.pop("$defs", {})
        self.note((), f"$defs ({error})")
        return {**root, "$defs": dict.fromkeys(defs, True)} if defs else root

    def _mapped(self, node: Any, path: tuple[str, ...], change: Any) -> Any:
        if not isinstance(node, dict):
            return node
        out = dict(change(node, path))
        for key in ("properties", "patternProperties", "$defs"):
            if key in out:
                start = ("$defs",) if key == "$defs" else path
                out[key] = {name: self._mapped(each, (*start, f".{name}"), change) for name, each in out[key].items()}
        for key in ("allOf", "anyOf", "prefixItems"):
            if key in out:
                out[key] = [self._mapped(each, path, change) for each in out[key]]
        for key, step in (("items", "[]"), ("additionalProperties", ".*")):
            if key in out:
                out[key] = self._mapped(out[key], (*path, step), change)
        return out


def _counted(node: Schema, path: tuple[str, ...]) -> Schema:
    return {**node, "minLength": LONGEST} if node.get("minLength", 0) > LONGEST else node


def _in_place(node: Any) -> set[str]:
    """References that a schema applies in place."""
    if not isinstance(node, dict):
        return set()
    inner = [each for key in ("allOf", "anyOf") for each in node.get(key, ())]
    own = {node["$ref"]} if "$ref" in node else set[str]()
    return own.union(*map(_in_place, inner))


def _says(known: Schema, other: Schema, key: str) -> bool:
    """Whether one schema says what another says by a keyword."""
    if key not in known or key in ("$ref", "anyOf"):
        return False
    if key == "type":
        return _type_list(known) <= _type_list(other)
    if key == "additionalProperties" and not {"properties", "patternProperties"} & other.keys():
        named = [*known.get("properties", {}).values(), *known.get("patternProperties", {}).values()]
        return all(each == other[key] for each in [known[key], *named])
    beside = ("properties", "patternProperties") if key == "additionalProperties" else ()
    return all(known.get(each) == other.get(each) for each in (key, *beside))


def _type_list(node: Schema) -> set[str]:
    given = node["type"]
    return set(given if isinstance(given, list) else [given])


def _is_joined(node: Schema) -> bool:
    """Whether what this schema applies in place must fit together with more."""
    in_place = [key for key in _IN_PLACE if key in node]
    return len(in_place) > 1 or "if" in node or (bool(in_place) and any(key in node for key in _OF_OBJECTS))


def _of(node: Schema, *keys: str) -> Schema:
    return {key: node[key] for key in keys if key in node}


def _names_type(node: Schema, kind: str) -> bool:
    types = node.get("type", [kind])
    return kind in (types if isinstance(types, list) else [types])


def _kind(value: Any) -> str:
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "object"


def _types(node: Any) -> set[str] | None:
    """Types that a schema says its values have; None where it does not say."""
    if not isinstance(node, dict):
        return None
    if "const" in node or "enum" in node:
        return {_kind(each) for each in node.get("enum", [node.get("const")])}
    given = node.get("type")
    if given is None:
        return None
    return set(given if isinstance(given, list) else [given])


def _values(node: Any) -> set[str] | None:
    if isinstance(node, dict) and ("const" in node or "enum" in node):
        return {json.dumps(each, sort_keys=True) for each in node.get("enum", [node.get("const")])}
    return None


def _disjoint(a: Any, b: Any) -> bool:
    """Whether no value fits both schemas, as far as types and constants say."""
    if a is False or b is False:
        return True
    mine, other = _types(a), _types(b)
    if mine and other:
        alike = {"integer", "number"}
        if not mine & other and not (mine & alike and other & alike):
            return True
    mine, other = _values(a), _values(b)
    if mine is not None and other is not None:
        return not mine & other
    if not (isinstance(a, dict) and isinstance(b, dict) and _types(a) == _types(b) == {"object"}):
        return False
    shared = a.get("properties", {}).keys() & b.get("properties", {}).keys()
    needed = {*a.get("required", ()), *b.get("required", ())}
    for name in shared & needed:
        mine, other = _values(a["properties"][name]), _values(b["properties"][name])
        if mine is not None and other is not None and not mine & other:
            return True
    return False
