"""A row's answers once more through ``Engine.steps``, one conversation at a time: the same tokens? how long?"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..budget import Budget
from ..engine.engine import Engine
from ..escalation import Escalation
from ..llms.local_llm import LocalLLM
from ..types import Sampling
from .dialogue import MAX_TURNS, AnsweredItem, Speaker, next_turn
from .rows import Live
from .tasks import Item, Task


def answer_live(slm: Speaker, llm: Speaker, task: Task, item: Item, live: Live, max_tokens: int) -> list[list[int]]:
    """The completions of one item, turn by turn, exactly as the package serves them."""
    remote = LocalLLM(llm.model)
    engine = Engine(
        llm.model if live.llm_generates else slm.model,
        k=live.k,
        trigger=live.trigger,
        selector=live.selector,
        escalation=Escalation(remote, margin=live.margin) if live.escalates else None,
    )
    budget = Budget(escalations=live.limit) if live.limit is not None else None
    speaker = llm if live.llm_generates else slm
    messages, completions = tuple(item.messages), []
    for turn in range(MAX_TURNS):
        prompt = speaker.encode(messages, item.tools)
        grammar = speaker.grammar(item, prompt, max_tokens)
        sampling = Sampling(max_tokens=max_tokens)
        ids = [step.token_id for step in engine.steps(prompt, sampling, grammar=grammar, budget=budget)]
        completions.append(ids)
        following = next_turn(task, item, messages, speaker.read(ids))
        if following is None or turn + 1 == MAX_TURNS:
            break
        messages = following
    return completions


def check_live(
    slm: Speaker, llm: Speaker, task: Task, answers: Sequence[AnsweredItem], live: Live, max_tokens: int
) -> tuple[list[float], list[bool]]:
    """Seconds per answer, and whether its tokens are those of the bulk run."""
    seconds, same = [], []
    for answer in answers:
        started = time.perf_counter()
        completions = answer_live(slm, llm, task, answer.item, live, max_tokens)
        seconds.append(time.perf_counter() - started)
        same.append(completions == [trace.ids for trace in answer.traces])
    return seconds, same
