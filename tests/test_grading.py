"""Grading: equal answers are equal however they are written, unequal ones are not, and nothing hangs."""

import json
import os
import signal
import threading
from importlib import util

import pytest

from s2t_agents.errors import ConfigError, InputError, S2TError
from s2t_agents.training import math_judge
from s2t_agents.training.equivalence import LONGEST, MathEquivalence, as_math, final_expression
from s2t_agents.training.grading import GRADERS, Exact, Numeric, final_answer
from s2t_agents.training.math_judge import MathJudge, shared_judge
from s2t_agents.training.tasks import JsonlTask, JsonlTaskConfig


@pytest.fixture(scope="module")
def grader():
    return MathEquivalence()


@pytest.fixture
def judge():
    judge = MathJudge(limit_s=2)
    yield judge
    judge.close()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (r"\frac{1}{2}", r"Half of it, so the answer is $\boxed{0.5}$."),
        (r"\frac12", "The answer is 1/2."),
        (r"\dfrac{3}{4}", r"we get \boxed{\frac{6}{8}}, as asked"),
        (r"\left[0, 1\right)", r"The answer is $[0,1)$."),
        (r"(-\infty, 3]", r"\boxed{(-\infty,3]}"),
        (r"\{1, 2, 3\}", r"The answer is \(\{3, 2, 1\}\)."),
        (r"10\text{ cm}", "The answer is 10 cm."),
        ("10", r"Its width is \boxed{10\text{ cm}}."),
        (r"90^\circ", r"\boxed{90}"),
        (r"12\%", "answer: 12%"),
        (r"\$42", "The answer is $42."),
        ("1,000", "#### 1000"),
        ("x^2+2x+1", "The answer is $(x+1)^2$."),
        (r"2\sqrt{3}", r"so \boxed{\sqrt{12}}"),
        ("5", "The answer is x = 5."),
        (r"\text{Evelyn}", r"The answer is \boxed{\text{Evelyn}}."),
        (r"\text{(B)}", "The answer is B."),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}"),
        ("42", "Six times seven.\nThat makes 42."),
        ("3", r"first \boxed{4}, but no: \boxed{3}"),
        ("7", "the answer is 6. I mean, the answer is 7. Good."),
        ("#### 18", "The answer is 18."),
    ],
)
def test_equal_answers_are_right(grader, answer, text):
    assert grader.right(text, answer)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}"),
        ("[0, 1]", r"\boxed{(0, 1)}"),
        (r"\{1, 2\}", r"\boxed{\{1, 2, 3\}}"),
        ("(1, 2)", r"\boxed{(2, 1)}"),
        ("3", r"\boxed{-3}"),
        (r"\pi", "The answer is 3.14."),
        ("12", "I do not know."),
        ("12", ""),
        ("12", r"\boxed{}"),
        ("", ""),
        ("4", r"\boxed{4, no, \boxed{5}"),
    ],
)
def test_other_answers_are_wrong(grader, answer, text):
    assert not grader.right(text, answer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "absurd",
    [
        "9^{9^{9^{9^{9}}}}",
        "(" * 400 + "1" + ")" * 400,
        r"\frac{" * 200,
        r"\int_0^{10^{10}} \sin(x^{x^x}) dx",
        r"100000000!",
        "1" * 900,
        "\x00\ud7ff\u2028",
        r"\begin{pmatrix}" * 50,
    ],
)
def test_absurd_answers_are_wrong(judge, absurd):
    judge.equal("$1$", "$1.0$")  # started
    assert not judge.equal("$12$", f"${absurd}$")
    assert judge.equal("$1$", "$1.0$")  # and the next question is answered


def test_what_takes_too_long_is_stopped_and_the_next_question_answered(judge):
    assert judge.equal("$1$", "$1.0$")
    first = judge.worker_pid
    judge.limit_s = 0.001
    assert not judge.equal("$x^2+2x+1$", "$(x+1)^2$")
    judge.limit_s = 5
    assert judge.equal("$x^2+2x+1$", "$(x+1)^2$")
    assert judge.worker_pid != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_worker_that_died_is_replaced(judge):
    assert judge.equal("$1$", "$1.0$")
    os.kill(judge.worker_pid, signal.SIGKILL)
    os.waitid(os.P_PID, judge.worker_pid, os.WEXITED | os.WNOWAIT)
    assert not judge.equal("$1$", "$1.0$")
    assert judge.equal("$1$", "$1.0$")


def test_threads_may_ask_and_the_alarm_is_left_alone(grader):
    before = signal.getsignal(signal.SIGALRM)
    found = []
    threads = [
        threading.Thread(target=lambda at=at: found.append(grader.right(f"\\boxed{{{at}.0}}", str(at))))
        for at in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_worker_that_can_not_start_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(math_judge, "WORKER", tmp_path / "broken.py")
    with pytest.raises(S2TError, match=r"math-verify could not be started \(exit code 3\)"):
        MathJudge().equal("1", "2")


def test_long_answers_are_not_judged(grader):
    assert not grader.right(r"\boxed{" + "1+" * LONGEST + "1}", str(LONGEST + 1))
    assert grader.right(r"\boxed{" + "x" * 2 * LONGEST + "}", "x" * 2 * LONGEST)


def test_equal_answers_get_one_vote(grader):
    texts = [r"\boxed{\frac{1}{2}}", "The answer is 0.5.", r"\boxed{\frac{2}{4}}", r"\boxed{\frac{1}{3}}", "no idea"]
    votes = [grader.vote("one", text) for text in texts]
    assert votes[0] == votes[1] == votes[2]
    assert len(set(votes)) == 3
    assert [grader.vote("one", text) for text in reversed(texts)] == votes[::-1]


def test_a_file_of_math_is_graded_and_voted(tmp_path):
    file = tmp_path / "math.jsonl"
    file.write_text(json.dumps({"prompt": "Half?", "answer": r"\frac{1}{2}"}))
    task = JsonlTaskConfig(task="jsonl", path=file, grading="math").open()
    (item,) = task.items
    assert task.grade(item, r"It is \boxed{0.5}")
    assert not task.grade(item, r"It is \boxed{5}")
    assert task.vote(item, "The answer is 1/2.") == task.vote(item, r"\boxed{0.5}")


def test_math_grading_without_its_library_says_what_to_install_before_anything_runs(tmp_path, monkeypatch):
    file = tmp_path / "math.jsonl"
    file.write_text('{"prompt": "a", "answer": "1"}')
    monkeypatch.setattr("s2t_agents.training.equivalence.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"math-verify library.*s2t-agents\[train\]"):
        JsonlTask(file, "math")


def test_the_library_is_loaded_in_the_worker_only():
    assert util.find_spec("math_verify")
    shared_judge().equal("$1$", "$1.0$")
    import sys

    assert "math_verify" not in sys.modules


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"$\frac{1}{2}$"),
        ("The answer is $x$.", "$x$"),
        ("Answer: 3.5. Done", "$3.5$"),
        ("nothing", None),
    ],
)
def test_final_expressions(text, found):
    assert final_expression(text) == found


def test_prose_is_not_taken_for_a_product_of_letters():
    assert as_math("5 cm because of that") == "5 cm because of that"
    assert as_math(r"5\text{ long words here}") == r"$5\text{ long words here}$"


def test_every_grader_gives_equal_answers_one_vote():
    assert final_answer("The answer is 42.0") == final_answer("it is 42") == "42"
    assert final_answer("  none ") == "none"
    assert Exact().right(" a ", "a")
    assert Numeric().right("#### 1,000", "1000")
    assert GRADERS["numeric"]().vote("1", "it is 42.0") == GRADERS["numeric"]().vote("1", "The answer is 42")
    assert GRADERS["exact"]().vote("1", " it is 42 ") == "it is 42"


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("1e3", "The answer is 1000."),
        ("5e-05", "The answer is 0.00005."),
        (".5", "The answer is 0.5."),
        ("0.5", "It is .5 in all."),
        ("1000", "The answer is 1e3."),
        ("-$5", "The answer is -5."),
        ("-5", "The answer is \u22125."),
        ("-5", "She is down -$5."),
        ("42", "Answer is: 42, which is 3 more than 39."),
        ("42", "**The answer is: 42** (39 + 3)"),
        ("42", "The answer is **42**, that is 6 times 7"),
        ("42", r"The answer is $\boxed{\$42}$, from 6 times 7"),
    ],
)
def test_a_number_counts_however_it_is_written(gold, text):
    assert Numeric().right(text, gold)


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("1e3", "The answer is 3."),
        (".5", "The answer is 5."),
        ("5", "The answer is \u22125."),
        ("1", "The answer is 1e400."),
    ],
)
def test_another_number_is_wrong_however_it_is_written(gold, text):
    assert not Numeric().right(text, gold)


def test_an_absurd_exponent_is_read_without_writing_its_digits_out():
    assert len(final_answer("The answer is 1e999999999.")) < 2000


@pytest.mark.parametrize("answer", ["Paris", "5/6", "#### 5/6", "x^2", "3, 4", "2026-11-26", [1], {"n": 1}, True])
def test_a_gold_answer_that_is_no_number_is_refused_by_numeric_grading(tmp_path, answer):
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps({"prompt": "a", "answer": "1"}) + "\n" + json.dumps({"prompt": "b", "answer": answer}))
    with pytest.raises(InputError, match=r"1 of 2 answers.* id '2'.*exact or math"):
        JsonlTask(file, "numeric")


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (0.00005, "0.00005"),
        (1e22, "10000000000000000000000"),
        (-3, "-3"),
        ("1,000", "1000"),
        ("$12.50", "12.5"),
        ("12%", "12%"),
        ("He has 3 + 4 = 7.\n#### 7", "7"),
        ("The answer is 7.", "7"),
        (r"\boxed{7}", "7"),
    ],
)
def test_a_gold_answer_that_is_one_number_is_taken(tmp_path, answer, reply):
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps({"prompt": "a", "answer": answer}))
    task = JsonlTask(file, "numeric")
    assert task.grade(task.items[0], f"The answer is {reply}.")


def test_words_are_graded_as_words_and_no_answers_are_needed_to_collect(tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps({"prompt": "a", "answer": "Paris"}))
    task = JsonlTask(file, "exact")
    assert task.grade(task.items[0], "Paris")
    assert JsonlTask(file, "numeric", answers=False).items
