"""Any JSON schema as draft 2020-12: keywords of older drafts and common mistakes are translated.

The canonical schema is equivalent to the original. It contains assertions only (no annotations), and its references are
``#`` or ``#/$defs/NAME``: identifiers, anchors and other pointers are resolved. What cannot be checked (an unknown
type, a reference to a remote schema) is left out and noted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from ..errors import BadSchema

Schema = dict[str, Any]

MAX_DEPTH = 50
"""Maximum nesting of a schema; deeper subschemas permit any value, and are noted."""

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

_ALIASES = {
    "dict": "object", "map": "object", "hashmap": "object", "record": "object", "struct": "object",
    "list": "array", "tuple": "array", "set": "array", "arraylist": "array",
    "float": "number", "double": "number", "decimal": "number",
    "int": "integer", "long": "integer", "short": "integer", "byte": "integer", "bigint": "integer",
    "int32": "integer", "int64": "integer",
    "str": "string", "char": "string", "text": "string",
    "bool": "boolean", "none": "null", "nulltype": "null",
}  # fmt: skip
_ANY_TYPE_NAMES = ("any", "object|array", "unknown", "mixed", "value")

_COUNTS = (
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "minContains",
    "maxContains",
)
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_SCHEMA_KEYWORDS = (
    "additionalProperties",
    "propertyNames",
    "unevaluatedProperties",
    "unevaluatedItems",
    "contains",
    "not",
)
_SCHEMA_MAPS = ("properties", "patternProperties", "dependentSchemas")
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_WITH_SUBSCHEMAS = (*_SCHEMA_LISTS, "items", *_SCHEMA_KEYWORDS, "if", "then", "else", *_SCHEMA_MAPS, "$defs")
"""In the order in which subschemas are changed, and so noted."""

_PATH_STEPS = {"additionalProperties": ".*", "items": "[]", "prefixItems": "[]"}


@dataclass
class CanonicalSchema:
    """A schema in draft 2020-12.

    Attributes:
        schema: the schema.
        notes: what was left out, and so is not checked either, as ``path: keyword (not checked)``.
    """

    schema: Schema
    notes: list[str] = field(default_factory=list)


def canonicalize(schema: Mapping[str, Any], what: str = "The schema") -> CanonicalSchema:
    """Translate a schema to its canonical form.

    Args:
        schema: of any draft, as plain JSON values.
        what: what it is for, in errors.

    Raises:
        BadSchema: it is not JSON, or contains itself.
    """
    check_json(schema, what)
    reader = _SchemaReader(schema)
    root = reader.read(schema, (), 0)
    bodies = reader.read_definitions()
    if bodies:
        root["$defs"] = bodies
    return CanonicalSchema(root, list(dict.fromkeys(reader.notes)))


def check_json(schema: Any, what: str) -> None:
    """Refuse a schema that is not JSON; infinite numbers pass, since Python's ``json`` supports them.

    Raises:
        BadSchema: with the reason.
    """
    try:
        json.dumps(schema, ensure_ascii=False).encode()
    except RecursionError:
        raise BadSchema(f"{what} is nested without end.") from None
    except ValueError as error:
        if "Circular" in str(error):
            raise BadSchema(f"{what} is nested without end.") from None
        raise BadSchema(f"{what} is no JSON: {error}.", hint="Use Unicode text.") from None
    except TypeError as error:
        hint = "Use plain dicts, lists, strings and numbers."
        raise BadSchema(f"{what} is no JSON: {error}.", hint=hint) from None


def format_path(path: tuple[str, ...]) -> str:
    """A path for messages: ``user.tags[]``; ``(root)`` for the whole."""
    return "".join(path).lstrip(".") or "(root)"


def map_subschemas(node: Schema, path: tuple[str, ...], change: Callable[[Any, tuple[str, ...], str], Any]) -> Schema:
    """A copy of a canonical schema with its direct subschemas changed, each given with its path and keyword."""
    out = dict(node)
    for key in (key for key in _WITH_SUBSCHEMAS if key in node):
        value, here = node[key], (*path, *_path_step(key))
        if key in _SCHEMA_LISTS:
            out[key] = [change(each, here, key) for each in value]
        elif key in _SCHEMA_MAPS or key == "$defs":
            start = ("$defs",) if key == "$defs" else path
            out[key] = {name: change(each, (*start, f".{name}"), key) for name, each in value.items()}
        else:
            out[key] = change(value, here, key)
    return out


def subschemas(node: Schema) -> list[tuple[str, Any]]:
    """The direct subschemas of a canonical schema, each with its keyword."""
    found: list[tuple[str, Any]] = []
    map_subschemas(node, (), lambda each, _, key: found.append((key, each)))
    return found


def rewritten(node: Schema, path: tuple[str, ...], change: Callable[[Schema, tuple[str, ...]], Schema]) -> Schema:
    """A canonical schema with every subschema changed, the outer ones first."""
    return map_subschemas(
        change(node, path), path, lambda each, at, _: rewritten(each, at, change) if isinstance(each, dict) else each
    )


def follow_pointer(root: Any, pointer: str) -> Any:
    """What a JSON pointer such as ``/$defs/a~1b`` or ``#/$defs/a~1b`` leads to in any schema; None if it is nowhere."""
    here = root
    for part in pointer.split("/")[1:]:
        names = [name.replace("~1", "/").replace("~0", "~") for name in (part, unquote(part))]
        if isinstance(here, Mapping):
            here = next((here[name] for name in names if name in here), None)
        elif isinstance(here, list) and part.isdecimal() and len(part) < 10 and int(part) < len(here):
            here = here[int(part)]
        else:
            return None
    return here


def definition(root: Schema, reference: str) -> Any:
    """What a reference of a canonical schema, ``#`` or ``#/$defs/NAME``, leads to."""
    return root if reference == "#" else root["$defs"][reference.removeprefix("#/$defs/")]


def resolved(node: Any, root: Schema) -> Any:
    """A subschema of a canonical schema; where it is only a reference, what that leads to (itself in a circle)."""
    seen = set[str]()
    while isinstance(node, dict) and node.keys() - {"$defs"} == {"$ref"} and node["$ref"] not in seen:
        seen.add(node["$ref"])
        node = definition(root, node["$ref"])
    return node


def types_of(node: Schema) -> list[str] | None:
    """The types that a canonical schema permits; None if it does not restrict them."""
    given = node.get("type")
    return given if given is None or isinstance(given, list) else [given]


def literals_of(node: Schema) -> list[Any] | None:
    """The values that a canonical schema lists by ``enum`` or ``const``; None if it lists none."""
    values: list[Any] | None = node.get("enum", [node["const"]] if "const" in node else None)
    return values


class _SchemaReader:
    def __init__(self, root: Any) -> None:
        self.root = root
        self.notes: list[str] = []
        self._names: dict[int, str] = {}
        self._pending: list[tuple[str, Any]] = []
        self._ids: dict[str, Any] = {"": root}
        self._anchors: dict[str, list[Any]] = {}
        self._bases: dict[int, str] = {}
        draft = root.get("$schema") if isinstance(root, Mapping) else None
        self._before_2019 = isinstance(draft, str) and any(f"draft-0{n}" in draft for n in (3, 4, 5, 6, 7))
        self._index(root)

    def _index(self, root: Any) -> None:
        """Collect identifiers, anchors and the base URI of every reference."""
        stack = [(root, "")]
        seen: set[int] = set()
        while stack:
            node, base = stack.pop()
            if isinstance(node, list):
                stack += [(each, base) for each in node]
            if not isinstance(node, Mapping) or id(node) in seen:
                continue
            seen.add(id(node))
            own = node.get("$id", node.get("id"))
            named = "$id" in node or node is root or (isinstance(own, str) and bool({"/", "#", "."} & set(own)))
            if isinstance(own, str) and named and not (self._before_2019 and "$ref" in node):
                base = _joined(base, own)
                self._ids.setdefault(base.rstrip("#"), node)
                if own.startswith("#"):
                    self._anchors.setdefault(own[1:], []).append(node)
            for key in ("$anchor", "$dynamicAnchor"):
                if isinstance(node.get(key), str):
                    self._anchors.setdefault(node[key], []).append(node)
            if any(key in node for key in _REFERENCES):
                self._bases[id(node)] = base
            stack += [(each, base) for each in node.values()]

    def _note(self, path: tuple[str, ...], what: str) -> None:
        self.notes.append(f"{format_path(path)}: {what} (not checked)")

    def read_definitions(self) -> Schema:
        """The canonical forms of the referenced schemas, by name."""
        bodies: Schema = {}
        while self._pending:
            name, target = self._pending.pop(0)
            bodies[name] = self.read(target, (f"$defs.{name}",), 1)
        return bodies

    def read(self, node: Any, path: tuple[str, ...], depth: int) -> Any:
        """The canonical form of one schema."""
        if isinstance(node, bool):
            return node
        if not isinstance(node, Mapping):
            self._note(path, f"{format_value(node)} in a schema's place")
            return True
        if depth > MAX_DEPTH:
            self._note(path, "nested too deep")
            return True
        out: Schema = {}
        if self._reference(node, out, path) and self._before_2019:
            return out
        self._type(node, out, path)
        for key, value in node.items():
            if key in ("const", "enum"):
                self._literals(key, value, out, path)
            elif key in _COUNTS or key in _BOUNDS or key == "multipleOf":
                self._number(node, key, value, out, path)
            elif key in ("pattern", "format"):
                if isinstance(value, str):
                    out[key] = value
                else:
                    self._note(path, f"{key} {format_value(value)}")
            elif key == "uniqueItems":
                if value is True:
                    out[key] = True
            elif key in _SCHEMA_MAPS:
                self._map(key, value, out, path, depth)
            elif key in _SCHEMA_LISTS:
                self._list(key, value, out, path, depth)
            elif key in _SCHEMA_KEYWORDS:
                out[key] = self.read(value, (*path, *_path_step(key)), depth + 1)
        self._items(node, out, path, depth)
        self._objects(node, out, path, depth)
        if "if" in node:
            for key in ("if", "then", "else"):
                if key in node:
                    out[key] = self.read(node[key], path, depth + 1)
        if node.get("nullable") is True and not ("type" not in out and "enum" not in out):
            self._nullable(out)
        if depth and set(out) == {"allOf"} and len(out["allOf"]) == 1:
            return out["allOf"][0]
        return out

    def _reference(self, node: Mapping[str, Any], out: Schema, path: tuple[str, ...]) -> bool:
        """Read the first reference that leads somewhere; False if none does."""
        for key in _REFERENCES:
            given = node.get(key)
            if not isinstance(given, str):
                continue
            target = self._resolve(given, self._bases.get(id(node), ""), dynamic=key == "$dynamicRef")
            if target is None:
                self._note(path, f"{key} {format_value(given)}")
                continue
            if target is self.root:
                out["$ref"] = "#"
            else:
                out["$ref"] = f"#/$defs/{self._definition_name(target, given)}"
            return True
        return False

    def _definition_name(self, target: Any, given: str) -> str:
        if id(target) in self._names:
            return self._names[id(target)]
        wanted = given.rstrip("/#").split("/")[-1].split("#")[-1] or "ref"
        wanted = "".join(char if char.isalnum() or char in "_-" else "_" for char in wanted)[:60]
        taken = set(self._names.values())
        name = next(each for each in _numbered(wanted) if each not in taken)
        self._names[id(target)] = name
        self._pending.append((name, target))
        return name

    def _resolve(self, given: str, base: str, *, dynamic: bool) -> Any:
        """The schema that a reference points to; None if it is not in this document."""
        url, fragment = urldefrag(given)
        here = self._ids.get(base.rstrip("#"), self.root) if not url else None
        if url:
            for each in (_joined(base, url), url):
                if each.rstrip("#") in self._ids:
                    here = self._ids[each.rstrip("#")]
        if here is None:
            return None
        if not fragment or fragment == "/":
            return here
        if not fragment.startswith("/"):
            found = self._anchors.get(fragment, [])
            return found[0] if len(found) == 1 or (found and not dynamic) else None
        for start in (here, self.root):
            target = follow_pointer(start, fragment)
            if isinstance(target, (Mapping, bool)):
                return target
        return None

    def _type(self, node: Mapping[str, Any], out: Schema, path: tuple[str, ...]) -> None:
        given = node.get("type")
        if given is None:
            return
        names = given if isinstance(given, list) else [given]
        found: list[str] = []
        for name in names:
            plain = name.lower() if isinstance(name, str) else None
            plain = _ALIASES.get(plain, plain) if plain else None
            if plain not in TYPES:
                if plain not in _ANY_TYPE_NAMES:
                    self._note(path, f"type {format_value(name)}")
                return
            found.append(plain)
        if found or isinstance(given, list):
            out["type"] = found[0] if len(found) == 1 else list(dict.fromkeys(found))

    def _nullable(self, out: Schema) -> None:
        if (types := types_of(out)) is not None:
            out["type"] = list(dict.fromkeys([*types, "null"]))
        if "enum" in out and None not in out["enum"]:
            out["enum"] = [*out["enum"], None]

    def _literals(self, key: str, value: Any, out: Schema, path: tuple[str, ...]) -> None:
        values = value if key == "enum" else [value]
        if not isinstance(values, list):
            self._note(path, f"enum {format_value(value)}")
            return
        kept = [each for each in values if _finite(each)]
        if len(kept) < len(values):
            self._note(path, f"{key} with a number that is no JSON")
        if key == "enum" or kept:
            out[key] = kept if key == "enum" else kept[0]

    def _number(self, node: Mapping[str, Any], key: str, value: Any, out: Schema, path: tuple[str, ...]) -> None:
        if isinstance(value, bool):  # draft 4's exclusive bounds
            plain = {"exclusiveMinimum": "minimum", "exclusiveMaximum": "maximum"}.get(key)
            if plain and value and isinstance(node.get(plain), int | float):
                self._number(node, key, node[plain], out, path)
            elif plain is None:
                self._note(path, f"{key} {format_value(value)}")
            return
        if isinstance(value, str):
            value = _parse_number(value, value)
        if not isinstance(value, int | float) or value != value:
            self._note(path, f"{key} {format_value(value)}")
        elif _is_beyond_double(value):
            lower = key.lower().endswith("minimum")
            if key not in _BOUNDS or lower != (value < 0):
                self._note(path, f"{key} {format_value(value)}")
        elif key in _COUNTS:
            if value != int(value):
                self._note(path, f"{key} {format_value(value)}")
            elif value > 0 or key.startswith("max") or key == "minContains":
                out[key] = int(value)
        elif key != "multipleOf" or value > 0:
            out[key] = value
        else:
            self._note(path, f"{key} {format_value(value)}")

    def _map(self, key: str, value: Any, out: Schema, path: tuple[str, ...], depth: int) -> None:
        if not isinstance(value, Mapping):
            if value:
                self._note(path, f"{key} {format_value(value)}")
            return
        out[key] = {
            str(name): self.read(inner, path if key == "dependentSchemas" else (*path, f".{name}"), depth + 1)
            for name, inner in value.items()
        }

    def _list(self, key: str, value: Any, out: Schema, path: tuple[str, ...], depth: int) -> None:
        if isinstance(value, Mapping):
            value = list(value.values()) if key != "allOf" else [value]
        if not isinstance(value, list) or not value:
            if value != []:
                self._note(path, f"{key} {format_value(value)}")
            return
        out[key] = [self.read(inner, (*path, *_path_step(key)), depth + 1) for inner in value]

    def _items(self, node: Mapping[str, Any], out: Schema, path: tuple[str, ...], depth: int) -> None:
        items = node.get("items")
        if isinstance(items, list):  # drafts before 2020-12
            self._list("prefixItems", items, out, path, depth)
            items = node.get("additionalItems")
        if items is not None:
            out["items"] = self.read(items, (*path, "[]"), depth + 1)

    def _objects(self, node: Mapping[str, Any], out: Schema, path: tuple[str, ...], depth: int) -> None:
        required = node.get("required")
        names = [each for each in required if isinstance(each, str)] if isinstance(required, list) else []
        properties = node.get("properties")
        for name, inner in properties.items() if isinstance(properties, Mapping) else ():
            if isinstance(inner, Mapping) and inner.get("required") is True:  # draft 3
                names.append(name)
        if names:
            out["required"] = list(dict.fromkeys(names))
        elif isinstance(required, str):
            self._note(path, f"required {format_value(required)}")
        dependencies = self._mapping(node, "dependencies", path)
        given = {k: v for k, v in dependencies.items() if isinstance(v, Mapping | bool)}
        if given:
            schemas = node.get("dependentSchemas")
            schemas = schemas if isinstance(schemas, Mapping) else {}
            self._map("dependentSchemas", {**schemas, **given}, out, path, depth)
        wanted: Schema = {k: [v] if isinstance(v, str) else v for k, v in dependencies.items() if k not in given}
        wanted |= self._mapping(node, "dependentRequired", path)
        for name in [name for name, each in wanted.items() if not _are_names(each)]:
            self._note(path, f"dependentRequired {format_value({name: wanted.pop(name)})}")
        if wanted:
            out["dependentRequired"] = wanted

    def _mapping(self, node: Mapping[str, Any], key: str, path: tuple[str, ...]) -> Mapping[str, Any]:
        """A keyword's mapping; an empty one, noted, where it is something else."""
        value = node.get(key) or {}
        if not isinstance(value, Mapping):
            self._note(path, f"{key} {format_value(value)}")
        return value if isinstance(value, Mapping) else {}


def format_value(value: Any) -> str:
    """A value for messages: JSON, cut at 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _path_step(key: str) -> tuple[str, ...]:
    return (_PATH_STEPS[key],) if key in _PATH_STEPS else ()


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}_{number}"
        number += 1


def _joined(base: str, url: str) -> str:
    try:
        return urljoin(base, url)
    except ValueError:
        return url


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_beyond_double(value: float) -> bool:
    try:
        return math.isinf(value)
    except OverflowError:  # an integer of more than 308 digits
        return True


def _parse_number(text: str, other: Any) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return other


def _finite(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True
