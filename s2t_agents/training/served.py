"""Items answered by ``Engine.steps``, as the package serves them: one after the other, or many at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..budget import Budget
from ..engine.engine import Engine
from ..errors import ContextOverflow
from ..escalation import Escalation
from ..llms.local_llm import LocalLLM
from ..scheduling.language_model import LanguageModel
from ..selectors import LocalSelector
from ..triggers import Trigger
from ..types import Sampling, Step
from .dialogue import MAX_TURNS, AnsweredItem, Speaker
from .lockstep import Trace
from .tasks import Item, Task


@dataclass(frozen=True)
class Live:
    """How ``Engine`` is built to answer: settings by name, and escalations per answer (None: no limit)."""

    llm_generates: bool = False
    k: int = 8
    trigger: Trigger | None = None
    selector: LocalSelector | None = None
    escalates: bool = False
    margin: float = 0.9
    limit: int | None = None

    def engine(self, slm: LanguageModel, llm: LanguageModel | None = None) -> Engine:
        """The engine.

        Args:
            slm: generates.
            llm: generates in its place, or is asked, where the settings say so.
        """
        generates, asked = (llm if self.llm_generates else slm), llm if self.escalates else None
        assert generates is not None
        return Engine(
            generates,
            k=self.k,
            trigger=self.trigger,
            selector=self.selector,
            escalation=Escalation(LocalLLM(asked), margin=self.margin) if asked is not None else None,
        )

    def budget(self) -> Budget | None:
        """Of one answer."""
        return Budget(escalations=self.limit) if self.limit is not None else None


@dataclass
class ServedItem(AnsweredItem):
    """An item's answer, and what the LLM was asked for it.

    Attributes:
        llm_calls: questions that it answered.
        llm_tokens: that they took.
    """

    llm_calls: int = 0
    llm_tokens: int = 0


Draws = Callable[[int], Sampling]
"""How the tokens of a turn are drawn, from the length of its prompt."""


def answer(
    engine: Engine,
    speaker: Speaker,
    task: Task,
    item: Item,
    draws: Draws,
    budget: Budget | None = None,
    over: threading.Event | None = None,
) -> ServedItem:
    """One item, turn by turn.

    Args:
        engine: generates.
        speaker: of the model that generates.
        task: runs the tools.
        item: the question.
        draws: see there.
        budget: of the answer.
        over: once it is set, nothing more is generated.

    Raises:
        ContextOverflow: a first prompt that does not fit. (A later one that does not fit ends the answer.)
    """
    answered, messages = ServedItem(item), tuple(item.messages)
    for turn in range(MAX_TURNS):
        try:
            prompt = speaker.encode(messages, item.tools)
        except ContextOverflow:
            if not turn:
                raise
            break
        sampling = draws(len(prompt))
        grammar = speaker.grammar(item, prompt, sampling.max_tokens)
        trace = Trace()
        for step in engine.steps(prompt, sampling, grammar=grammar, budget=budget):
            _note(step, trace, answered)
            if over is not None and over.is_set():
                return answered
        following = answered.take(prompt, trace, speaker.read(trace.ids), task, messages)
        if following is None:
            break
        messages = following
    return answered


def answer_all(
    engine: Engine,
    speaker: Speaker,
    task: Task,
    items: Sequence[Item],
    draws: Sequence[Draws],
    budget: Callable[[], Budget | None] = lambda: None,
) -> list[ServedItem]:
    """All items, as many at a time as the engine runs: their steps share forwards.

    In which of them two answers meet depends on time, and with it the last bits of the logits.

    Args:
        engine: generates.
        speaker: of the model that generates.
        task: runs the tools.
        items: the questions.
        draws: of each.
        budget: makes that of one answer.

    Raises:
        Exception: as ``answer`` does; the other answers are broken off.
    """
    over = threading.Event()
    with ThreadPoolExecutor(min(engine.gate.limits.running, max(1, len(items)))) as pool:
        try:
            jobs = [
                pool.submit(answer, engine, speaker, task, item, each, budget(), over)
                for item, each in zip(items, draws, strict=True)
            ]
            return [job.result() for job in jobs]
        except BaseException:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _note(step: Step, trace: Trace, answered: ServedItem) -> None:
    """One step, where a trace wants it."""
    position = len(trace.ids)
    trace.ids.append(step.token_id)
    if step.triggered:
        trace.triggered.append(position)
        if step.flipped:
            trace.flipped.append(position)
    if step.picked_by == "llm":
        trace.by_llm.append(position)
        answered.llm_calls += 1
        if step.escalation is not None and step.escalation.actual is not None:
            answered.llm_tokens += step.escalation.actual.llm_tokens
