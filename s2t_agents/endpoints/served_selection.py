"""What a server's selector did at a step, as any server reports it: in the step's log-probabilities.

not triggered    -0.1  -2.7  -4.1  -5.0  -5.2 ...
triggered        -0.3  -1.9  -3.0  -1104.2  -1105.9 ...      K candidates by the selector's scores, then all others,
                                                             lowered: by 1,100 where the small model's best token is
                                                             the second of them, by 1,000 where it is the first
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OUT_OF_REACH = 1000.0
"""Nats by which tokens outside the K candidates are lowered: legal still, where a grammar forbids all candidates."""
A_PLACE = 100.0
"""And by so many more for each place that the small model's best token has among the selector's scores: the first has
none. A token's own log-probability is above -100 wherever it matters."""
MOST_CANDIDATES = 16
"""So that of 20 log-probabilities some are of lowered tokens."""


@dataclass(frozen=True)
class ServerSelection:
    """A triggered step as it can be read off log-probabilities.

    Attributes:
        candidates: token ids with their log-probabilities, the selector's best first.
        wanted: what the small model alone would have taken; None where it is not among those reported.
    """

    candidates: tuple[tuple[int, float], ...]
    wanted: int | None


def read_back(logprobs: Mapping[int, float]) -> ServerSelection | None:
    """The selection behind a position's best log-probabilities, by token id; None where there was none."""
    lowered = [value for value in logprobs.values() if value <= -OUT_OF_REACH]
    ranked = sorted(((token, value) for token, value in logprobs.items() if value > -OUT_OF_REACH), key=lambda e: -e[1])
    if not lowered or not ranked:
        return None
    place = int((-OUT_OF_REACH - max(lowered)) // A_PLACE)
    return ServerSelection(tuple(ranked), ranked[place][0] if place < len(ranked) else None)
