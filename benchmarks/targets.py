"""What the engine is held to, beside what was measured: over several prefixes, the worst figure counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from .chat import slowest as slowest_chat

PARTS = ("decode", "chat", "parallel", "loops", "turns")
"""Of a result; each holds measurements that name their model."""


GREEDY = "greedy over generate"
"""Our greedy decoding over transformers' ``generate``."""


CHAT = "chat model over the bare engine, grammar on"
"""``chat.slowest``; results stored before there was that part have no such target, nor one of the bound."""


class Verdict(TypedDict):
    """A target, the figure found, and whether that is good enough."""

    wanted: str
    figure: float
    met: bool


def at_most(limit: float, figure: float) -> Verdict:
    """A figure that should be small."""
    return {"wanted": f"at most {limit:.3g}", "figure": figure, "met": figure <= limit}


def at_least(limit: float, figure: float) -> Verdict:
    """A figure that should be large."""
    return {"wanted": f"at least {limit:.3g}", "figure": figure, "met": figure >= limit}


def targets_of(
    model: str, parts: Mapping[str, Any], *, over_generate: float = 1.0, over_engine: float = 1.01
) -> dict[str, Verdict]:
    """The targets that any model has, on any device.

    Args:
        model: whose parts count.
        parts: ``PARTS``, as ``speed.run`` returns them; others are not looked at.
        over_generate: how much of the time of transformers' ``generate`` our greedy may take.
        over_engine: and the chat model of our greedy's.
    """
    own = {name: [part for part in parts[name] if part["model"] == model] for name in PARTS if name in parts}
    rows = [part["rows"] for part in own["decode"]]
    eight = [part for part in own["parallel"] if part["at_once"] <= 8][-1]

    def slowest(name: str) -> float:
        return max(float(row["over_greedy"]) for found in rows for key, row in found.items() if key.startswith(name))

    chat = [slowest_chat(part) for part in own.get("chat", ())]
    bound = [part["bound"]["share"] for part in own["loops"] if "bound" in part]
    return {
        **({f"{model}: {CHAT}": at_most(over_engine, max(chat))} if chat else {}),
        **({f"{model}: agent loops, share of the bound": at_least(0.95, bound[-1])} if bound else {}),
        f"{model}: {GREEDY}": at_most(over_generate, max(found["engine"]["over_generate"] for found in rows)),
        f"{model}: head at any rate, over greedy": at_most(1.02, slowest("head@")),
        f"{model}: activated at 1%, over greedy": at_most(1.02, slowest("activated@0.01")),
        f"{model}: activated at 10%, over greedy": at_most(1.10, slowest("activated@0.1")),
        f"{model}: time to first token at turn 10, over reading the new tokens alone": at_most(
            1.3, own["turns"][-1]["kept_over_new_alone"]
        ),
        f"{model}: 8 concurrent agent loops, speed-up": at_least(5.0, own["loops"][-1]["ratio"]),
        f"{model}: {eight['at_once']} concurrent uncached prompts, speed-up": at_least(5.0, eight["ratio"]),
    }
