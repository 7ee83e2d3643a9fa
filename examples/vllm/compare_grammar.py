"""What differs when the selector runs in the server, where its candidates come before the grammar: function calls.

    python examples/vllm/compare_grammar.py --address vllm://127.0.0.1:8399/s2t-demo --slm runs/smollm2/slm \\
        --selector examples/real_pair/selectors/head --bfcl runs/smollm2/bfcl

Here the K candidates are the likeliest legal tokens, and the trigger reads the entropy of legal tokens; in the server
both are those of the whole vocabulary. The same questions of the Berkeley Function Calling Leaderboard, both ways.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from s2t_agents.chat.engine_settings import EngineSettings
from s2t_agents.chat.runtime import build
from s2t_agents.engine.engine import Engine
from s2t_agents.scheduling.waits import gather
from s2t_agents.training.dialogue import AnsweredItem, Speaker, Trace, answering
from s2t_agents.training.tasks.bfcl import BfclTask
from s2t_agents.types import Sampling


def answered(engine: Engine, task: BfclTask, n: int, tokens: int) -> list[AnsweredItem]:
    """The first n questions, one call each under its grammar."""
    speaker, limit = Speaker(engine.slm), Sampling(max_tokens=tokens)
    return gather([answering(speaker, task, item, engine, lambda prompt: limit) for item in task.items[:n]])


def first_difference(here: Trace, there: Trace) -> str:
    """What was otherwise at the first token that is."""
    at = next(i for i, (one, two) in enumerate(zip(here.ids, there.ids, strict=False)) if one != two)
    triggered = {"here": at in here.triggered, "there": at in there.triggered}
    names = [name for name, was in triggered.items() if was]
    return f"triggered {' and '.join(names)}" if names else "triggered nowhere"


def main() -> None:
    """Answer, compare, print JSON."""
    parser = argparse.ArgumentParser(description="Compare a selector before the grammar with one after it.")
    parser.add_argument("--address", required=True, help="vllm://host:port/name, with S2T_SELECTOR")
    parser.add_argument("--slm", required=True, help="the same model, for this process")
    parser.add_argument("--selector", required=True, help="the same selector")
    parser.add_argument("--bfcl", type=Path, required=True, help="the leaderboard's data")
    parser.add_argument("--n", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=80)
    given = parser.parse_args()
    task = BfclTask(given.bfcl, ["simple_python"])
    near = build(EngineSettings(given.slm, selector=given.selector)).engine
    served = {"tokenizer": near.slm.tokenizer}
    far = build(EngineSettings(given.address, selector="server", k=near.k, model_kwargs=served)).engine
    here, there = (answered(engine, task, given.n, given.tokens) for engine in (near, far))
    traces = [(one.traces[0], two.traces[0]) for one, two in zip(here, there, strict=True)]
    differing = [(one, two) for one, two in traces if one.ids != two.ids]
    both = {"here": [one for one, _ in traces], "in the server": [two for _, two in traces]}
    print(
        json.dumps(
            {
                "questions": len(traces),
                "the same tokens": len(traces) - len(differing),
                "the same call": sum(one.text == two.text for one, two in zip(here, there, strict=True)),
                "right": {
                    name: sum(task.grade(each.item, each.text) for each in answers)
                    for name, answers in (("here", here), ("in the server", there))
                },
                "tokens": {name: sum(len(each.ids) for each in part) for name, part in both.items()},
                "triggered": {name: sum(len(each.triggered) for each in part) for name, part in both.items()},
                "flipped": {name: sum(len(each.flipped) for each in part) for name, part in both.items()},
                "first differing token": Counter(first_difference(one, two) for one, two in differing),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
