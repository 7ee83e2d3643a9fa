"""The same conversation in stricter forms, for chat templates that refuse it as it is or leave out some of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .hermes_tools import Turn, joined


def forms(turns: list[Turn]) -> Iterator[list[Turn]]:
    """The conversation as it is, then with ever more changed: all text stays, in the same order but for the system's.

    One system turn at the head; neighbours of one role in one turn; the system's text in the first user turn; an empty
    user turn before an assistant that speaks first, and after one that speaks last; one tool call in each turn.
    """
    gathered = _system_first(turns)
    told: list[list[Turn]] = []
    for form in (turns, gathered, _merged(gathered), _merged(system_in_user(turns))):
        opened = _opened(form)
        for last in (form, opened, _ended(opened)):
            for one in (last, one_call_each(last)):
                if one not in told:
                    told.append(one)
                    yield one


def system_in_user(turns: Sequence[Turn]) -> list[Turn]:
    """System text moved to the head of the first user turn."""
    said = joined([turn["content"] for turn in turns if turn["role"] == "system"])
    rest = [turn for turn in turns if turn["role"] != "system"]
    if not said:
        return rest
    if rest and rest[0]["role"] == "user":
        return [{**rest[0], "content": joined([said, rest[0]["content"]])}, *rest[1:]]
    return [{"role": "user", "content": said}, *rest]


def one_call_each(turns: Sequence[Turn]) -> list[Turn]:
    """Each tool call in a turn of its own, followed by its results."""
    results: dict[str, list[Turn]] = {}
    for turn in turns:
        if turn["role"] == "tool":
            results.setdefault(turn["tool_call_id"], []).append(turn)
    told: list[Turn] = []
    for turn in turns:
        calls = turn.get("tool_calls", ())
        if turn["role"] == "tool":
            continue
        if not calls:
            told.append(turn)
        for at, call in enumerate(calls):
            first = turn if at == 0 else {"role": "assistant", "content": ""}
            told.append({**first, "tool_calls": [call]})
            told += results.get(call["id"], ())
    return told


def in_parts(turns: Sequence[Turn], roles: frozenset[str]) -> list[Turn]:
    """The conversation with the content of these roles as a list of parts, as templates of vision models read it."""
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]} if turn["role"] in roles else turn
        for turn in turns
    ]


def _system_first(turns: Sequence[Turn]) -> list[Turn]:
    said = [turn["content"] for turn in turns if turn["role"] == "system"]
    rest = [turn for turn in turns if turn["role"] != "system"]
    return [{"role": "system", "content": joined(said)}, *rest] if said else rest


def _merged(turns: Sequence[Turn]) -> list[Turn]:
    """Neighbours of one role in one turn; what follows a call stays apart from it."""
    told: list[Turn] = []
    for turn in turns:
        before = told[-1] if told else None
        if before and before["role"] == turn["role"] != "tool" and "tool_calls" not in before:
            both = {**before, **turn, "content": joined([before["content"], turn["content"]])}
            thoughts = [one["reasoning_content"] for one in (before, turn) if "reasoning_content" in one]
            told[-1] = both | ({"reasoning_content": joined(thoughts)} if thoughts else {})
        else:
            told.append(turn)
    return told


def _opened(turns: Sequence[Turn]) -> list[Turn]:
    """An empty user turn before an assistant that speaks first."""
    at = 1 if turns and turns[0]["role"] == "system" else 0
    first = turns[at]["role"] if at < len(turns) else "user"
    return [*turns[:at], {"role": "user", "content": ""}, *turns[at:]] if first == "assistant" else list(turns)


def _ended(turns: Sequence[Turn]) -> list[Turn]:
    """An empty user turn after an assistant that speaks last."""
    return [*turns, {"role": "user", "content": ""}] if turns[-1]["role"] == "assistant" else list(turns)
