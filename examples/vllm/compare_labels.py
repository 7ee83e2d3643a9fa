"""Are labels that were made on servers those of the same models in this process?

python examples/vllm/compare_labels.py runs/served/rollouts/train runs/here/rollouts/train
"""

import json
import sys
from pathlib import Path

from s2t_agents.backends.statistics import FLOOR
from s2t_agents.training.shards import read_shards

NEAR = 1e-3


def main() -> None:
    """Compare answers, and the labels of those that are the same; print JSON."""
    far, near = (read_shards(Path(folder)) for folder in sys.argv[1:3])
    answers = same = steps = first = best = candidates = listed = bounds = 0
    worst_slm = 0.0
    for theirs, ours in zip(far, near, strict=True):
        for (_, one, at), (_, two, here) in zip(theirs.trajectories(), ours.trajectories(), strict=True):
            answers += 1
            if one != two:
                continue
            same, steps = same + 1, steps + len(one)
            first += int((theirs.candidates[at][:, 0] == ours.candidates[here][:, 0]).sum())
            best += int((theirs.llm_best[at] == ours.llm_best[here]).sum())
            alike = (theirs.candidates[at] == ours.candidates[here]) & (ours.slm[here] > FLOOR)
            worst_slm = max(worst_slm, float((theirs.slm[at] - ours.slm[here])[alike].abs().max()))
            over = (theirs.llm[at] - ours.llm[here])[alike]
            candidates, listed = candidates + len(over), listed + int((over.abs() < NEAR).sum())
            bounds += int((over >= NEAR).sum())
    print(
        json.dumps(
            {
                "answers": answers,
                "the same tokens": same,
                "their steps": steps,
                "the same best candidate": first,
                "the same best token of the LLM": best,
                "SLM, largest difference (nats)": round(worst_slm, 6),
                "candidates": candidates,
                f"the LLM's log-probability within {NEAR} nats": listed,
                "not listed: an upper bound, that of the last that is": bounds,
            },
            indent=2,
        )
    )
    raise SystemExit(0 if same >= 0.9 * answers else 1)


if __name__ == "__main__":
    main()
