"""Draw results/decode.json: ``python -m benchmarks.speed_plot``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"


def draw(stored: dict[str, Any], out: Path) -> None:
    """Three panels: ms against prefix and against K, speed-up against concurrent generations."""
    report, made = stored["report"], stored["made"]
    figure, (by_prefix, by_k, at_once) = plt.subplots(1, 3, figsize=(15, 5))
    for part in report["growth"]:
        for axis, key, what in ((by_prefix, "by_prefix", "prefix, tokens"), (by_k, "by_k", "candidates K")):
            at = [int(n) for n in part[key]]
            for name in ("step_ms", "activated_ms", "head_ms"):
                line = [point[name] for point in part[key].values()]
                axis.plot(at, line, marker="o", label=f"{part['model']}, {name.removesuffix('_ms')}")
            axis.set(xscale="log", yscale="log", xlabel=what, ylabel="ms")
    for name in dict.fromkeys(part["model"] for part in report["parallel"]):
        parts = [part for part in report["parallel"] if part["model"] == name]
        at_once.plot([p["at_once"] for p in parts], [p["ratio"] for p in parts], marker="o", label=name)
    at_once.set(xlabel="concurrent generations", ylabel="speed-up over sequential")
    for axis in (by_prefix, by_k, at_once):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    figure.suptitle(f"{made['hardware']}, commit {made['commit']}, {made['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(json.loads((RESULTS / "decode.json").read_text()), RESULTS / "decode.png")
