"""A short way to the end of a grammar, so that JSON is closed before the tokens run out.

Finding the shortest completion exactly would search every path. Rollouts find a short one: forced tokens are
taken, and else the token that most likely ends things (closing brackets and quotes first, opening ones last). Where
these fail, as in patterns, a search goes letter by letter, in breadth.
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
_LONG = 12  # a longer way than this may be one that a search by letters shortens
_WIDE, _ALIKE, _TRIED = 24, 2, 24
_PROBES = """"0a1@.-:/+A_}] TZ2,z!#=\\'()[{*%&;?x9bceghtps\n""" + "".join(map(chr, range(33, 127)))
_CLOSING, _QUOTE, _COMMA, _LAST = 0, 1, 2, 9


class Work:
    """Steps that searches may still take, counted together: a mask must not take seconds.

    Args:
        steps: how many.
    """

    def __init__(self, steps: int = 6000) -> None:
        self.left = steps

    def take(self) -> bool:
        """Take one; False when none is left."""
        self.left -= 1
        return self.left >= 0


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
        known = {text: i for i, text in reversed(list(enumerate(texts))) if len(text) == 1}
        self._single = [known[char] for char in _PROBES if char in known]
        self._enders = sorted(enders)
        self._punctuation = np.array([text.lstrip()[:1] in ("}", "]", ",") for text in texts])

    def path(
        self, matcher: Any, masks: Any, limit: int, *, any_will_do: bool = False, work: Work | None = None
    ) -> list[int] | None:
        """Tokens from here to an accepting state, at most ``limit`` of them; None if no search finds any.

        Args:
            matcher: the state to start from; it is left as it is.
            masks: gives the mask ``[V]`` (bool) of a matcher.
            limit: most tokens the path may have.
            any_will_do: take the first path that a rollout finds; where none does, that is all.
            work: steps that the search may still take; some by default.
        """
        best: list[int] | None = None
        chance = random.Random(0)
        work = work or Work()
        for attempt in range(_ROLLOUTS // 2 if any_will_do else _ROLLOUTS):
            order = (self._short_first, self._long_first)[attempt % 2]
            found = self._rollout(matcher.deep_copy(), masks, limit, order, chance if attempt > 1 else None, work)
            if found is not None:
                best, limit = found, len(found) - 1
                if any_will_do:
                    return best
        if not any_will_do and (best is None or len(best) > _LONG):
            letters = self._beam(matcher, masks, limit, work)
            best = letters if letters is not None else best
        return best

    def _rollout(
        self,
        matcher: Any,
        masks: Any,
        limit: int,
        order: Floats,
        chance: random.Random | None,
        work: Work,
    ) -> list[int] | None:
        path: list[int] = []
        while not matcher.is_accepting():
            step = matcher.compute_ff_tokens()
            if not step:
                mask = masks(matcher)
                if not mask.any():
                    return None
                step = [self._choice(mask, order, chance)]
            if not work.take() or len(path) + len(step) > limit or not matcher.consume_tokens(step):
                return None
            path += step
        return path

    def _beam(self, matcher: Any, masks: Any, limit: int, work: Work) -> list[int] | None:
        """A path of single letters, by breadth: the shortest value of a pattern is not the greediest."""
        front = [(matcher, list[int]())]
        while front:
            ahead: list[tuple[Any, list[int]]] = []
            seen: dict[bytes, int] = {}
            for state, path in front:
                for step in self._steps(state, masks):
                    if len(path) + len(step) > limit:
                        continue
                    if not work.take():
                        return None
                    twin = state.deep_copy()
                    if not twin.consume_tokens(step):
                        continue
                    if twin.is_accepting():
                        return [*path, *step]
                    kind = masks(twin).tobytes()
                    seen[kind] = seen.get(kind, 0) + 1
                    if seen[kind] <= _ALIKE:
                        ahead.append((twin, [*path, *step]))
            front = ahead[:_WIDE]
        return None

    def _steps(self, matcher: Any, masks: Any) -> list[list[int]]:
        forced = matcher.compute_ff_tokens()
        if forced:
            return [list(forced)]
        mask = masks(matcher)
        chosen = [i for i in self._single if mask[i]][:_TRIED]
        if not chosen:
            chosen = np.flatnonzero(mask)[:_TRIED].tolist()
        return [[i] for i in (*(i for i in self._enders if mask[i]), *chosen)]

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
