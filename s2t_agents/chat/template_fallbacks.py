"""Stricter forms of a conversation, for chat templates that refuse it or drop some of its text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from ..tokenization.traced_text import concat
from .hermes_tools import Turn, join_nonempty


def results_by_call(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation with results in the order of the calls that they answer, since most templates show no ids.

    Results are sorted among those next to them, the calls of the latest turns first; several of one call there become
    one. Calls that are answered later, or never, come after the others of their turn.
    """
    blocks = [(kind, list(each)) for kind, each in itertools.groupby(turns, _kind)]
    answered: dict[str, int] = {}
    for number, (kind, block) in enumerate(blocks):
        if kind == "tool":
            answered = {turn["tool_call_id"]: number for turn in block} | answered
    places: dict[str, tuple[int, int]] = {}
    result: list[Turn] = []
    for number, (kind, block) in enumerate(blocks):
        if kind == "calls":
            for turn in block:
                calls = sorted(turn["tool_calls"], key=lambda call: answered.get(call["id"], len(blocks)))
                places |= {call["id"]: (-number, len(places) + at) for at, call in enumerate(calls)}
                result.append({**turn, "tool_calls": calls})
        elif kind == "tool":
            one_each: dict[str, Turn] = {}
            for turn in sorted(block, key=lambda turn: places[turn["tool_call_id"]]):
                before = one_each.get(turn["tool_call_id"])
                text = turn["content"] if before is None else concat([before["content"], "\n", turn["content"]])
                one_each[turn["tool_call_id"]] = {**turn, "content": text}
            result += one_each.values()
        else:
            result += block
    return result


def _kind(turn: Turn) -> str:
    return "calls" if "tool_calls" in turn else "tool" if turn["role"] == "tool" else "other"


def fallback_forms(turns: list[Turn]) -> Iterator[list[Turn]]:
    """The conversation as given, then with more and more changes. All text is kept; only system text may move.

    The changes: one system turn at the start; adjacent turns of one role merged; system text in the first user turn;
    an empty user turn before a leading and after a trailing assistant turn; one tool call per turn.
    """
    gathered = _system_first(turns)
    result: list[list[Turn]] = []
    for form in (turns, gathered, _merge_same_role(gathered), _merge_same_role(system_in_user(turns))):
        opened = _with_leading_user(form)
        for last in (form, opened, _with_trailing_user(opened)):
            for one in (last, one_call_each(last)):
                if one not in result:
                    result.append(one)
                    yield one


def system_in_user(turns: Sequence[Turn]) -> list[Turn]:
    """System text moved to the start of the first user turn."""
    system_text = join_nonempty([turn["content"] for turn in turns if turn["role"] == "system"])
    rest = [turn for turn in turns if turn["role"] != "system"]
    if not system_text:
        return rest
    if rest and rest[0]["role"] == "user":
        return [{**rest[0], "content": join_nonempty([system_text, rest[0]["content"]])}, *rest[1:]]
    return [{"role": "user", "content": system_text}, *rest]


def one_call_each(turns: Sequence[Turn]) -> list[Turn]:
    """One tool call per assistant turn, followed by its results."""
    results: dict[str, list[Turn]] = {}
    for turn in turns:
        if turn["role"] == "tool":
            results.setdefault(turn["tool_call_id"], []).append(turn)
    result: list[Turn] = []
    for turn in turns:
        calls = turn.get("tool_calls", ())
        if turn["role"] == "tool":
            continue
        if not calls:
            result.append(turn)
        for at, call in enumerate(calls):
            first = turn if at == 0 else {"role": "assistant", "content": ""}
            result.append({**first, "tool_calls": [call]})
            result += results.get(call["id"], ())
    return result


def in_parts(turns: Sequence[Turn], roles: frozenset[str]) -> list[Turn]:
    """The conversation with the content of these roles as a list of parts, which templates of vision models read."""
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]} if turn["role"] in roles else turn
        for turn in turns
    ]


def _system_first(turns: Sequence[Turn]) -> list[Turn]:
    system_text = [turn["content"] for turn in turns if turn["role"] == "system"]
    rest = [turn for turn in turns if turn["role"] != "system"]
    return [{"role": "system", "content": join_nonempty(system_text)}, *rest] if system_text else rest


def _merge_same_role(turns: Sequence[Turn]) -> list[Turn]:
    """Adjacent turns of one role merged, except after a tool call."""
    result: list[Turn] = []
    for turn in turns:
        before = result[-1] if result else None
        if before and before["role"] == turn["role"] != "tool" and "tool_calls" not in before:
            both = {**before, **turn, "content": join_nonempty([before["content"], turn["content"]])}
            thoughts = [one["reasoning_content"] for one in (before, turn) if "reasoning_content" in one]
            result[-1] = both | ({"reasoning_content": join_nonempty(thoughts)} if thoughts else {})
        else:
            result.append(turn)
    return result


def _with_leading_user(turns: Sequence[Turn]) -> list[Turn]:
    """An empty user turn before a leading assistant turn."""
    at = 1 if turns and turns[0]["role"] == "system" else 0
    first = turns[at]["role"] if at < len(turns) else "user"
    return [*turns[:at], {"role": "user", "content": ""}, *turns[at:]] if first == "assistant" else list(turns)


def _with_trailing_user(turns: Sequence[Turn]) -> list[Turn]:
    """An empty user turn after a trailing assistant turn."""
    return [*turns, {"role": "user", "content": ""}] if turns[-1]["role"] == "assistant" else list(turns)
