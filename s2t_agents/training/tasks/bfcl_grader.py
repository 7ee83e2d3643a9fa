"""Whether calls are those of a possible answer, as the leaderboard's own checker decides it for Python.

A possible answer lists, for each parameter, the values that count; an empty string among them lets it be left out.
tests/test_bfcl.py compares every decision with the checker's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .items import Call

TYPES: dict[str, type[Any]] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
"""Python's types by the leaderboard's names."""

OMITTED = ""
"""Among the values of a parameter: it may be left out."""


def called_name(name: str) -> str:
    """A function's name as a client of OpenAI's interface may spell it: without dots."""
    return name.replace(".", "_")


def right_calls(
    functions: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], calls: Sequence[Call]
) -> bool:
    """Whether the calls are those of the answers, each once, in any order.

    Args:
        functions: as the leaderboard describes them.
        answers: one for each call: ``{name: {parameter: [values that count]}}``.
        calls: as made, names without dots.
    """
    described = {function["name"]: function for function in reversed(functions)}
    left = list(calls)
    if len(left) != len(answers):
        return False
    for answer in answers:
        ((name, values),) = answer.items()
        fitting = (at for at, call in enumerate(left) if name in described and _right(described[name], values, call))
        if (found := next(fitting, None)) is None:
            return False
        del left[found]
    return True


def _right(function: Mapping[str, Any], values: Mapping[str, Sequence[Any]], call: Call) -> bool:
    name, arguments = call
    parameters = function["parameters"]
    known = parameters.get("properties", {})
    return (
        name == called_name(function["name"])
        and all(required in arguments for required in parameters.get("required", ()))
        and all(given in known and given in values for given in arguments)
        and all(_counts(known[given], value, values[given]) for given, value in arguments.items())
        and all(OMITTED in counting for left_out, counting in values.items() if left_out not in arguments)
    )


def _counts(described: Mapping[str, Any], value: Any, counting: Sequence[Any]) -> bool:
    """Whether an argument is of the parameter's type, or of the answers', and equals one of the values that count."""
    kind: type[Any] = TYPES[described["type"]]
    inner = TYPES[described["items"]["type"]] if kind is list else None
    if described["type"] == "float" and type(value) is int:
        value = float(value)
    if not _typed(value, counting, kind, inner):
        return False
    if not isinstance(value, kind) or _kind_of(counting) not in (None, kind):
        return value in counting  # the answers are of another type than the description says: they decide
    if kind is dict:
        return any(_same_object(value, each) for each in counting if each != OMITTED)
    if inner is dict:
        return any(_same_objects(value, each) for each in counting)
    if kind is str:
        return _plain(value) in map(_plain, counting)
    if kind is list:
        return _plain_list(value) in map(_plain_list, counting)
    return value in counting


def _typed(value: Any, counting: Sequence[Any], kind: type[Any], inner: type[Any] | None) -> bool:
    if type(value) is kind and inner is not None:
        return any(
            not isinstance(each, list) or all(_typed(item, each, inner, None) for item in value) for each in counting
        )
    return type(value) in (kind, _kind_of(counting))


def _kind_of(counting: Iterable[Any]) -> type[Any] | None:
    return next((type(each) for each in counting if each != OMITTED), None)


def _same_objects(value: Sequence[Any], wanted: Any) -> bool:
    """Objects of a list, in their order."""
    return len(value) == len(wanted) and all(
        each != OMITTED and _same_object(ours, each) for ours, each in zip(value, wanted, strict=True)
    )


def _same_object(value: Any, wanted: Mapping[str, Sequence[Any]]) -> bool:
    """An object whose every key has one of the values that count for it."""
    if not isinstance(value, Mapping):
        return False
    return all(key in wanted and _plain(each) in map(_plain, wanted[key]) for key, each in value.items()) and all(
        key in value or OMITTED in counting for key, counting in wanted.items()
    )


def _plain_list(items: Iterable[Any]) -> list[Any]:
    return list(map(_plain, items))


def _plain(value: Any) -> Any:
    """Text without case, spaces and the punctuation that does not count; anything else as it is."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value
