"""SVAMP and GSM8K as their authors ship them."""

import json

import pytest
from pydantic import ValidationError

from s2t_agents.errors import InputError
from s2t_agents.training.tasks import WordProblemsConfig, disjoint

SVAMP = [
    {"ID": f"chal-{at}", "Body": f"Dan had {at} pens. He lost 1.", "Question": "How many are left?", "Answer": at - 1.0}
    for at in range(2, 12)
]
GSM8K = [
    {
        "question": f"Ann has {at} hens.\nHow many legs?",
        "answer": f"2 * {at} = <<2*{at}={2 * at}>>{2 * at}\n#### {2 * at}",
    }
    for at in range(2, 12)
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "svamp.json").write_text(json.dumps(SVAMP))
    (tmp_path / "gsm8k.json").write_text("\n".join(map(json.dumps, GSM8K)) + "\n")
    return {name: tmp_path / f"{name}.json" for name in ("svamp", "gsm8k")}


@pytest.mark.parametrize(
    ("name", "asked", "right"),
    [("svamp", "Dan had 5 pens. He lost 1. How many are left?", 4), ("gsm8k", "Ann has 5 hens.\nHow many legs?", 10)],
)
def test_a_problem_is_asked_and_graded_by_its_final_number(files, name, asked, right):
    task = WordProblemsConfig(task=name, path=files[name]).open()
    item = task.items[3]
    assert item.messages[0]["content"].startswith(asked)
    assert "The answer is" in item.messages[0]["content"]
    for text in (f"The answer is {right}.", f"5 and {right}.0", f"The answer is {right}, not 7"):
        assert task.grade(item, text)
    for text in ("", "The answer is 7.", f"The answer is {right}0."):
        assert not task.grade(item, text)
    assert task.vote(item, f"so {right}") == task.vote(item, f"The answer is {right}.0")


@pytest.mark.parametrize("name", ["svamp", "gsm8k"])
def test_parts_of_a_file_share_nothing(files, name):
    whole = WordProblemsConfig(task=name, path=files[name])
    first, rest = (whole.model_copy(update=part).open() for part in ({"count": 4}, {"first": 4}))
    disjoint(first, rest)
    assert [item.id for item in (*first.items, *rest.items)] == [f"{name}-{at}" for at in range(10)]
    assert [item.id for item in whole.model_copy(update={"every": 4}).open().items] == [
        f"{name}-{at}" for at in (0, 4, 8)
    ]


def test_files_that_cannot_be_used(files, tmp_path):
    for name, path in (("svamp", tmp_path / "none.json"), ("svamp", files["gsm8k"]), ("gsm8k", files["svamp"])):
        with pytest.raises(InputError, match=str(path)):
            WordProblemsConfig(task=name, path=path).open()
    with pytest.raises(InputError, match="none from place 10 on"):
        WordProblemsConfig(task="svamp", path=files["svamp"], first=10).open()
    with pytest.raises(ValidationError):
        WordProblemsConfig(task="math", path=files["svamp"])
