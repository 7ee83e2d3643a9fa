"""The demo: an ordinary ``create_agent`` agent on the bundled pair answers a problem it has never seen, on a budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from langchain.agents import create_agent
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, convert_to_openai_messages
from langchain_core.tools import BaseTool, StructuredTool

from ..budget import Budget, DevicePrice, TokenPrice
from ..bundled import LLM, SLM
from ..chat.chat_model import ChatS2T
from ..ledger import CostSum, Ledger
from ..llms import LocalLLM
from ..types import Step
from .problem import Problem, grade

AGENT = "solver"
DEVICE_PRICE = DevicePrice(Decimal("0.10"))
"""USD per hour: about what two cores are rented for. Only an example, as is the LLM's price."""
LLM_PRICE = TokenPrice(Decimal("0.50"), Decimal("1.50"))
"""USD per million tokens in and out, as if the bundled large model were hosted."""

COUNTS = ("triggers", "selections", "flips", "escalations", "refused")
THOUGHT_COUNTS = ("tokens", "triggers", "selections", "escalations")


@dataclass(frozen=True)
class DemoRun:
    """What the agent did with one problem; ``steps`` are those of every generation, by trace id."""

    problem: Problem
    messages: Sequence[BaseMessage]
    model: ChatS2T
    steps: Mapping[str, list[Step]]
    ledger: Ledger

    @property
    def answer(self) -> str:
        """The final text."""
        return str(self.messages[-1].text)

    @property
    def correct(self) -> bool:
        """Whether it is the expected one."""
        return grade(self.answer, self.problem)

    def as_json(self) -> dict[str, Any]:
        """The run for programs; see ``s2t demo --json``."""
        return {
            "question": self.problem.question,
            "answer": self.answer,
            "expected": self.problem.expected,
            "correct": self.correct,
            "messages": convert_to_openai_messages(list(self.messages)),
            "s2t": self.sums(),
            "per_agent": {agent: totals.model_dump(mode="json") for agent, totals in self.ledger.totals().items()},
        }

    def sums(self) -> dict[str, Any]:
        """The run under the keys of ``response_metadata["s2t"]``; trace id and budget are the last answer's."""
        total = self.ledger.total()
        answers = [each.response_metadata["s2t"] for each in self.messages if isinstance(each, AIMessage)]
        cost = total.cost_usd
        return {
            "tokens": total.completion_tokens,
            "reused_tokens": sum(each["reused_tokens"] for each in answers),
            "trace_id": answers[-1]["trace_id"],
            "cost_usd": {"local": _usd(cost.local), "llm": _usd(cost.llm), "total": _usd(cost.total)},
            "latency_ms": {
                part: total.latency_us[part] / 1000 if part in total.latency_us else None
                for part in answers[-1]["latency_ms"]
            },
            "thought": {
                **{key: getattr(total, f"thought_{key}") for key in THOUGHT_COUNTS},
                "llm_usd": _usd(cost.thought),
            },
            **{key: getattr(total, key) for key in COUNTS},
            "degraded": total.degraded > 0,
            "budget": answers[-1]["budget"],
        }


def _usd(cost: CostSum) -> float | None:
    return None if cost.usd is None else float(cost.usd)


def run_demo(problem: Problem, *, escalations: int = 3, selector: bool = True, llm: bool = True) -> DemoRun:
    """Let the agent answer a problem.

    Args:
        problem: see ``world.demo_question``.
        escalations: how often the LLM may be asked in the whole run.
        selector: use the bundled selector.
        llm: let it ask the bundled large model; False never loads its weights.
    """
    ledger = Ledger()
    steps: defaultdict[str, list[Step]] = defaultdict(list)
    chat = ChatS2T(
        model=SLM,
        selector=SLM if selector else None,
        escalation=LocalLLM(LLM, price=LLM_PRICE) if llm else None,
        budget=Budget(escalations=escalations, name="demo"),
        ledger=ledger,
        device_price=DEVICE_PRICE,
        on_step=lambda trace_id, step: steps[trace_id].append(step),
        max_tokens=256,
    )
    agent = create_agent(chat, tools=tools_of(problem), system_prompt=problem.system, name=AGENT)
    out = agent.invoke({"messages": [HumanMessage(problem.question)]}, {"recursion_limit": 12})
    return DemoRun(problem, out["messages"], chat, steps, ledger)


def tools_of(problem: Problem) -> list[BaseTool]:
    """The problem's tools as LangChain tools that really run."""
    return [_tool(problem, schema["function"]) for schema in problem.tools]


def _tool(problem: Problem, function: Mapping[str, Any]) -> BaseTool:
    def run(**arguments: Any) -> str:
        return problem.call(function["name"], arguments)

    return StructuredTool.from_function(
        run, name=function["name"], description=function["description"], args_schema=dict(function["parameters"])
    )
