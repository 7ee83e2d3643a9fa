"""An interrupt of one caller, at any line of the loop that it runs through, loses nothing of the others'."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any

import pytest

from s2t_agents import Engine
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.scheduler import Scheduler
from s2t_agents.testing import tiny_model
from s2t_agents.types import Sampling

OTHERS = 2
IN_THE_SCHEDULERS_THREAD, IN_THE_CALLERS_THREAD = -1.0, 60.0


class Interrupt(BaseException):
    """What a signal's handler raises."""


def lines_of(*functions: Callable[..., Any]) -> list[tuple[CodeType, int]]:
    codes = [function.__code__ for function in functions]
    return [(code, line) for code in codes for line in sorted({at for *_, at in code.co_lines() if at is not None})]


def tokens(model: LanguageModel, seed: int, count: int) -> list[int]:
    return [step.token_id for step in Engine(model).steps([5 + seed, 6, 7], Sampling(max_tokens=count))]


def interrupted_at(model: LanguageModel, code: CodeType, line: int, count: int) -> bool:
    """Run an answer in this thread, which is interrupted when it comes to a line beside others; whether it did."""
    steps, armed = Engine(model).steps([5, 6, 7], Sampling(max_tokens=count)), False

    def at_line(frame: FrameType, event: str, arg: object) -> Any:
        if armed and event == "line" and frame.f_lineno == line:
            raise Interrupt
        return at_line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: at_line if frame.f_code is code else None)
    try:
        for at, _ in enumerate(steps):
            armed = at >= 3
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("hand_over_s", [IN_THE_SCHEDULERS_THREAD, IN_THE_CALLERS_THREAD])
@pytest.mark.parametrize(
    ("code", "line"),
    lines_of(Scheduler._hand_out, Scheduler._hand_out_all, Scheduler._postprocess, Scheduler._drive),
    ids=lambda part: part.co_name if isinstance(part, CodeType) else f"line{part}",
)
def test_the_others_say_what_they_say_alone(code: CodeType, line: int, hand_over_s: float) -> None:
    model = tiny_model("qwen3")
    alone = [tokens(model, 1 + seed, 30) for seed in range(OTHERS)]
    model.backend.limits = replace(model.backend.limits, hand_over_s=hand_over_s)
    said: dict[int, list[int]] = {}

    def other(seed: int) -> None:
        said[seed] = tokens(model, 1 + seed, 30)

    threads = [threading.Thread(target=other, args=(seed,), daemon=True) for seed in range(OTHERS)]
    for thread in threads:
        thread.start()
    interrupted_at(model, code, line, count=30)  # whether or not: which thread runs a line is a matter of timing
    for thread in threads:
        thread.join(timeout=20)
    assert [said.get(seed) for seed in range(OTHERS)] == alone
    assert tokens(model, 1, 30) == alone[0]
