"""What llguidance refuses in a schema, found by compiling it and its parts, and dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any
from urllib.parse import unquote

from llguidance import LLMatcher

from ..errors import BadSchema
from ..fork_safety import delay_fork
from .canonical_schema import Schema, map_subschemas, rewritten
from .schema_rules import json_rule

MAX_TRIALS = 400
"""Compilations that may be tried to find what llguidance refuses."""

_DROPPED = ("pattern", "format", "patternProperties", "allOf", "anyOf", "$ref", "enum", "required", "properties")
"""Keywords that are dropped from a part that is refused, one after the other."""


@lru_cache(maxsize=4096)
def _validate_rule(source: str) -> str:
    with delay_fork:
        return str(LLMatcher.validate_grammar(f"start: value\nvalue: {source}\n"))


def grammar_error(schema: Mapping[str, Any]) -> str:
    """llguidance's error for a schema; "" if it compiles."""
    error = _validate_rule(json_rule(schema)).strip()
    lines = error.split("failed to compile JSON schema: ")[-1].splitlines() or [""]
    messages = [line.strip() for line in lines if line.strip()]
    if messages and messages[0] == "regex parse error:":  # the reason follows the quoted pattern
        why = [line.removeprefix("error: ") for line in messages if line.startswith("error: ")]
        return why[0].rstrip(".") if why else "no such expression"
    return messages[0].rstrip(".") if messages else ""


def relax_by_trial(root: Schema, what: str, note: Callable[[tuple[str, ...], str], None]) -> Schema:
    """A schema that llguidance compiles: without what it refuses, first in each part, then in the whole.

    Args:
        root: relaxed by keyword, refused as a whole.
        what: what it is for, in errors.
        note: is given the path and the keyword of what is dropped.

    Raises:
        BadSchema: no answer can fit it.
    """
    defs = root.get("$defs", {})
    relaxer = _TrialRelaxer(dict.fromkeys(defs, True), note)
    parts = {name: relaxer.part(inner, (f"$defs.{name}",)) for name, inner in defs.items()}
    done = relaxer.part({key: value for key, value in root.items() if key != "$defs"}, ())
    root = done if isinstance(done, dict) else {}
    if parts:
        root["$defs"] = parts
    error = grammar_error(root)
    for relax_step in (relaxer.cut_circular_refs, relaxer.drop_alternatives, relaxer.drop_definitions):
        if error and not error.startswith("Unsatisfiable"):
            root = relax_step(root, error)
            error = grammar_error(root)
    if error.startswith("Unsatisfiable"):
        raise BadSchema(f"No answer can fit {what}: {error}.", hint="Correct that part of the schema.")
    if error:
        note((), f"everything ({error})")
        return {"type": root["type"]} if root.get("type") in ("object", "array", "string") else {}
    return root


class _TrialRelaxer:
    """Relaxes the parts of one schema, and then the whole.

    Args:
        stubs: its definitions, each permitting anything.
        note: as for ``relax_by_trial``.
    """

    def __init__(self, stubs: Mapping[str, Any], note: Callable[[tuple[str, ...], str], None]) -> None:
        self.stubs, self.note = stubs, note
        self.trials = MAX_TRIALS

    def _refused(self, node: Any) -> str:
        self.trials -= 1
        error = grammar_error({**node, "$defs": self.stubs} if self.stubs else node) if isinstance(node, dict) else ""
        return "" if error.startswith("Unsatisfiable") else error

    def part(self, node: Any, path: tuple[str, ...]) -> Any:
        """A subschema without what llguidance refuses in it, with all references stubbed."""
        error = self._refused(node)
        if not error:
            return node
        if self.trials <= 0:
            self.note(path, f"everything in it ({error})")
            return True
        out = map_subschemas(node, path, lambda each, at, _: self.part(each, at))
        for key in ("", *(key for key in _DROPPED if key in out)):
            if key:
                del out[key]
                self.note(path, f"{key} ({error})")
            if not self._refused(out):
                return out
        return True

    def cut_circular_refs(self, root: Schema, error: str) -> Schema:
        """Drop circular references that have sibling keywords, one after the other."""
        for _ in range(len(self.stubs) + 1):
            if "circular references" not in error:
                break
            target = f"#{unquote(error.rpartition('#')[2])}"
            before = root
            for targets in ({target}, _references_to(target, root)):
                root = rewritten(root, (), partial(self._without_references, targets=targets))
                if root != before:
                    break
            else:
                break
            error = grammar_error(root)
        return root

    def _without_references(self, node: Schema, path: tuple[str, ...], *, targets: set[str]) -> Schema:
        """Drop a reference and keep its sibling keywords; keep the reference if these say little."""
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

    def drop_alternatives(self, root: Schema, error: str) -> Schema:
        """Drop alternatives of conjunctions, whose combinations multiply."""
        return rewritten(root, (), self._drop_alternatives_of)

    def _drop_alternatives_of(self, node: Schema, path: tuple[str, ...]) -> Schema:
        joined = [key for key in ("allOf", "anyOf", "$ref") if key in node]
        if "allOf" in node or (len(joined) and len(node) > 1):
            self.note(path, joined[0])
            rest = {key: value for key, value in node.items() if key not in joined}
            return rest or {joined[0]: node[joined[0]]} if joined != ["allOf"] else rest
        return node

    def drop_definitions(self, root: Schema, error: str) -> Schema:
        """Drop the definitions of a schema that is too large as a whole."""
        defs = root.pop("$defs", {})
        self.note((), f"$defs ({error})")
        return {**root, "$defs": dict.fromkeys(defs, True)} if defs else root


def _references_to(target: str, root: Schema) -> set[str]:
    """References whose definitions lead to this one in place, not through a property or an item."""
    bodies = {f"#/$defs/{name}": inner for name, inner in root.get("$defs", {}).items()}
    known, size = {target}, 0
    while len(known) > size:
        size = len(known)
        known |= {name for name, inner in bodies.items() if known & _in_place(inner)}
    return known


def _in_place(node: Any) -> set[str]:
    """References that a schema applies in place."""
    if not isinstance(node, dict):
        return set()
    inner = [each for key in ("allOf", "anyOf") for each in node.get(key, ())]
    own = {node["$ref"]} if "$ref" in node else set[str]()
    return own.union(*map(_in_place, inner))
