"""The demo world: a pure function of its seed, right where it says so, wrong only where a carry is forgotten."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from random import Random
from typing import get_args

import pytest
from langchain_core.utils.function_calling import convert_to_openai_tool

from s2t_agents.demo.arithmetic import Move, Operation, totals, work
from s2t_agents.demo.problem import Kind, answer_line
from s2t_agents.demo.record_problems import RecordProblem
from s2t_agents.demo.schemas import function_tool
from s2t_agents.demo.world import SPLITS, demo_question, generate, grade

KINDS = get_args(Kind)
WORKED = ("word", "tool")
STEP = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)\.")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_makes_the_same_problem(kind, split):
    for seed in range(20):
        assert generate(seed, split, kind) == generate(seed, split, kind)
    assert len({generate(seed, split, "word").question for seed in range(50)}) == 50


def test_worlds_are_equal_across_processes():
    code = "from s2t_agents.demo.world import generate; print(generate(7, 'heldout', 'tool').gold)"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(runs) == 1


def test_the_world_needs_no_torch():
    code = "import sys, s2t_agents.demo.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_splits_do_not_share_problems():
    train = {generate(seed, "train", kind).question for kind in WORKED for seed in range(3000)}
    for split in set(SPLITS) - {"train"}:
        fresh = [generate(seed, split, kind).question for kind in WORKED for seed in range(500)]
        assert sum(question in train for question in fresh) <= len(fresh) // 500


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="must be one of train, heldout"):
        generate(1, "test")  # type: ignore[arg-type]


def test_without_a_kind_word_and_tool_problems_come_half_and_half():
    kinds = [generate(seed).kind for seed in range(400)]
    assert set(kinds) == set(WORKED)
    assert 150 < kinds.count("tool") < 250
    assert all(demo_question(seed).kind == "tool" for seed in range(10))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_gold_conversations_are_right(kind, split):
    for seed in range(60):
        problem = generate(seed, split, kind)
        assert problem.gold[: len(problem.prompt)] == problem.prompt
        assert problem.prompt[-1] == {"role": "user", "content": problem.question}
        assert grade(problem.gold[-1]["content"], problem)
        if kind != "talk":
            assert not grade("", problem)
            assert not grade("I do not know.", problem)


@pytest.mark.parametrize("split", SPLITS)
def test_every_step_of_the_gold_working_is_right_and_small(split):
    for seed in range(200):
        problem = generate(seed, split, "word" if seed % 2 else "tool")
        steps = STEP.findall(problem.gold[-1]["content"])
        assert steps
        for left, sign, right, result in steps:
            assert Operation(int(left), sign, int(right)).result == int(result) >= 0
        assert problem.gold[-1]["content"].endswith(answer_line(problem.expected))
        fewest, most = (5, 7) if split in ("longer", "hard") else (2, 4)
        assert fewest <= len(steps) <= most
        assert int(problem.expected) <= (1999 if split in ("larger", "hard") else 999)


def test_each_split_goes_beyond_training_in_its_own_way_and_the_hard_one_in_all():
    def words(split):
        return {problem.system for problem in problems(split)} - {None}, {
            tool["function"]["name"].rpartition("_")[0] for problem in problems(split) for tool in problem.tools
        }

    def problems(split):
        return [generate(seed, split, "tool") for seed in range(200)]

    def largest(split):
        return max(int(problem.expected) for problem in problems(split))

    usual, new = words("train"), words("unseen")
    assert usual[0].isdisjoint(new[0])
    assert usual[1].isdisjoint(new[1])
    assert words("longer") == words("larger") == usual
    assert words("hard") == new
    assert largest("longer") <= 999 < largest("larger")
    assert largest("unseen") <= 999 < largest("hard")


def test_a_tool_answers_the_right_call_only():
    problem = demo_question(3)
    call = problem.expected_call
    assert call is not None
    assert problem.call(call.name, call.arguments) == call.result
    assert problem.call(call.name, json.dumps(dict(call.arguments))) == call.result
    assert "error" in json.loads(problem.call(call.name, {}))
    assert "error" in json.loads(problem.call("other", call.arguments))
    assert "error" in json.loads(problem.call(call.name, "{not json"))


def test_the_needed_tool_is_offered_once():
    for kind in ("tool", "call"):
        for seed in range(200):
            problem = generate(seed, "heldout", kind)
            names = [tool["function"]["name"] for tool in problem.tools]
            assert problem.expected_call is not None
            assert names.count(problem.expected_call.name) == 1
            assert len(names) <= 3


def test_schemas_are_what_langchain_makes_of_a_function():
    def get_stock(item: str, number: int) -> int:
        """Get the stock.

        Args:
            item: The item.
        """
        return 0

    def no_arguments() -> int:
        """Nothing to say."""
        return 0

    mine = function_tool(
        "get_stock", "Get the stock.", {"item": "string", "number": "integer"}, {"item": {"description": "The item."}}
    )
    assert json.dumps(mine) == json.dumps(convert_to_openai_tool(get_stock))
    assert json.dumps(function_tool("no_arguments", "Nothing to say.", {})) == json.dumps(
        convert_to_openai_tool(no_arguments)
    )


@pytest.mark.parametrize(
    ("operation", "right", "forgotten"),
    [
        (Operation(85, "-", 27), 58, 68),
        (Operation(58, "+", 36), 94, 84),
        (Operation(80, "+", 47), 127, 127),
        (Operation(3, "*", 16), 48, 38),
        (Operation(16, "*", 3), 48, 38),
        (Operation(41, "*", 3), 123, 123),
        (Operation(120, "-", 115), 5, 15),
        (Operation(300, "-", 1), 299, 309),
    ],
)
def test_forgetting_the_carry(operation, right, forgotten):
    assert (operation.result, operation.forgotten) == (right, forgotten)
    assert operation.carries == (right != forgotten)


def test_later_steps_go_on_from_what_was_written():
    sentences, total = work(85, (Move("-", 27), Move("+", 10)), Random(0), noise=1.0)
    assert (sentences, total) == (["85 - 27 = 68.", "68 + 10 = 78."], 78)
    assert totals(85, (Move("-", 27),)) == {85, 58, 68}
    assert min(totals(5, (Move("-", 9),))) < 0


def test_what_a_record_is_asked_for_with_stands_in_the_question():
    scripts = set()
    for seed in range(300):
        made = RecordProblem(Random(seed))
        assert all(str(value) in made.question for value in made.values.values())
        name = next(iter(made.values.values()))
        assert f"'{name}'" in made.question
        scripts |= {ord(character) >> 8 for character in str(name)}
    assert len(scripts) > 60  # many blocks of Unicode, so that nothing but copying helps
