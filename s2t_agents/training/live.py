"""A row's answers once more through ``Engine.steps``, one conversation at a time: the same tokens? how long?"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..types import Sampling
from .dialogue import AnsweredItem, Speaker
from .served import Live, answer
from .tasks import Item, Task


def answer_live(slm: Speaker, llm: Speaker, task: Task, item: Item, live: Live, max_tokens: int) -> list[list[int]]:
    """The completions of one item, turn by turn, exactly as the package serves them."""
    engine, speaker = live.engine(slm.model, llm.model), llm if live.llm_generates else slm
    sampling = Sampling(max_tokens=max_tokens)
    answered = answer(engine, speaker, task, item, lambda _: sampling, live.budget())
    return [trace.ids for trace in answered.traces]


def check_live(
    slm: Speaker, llm: Speaker, task: Task, answers: Sequence[AnsweredItem], live: Live, max_tokens: int
) -> tuple[list[float], list[bool]]:
    """Seconds per answer, and whether its tokens are those of the bulk run."""
    seconds, same = [], []
    for given in answers:
        started = time.perf_counter()
        completions = answer_live(slm, llm, task, given.item, live, max_tokens)
        seconds.append(time.perf_counter() - started)
        same.append(completions == [trace.ids for trace in given.traces])
    return seconds, same
