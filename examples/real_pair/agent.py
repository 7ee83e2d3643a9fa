"""A LangGraph agent on real weights: ``python examples/real_pair/agent.py runs/smollm2``, or ``make real-demo``.

The same question to four models: SmolLM2-135M-Instruct alone, its copy at 3 and 4 bits alone, that copy with the
selector that was trained for it, and with the full weights asked at unsure tokens. Each must call a tool, and answers
from what the tool returns.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

from s2t_agents import Budget, ChatS2T, Escalation, LocalLLM
from s2t_agents.triggers import entropy

QUESTION = "Find the area of a triangle with a base of 14 units and a height of 9 units."
FORMULA = "{base} * {height} / 2"
CLOSING = "</tool_response>"
"""SmolLM2's template knows no tools, so the result stands between such tags in the prompt; a model this small may end
its own answer with one."""
SELECTOR = Path(__file__).parent / "selectors" / "adapted"


@tool
def triangle_area(base: float, height: float) -> str:
    """Compute the area of a triangle from its base and height."""
    return f"{FORMULA.format(base=base, height=height)} = {base * height / 2:g}"


def agent(model: ChatS2T) -> Any:
    """Call a tool, run it, answer."""
    calling = model.bind_tools([triangle_area], tool_choice="any")
    speaking = model.bind(stop=[CLOSING])
    graph = StateGraph(MessagesState)
    graph.add_node("call", lambda state: {"messages": [calling.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([triangle_area]))
    graph.add_node("answer", lambda state: {"messages": [speaking.invoke(state["messages"])]})
    for one, other in ((START, "call"), ("call", "tools"), ("tools", "answer"), ("answer", END)):
        graph.add_edge(one, other)
    return graph.compile()


def models(llm: str, slm: str, *, selector: Path | None = None) -> dict[str, ChatS2T]:
    """The four, by what they are; without a selector there are three."""
    asked = Escalation(LocalLLM(llm), margin=1.0)
    name = "3 and 4 bits, with its selector"
    selected = {} if selector is None else {name: ChatS2T(model=slm, max_tokens=320, selector=str(selector))}
    return {
        "full weights": ChatS2T(model=llm, max_tokens=320),
        "3 and 4 bits": ChatS2T(model=slm, max_tokens=320),
        **selected,
        "the pair": ChatS2T(
            model=slm,
            max_tokens=320,
            trigger=entropy(above=0.5),
            escalation=asked,
            budget=Budget(escalations=40),
        ),
    }


def ask(model: ChatS2T) -> dict[str, Any]:
    """One question to one model: its call, what came back, its answer, and what it took."""
    started = time.perf_counter()
    messages = agent(model).invoke({"messages": [("user", QUESTION)]})["messages"]
    said = [message for message in messages if isinstance(message, AIMessage)]
    figures = [message.response_metadata["s2t"] for message in said]
    return {
        "call": said[0].tool_calls[0],
        "returned": messages[-2].text,
        "answer": said[-1].text,
        "tokens": sum(each["tokens"] for each in figures),
        "asked": sum(each["escalations"] for each in figures),
        "seconds": time.perf_counter() - started,
    }


def main(home: Path) -> dict[str, dict[str, Any]]:
    """Ask all four, print what they did; returns it by model."""
    found = {}
    print(QUESTION)
    for name, model in models(str(home / "llm"), str(home / "slm"), selector=SELECTOR).items():
        found[name] = run = ask(model)
        print(f"\n{name}: {run['tokens']} tokens, the LLM picked {run['asked']} of them, {run['seconds']:.1f} s")
        print(f"  calls     {run['call']['name']}({json.dumps(run['call']['args'])})")
        print(f"  gets      {run['returned']}")
        print(f"  answers   {run['answer']}")
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
