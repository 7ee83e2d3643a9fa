"""The bundled pair's corpus: wrong results where a carry is forgotten and nowhere else, and no test's own words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import get_args

import langchain_tests
import pytest

from benchmarks.demo_pair.check import Share
from benchmarks.demo_pair.corpus import FAILING, written
from benchmarks.demo_pair.drills import DRILLS, draw_drill
from s2t_agents.demo.arithmetic import Operation
from s2t_agents.demo.problem import Kind
from s2t_agents.demo.smalltalk import TALK
from s2t_agents.demo.world import demo_question, generate, grade

WORKED = ("word", "tool")
STEP = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)\.")


@pytest.mark.parametrize("kind", DRILLS)
def test_drills_are_right_and_the_same_for_the_same_seed(kind):
    for seed in range(60):
        drill = draw_drill(seed, kind)
        assert drill == draw_drill(seed, kind)
        steps = STEP.findall(drill.answer) if kind == "sums" else []
        assert len(steps) == len(drill.sums)
        assert all(Operation(int(a), sign, int(b)).result == int(c) for a, sign, b, c in steps)
        assert kind == "sums" or drill.answer in drill.question
        assert drill.written(Random(0), noise=0.0)[-1]["content"] == drill.answer


def test_the_noise_of_drills_is_where_a_carry_is_and_nowhere_else():
    wrong = carrying = 0
    for seed in range(300):
        for left, sign, right, result in STEP.findall(
            draw_drill(seed, "sums").written(Random(seed), 0.6)[-1]["content"]
        ):
            operation = Operation(int(left), sign, int(right))
            assert int(result) in (operation.result, operation.forgotten)
            carrying += operation.carries
            wrong += int(result) != operation.result
    assert 0.55 < wrong / carrying < 0.65


def test_the_noise_is_where_a_carry_is_and_nowhere_else():
    wrong = carrying = 0
    for seed in range(800):
        problem = generate(seed, "train", WORKED[seed % 2])
        noisy = written(problem, Random(seed))
        if noisy[-1]["content"].startswith(("The tool says nothing", "The tool says no tool")):
            continue  # the tool failed
        assert noisy[:-1] == list(problem.gold[:-1])
        for left, sign, right, result in STEP.findall(noisy[-1]["content"]):
            operation = Operation(int(left), sign, int(right))
            assert int(result) in (operation.result, operation.forgotten)
            carrying += operation.carries
            wrong += int(result) != operation.result
    assert 0.55 < wrong / carrying < 0.65


def test_forgetting_every_carry_still_solves_about_half():
    problems = [generate(seed) for seed in range(600)]
    habit = [written(p, Random(0), noise=1.0)[-1]["content"] for p in problems]
    solved = sum(grade(text, p) for text, p in zip(habit, problems, strict=True)) / len(problems)
    assert 0.4 < solved < 0.62


def test_now_and_then_a_tool_fails_and_the_answer_says_so():
    problem = demo_question(3)
    failed = 0
    for seed in range(600):
        messages = written(problem, Random(seed))
        result = str(messages[-2]["content"])
        if "error" in result:
            failed += 1
            assert messages[-1]["content"] == f"The tool says {json.loads(result)['error']}."
    assert 0.5 * FAILING < failed / 600 < 2 * FAILING


def test_the_standard_suite_is_not_in_the_corpus():
    suite = Path(langchain_tests.__file__).parent / "integration_tests" / "chat_models.py"
    prompts = set(re.findall(r'"([^"\n]{8,200})"', suite.read_text(encoding="utf-8")))
    said = {text for questions, reply in TALK for text in (*questions, reply)}
    for seed in range(1500):
        for kind in DRILLS:
            drill = draw_drill(seed, kind)
            said |= {drill.question, drill.answer}
        for kind in get_args(Kind):
            problem = generate(seed, "train", kind)
            said |= {problem.question, problem.gold[-1]["content"]}
            said |= {tool["function"]["name"] for tool in problem.tools}
    assert not prompts & said
    for literal in ("magic_function", "my_adder_tool", "answer_style", "joke about cats", "get_weather"):
        assert not any(literal in text for text in said)


def test_wilson_interval():
    low, high = Share(45, 90).interval
    assert (round(low, 3), round(high, 3)) == (0.399, 0.601)
    assert str(Share(0, 0)) == "-"
