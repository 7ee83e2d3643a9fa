"""Scores of byte strings by a model with tokens of its own: every way in which its tokens can write them, summed up.

    text so far   ... so the cap|          the SLM's candidates:  "ital"  "acity"  "ture"
    trunk         ... so the              tokens that stay whatever comes: in the KV cache
    contexts                 cap          how the LLM's tokenizer writes the text up to a place where a token may end
                             cap | a      (a trie: all are read in one forward, each with logits after it)

A place is kept as the end of a token if the tokenizer ends one there in some text that goes on like this. From place to
place the text is written by any token that fits, at its probability after the tokenizer's own writing of the text up to
there. So with f(trunk) = 1

    f(place)  = sum over places before it:  f(before) * P(the tokens with the bytes between | before)
    P(bytes)  = sum over places before the end:  f(place) * P(tokens that reach or pass the end | place)

Places up to the end of the text so far are the same for all candidates, so the probabilities of all next bytes and of
the end of the answer add up to that of the text so far: nothing is lost, whatever the model says.

One thing is passed over: pre-tokenizers that look ahead over a run of spaces (GPT-2's rule and its kin) write a space
before a character that has no token with a space in front in another way than the run up to it.

Prior work: Vieira et al. (arXiv 2412.03719), Phan et al. (2410.09303), Hayase et al. (ByteSampler, 2506.14123).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import exp, inf, log

import torch
from torch import Tensor

from ..errors import InputError
from ..tokenization.byte_tokenizer import ByteTokenizer

WINDOW = 96
"""Bytes at the end of a text, at least, within which tokens may still change; none but runs of spaces are longer."""

ANCHOR = 24
"""Bytes, at least, before a place with which the tokenizer is asked whether a token may end there, or from a space."""

CHUNK = 64
"""Tokens that are tried at once."""


class TokenTree:
    """Paths of tokens that share their beginnings.

    Attributes:
        ids: ``[N]``.
        parents: ``[N]``: index of the token before each; -1 at the beginning.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def add(self, path: Iterable[int]) -> int:
        """Index of the last token of a path, -1 of an empty one."""
        at = -1
        for token in path:
            found = self._children.get((at, token))
            if found is None:
                found = self._children[at, token] = len(self.ids)
                self.ids.append(token)
                self.parents.append(at)
            at = found
        return at

    def paths(self) -> list[list[int]]:
        """``[N]``: the tokens from the beginning to each."""
        found: list[list[int]] = []
        for token, parent in zip(self.ids, self.parents, strict=True):
            found.append([*(found[parent] if parent >= 0 else ()), token])
        return found


class Places:
    """Where the tokens of one tokenizer may end; answers are cached.

    Args:
        tokenizer: of the LLM.
    """

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self.tokenizer = tokenizer
        self._possible = lru_cache(maxsize=2**16)(self._find)

    def may_end(self, ids: Sequence[int], span: tuple[int, int]) -> bool:
        """Whether the tokenizer writes some text as these tokens and then one of a span."""
        return self._possible(self._anchor(ids), span)

    def _anchor(self, ids: Sequence[int]) -> bytes:
        """So many bytes before the place that the tokenizer writes them as it does after all that is before them."""
        for start in range(len(ids) - 1, -1, -1):
            data = self.tokenizer.decode(ids[start:])
            if (len(data) >= ANCHOR or data[:1].isspace()) and self.tokenizer.encode(data) == list(ids[start:]):
                return data
        return self.tokenizer.decode(ids)

    def _find(self, before: bytes, span: tuple[int, int]) -> bool:
        ids = self.tokenizer.encode(before)
        tokens = self.tokenizer.ids(span).sort().values.tolist()  # the first in the vocabulary are the likeliest
        for start in range(0, len(tokens), CHUNK):
            some = tokens[start : start + CHUNK]
            written = self.tokenizer.encode_all([before + (self.tokenizer.bytes_of[each] or b"") for each in some])
            if any(found == [*ids, token] for found, token in zip(written, some, strict=True)):
                return True
        return False


@dataclass(frozen=True)
class PlaceContext:
    """A place, and the LLM's context there.

    Attributes:
        place: bytes of the window before it.
        row: of its logits: 0 after the trunk, ``1 + i`` after token i of the tree.
    """

    place: int
    row: int


class Covering:
    """What has to be read to score candidates, and their scores once that was read.

    Args:
        places: of the LLM's tokenizer.
        text: the text so far, from a place where a token ends for certain (the beginning of the answer).
        candidates: ``[K]`` byte strings after it, none empty.

    Attributes:
        trunk: the LLM's tokens of the text that stay whatever comes.
        tree: what is to be read after it, all in one forward.

    Raises:
        InputError: the LLM's tokenizer cannot write these bytes.
    """

    def __init__(self, places: Places, text: bytes, candidates: Sequence[bytes]) -> None:
        self._places, self._tokenizer, self._candidates = places, places.tokenizer, candidates
        settled, self._window = settled_front(self._tokenizer, text)
        self._end = len(self._window)
        ends = [self._end, *self._passed(self._window, max(0, self._end - self._tokenizer.longest), passing=True)]
        written = {place: self._tokenizer.encode(self._window[:place]) for place in ends}
        inner = [self._inner_contexts(self._window + each) for each in candidates]
        paths = [*written.values(), *(ids for contexts in inner for ids in contexts.values())]
        stays = common_front(paths)
        self.trunk = [*settled, *paths[0][:stays]]
        self.tree = TokenTree()
        root = PlaceContext(len(self._tokenizer.decode(paths[0][:stays])), 0)

        def contexts(data: bytes, found: dict[int, list[int]], after: int) -> list[PlaceContext]:
            """In the order of their places, with those that are passed on the way."""
            steps = dict(found)
            for ids in found.values():
                for end in accumulate(len(self._tokenizer.bytes_of[i] or b"") for i in ids):
                    if end > after and end not in steps:
                        steps[end] = self._tokenizer.encode(data[:end])
            kept = sorted(place for place in steps if place > after)
            return [PlaceContext(place, 1 + self.tree.add(steps[place][stays:])) for place in kept]

        self._shared = [root, *contexts(self._window, written, root.place)]
        self._inner = [
            contexts(self._window + each, found, self._end) for each, found in zip(candidates, inner, strict=True)
        ]

    def _inner_contexts(self, data: bytes) -> dict[int, list[int]]:
        """Contexts between the end of the text so far and that of ``data``; by place."""
        try:
            return {place: self._tokenizer.encode(data[:place]) for place in self._passed(data, self._end + 1)}
        except InputError:  # a candidate that the LLM cannot write
            return {}

    def _passed(self, data: bytes, start: int, *, passing: bool = False) -> list[int]:
        """Places from ``start`` on from which one token may reach the end of ``data``, or pass it."""
        found = []
        for place in range(start, len(data)):
            first, last = self._tokenizer.span(data[place:])
            if passing:
                first = self._tokenizer.exactly(data[place:])[1]
            if first < last and self._places.may_end(self._tokenizer.encode(data[:place]), (first, last)):
                found.append(place)
        return found

    def read(self, logits: Tensor) -> Scores:
        """The scores, by logits ``[1 + N, V]``: after the trunk, and after each token of the tree."""
        return Scores(self, logits, logits.logsumexp(1).tolist())

    def read_known(self, rows: Sequence[Mapping[int, float]], size: int) -> Scores:
        """The scores by what is known of the log-probabilities; what is not counts nothing.

        Args:
            rows: ``[1 + N]``: by token id, after the trunk and after each token of the tree.
            size: V.
        """
        known = torch.full((len(rows), size), -inf, dtype=torch.float64)
        for row, told in zip(known, rows, strict=True):
            ids = [i for i in told if i < size]
            row[ids] = torch.tensor([told[i] for i in ids], dtype=torch.float64)
        return Scores(self, known, [0.0] * len(rows))

    def ids_at_end(self, slm: ByteTokenizer) -> list[list[int]]:
        """``[K]``: of these the tokens that ``read_end`` reads, the first in the vocabulary first."""
        found = []
        for candidate in self._candidates:
            whole = self._window + candidate
            ids = kept(slm, self._tokenizer, whole, self._end, self._end).sort().values.tolist()
            found.append([*self._begun(whole), *ids])
        return found

    def _begun(self, whole: bytes) -> list[int]:
        """The token, if any, with which the tokenizer begins a candidate that takes several."""
        place = 0
        try:
            for i in self._tokenizer.encode(whole):
                after = place + len(self._tokenizer.bytes_of[i] or b"")
                if place == self._end:
                    return [i] if after < len(whole) else []
                place = after
        except InputError:  # a candidate that the LLM cannot write
            pass
        return []

    def read_end(self, row: Mapping[int, float]) -> EndScores:
        """Approximate scores by what is known of the log-probabilities at the end of the text so far alone."""
        return EndScores(self, row)

    @property
    def end(self) -> PlaceContext:
        """The context at the end of the text so far."""
        return next(each for each in self._shared if each.place == self._end)

    def ids_that_count(self, slm: ByteTokenizer) -> list[list[int]]:
        """``[K]``: the tokens whose log-probabilities make up each candidate's score, the shortest first."""
        found = []
        for candidate, inner in zip(self._candidates, self._inner, strict=True):
            whole, contexts = self._window + candidate, [*self._shared, *inner]
            counted: dict[int, int] = {}
            for context in contexts:
                if context.place < len(whole):
                    spans = [kept(slm, self._tokenizer, whole, context.place, self._end)]
                    steps = [later.place for later in contexts if later.place > context.place]
                    spans += [self._tokenizer.ids(self._tokenizer.exactly(whole[context.place : to])) for to in steps]
                    counted |= {i: len(self._tokenizer.bytes_of[i] or b"") for ids in spans for i in ids.tolist()}
            found.append(sorted(counted, key=lambda i: counted[i]))
        return found


class Scores:
    """Log-probabilities of what may follow the text so far; see ``Covering``.

    Args:
        covering: the places and their contexts.
        logits: ``[1 + N, V]``.
        norms: ``[1 + N]``: what is to be subtracted from each row, so that it holds log-probabilities.
    """

    def __init__(self, covering: Covering, logits: Tensor, norms: Sequence[float]) -> None:
        self._covering, self._logits, self._norms = covering, logits, norms
        self._shared = self._reached([], covering._shared, covering._window)
        self._text = self._passing(self._shared, covering._window, covering._end)

    def log_probs(self) -> list[float]:
        """``[K]``: log-probability that the text goes on with each candidate's bytes."""
        return [self._of(at) for at in range(len(self._covering._candidates))]

    def log_probs_of_tokens(self, slm: ByteTokenizer) -> list[float]:
        """``[K]``: log-probability that the text goes on so that the SLM's tokenizer writes the candidate first.

        A candidate that is the beginning of another token of the SLM (``a`` of ``apple``) has only what is left
        without it. The text is known up to the end of the LLM's token that reaches or passes the candidate's end.
        """
        return [self._of(at, slm) for at in range(len(self._covering._candidates))]

    def log_prob_of_control(self, tokens: Collection[int]) -> float:
        """Log-probability that one of these control tokens comes next, as at the end of an answer."""
        reached = {context.place: (mass, context) for context, mass in self._shared}
        if self._covering._end not in reached or not tokens:
            return -inf
        mass, context = reached[self._covering._end]
        return mass + self._sum(context, torch.tensor(sorted(tokens))) - self._text

    def _of(self, at: int, slm: ByteTokenizer | None = None) -> float:
        covering, candidate = self._covering, self._covering._candidates[at]
        whole = covering._window + candidate
        reached = self._reached(self._shared, covering._inner[at], whole)
        return self._passing(reached, whole, len(whole), slm) - self._text

    def _reached(
        self, before: Sequence[tuple[PlaceContext, float]], contexts: Sequence[PlaceContext], data: bytes
    ) -> list[tuple[PlaceContext, float]]:
        """The contexts, in order, with the log-probability of getting there."""
        reached = list(before)
        for context in contexts:
            if not reached:
                reached.append((context, 0.0))
                continue
            steps = [mass + self._exactly(each, data[each.place : context.place]) for each, mass in reached]
            reached.append((context, _log_sum(steps)))
        return reached

    def _exactly(self, context: PlaceContext, data: bytes) -> float:
        tokenizer = self._covering._tokenizer
        return self._sum(context, tokenizer.ids(tokenizer.exactly(data)))

    def _passing(
        self,
        reached: Sequence[tuple[PlaceContext, float]],
        data: bytes,
        end: int,
        slm: ByteTokenizer | None = None,
    ) -> float:
        """Log-probability of all tokens that reach or pass the end of ``data``.

        Args:
            reached: contexts before the end.
            data: the text.
            end: its length.
            slm: count only what this tokenizer begins, after the text so far, with the rest of ``data``.
        """
        tokenizer, start = self._covering._tokenizer, self._covering._end
        if reached[0][0].place == end:  # nothing is open
            return 0.0
        parts = []
        for context, mass in reached:
            if mass == -inf or context.place >= end:
                continue
            if slm is None:
                ids = tokenizer.ids(tokenizer.span(data[context.place :]))
            else:
                ids = kept(slm, tokenizer, data, context.place, start)
            parts.append(mass + self._sum(context, ids))
        return _log_sum(parts)

    def _sum(self, context: PlaceContext, ids: Tensor) -> float:
        if not len(ids):
            return -inf
        row = self._logits[context.row]
        return float(row[ids.to(row.device)].logsumexp(0)) - float(self._norms[context.row])


class EndScores:
    """Scores by one context, at the end of the text so far: a candidate has the tokens that begin with it; one that the
    tokenizer writes as several has the whole of the first, whatever comes after it.

    Args:
        covering: see ``Scores``.
        row: log-probabilities by token id.
    """

    def __init__(self, covering: Covering, row: Mapping[int, float]) -> None:
        self._covering, self._row = covering, row

    def log_probs_of_tokens(self, slm: ByteTokenizer) -> list[float]:
        """``[K]``; see ``Scores``."""
        return [_log_sum([self._row[i] for i in ids if i in self._row]) for ids in self._covering.ids_at_end(slm)]

    def log_prob_of_control(self, tokens: Collection[int]) -> float:
        """See ``Scores``."""
        return _log_sum([self._row[i] for i in tokens if i in self._row])


def kept(slm: ByteTokenizer, llm: ByteTokenizer, data: bytes, place: int, start: int) -> Tensor:
    """``[N]``: the LLM's tokens that reach or pass the end of ``data`` from a place and make a text that the SLM's
    tokenizer begins, from ``start`` on, with the rest of ``data``."""
    span = llm.span(data[place:])
    return llm.ids(span)[begun_with(slm, llm, data[start:place], max(0, start - place), span, len(data) - start)]


@lru_cache(maxsize=2**12)
def begun_with(
    slm: ByteTokenizer, llm: ByteTokenizer, lead: bytes, cut: int, span: tuple[int, int], length: int
) -> Tensor:
    """``[N]`` bool: which of the LLM's tokens make a text that the SLM's tokenizer begins with a token of ``length``.

    Args:
        slm: tokenizer of the SLM.
        llm: tokenizer of the LLM.
        lead: bytes before each token.
        cut: bytes at the beginning of each token that belong to the text before.
        span: the tokens.
        length: in bytes.
    """
    lengths = slm.first_token_lengths([lead + each[cut:] for each in llm.spelled(span)])
    return torch.tensor(lengths, dtype=torch.long) == length


def settled_front(tokenizer: ByteTokenizer, text: bytes) -> tuple[list[int], bytes]:
    """Tokens of the front of a text, and its end of at least ``WINDOW`` bytes that is written the same without it."""
    ids = tokenizer.encode(text)
    length = 0
    for at in range(len(ids) - 1, 0, -1):
        length += len(tokenizer.bytes_of[ids[at]] or b"")
        if length >= WINDOW and tokenizer.encode(text[-length:]) == ids[at:]:
            return ids[:at], text[-length:]
    return [], text


def common_front(paths: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all paths share."""
    first = paths[0]
    return next(
        (at for at in range(len(first)) if any(path[at : at + 1] != first[at : at + 1] for path in paths)), len(first)
    )


def _log_sum(values: Sequence[float]) -> float:
    top = max(values, default=-inf)
    return top if top == -inf else top + log(sum(exp(value - top) for value in values))
