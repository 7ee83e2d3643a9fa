"""The demo, end to end on the bundled pair: exact, within its budget, and honest about who chose what."""

import json
import subprocess
import sys
from typing import Any

import forked
import pytest
import torch
from langchain_core.messages import convert_to_messages
from langchain_core.utils.function_calling import convert_to_openai_tool

from s2t_agents import Budget, ChatS2T, Ledger
from s2t_agents.bundled import LLM, SLM
from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.demo.agent import DEVICE_PRICE, DemoRun, run_demo, tools_of
from s2t_agents.demo.world import demo_question, generate
from s2t_agents.engine.engine import Engine
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.selectors import load_selector
from s2t_agents.types import Sampling


@pytest.fixture(scope="module")
def slm() -> LanguageModel:
    return LanguageModel.load(SLM, device="cpu")


def s2t(*arguments: str) -> dict[str, Any]:
    out = forked.run("-c", "from s2t_agents.cli import main; main()", "demo", "--json", *arguments)
    assert out.returncode == 0, out.stderr
    found: dict[str, Any] = json.loads(out.stdout)
    return found


def test_greedy_equals_generate_on_20_prompts_of_the_demo_world(slm: LanguageModel) -> None:
    encoder = PromptEncoder(slm.tokenizer)
    for seed in range(20):
        problem = generate(seed, "heldout")
        prompt = encoder.encode(convert_to_messages(list(problem.prompt)), problem.tools)
        reference = slm.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=100)[0, len(prompt) :]
        ours = [step.token_id for step in Engine(slm).steps(prompt, Sampling(max_tokens=100))]
        assert ours == reference.tolist(), seed


def test_the_bundled_selectors_load_for_the_bundled_model_and_are_calibrated(slm: LanguageModel) -> None:
    for name in (SLM, "s2t-demo/head"):
        _, config = load_selector(name, slm)
        assert config.calibration is not None


def test_tools_reach_the_model_exactly_as_the_world_writes_them() -> None:
    for seed in range(30):
        problem = demo_question(seed)
        rendered = [convert_to_openai_tool(tool) for tool in tools_of(problem)]
        assert json.dumps(rendered) == json.dumps(list(problem.tools))


@pytest.mark.slow
def test_no_run_escalates_more_often_than_its_budget_and_many_exhaust_it() -> None:
    exhausted = dict.fromkeys((1, 2, 3), 0)
    for seed in range(60):
        limit = 1 + seed % 3
        run = run_demo(demo_question(seed), escalations=limit)
        [totals] = run.ledger.totals().values()
        spent = run.model.budget.state().spent["escalations"] if run.model.budget else None
        assert totals.escalations == spent <= limit
        exhausted[limit] += spent == limit
    assert min(exhausted.values()) > 1  # or the test would show little
    assert sum(exhausted.values()) >= 15


def test_the_command_prints_one_object_with_the_published_keys() -> None:
    run = s2t("--seed", "3", "--budget-escalations", "2")
    assert set(run) == {"question", "answer", "expected", "correct", "messages", "s2t", "per_agent"}
    assert run["s2t"]["escalations"] <= 2
    assert run["per_agent"]["solver"]["completion_tokens"] == run["s2t"]["tokens"]
    assert any(message["role"] == "tool" for message in run["messages"])


@pytest.mark.parametrize("limits", [{"answer_tokens": 4}, {"max_tokens": 2}, {}], ids=str)
def test_a_run_adds_up_whatever_ended_its_answers(limits: dict[str, int]) -> None:
    problem, ledger = demo_question(3), Ledger()
    model = ChatS2T(model=SLM, ledger=ledger, max_tokens=limits.get("max_tokens", 40), device_price=DEVICE_PRICE)
    tools = tools_of(problem)
    calling = model.bind_tools(tools, tool_choice="any") if not limits else model
    budgets = [Budget(answer_tokens=limits["answer_tokens"]) if "answer_tokens" in limits else None for _ in range(3)]
    messages = [calling.invoke(problem.question, s2t_budget=budget) for budget in budgets]
    told = [message.response_metadata["s2t"] for message in messages]
    assert all(("stopped_by" in each) == ("answer_tokens" in limits) for each in told)
    found = json.loads(json.dumps(DemoRun(problem, messages, model, {}, ledger).as_json()))["s2t"]
    assert set(found) == set(told[0]) - {"stopped_by", "shortened"}
    for key in ("tokens", "reused_tokens", "triggers", "selections", "flips", "escalations", "refused"):
        assert found[key] == sum(each[key] for each in told)
    assert set(found["cost_usd"]) == set(told[0]["cost_usd"])
    assert found["cost_usd"]["local"] == pytest.approx(sum(each["cost_usd"]["local"] for each in told))
    assert found["latency_ms"]["total"] == pytest.approx(sum(each["latency_ms"]["total"] for each in told), abs=0.01)
    assert found["thought"].keys() == told[0]["thought"].keys()
    assert found["trace_id"] == told[-1]["trace_id"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of resident memory is read from /proc")
def test_it_keeps_to_a_gigabyte_and_a_half() -> None:
    """Read by the process itself: what a parent is told of its children counts the parent's own memory, too."""
    code = (
        "import re, sys; from pathlib import Path; from s2t_agents.cli import app;"
        "app(['demo', '--json', '--seed', '3'], standalone_mode=False);"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1], file=sys.stderr)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout)["answer"]
    assert 0 < int(out.stderr.split()[-1]) < 1.5 * 2**20


def test_every_seed_is_another_problem_and_the_same_seed_the_same_run() -> None:
    once, again, other = s2t("--seed", "3"), s2t("--seed", "3"), s2t("--seed", "4")
    assert (once["question"], once["answer"]) == (again["question"], again["answer"])
    assert once["question"] != other["question"]


def test_no_llm_never_loads_the_llms_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    real = LanguageModel.load.__func__

    def watched(cls: type[LanguageModel], path: str, **options: Any) -> LanguageModel:
        loaded.append(path)
        return real(cls, path, **options)

    monkeypatch.setattr(LanguageModel, "load", classmethod(watched))
    run_demo(demo_question(3), llm=False)
    assert LLM not in loaded
    for seed in range(20):
        if run_demo(demo_question(seed), escalations=3).ledger.total().escalations:
            break
    assert LLM in loaded  # or the check above would see nothing


def test_without_selector_and_llm_it_is_the_small_model_alone() -> None:
    run = run_demo(demo_question(3), selector=False, llm=False)
    totals = run.ledger.total()
    assert (totals.triggers, totals.flips, totals.escalations) == (0, 0, 0)


def test_a_flip_shows_what_the_slm_wanted_and_who_chose() -> None:
    runs = (run_demo(demo_question(seed), llm=False) for seed in range(60))
    run = next(run for run in runs if run.ledger.total().flips)
    changed = [step for steps in run.steps.values() for step in steps if step.flipped]
    assert all(step.picked_by == "selector" and step.wanted_id == step.candidates[0].token_id for step in changed)
