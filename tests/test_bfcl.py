"""The Berkeley Function Calling Leaderboard: prompts, tools and grading."""

import enum
import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest

from s2t_agents.chat.response_options import ResponseOptions
from s2t_agents.errors import ConfigError, InputError
from s2t_agents.training.tasks import BfclTask, BfclTaskConfig, disjoint, prompts_hash
from s2t_agents.training.tasks.bfcl import Category, json_schema
from s2t_agents.training.tasks.bfcl_grader import right_calls
from s2t_agents.training.tasks.items import Calls, calls_text

TESTED = ("simple_python", "multiple")
OTHERS = tuple(category for category in get_args(Category) if category not in TESTED)

AREA = {
    "name": "shape.area",
    "description": "Area of a shape.",
    "parameters": {
        "type": "dict",
        "properties": {
            "sides": {"type": "array", "items": {"type": "float"}},
            "unit": {"type": "string", "default": "m"},
            "exact": {"type": "boolean"},
            "type": {"type": "any"},
            "at": {"type": "tuple", "items": {"type": "integer"}},
            "options": {"type": "dict", "properties": {"digits": {"type": "integer"}}},
        },
        "required": ["sides"],
    },
}
WANTED = {"shape.area": {"sides": [[3.0, 4.5]], "unit": ["m", "metre", ""], "exact": [True, ""]}}


def write(folder: Path, category: str, rows: list[tuple[str, list, list]]) -> Path:
    """A data folder with one category: (question, functions, answers) each."""
    (folder / "possible_answer").mkdir(parents=True, exist_ok=True)
    asked = [
        {"id": f"{category}_{at}", "question": [[{"role": "user", "content": question}]], "function": functions}
        for at, (question, functions, _) in enumerate(rows)
    ]
    answers = [{"id": f"{category}_{at}", "ground_truth": wanted} for at, (_, _, wanted) in enumerate(rows)]
    (folder / f"BFCL_v4_{category}.json").write_text("\n".join(map(json.dumps, asked)) + "\n")
    (folder / "possible_answer" / f"BFCL_v4_{category}.json").write_text("\n".join(map(json.dumps, answers)))
    return folder


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({"sides": [3, 4.5]}, False),  # the checker lets a lone integer be a float, not one in a list
        ({"sides": [3.0, 4.5]}, True),
        ({"sides": [3.0, 4.5], "unit": "M"}, True),
        ({"sides": [3.0, 4.5], "unit": "m."}, True),
        ({"sides": [3.0, 4.5], "unit": "feet"}, False),
        ({"sides": [3.0, 4.5], "exact": True}, True),
        ({"sides": [3.0, 4.5], "exact": 1}, False),
        ({"sides": [3.0, 4.5], "exact": "true"}, False),
        ({"sides": [4.5, 3.0]}, False),
        ({"sides": "3, 4.5"}, False),
        ({"sides": [3.0, 4.5], "digits": 2}, False),
        ({}, False),
    ],
)
def test_an_answer_counts_by_names_types_and_values(arguments, right):
    assert right_calls([AREA], [WANTED], [("shape_area", arguments)]) is right


def test_each_call_is_wanted_once_in_any_order():
    wanted = [{"shape.area": {"sides": [[side]]}} for side in (1.0, 2.0)]
    one, two = (("shape_area", {"sides": [side]}) for side in (1.0, 2.0))
    assert right_calls([AREA], wanted, [two, one])
    for calls in ([], [one], [one, one], [one, two, two], [("shape.area", one[1]), two], [("area", one[1]), two]):
        assert not right_calls([AREA], wanted, calls)


def test_tools_are_shown_as_clients_show_them(tmp_path):
    item, *_ = BfclTask(write(tmp_path, "simple_python", [("How big?", [AREA], [WANTED])]), ["simple_python"]).items
    (tool,) = item.tools
    function = tool["function"]
    assert function["name"] == "shape_area"
    shown = function["parameters"]
    assert shown["type"] == "object"
    assert shown["properties"]["sides"] == {"type": "array", "items": {"type": "number"}}
    assert shown["properties"]["at"] == {"type": "array", "items": {"type": "integer"}}
    assert shown["properties"]["type"] == {}  # anything; a parameter that is called "type" stays one
    assert shown["properties"]["options"]["type"] == "object"
    assert item.calls == Calls(several=False)
    ResponseOptions(tools=item.tools, tool_choice="any").check()


def test_values_in_a_schema_are_no_types():
    said = {"type": "string", "enum": ["dict", "any"], "default": {"type": "any"}}
    assert json_schema(said) == said


def test_an_enum_beside_an_arrays_items_is_theirs():
    items = {"type": "string"}
    assert json_schema({"type": "array", "items": items, "enum": ["a", "b"]}) == {
        "type": "array",
        "items": {"type": "string", "enum": ["a", "b"]},
    }
    for said in ({"type": "array", "items": items, "enum": [["a"]]}, {"type": "array", "items": items}):
        assert json_schema(said) == said


def test_the_calls_are_the_answer(tmp_path):
    task = BfclTask(write(tmp_path, "simple_python", [("How big?", [AREA], [WANTED])]), ["simple_python"])
    (item,) = task.items
    assert task.call(item, "shape_area", {}) is None
    assert task.grade(item, calls_text([("shape_area", {"sides": [3.0, 4.5]})]))
    for wrong in (calls_text([("shape_area", {"sides": []})]), "3 by 4.5", "", "[]", "[1]", '{"name": 1}', "null"):
        assert not task.grade(item, wrong)


def test_few_functions_are_shown_the_wanted_ones_among_them(tmp_path):
    others = [{**AREA, "name": f"other.{at}"} for at in range(4)]
    data = write(tmp_path, "multiple", [("How big?", [*others, AREA], [WANTED])])
    (item,) = BfclTask(data, ["multiple"], functions=2).items
    assert [tool["function"]["name"] for tool in item.tools] == ["other_0", "shape_area"]
    assert BfclTask(data, ["multiple"]).grade(item, calls_text([("shape_area", {"sides": [3.0, 4.5]})]))


def test_questions_of_the_tested_categories_are_left_out_of_training(tmp_path):
    write(tmp_path, "parallel", [(question, [AREA], [WANTED]) for question in ("How big?", "How wide?", "How tall?")])
    write(tmp_path, "simple_python", [("How big?", [AREA], [WANTED])])
    test = BfclTask(tmp_path, ["simple_python"])
    with pytest.raises(ConfigError, match="share 1 prompts"):
        disjoint(BfclTask(tmp_path, ["parallel"]), test)
    train = BfclTask(tmp_path, ["parallel"], apart_from=["simple_python"], mixed=True)
    disjoint(train, test)
    assert sorted(item.messages[0]["content"] for item in train.items) == ["How tall?", "How wide?"]


def test_parts_of_a_mixed_task_share_nothing_and_are_everything(tmp_path):
    asked = [*range(30), 3, 7, 11]  # three questions come twice
    write(tmp_path, "parallel", [(f"How big is {at}?", [AREA], [WANTED]) for at in asked])
    whole = BfclTaskConfig(task="bfcl", path=tmp_path, categories=("parallel",), mixed=True)
    heldout, train = (whole.model_copy(update=part).open() for part in ({"count": 10}, {"first": 10}))
    disjoint(train, heldout)
    assert len({item.messages[0]["content"] for item in (*heldout.items, *train.items)}) == 30
    assert len(heldout.items) + len(train.items) == 30
    assert [item.id for item in heldout.items] != [f"parallel_{at}" for at in range(10)]
    spaced = whole.model_copy(update={"mixed": False, "every": 7, "count": 3}).open()
    assert [item.id for item in spaced.items] == ["parallel_0", "parallel_7", "parallel_14"]


def test_long_questions_can_be_left_out(tmp_path):
    write(tmp_path, "parallel", [("How big is it?" + " Please." * at, [AREA], [WANTED]) for at in range(30)])
    whole = BfclTaskConfig(task="bfcl", path=tmp_path, categories=("parallel",))
    size = {item.id: len(json.dumps([item.messages, item.tools])) for item in whole.open().items}
    longest = sorted(size.values())[9]
    short = whole.model_copy(update={"longest": longest}).open()
    assert {item.id for item in short.items} == {at for at, long in size.items() if long <= longest}


def test_what_may_answer_is_part_of_what_rollouts_are_made_from(tmp_path):
    write(tmp_path, "parallel", [("How big?", [AREA], [WANTED])])
    one, several = (BfclTask(tmp_path, ["parallel"], parallel=parallel) for parallel in (False, True))
    assert prompts_hash(one) != prompts_hash(several)


def test_data_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        BfclTask(tmp_path, ["parallel"])
    write(tmp_path, "parallel", [("How big?", [AREA], [])])
    with pytest.raises(InputError, match="no possible answer for 1"):
        BfclTask(tmp_path, ["parallel"])
    (tmp_path / "BFCL_v4_parallel.json").write_text("{")
    with pytest.raises(InputError, match="not JSON lines"):
        BfclTask(tmp_path, ["parallel"])
    write(tmp_path, "parallel", [("How big?", [AREA], [WANTED])])
    with pytest.raises(InputError, match="none from place 1 on"):
        BfclTaskConfig(task="bfcl", path=tmp_path, categories=("parallel",), first=1).open()


def load_checker(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, type[enum.Enum]]:
    """The leaderboard's own module, without the providers' clients that its package imports."""
    language = enum.Enum("Language", ["PYTHON", "JAVA", "JAVASCRIPT"])
    client = SimpleNamespace(underscore_to_dot=True)
    here = "bfcl_eval.eval_checker.ast_eval.type_convertor"
    modules = {
        "bfcl_eval.constants.enums": {"Language": language},
        "bfcl_eval.constants.model_config": {"MODEL_CONFIG_MAPPING": {"ours": client}},
        "bfcl_eval.constants.type_mappings": {"JAVA_TYPE_CONVERSION": {}, "JS_TYPE_CONVERSION": {}},
        f"{here}.java_type_converter": {"java_type_converter": None},
        f"{here}.js_type_converter": {"js_type_converter": None},
    }
    for name, members in modules.items():
        for parent in [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)]:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("ast_checker", file)
    assert spec is not None
    assert spec.loader is not None
    checker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checker)
    return checker, language


def some_value(counting, draw: random.Random):
    """One of the values that count, the lists of an object's own values resolved."""
    value = draw.choice([each for each in counting if each != ""] or [""])

    def plain(each):
        if isinstance(each, dict):
            return {key: plain(draw.choice(inner)) for key, inner in each.items() if isinstance(inner, list)}
        return [plain(inner) for inner in each] if isinstance(each, list) else each

    return plain(value)


def spoilt(value, draw: random.Random):
    """Something near a value: another type, another spelling, a part of it."""
    near = [str(value), [value], {"value": value}, None, True, 0, 1, "", -1.5, [], {}]
    if isinstance(value, str):
        near += [value.upper(), value.replace(" ", ""), value + ".", f" {value}", value.replace("'", '"'), value[:-1]]
    if isinstance(value, int | float):
        near += [float(value), int(value), value + 1, bool(value)]
    if isinstance(value, list):
        near += [value[::-1], value[:-1], value * 2, [str(each) for each in value], [spoilt(e, draw) for e in value]]
    if isinstance(value, dict):
        near += [
            dict(list(value.items())[1:]),
            {**value, "more": 1},
            {key: spoilt(v, draw) for key, v in value.items()},
        ]
    return draw.choice(near)


def some_answer(answers, draw: random.Random) -> list[tuple[str, dict]]:
    """Calls that are right, or nearly."""
    calls = []
    for answer in answers:
        ((name, values),) = answer.items()
        arguments = {
            key: some_value(counting, draw)
            for key, counting in values.items()
            if "" not in counting or draw.random() < 0.6
        }
        if arguments and draw.random() < 0.5:
            key = draw.choice(list(arguments))
            arguments[key] = spoilt(arguments[key], draw)
        if draw.random() < 0.05:
            arguments["unknown"] = 1
        if arguments and draw.random() < 0.05:
            arguments.pop(draw.choice(list(arguments)))
        calls.append((name.replace(".", "_") if draw.random() < 0.97 else f"{name}.x", arguments))
    if draw.random() < 0.1:
        calls.append(draw.choice(calls))
    if draw.random() < 0.3:
        draw.shuffle(calls)
    return calls if draw.random() < 0.97 else calls[1:]


@pytest.mark.real
@pytest.mark.parametrize("category", get_args(Category))
def test_grades_as_the_leaderboards_checker(category, bfcl, bfcl_checker, monkeypatch):
    checker, language = load_checker(bfcl_checker, monkeypatch)
    draw = random.Random(category)
    compared, right = 0, 0
    for item in BfclTask(bfcl, [category]).items:
        functions, answers = item.source
        for _ in range(8):
            calls = some_answer(answers, draw)
            ours = right_calls(functions, answers, calls)
            try:
                theirs = checker.ast_checker(
                    functions, [{name: given} for name, given in calls], answers, language.PYTHON, category, "ours"
                )["valid"]
            except (TypeError, AttributeError, KeyError, IndexError):
                assert not ours  # it crashes on some values that are none of the possible answers
                continue
            assert ours is theirs, (item.id, calls, answers)
            compared += 1
            right += ours
    assert compared > 7 * len(BfclTask(bfcl, [category]).items)
    assert 0.1 < right / compared < 0.9


@pytest.mark.real
def test_training_shares_no_item_with_the_tests(bfcl):
    train = BfclTask(bfcl, OTHERS, apart_from=TESTED, functions=1, mixed=True)
    for category in TESTED:
        test = BfclTask(bfcl, [category])
        disjoint(train, test)
        questions = {item.messages[-1]["content"] for item in test.items}
        assert not questions & {item.messages[-1]["content"] for item in train.items}
    assert len(train.items) > 1_700


@pytest.mark.real
@pytest.mark.parametrize("category", get_args(Category))
def test_every_item_can_be_asked(category, bfcl):
    task = BfclTask(bfcl, [category])
    for item in task.items:
        assert item.calls is not None
        ResponseOptions(tools=item.tools, tool_choice="any", parallel=item.calls.several).check()
