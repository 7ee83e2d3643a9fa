"""The speed bench runs through, compares like with like, and says which figures it composed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import chat, loops, parallel, speed, turns
from benchmarks.decode import RATES, Timed, at_rate, run
from benchmarks.shapes import measured_model
from benchmarks.timed_chat import TimedChat
from s2t_agents.engine.engine import Engine
from s2t_agents.testing import tiny_model
from s2t_agents.types import Sampling


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    return speed.run(quick=True)


def test_every_row_is_there_with_its_ratios(quick: dict[str, Any]) -> None:
    for part in quick["decode"]:
        rows = part["rows"]
        kinds = [f"{kind}@{rate:g}" for kind in ("head", "activated", "published") for rate in RATES]
        assert set(rows) == {"generate", "engine", "maj8", *kinds}
        assert rows["generate"]["over_generate"] == rows["engine"]["over_greedy"] == 1
        assert all(row["ms_per_token"] > 0 for row in rows.values())
        assert all(rows[name].get("composed") for name in rows if name.startswith("published"))


def test_targets_stand_beside_figures_missed_or_met(quick: dict[str, Any]) -> None:
    assert len(quick["targets"]) == 11
    assert all(isinstance(each["met"], bool) for each in quick["targets"].values())
    assert speed.table(quick).renderables


def test_rows_are_compared_within_each_turn_so_that_a_machine_that_slows_down_cancels_out() -> None:
    ours, theirs = Timed(token_ms=[2.0, 4.0, 16.0]), Timed(token_ms=[1.0, 2.0, 8.0])
    assert ours.over(theirs) == 2.0
    assert ours.beyond(theirs) == 2.0  # the median of 1, 2 and 8


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2, 1.0])
def test_a_forced_rate_is_kept_to(rate: float) -> None:
    model = tiny_model("qwen3")
    model.backend.eos_ids = frozenset()
    steps = list(Engine(model, trigger=at_rate(rate), selector=_Greedy()).steps([1, 2, 3], Sampling(max_tokens=100)))
    assert abs(sum(step.triggered for step in steps) - 100 * rate) <= 1


class _Greedy:
    def scores(self, proposal: Any) -> torch.Tensor:
        scores: torch.Tensor = proposal.candidate_log_probs
        return scores


def test_generations_at_once_are_equal_to_those_alone() -> None:
    model = tiny_model("qwen3")
    model.backend.eos_ids = frozenset()
    assert parallel.run(model, at_once=4, prefix=16, tokens=8)["equal"]


def test_agent_loops_call_the_tool_and_are_equal_at_once_and_one_by_one(quick: dict[str, Any]) -> None:
    for found in quick["loops"]:
        assert found["equal"]
        bound = found["bound"]
        assert bound["seconds"] > 0
        assert bound["share"] == pytest.approx(bound["seconds"] / found["together_s"])
        assert bound["steps"] >= found["turns"] * found["tokens"] / 2  # the calls are as long as was asked for


def test_the_bound_reads_every_token_of_a_prompt_once() -> None:
    shared = [1, 2, 3]
    first = [([*shared, 10], [20, 21]), ([*shared, 10, 20, 21, 11, 12], [22])]
    second = [([*shared, 30, 31], [40, 41])]
    # shared once; 10; the last token of the answer, which nobody has read, and 11, 12; 30, 31
    assert loops.unread([first, second]) == 3 + 1 + 3 + 2
    assert loops.unread([first]) == 4 + 3


def test_the_chat_model_is_measured_beside_the_engine_at_the_same_prompt(quick: dict[str, Any]) -> None:
    for part in quick["chat"]:
        rows = part["rows"]
        assert set(rows) == {"generate", *chat.CHAT, *chat.CHAT.values()}
        assert all(row["ms_per_token"] > 0 for row in rows.values())
        assert rows["engine"]["over_engine"] == rows["generate"]["over_generate"] == 1
        assert part["prompt_tokens"]["with_tool"] > part["prompt_tokens"]["plain"] > 16
        assert chat.slowest(part) == max(rows[name]["over_engine"] for name in chat.HELD)


def test_the_chat_model_says_what_the_engine_says_and_every_token_has_its_time() -> None:
    model = measured_model("tiny", dtype=torch.float32)
    timed = TimedChat(model, 20)
    messages = timed.conversation(8, 30)
    plain = timed.answer(messages, scope="a")
    assert len(plain.ids) == len(plain.stamps) == 20
    assert plain.chosen == plain.stamps == sorted(plain.stamps)
    called = timed.answer(messages, scope="a", tools="any")
    assert len(called.message.tool_calls[0]["args"]["numbers"]) >= timed.least
    assert 10 <= len(called.chosen) < len(called.stamps) == len(called.ids)  # what the grammar chose took no step
    assert len(timed.chat.get_token_ids(timed.text(50))) in range(50, 55)


def test_a_turn_reuses_all_but_what_is_new() -> None:
    model = tiny_model("qwen3")
    model.backend.eos_ids = frozenset()
    found = turns.run(model, system=30, new=10, turns=4, repeats=1)
    assert found["prompt_tokens"] == 30 + 4 * 10 + 3 * 8
    assert found["prompt_tokens"] - found["reused_tokens"] == 10 + 1  # the last answer's end was never read


def test_all_rows_make_as_many_tokens_as_asked() -> None:
    model = tiny_model("qwen3")
    model.backend.eos_ids = frozenset()
    model.model.generation_config.eos_token_id = None
    found = run(model, prefix=16, tokens=12, repeats=1, rates=(0.0, 0.2))
    assert found["rows"]["head@0.05"]["composed"]
    assert "composed" not in found["rows"]["head@0.2"]
