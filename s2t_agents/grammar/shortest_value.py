"""The shortest JSON value of a schema: its minimum length, its text where known, and whether any value exists."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llguidance import LLTokenizer

from .canonical_schema import Schema, definition, format_path, format_value, literals_of, resolved, types_of
from .completion_search import CompletionSearch, SearchBudget
from .matcher import Matcher
from .schema_rules import MAX_VALUE_BYTES, json_rule, parsed_pattern, shortest_match
from .validation import SchemaValidator

_MAX_ROUNDS = 24
_MAX_TEXT_BYTES = 20_000  # longest value whose text is kept
_MAX_ENUM_VALUES = 2000  # values of an enum that are examined
_KINDS = ("integer", "null", "boolean", "string", "array", "object")
"""Of a schema that names none: an integer is as short as a number."""


@dataclass(frozen=True)
class ShortestValue:
    """The shortest value of a schema.

    Attributes:
        size: lower bound of its length in bytes.
        text: a shortest value; None if unknown.
        blame: the keyword that requires most of the length, as (bytes, path, keyword, value); None if there is none.
    """

    size: int
    text: str | None = None
    blame: tuple[int, str, str, Any] | None = None

    def describe_blame(self) -> str:
        """The keyword that requires most of the length, for errors; "" if there is none."""
        return f"{self.blame[1]}: {self.blame[2]} {format_value(self.blame[3])}" if self.blame else ""


@dataclass(frozen=True)
class Unsatisfiable:
    """No value fits: path, keyword and its value that exclude all values."""

    where: str
    keyword: str
    value: Any

    def describe(self) -> str:
        """Path, keyword and value, for errors."""
        return f"{self.where}: {self.keyword} {format_value(self.value)}"


Found = ShortestValue | Unsatisfiable


def shortest_value(schema: Schema) -> tuple[Found, list[str]]:
    """The shortest value of a relaxed schema, and the names of its definitions that no value fits."""
    search = _Search(schema)
    found = search.root()
    excluded = [name for name, each in search.known.items() if isinstance(each, Unsatisfiable) and name != "#"]
    return found, [name.removeprefix("#/$defs/") for name in excluded]


def excluding_count(node: Schema) -> str:
    """The property count of an object schema that no object reaches or keeps; "" if there is none."""
    if len(node.get("required", ())) > node.get("maxProperties", math.inf):
        return "maxProperties"
    closed = node.get("additionalProperties") is False and not node.get("patternProperties")
    possible = sum(inner is not False for inner in node.get("properties", {}).values())
    return "minProperties" if closed and node.get("minProperties", 0) > possible else ""


class _Search:
    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.known: dict[str, Found] = {}

    def root(self) -> Found:
        names = ["#", *(f"#/$defs/{name}" for name in self.schema.get("$defs", {}))]
        self.known = {name: Unsatisfiable(format_path((name.removeprefix("#/"),)), "$ref", name) for name in names}
        for _ in range(_MAX_ROUNDS):
            changed = False
            for name in reversed(names):
                path = () if name == "#" else (name.removeprefix("#/").replace("/", "."),)
                found = self.of(definition(self.schema, name), path)
                if _shorter(found, self.known[name]) or (
                    _rests_on_itself(self.known[name]) and found != self.known[name]
                ):
                    self.known[name], changed = found, True
            if not changed:
                break
        else:  # no fixed point reached: nothing is excluded
            self.known = {
                name: ShortestValue(1) if isinstance(each, Unsatisfiable) else each for name, each in self.known.items()
            }
        return self.known["#"]

    def of(self, node: Any, path: tuple[str, ...]) -> Found:
        if node is False:
            return Unsatisfiable(format_path(path), "schema", False)
        if not isinstance(node, dict):
            return ShortestValue(1, "0")
        parts: list[Found] = []
        if "const" in node or "enum" in node:
            parts.append(self._literal(node, path))
        if "$ref" in node:
            parts.append(self.known.get(node["$ref"], ShortestValue(1)))
        parts += [self.of(each, path) for each in node.get("allOf", ())]
        if "anyOf" in node:
            parts.append(_best([self.of(each, path) for each in node["anyOf"]]))
        rest = node.keys() - {"const", "enum", "$ref", "allOf", "anyOf", "$defs"}
        if rest and not ("const" in node or "enum" in node):
            types = types_of(node)
            parts.append(_best([self._typed(kind, node, path) for kind in (_KINDS if types is None else types)]))
        if not parts:
            return ShortestValue(1, "0")
        unsatisfiable = next((each for each in parts if isinstance(each, Unsatisfiable)), None)
        if unsatisfiable is not None:
            return unsatisfiable
        kinds = [each for each in map(self._kinds_of, _in_place(node)) if each]
        if kinds and not set.intersection(*kinds):
            return Unsatisfiable(
                format_path(path), "allOf" if "allOf" in node else "type", node.get("allOf", node.get("type"))
            )
        whole = max((each for each in parts if isinstance(each, ShortestValue)), key=lambda each: each.size)
        return whole if len(parts) == 1 else ShortestValue(whole.size, None, whole.blame)

    def _kinds_of(self, node: Any) -> set[str]:
        """The types that a schema permits; empty if it does not restrict them."""
        node = resolved(node, self.schema)
        kinds = set((types_of(node) or ()) if isinstance(node, dict) else ())
        return kinds | {"integer"} if "number" in kinds else kinds

    def _literal(self, node: Schema, path: tuple[str, ...]) -> Found:
        values = literals_of(node) or []
        if "const" in node and "enum" in node:
            values = [each for each in values if _same(each, node["const"])]
        fitting = [each for each in values[:_MAX_ENUM_VALUES] if _fits(each, node)]
        if not fitting and len(values) <= _MAX_ENUM_VALUES:
            return Unsatisfiable(
                format_path(path), "enum" if "enum" in node else "const", node.get("enum", node.get("const"))
            )
        texts = [json.dumps(each, ensure_ascii=False) for each in fitting] or ["0"]
        shortest = min(texts, key=lambda text: len(text.encode()))
        size = len(shortest.encode())
        return ShortestValue(
            size, shortest, (size, format_path(path), "const" if "const" in node else "enum", shortest)
        )

    def _typed(self, kind: str, node: Schema, path: tuple[str, ...]) -> Found:
        if kind == "null":
            return ShortestValue(4, "null")
        if kind == "boolean":
            return ShortestValue(4, "true")
        if kind in ("integer", "number"):
            return _number(kind, node, path)
        if kind == "string":
            return _string(node, path)
        return self._array(node, path) if kind == "array" else self._object(node, path)

    def _array(self, node: Schema, path: tuple[str, ...]) -> Found:
        count = node.get("minItems", 0)
        if count > node.get("maxItems", math.inf):
            key = "minItems" if count > MAX_VALUE_BYTES else "maxItems"
            return Unsatisfiable(format_path(path), key, node[key])
        sizes, texts, blames = 0, list[str | None](), list[tuple[int, str, str, Any]]()
        schemas = node.get("prefixItems", [])[:count]
        items = [self.of(each, (*path, "[]")) for each in schemas]
        more = count - len(schemas)
        if more:
            items.append(self.of(node.get("items", True), (*path, "[]")))
        for at, item in enumerate(items):
            if isinstance(item, Unsatisfiable):
                return item
            times = more if more and at == len(items) - 1 else 1
            sizes += times * item.size
            few = times * len(item.text or "") <= _MAX_TEXT_BYTES and times <= _MAX_TEXT_BYTES
            texts += [item.text] * times if few else [None]
            blames += [item.blame] if item.blame and times == 1 else []
        size = 2 + sizes + 2 * max(count - 1, 0)
        text = None if None in texts else f"[{', '.join(map(str, texts))}]"
        if count > 1:
            blames.append((size, format_path(path), "minItems", count))
        return ShortestValue(size, text, max(blames, key=lambda each: each[0], default=None))

    def _object(self, node: Schema, path: tuple[str, ...]) -> Found:
        properties, required = node.get("properties", {}), node.get("required", [])
        others = node.get("additionalProperties", True)
        if key := excluding_count(node):
            return Unsatisfiable(format_path(path), key, node[key])
        wanted = set(required)
        names = [
            *(name for name in properties if name in wanted),
            *(name for name in required if name not in properties),
        ]
        texts, size, blames = list[str | None](), 2, list[tuple[int, str, str, Any]]()
        for name in names:
            if name in properties:
                found = self.of(properties[name], (*path, f".{name}"))
            elif others is False and not node.get("patternProperties"):
                return Unsatisfiable(format_path(path), "required", name)
            else:
                found = ShortestValue(1, "0" if others is True and not node.get("patternProperties") else None)
            if isinstance(found, Unsatisfiable):
                return found
            key = json.dumps(name, ensure_ascii=False)
            size += len(key.encode()) + 2 + found.size
            texts.append(f"{key}: {found.text}" if found.text is not None else None)
            blames += [found.blame] if found.blame else []
        size += 2 * max(len(names) - 1, 0)
        more = node.get("minProperties", 0) - len(names)
        if more > 0:
            size += 6 * more
            texts.append(None)
            blames.append((6 * more, format_path(path), "minProperties", node["minProperties"]))
        if len(names) > 1:
            own = size - sum(each[0] for each in blames)
            blames.append((own, format_path(path), "required", names))
        text = None if None in texts or size > _MAX_TEXT_BYTES else "{" + ", ".join(map(str, texts)) + "}"
        return ShortestValue(size, text, max(blames, key=lambda each: each[0], default=None))


def _in_place(node: Schema) -> list[Any]:
    own = {key: node[key] for key in ("type",) if key in node}
    return [own, *node.get("allOf", ()), *([{"$ref": node["$ref"]}] if "$ref" in node else [])]


def _rests_on_itself(found: Found) -> bool:
    return isinstance(found, Unsatisfiable) and found.keyword == "$ref"


def _shorter(one: Found, other: Found) -> bool:
    if isinstance(one, Unsatisfiable):
        return False
    return isinstance(other, Unsatisfiable) or one.size < other.size


def _best(options: list[Found]) -> Found:
    fitting = [each for each in options if isinstance(each, ShortestValue)]
    if not fitting:
        return options[0] if options else Unsatisfiable("(root)", "anyOf", [])
    known = [each for each in fitting if each.text is not None]
    size = min(each.size for each in fitting)
    shortest = min(known or fitting, key=lambda each: each.size)
    return ShortestValue(size, shortest.text, min(fitting, key=lambda each: each.size).blame)


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _fits(value: Any, node: Schema) -> bool:
    rest = {key: node[key] for key in node if key not in ("$ref", "allOf", "anyOf", "enum", "const", "$defs")}
    return not rest or not SchemaValidator(rest).error_of(value)


def _number(kind: str, node: Schema, path: tuple[str, ...]) -> Found:
    low, high = node.get("minimum", -math.inf), node.get("maximum", math.inf)
    over, under = node.get("exclusiveMinimum", -math.inf), node.get("exclusiveMaximum", math.inf)
    lower = max(low, over)
    if lower > min(high, under) or (lower == min(high, under) and (over == lower or under == lower)):
        key = next(key for key in ("maximum", "exclusiveMaximum") if node.get(key, math.inf) == min(high, under))
        return Unsatisfiable(format_path(path), key, node[key])
    if low <= 0 <= high and over < 0 < under:
        return ShortestValue(1, "0")
    first = math.floor(lower) if lower > -math.inf else 0
    step = node.get("multipleOf", 1)
    if lower >= 0:
        value = first if first >= low and first > over else first + 1
        value = math.ceil(value / step) * step
    else:
        value = math.ceil(min(high, under))
        value = value if value <= high and value < under else value - 1
        value = math.floor(value / step) * step
    whole = value == int(value) and low <= value <= high and over < value < under
    if whole:
        text = str(int(value))
        return ShortestValue(1, text)
    if kind == "integer" and "multipleOf" not in node:
        key = "maximum" if "maximum" in node else "exclusiveMaximum"
        return Unsatisfiable(format_path(path), key, node.get(key))
    return ShortestValue(1)


def _string(node: Schema, path: tuple[str, ...]) -> Found:
    count = node.get("minLength", 0)
    if count > node.get("maxLength", math.inf):
        key = "minLength" if count > MAX_VALUE_BYTES else "maxLength"
        return Unsatisfiable(format_path(path), key, node[key])
    blame = (count + 2, format_path(path), "minLength", count) if count else None
    keys = ("pattern", "format", "minLength", "maxLength")
    rules: Schema = {key: node[key] for key in keys if key in node}
    if "pattern" not in rules and "format" not in rules:
        return ShortestValue(count + 2, f'"{"a" * count}"' if count <= _MAX_TEXT_BYTES else None, blame)
    fewest = shortest_match(rules.get("pattern", ""))
    text = _shortest_string(json.dumps(rules)) if count <= 200 and fewest <= _MAX_TEXT_BYTES else None
    key = "pattern" if "pattern" in rules else "format"
    least = max(count, fewest) + 2
    size = len(text.encode()) if text is not None else least
    return ShortestValue(
        least, text, blame if blame and count >= fewest else (size, format_path(path), key, rules[key])
    )


@lru_cache(maxsize=2048)
def _shortest_string(rules: str) -> str | None:
    """The shortest string that fits, as JSON, found by a search over bytes; None if none is found."""
    source = f"start: value\nvalue: {json_rule({'type': 'string', **json.loads(rules)})}\n"
    llguidance_tokenizer, order = _byte_vocabulary()
    matcher = Matcher(llguidance_tokenizer, source)
    if matcher.is_error():
        return None
    spelt = json.dumps(_example_of_pattern(json.loads(rules).get("pattern", "")), ensure_ascii=False)
    if _accepts(matcher, spelt):
        return spelt
    found = order.find_completion(matcher, 400, budget=SearchBudget(20_000))
    text = bytes(found or b"").decode(errors="replace")
    return text if found is not None and _accepts(matcher, text) else None


def _accepts(matcher: Matcher, text: str) -> bool:
    state = matcher.deep_copy()
    return bool(state.consume_tokens(list(text.encode())) and state.is_accepting())


def _example_of_pattern(pattern: str) -> str:
    """A short text that matches a pattern, built from its parts; "" if Python cannot parse the pattern."""
    parts = parsed_pattern(pattern)
    return "" if parts is None else str(_example_of_parts(parts))


def _example_of_parts(parts: Any) -> str:
    out: str = ""
    for kind, value in parts:
        name = str(kind)
        if name == "LITERAL":
            out += chr(value)
        elif name == "IN":
            out += _one_of(value)
        elif name == "NOT_LITERAL":
            out += "a" if value != ord("a") else "b"
        elif name == "ANY":
            out += "a"
        elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            out += _example_of_parts(value[2]) * min(value[0], _MAX_TEXT_BYTES)
        elif name == "SUBPATTERN":
            out += _example_of_parts(value[3])
        elif name == "BRANCH":
            out += min((_example_of_parts(each) for each in value[1]), key=len)
    return out


def _one_of(choices: Any) -> str:
    probes: str = "a0A_-. @/"
    negated = any(str(kind) == "NEGATE" for kind, _ in choices)
    for char in [*probes, *map(chr, range(33, 127))]:
        if any(_holds(choice, char) for choice in choices) != negated:
            return str(char)
    return str(next((chr(value[0] if isinstance(value, tuple) else value) for _, value in choices if value), "a"))


def _holds(choice: Any, char: str) -> bool:
    kind, value = str(choice[0]), choice[1]
    if kind == "LITERAL":
        return bool(chr(value) == char)
    if kind == "RANGE":
        return bool(value[0] <= ord(char) <= value[1])
    word, space = char.isalnum() or char == "_", char.isspace()
    found = {"DIGIT": char.isdigit(), "WORD": word, "SPACE": space}
    name = str(value).removeprefix("CATEGORY_")
    if name.startswith("NOT_"):
        return not found.get(name.removeprefix("NOT_"), False)
    return found.get(name, False)


@lru_cache(maxsize=1)
def _byte_vocabulary() -> tuple[LLTokenizer, CompletionSearch]:
    """llguidance's tokenizer of single bytes and some control tokens, with the search over it."""
    tokenizer = LLTokenizer("byte")
    texts = [chr(value) if value < 128 else "\ufffd" if value < 256 else "" for value in range(tokenizer.vocab_size)]
    return tokenizer, CompletionSearch(texts, enders=set())
