"""The demo world: conversations that the bundled pair was trained on, and fresh problems to try it on.

    word   a word problem; the answer shows its working       call   one tool call, and an answer that reads it
    tool   the same, but a number must be looked up first     talk   small talk, with or without tools around

Everything is a pure function of (seed, split, kind). The split is part of what seeds the generator, so the streams of
two splits share nothing. Beside "train" and "heldout", which are alike, there are three that go beyond them in one way
each: "longer" (5 to 7 lines of working instead of 2 to 4), "larger" (numbers up to 1,999 instead of 999) and "unseen"
(tellings, tools and system prompts of which training saw none); "hard" does all three at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from . import lookups, stories, tool_call_problems
from .arithmetic import work
from .problem import (
    Call,
    Kind,
    Message,
    Problem,
    Split,
    Working,
    answer_line,
    grade,
    tool_call_message,
    tool_result_message,
)
from .smalltalk import draw_talk

__all__ = [
    "Call",
    "Kind",
    "Message",
    "Problem",
    "Split",
    "demo_question",
    "generate",
    "grade",
]


@dataclass(frozen=True)
class Beyond:
    """In what a split goes beyond the training corpus: how large its problems are, and whether their words are new."""

    size: stories.Size = stories.NORMAL
    unseen: bool = False


SPLITS: dict[Split, Beyond] = {
    "train": Beyond(),
    "heldout": Beyond(),
    "longer": Beyond(stories.LONGER),
    "larger": Beyond(stories.LARGER),
    "unseen": Beyond(unseen=True),
    "hard": Beyond(stories.LARGE, unseen=True),
}


def generate(seed: int, split: Split = "heldout", kind: Kind | None = None) -> Problem:
    """The problem of this seed; without a `kind`, a word or a tool problem, half and half."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if kind is None:
        kind = "word" if Random(f"{split}/{seed}/kind").random() < 0.5 else "tool"
    rng = Random(f"{split}/{seed}/{kind}")
    made = _MAKERS[kind](rng, SPLITS[split])
    return replace(made, seed=seed, split=split)


def demo_question(seed: int) -> Problem:
    """A held-out problem which needs a tool call and several steps of arithmetic."""
    return generate(seed, "heldout", "tool")


def _write(working: Working) -> tuple[str, int]:
    sentences, total = work(working.start, working.moves)
    before = [working.before] if working.before else []
    return " ".join([*before, *sentences, answer_line(total)]), total


def _opening(system: str | None, question: str) -> tuple[Message, ...]:
    user: Message = {"role": "user", "content": question}
    return ({"role": "system", "content": system}, user) if system else (user,)


def _draw_system(rng: Random, unseen: bool) -> str | None:
    if rng.random() < 0.5:
        return None
    return rng.choice(lookups.UNSEEN_SYSTEMS if unseen else lookups.SYSTEMS)


def _finish(kind: Kind, system: str | None, question: str, answer: str, **more: object) -> Problem:
    """A problem from its parts, its conversation written out; seed and split are filled in by `generate`."""
    opening = _opening(system, question)
    call = more.get("expected_call")
    middle = (tool_call_message(call), tool_result_message(call)) if isinstance(call, Call) else ()
    gold = (*opening, *middle, {"role": "assistant", "content": answer})
    fields = {"tools": (), "expected": answer, **more}
    return Problem(0, "train", kind, system, question=question, gold=gold, prompt=opening, **fields)  # type: ignore[arg-type]


def _word(rng: Random, beyond: Beyond) -> Problem:
    telling = stories.UNSEEN if beyond.unseen else stories.USUAL
    question, start, moves = stories.draw_story(rng, telling, beyond.size)
    working = Working(start, moves)
    answer, total = _write(working)
    system = _draw_system(rng, beyond.unseen) if rng.random() < 0.4 else None
    return _finish("word", system, question, answer, expected=str(total), working=working)


def _tool(rng: Random, beyond: Beyond) -> Problem:
    lookup = lookups.draw_lookup(rng, rng.choice(lookups.TOPICS), unseen=beyond.unseen)
    start, moves = stories.draw_moves(rng, beyond.size)
    call = lookups.draw_call(rng, lookup, start)
    telling = stories.Telling((), lookups.ADD, lookups.TAKE, lookups.ADD_GROUPS, lookups.TAKE_GROUPS, lookups.TIMES, ())
    told = stories.tell_moves(rng, telling, moves, stories.cast(rng))
    ask = rng.choice(lookups.UNSEEN_ASK if beyond.unseen else lookups.ASK).format(u=lookup.unit)
    working = Working(start, moves, before=f"The tool says {start}.")
    answer, total = _write(working)
    return _finish(
        "tool",
        _draw_system(rng, beyond.unseen),
        " ".join([lookup.ask, *told, ask]),
        answer,
        tools=lookups.draw_tools(rng, lookup.tool, unseen=beyond.unseen),
        expected=str(total),
        expected_call=call,
        working=working,
    )


def _call(rng: Random, beyond: Beyond) -> Problem:
    made = tool_call_problems.draw_tool_call_problem(rng)
    tools = lookups.draw_tools(rng, made.tool, unseen=beyond.unseen)
    system = _draw_system(rng, beyond.unseen)
    return _finish(
        "call",
        system,
        made.question,
        made.answer,
        tools=tools,
        expected=made.said,
        expected_call=made.call,
    )


def _talk(rng: Random, beyond: Beyond) -> Problem:
    said, reply = draw_talk(rng)
    if rng.random() < 0.3:
        return _finish("talk", _draw_system(rng, beyond.unseen), said, reply)
    tool = tool_call_problems.draw_tool_call_problem(rng).tool
    return _finish(
        "talk", _draw_system(rng, beyond.unseen), said, reply, tools=lookups.draw_tools(rng, tool, unseen=beyond.unseen)
    )


_MAKERS = {"word": _word, "tool": _tool, "call": _call, "talk": _talk}
