"""A short way to the end of a grammar, so that JSON is closed before the tokens run out.

Finding the shortest completion exactly would search every path. Rollouts find a short one: forced tokens are
taken, and else the token that most likely ends things (closing brackets and quotes first, opening ones last).
A path that is found is real: the matcher itself walked it to an accepting state.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_ROLLOUTS = 6
_FEW = 24  # legal tokens at a choice between constants or keys, where luck may find the short one
_CLOSING, _QUOTE, _COMMA, _LAST = 0, 1, 2, 9


class ClosingOrder:
    """How readily each token of a vocabulary ends a JSON text.

    Args:
        texts: what each token spells, by id; ``""`` for control tokens.
        enders: control tokens that end something, such as ``</tool_call>``.
    """

    def __init__(self, texts: list[str], enders: set[int]) -> None:
        ranks = np.array([_CLOSING if i in enders else _rank(text) for i, text in enumerate(texts)], dtype=np.float64)
        lengths = np.array([len(text) for text in texts], dtype=np.float64) / 1000
        self.rank = ranks
        closing = ranks == _CLOSING
        self._short_first = ranks + np.where(closing, -lengths, lengths)
        self._long_first = ranks - lengths
        # inside a string only a quote ends anything: brackets are letters there
        self._letters = np.array([i for i, text in enumerate(texts) if text in ("j", "q", "x", "z")])
        self._punctuation = np.array([text.lstrip()[:1] in ("}", "]", ",") for text in texts])

    def path(self, matcher: Any, masks: Any, limit: int, *, any_will_do: bool = False) -> list[int] | None:
        """Tokens from here to an accepting state, at most ``limit`` of them; None if no rollout finds any.

        Args:
            matcher: the state to start from; it is left as it is.
            masks: gives the mask ``[V]`` (bool) of a matcher.
            limit: most tokens the path may have.
            any_will_do: take the first path found instead of the shortest of all rollouts.
        """
        best: list[int] | None = None
        chance = random.Random(0)
        for attempt in range(_ROLLOUTS // 2 if any_will_do else _ROLLOUTS):
            order = (self._short_first, self._long_first)[attempt % 2]
            found = self._rollout(matcher.deep_copy(), masks, limit, order, chance if attempt > 1 else None)
            if found is not None:
                best, limit = found, len(found) - 1
                if any_will_do:
                    break
        return best

    def _rollout(
        self, matcher: Any, masks: Any, limit: int, order: Floats, chance: random.Random | None
    ) -> list[int] | None:
        path: list[int] = []
        while not matcher.is_accepting():
            step = matcher.compute_ff_tokens()
            if not step:
                mask = masks(matcher)
                if not mask.any():
                    return None
                step = [self._choice(mask, order, chance)]
            if len(path) + len(step) > limit or not matcher.consume_tokens(step):
                return None
            path += step
        return path

    def _choice(self, mask: npt.NDArray[np.bool_], order: Floats, chance: random.Random | None) -> int:
        """The best token of the order, or one by chance where it ends nothing: patterns need some luck."""
        if len(self._letters) and mask[self._letters].all():
            mask = mask & ~self._punctuation
        allowed = np.flatnonzero(mask)
        best = int(allowed[order[allowed].argmin()])
        if chance is None or (self.rank[best] <= _QUOTE and len(allowed) > _FEW):
            return best
        return int(chance.choice(allowed[self.rank[allowed] < _LAST].tolist() or [best]))


def _rank(text: str) -> int:
    core = text.strip(" \n")
    if not core:
        return _LAST if not text else 7
    if set(core) <= set('"}]'):
        return _QUOTE if core == '"' else _CLOSING
    if core in (",", '",', "},", "],", ', "', '", "'):
        return _COMMA
    if core in ("null", "true", "false", '""', "[]", "{}", "n", "t", "f") or (len(core) == 1 and core in "0123456789"):
        return 3
    if len(core) == 1 and core in "@.-:/+%#":
        return 4
    if set(core) & set("[{,\\") or '"' in core:
        return _LAST
    return 5 if core.isascii() else 6
