"""Search for a short completion of a grammar state, so that JSON is closed before the token limit.

An exact search would visit every path. Rollouts find a short one: they take forced tokens, else the token that most
likely ends the value (closing brackets and quotes first, opening ones last). Where these fail, as for patterns, a beam
search over single characters follows. Every completion found was consumed by the matcher up to an accepting state.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .matcher import Mask, Matcher

Floats = npt.NDArray[np.float64]

_ROLLOUTS = 6
_FEW_LEGAL = 24  # legal tokens at a choice between constants or keys: there a random choice may find the shorter one
_LONG_PATH = 12  # a longer completion may be shortened by the character search
_JOINED_WITHIN = 8  # a rollout joins a known completion within so many of its own tokens and of the other's
_BEAM_WIDTH, _SAME_MASK_LIMIT, _MAX_BRANCHING = 24, 2, 24
_PROBE_CHARACTERS = """"0a1@.-:/+A_}] TZ2,z!#=\\'()[{*%&;?x9bceghtps\n""" + "".join(map(chr, range(33, 127)))
_CLOSING, _QUOTE, _COMMA, _LAST = 0, 1, 2, 9


class SearchBudget:
    """Steps left for the searches of one mask, so that it does not take seconds.

    Args:
        steps: how many.
    """

    def __init__(self, steps: int = 6000) -> None:
        self.left = steps

    def spend(self) -> bool:
        """Spend one step; False if none is left."""
        self.left -= 1
        return self.left >= 0


class CompletionSearch:
    """Finds short completions, by a rank of each token for how likely it ends a JSON value.

    Args:
        texts: text of each token, by id; ``""`` for control tokens.
        enders: control tokens that end a value, such as ``</tool_call>``.
    """

    def __init__(self, texts: list[str], enders: set[int]) -> None:
        ranks = np.array([_CLOSING if i in enders else _rank(text) for i, text in enumerate(texts)], dtype=np.float64)
        lengths = np.array([len(text) for text in texts], dtype=np.float64) / 1000
        self.rank = ranks
        closing = ranks == _CLOSING
        self._short_first = ranks + np.where(closing, -lengths, lengths)
        self._long_first = ranks - lengths
        # inside a string only a quote ends the value: brackets are ordinary characters
        self._letters = np.array([i for i, text in enumerate(texts) if text in ("j", "q", "x", "z")])
        known = {text: i for i, text in reversed(list(enumerate(texts))) if len(text) == 1}
        self._single = [known[char] for char in _PROBE_CHARACTERS if char in known]
        self._enders = sorted(enders)
        self._punctuation = np.array([text.lstrip()[:1] in ("}", "]", ",") for text in texts])

    def find_completion(
        self,
        matcher: Matcher,
        limit: int,
        *,
        known: Sequence[int] = (),
        first_found: bool = False,
        budget: SearchBudget | None = None,
    ) -> list[int] | None:
        """Tokens from a state to an accepting state, at most ``limit`` of them; None if no search finds any.

        Args:
            matcher: the state to start from; not modified.
            limit: maximum number of tokens.
            known: a completion of a state nearby: where its end completes a state on the way, the search ends there.
            first_found: return the first completion that a rollout finds, and skip the character search.
            budget: steps left for the search; a default number if None.
        """
        best: list[int] | None = None
        rng = random.Random(0)
        budget = budget or SearchBudget()
        for attempt in range(_ROLLOUTS // 2 if first_found else _ROLLOUTS):
            order = (self._short_first, self._long_first)[attempt % 2]
            varied = rng if attempt > 1 else None
            found = self._rollout(matcher.deep_copy(), limit, order, varied, budget, known)
            if found is not None:
                best, limit = found, len(found) - 1
                if first_found:
                    return best
        if not first_found and (best is None or len(best) > _LONG_PATH):
            shorter = self._character_search(matcher, limit, budget)
            best = shorter if shorter is not None else best
        return best

    def _rollout(
        self,
        matcher: Matcher,
        limit: int,
        order: Floats,
        rng: random.Random | None,
        budget: SearchBudget,
        known: Sequence[int],
    ) -> list[int] | None:
        path: list[int] = []
        # only one shorter than the known completion fits: a rollout that does not join it soon hardly finds that
        needs_shorter = limit < len(known)
        while not matcher.is_accepting():
            if len(path) <= _JOINED_WITHIN:
                rest = self._end_of(known, matcher, limit - len(path))
                if rest is not None:
                    return path + rest
            elif needs_shorter:
                return None
            step = matcher.compute_ff_tokens()
            if not step:
                mask = matcher.mask()
                if not mask.any():
                    return None
                step = [self._pick_token(mask, order, rng)]
            if not budget.spend() or len(path) + len(step) > limit or not matcher.consume_tokens(step):
                return None
            path += step
        return path

    def _end_of(self, known: Sequence[int], matcher: Matcher, room: int) -> list[int] | None:
        """The end of a known completion that completes this state too, the shortest; without at most its first few."""
        for dropped in reversed(range(min(len(known), _JOINED_WITHIN))):
            rest = list(known[dropped:])
            if len(rest) <= room and matcher.validate_tokens(rest) == len(rest):
                copy = matcher.deep_copy()
                if copy.consume_tokens(rest) and copy.is_accepting():
                    return rest
        return None

    def _character_search(self, matcher: Matcher, limit: int, budget: SearchBudget) -> list[int] | None:
        """Beam search over single characters: greedy rollouts do not find the shortest value of a pattern."""
        front = [(matcher, list[int]())]
        while front:
            next_front: list[tuple[Matcher, list[int]]] = []
            seen: dict[bytes, int] = {}
            for state, path in front:
                for step in self._next_steps(state):
                    if len(path) + len(step) > limit:
                        continue
                    if not budget.spend():
                        return None
                    copy = state.deep_copy()
                    if not copy.consume_tokens(step):
                        continue
                    if copy.is_accepting():
                        return [*path, *step]
                    kind = copy.compute_bitmask()
                    seen[kind] = seen.get(kind, 0) + 1
                    if seen[kind] <= _SAME_MASK_LIMIT:
                        next_front.append((copy, [*path, *step]))
            front = next_front[:_BEAM_WIDTH]
        return None

    def _next_steps(self, matcher: Matcher) -> list[list[int]]:
        forced = matcher.compute_ff_tokens()
        if forced:
            return [list(forced)]
        mask = matcher.mask()
        chosen = [i for i in self._single if mask[i]][:_MAX_BRANCHING]
        if not chosen:
            chosen = np.flatnonzero(mask)[:_MAX_BRANCHING].tolist()
        return [[i] for i in (*(i for i in self._enders if mask[i]), *chosen)]

    def _pick_token(self, mask: Mask, order: Floats, rng: random.Random | None) -> int:
        """The best-ranked token, or a random one if that does not end the value, which helps with patterns."""
        if len(self._letters) and mask[self._letters].all():
            mask = mask & ~self._punctuation
        allowed = np.flatnonzero(mask)
        best = int(allowed[order[allowed].argmin()])
        if rng is None or (self.rank[best] <= _QUOTE and len(allowed) > _FEW_LEGAL):
            return best
        return int(rng.choice(allowed[self.rank[allowed] < _LAST].tolist() or [best]))


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
