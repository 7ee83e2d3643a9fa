"""Grammars for constrained decoding with llguidance: free text, tool calls or JSON.

A grammar is compiled once per set of response options and started once per generation. Its token mask applies before
the top-K, so every candidate is legal; forced tokens skip the choice. With a token limit, a token is legal only if the
answer can still be completed within the limit.

Exact: every mask is llguidance's; under a limit, each allowed token has a known completion that fits. Not exact: near
the limit only the most likely tokens are tried, and the shortest completion comes from a bounded search, so that a
value may be closed earlier than necessary.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import BadSchema, ConfigError
from ..greedy import argmax, descending
from .completion_search import SearchBudget
from .lark_rules import Choice, arguments_of, auto_start, call_rules, call_texts, functions_of, reply_of, text_rule
from .matcher import Mask, Matcher
from .schema_rules import json_rule, longest_minimum_bytes
from .shortest_value import ShortestValue
from .vocabulary import Vocabulary

MAX_TRIED = 64
"""Near the limit, how many of the most likely legal tokens are tried for a completion that fits."""

MAX_TRIED_WITHOUT_LOGITS = 2048
"""The same without logits: how many of the first legal tokens are tried."""

_TRIED_BEFORE_MASK = 8
"""How many of the likeliest tokens are tried one by one before the mask of all is computed, which costs far more."""

_FEW_LEGAL = 1 / 16
"""Share of the vocabulary: after a mask with fewer legal tokens the next one is computed at once."""

_MASK_SEARCH_STEPS = 200  # steps of all searches for one mask, for tokens that the known completion does not follow
_SEARCH_BEYOND_LIMIT = 64  # tokens beyond the limit to search for the shortest answer, so that an error can name it
_MAX_SHORTEST_SEARCH = 4096
_DETOURS: tuple[tuple[list[int], int], ...] = (([], 0), ([], 1))
"""Tokens in place of so many of the known completion's first: none (a letter more in a string), none for one (the same
separator in another token)."""
_MAX_DETOURS, _LONGEST_DETOUR = 4, 8
_SIMPLIFY_HINT = "Simplify that part of the schema."


class Grammar(Protocol):
    """The grammar state of one generation."""

    def allowed(self, logits: Tensor | None = None) -> Tensor | None:
        """Token mask ``[V]`` (bool, CPU) of the next token; None permits all."""

    def legal(self) -> Tensor | None:
        """What the grammar alone permits: ``allowed`` without the token limit."""

    def best(self, logits: Tensor, likeliest: int | None = None) -> int:
        """The most likely token that ``allowed(logits)`` permits, the first of equally likely ones.

        Args:
            logits: ``[V]``, the model's.
            likeliest: their largest, where it is known.
        """

    def forced(self) -> list[int]:
        """The next tokens, as far as there is only one legal continuation."""

    def takes(self, token_id: int) -> bool:
        """Whether this token is legal next."""

    def accept(self, token_id: int) -> None:
        """Advance by a token, chosen or forced."""

    @property
    def finished(self) -> bool:
        """Whether no token is legal any more."""

    @property
    def shortened(self) -> bool:
        """Whether the token limit has ruled out the most likely legal token somewhere, so that texts may end early."""

    def fork(self) -> Self:
        """An independent copy of the state."""


class CompiledGrammar:
    """A compiled grammar; can be started any number of times.

    Args:
        vocabulary: of the model's tokenizer.
        source: in llguidance's Lark dialect.
        margin: upper bound of the tokens that accepting one more token may make necessary.
        what: what the grammar is for, in errors.
        shortest_value: the shortest JSON value that every answer contains; None if an answer need not contain any.
        hints: answers that may be short, as texts and ids of control tokens.

    Raises:
        BadSchema: llguidance cannot express it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        source: str,
        *,
        margin: int,
        what: str,
        shortest_value: ShortestValue | None = None,
        hints: Sequence[Sequence[str | int]] = (),
    ) -> None:
        self.vocabulary, self.source, self.margin = vocabulary, source, margin
        self.what, self._shortest_value, self._hints = what, shortest_value, hints
        self._searched = 0
        self._shortest: list[int] | None = None
        self._matcher = Matcher(vocabulary.llguidance_tokenizer, source)
        if self._matcher.is_error():
            error = _llguidance_reason(self._matcher.get_error())
            raise BadSchema(f"No grammar can express {what}: {error}.", hint=_SIMPLIFY_HINT)

    def start(self, max_tokens: int | None = None) -> GrammarState:
        """The state of a new generation.

        Args:
            max_tokens: token limit within which the answer will be complete; None sets no limit.

        Raises:
            ConfigError: the shortest answer found does not fit.
        """
        if max_tokens is not None:
            self._check_room(max_tokens)
        return GrammarState(self, self._matcher.deep_copy(), max_tokens)

    def fits(self, tokens: int) -> bool:
        """Whether an answer with at most this many tokens is known to exist."""
        return self.min_tokens <= tokens and (tokens >= self.margin or len(self.shortest(tokens) or ()) <= tokens)

    def shortest(self, tokens: int) -> list[int] | None:
        """Tokens of the shortest answer found, without the end token; None if none was found.

        Args:
            tokens: the limit of interest; the search goes a little beyond it.
        """
        limit = tokens + max(tokens, _SEARCH_BEYOND_LIMIT)
        if self._shortest is None and self._searched < limit:
            self._searched = limit
            short = self.vocabulary.encode_answers(self._hints)
            known = min(
                (each for each in short if self.vocabulary.completes(self._matcher, each)), key=len, default=None
            )
            if known is not None:
                limit = min(limit, len(known) - 1)
            find = self.vocabulary.completion_search.find_completion
            found = find(self._matcher, limit, first_found=known is not None)
            self._shortest = found if found is not None else known
        return self._shortest

    @property
    def shortest_tokens(self) -> int:
        """Number of tokens of the shortest answer found; a lower bound if none was found."""
        found = self.shortest(min(4 * self.margin, _MAX_SHORTEST_SEARCH))
        return len(found) if found is not None else self.min_tokens

    @property
    def min_tokens(self) -> int:
        """A lower bound of the tokens of an answer."""
        return -(-self._shortest_value.size // self.vocabulary.longest) if self._shortest_value is not None else 0

    def _check_room(self, max_tokens: int) -> None:
        if self.fits(max_tokens):
            return
        known = self.shortest(max_tokens) if self.min_tokens <= max_tokens + _SEARCH_BEYOND_LIMIT else None
        fewest = len(known) if known is not None else self.min_tokens
        has = "has" if known is not None else "has at least"
        asked = self._shortest_value.describe_blame() if self._shortest_value is not None else ""
        who = f" (most of it for {asked} in {self.what})" if asked and fewest > _SEARCH_BEYOND_LIMIT else ""
        raise ConfigError(
            f"max_tokens={max_tokens} cannot hold an answer: the shortest {has} {fewest} tokens{who}.",
            hint=f"Set max_tokens to {fewest} or more.",
        )


class _FailedSearch(NamedTuple):
    """A search for a completion that found none, and when it is worth repeating from a state with the same mask.

    Attributes:
        spare: tokens beyond the known completion that were too few.
        retry_below: room in tokens below which it may end within its steps; 0 where it did.
    """

    spare: int
    retry_below: int


class GrammarState:
    """The state of one generation under a compiled grammar; a ``Grammar``."""

    def __init__(self, compiled: CompiledGrammar, matcher: Matcher, max_tokens: int | None) -> None:
        self._vocabulary, self._margin = compiled.vocabulary, compiled.margin
        self._matcher = matcher
        self._left = max_tokens
        # a known completion of this state or of an earlier one
        near = max_tokens is not None and max_tokens < compiled.margin
        self._known_completion = compiled.shortest(max_tokens) if near and max_tokens is not None else None
        self._completion_holds = False  # it was checked against this very state
        self._what = compiled.what
        self._detours = _DETOURS  # how a completion may go on after other tokens, tried before a search
        self._completions_after: dict[int, list[int]] = {}  # completions found for tokens that are legal now
        self._failed_searches: dict[int, _FailedSearch] = {}
        """By a mask's hash."""
        self._ended = self._shortened = False
        self._mask: Mask | None = None
        """Of this state, once it has been asked for."""
        self._few_legal = False
        """Whether the last mask that was asked for had few legal tokens."""

    @property
    def finished(self) -> bool:
        """Whether nothing more may come; after a matcher that failed, the next mask raises ``BadSchema``."""
        return bool(self._ended or (self._matcher.is_stopped() and not self._matcher.is_error()))

    @property
    def shortened(self) -> bool:
        """Whether the token limit has ruled out the most likely legal token somewhere."""
        return self._shortened

    @property
    def _near_limit(self) -> bool:
        return self._left is not None and self._left < self._margin

    def forced(self) -> list[int]:
        """Tokens that must come next, with no choice in them."""
        if self.finished:
            return []
        tokens = list(self._matcher.compute_ff_tokens())
        if tokens and self._near_limit and not self._completion_after_forced(tokens):
            return []  # this tokenization would not leave enough tokens: the mask chooses another one
        return tokens

    def accept(self, token_id: int) -> None:
        """Take the next token.

        Raises:
            ValueError: a token that is not legal here.
        """
        if token_id in self._vocabulary.eos_ids and self._matcher.is_accepting():
            self._ended = True
            return
        self._mask = None
        if self.finished or not self._matcher.consume_token(token_id):
            raise ValueError(f"token {token_id} is not legal here")
        if self._left is not None:
            self._left -= 1
        if token_id in self._completions_after:
            self._known_completion, self._completion_holds = self._completions_after[token_id], True
        elif self._known_completion and self._known_completion[0] == token_id:
            self._known_completion = self._known_completion[1:]
        else:
            self._completion_holds = False
        self._completions_after = {}

    def fork(self) -> Self:
        """An independent copy of the state; given the same tokens it makes the same decisions."""
        copied = copy.copy(self)
        copied._matcher, copied._completions_after = self._matcher.deep_copy(), dict(self._completions_after)
        copied._failed_searches = dict(self._failed_searches)
        return copied

    def takes(self, token_id: int) -> bool:
        """Whether this token is legal next; near the token limit, whether the answer can be completed after it.

        True for every token that ``allowed`` permits, for any logits.
        """
        if self.finished or not self._is_legal(token_id):
            return False
        if not self._near_limit:
            return True
        path = self._completion(self._left or 0)
        return path is None or self._can_finish_after(token_id, path, SearchBudget(_MASK_SEARCH_STEPS), {})

    def best(self, logits: Tensor, likeliest: int | None = None) -> int:
        """The most likely token that ``allowed(logits)`` permits, the first of equally likely ones.

        Tries tokens one by one, the most likely first, which mostly ends with the first: no mask is computed for it.

        Args:
            logits: ``[V]``, the model's.
            likeliest: their largest, where it is known.
        """
        first = likeliest if likeliest is not None else argmax(logits)
        path = self._completion(self._left or 0) if self._near_limit else None
        budget = SearchBudget(_MASK_SEARCH_STEPS)
        if path is not None and (first in path[:1] or self._completes_after(first, path)):
            return first  # which is legal, then
        if self._is_legal(first) and (
            path is None or self._can_finish_after(first, path, budget, self._failed_searches)
        ):
            return first
        tried = self._most_likely_legal(logits)
        legal = next(tried)
        if path is None:
            return legal
        others = (token for token in chain([legal], tried) if token != first)
        failed = self._failed_searches
        found = next((token for token in others if self._can_finish_after(token, path, budget, failed)), None)
        permitted = {*self._next_of(path), *([found] if found is not None else [])}
        best = min(permitted, key=lambda token: (-float(logits[token]), token))
        self._shortened |= best != legal
        return best

    def allowed(self, logits: Tensor | None = None) -> Tensor:
        """Token mask ``[V]`` (bool, CPU); near the token limit, only tokens after which the answer can be completed.

        Args:
            logits: ``[V]``, the model's; near the limit the most likely tokens are tried first.
        """
        mask = self._legal()
        if self._near_limit:
            mask = self._mask_that_can_finish(mask, logits)
        return torch.from_numpy(mask)

    def legal(self) -> Tensor:
        """Token mask ``[V]`` (bool, CPU) of the grammar alone, without the limit."""
        return torch.from_numpy(self._legal())

    def _is_legal(self, token: int) -> bool:
        """Whether the mask would permit one token, without computing it."""
        if token in self._vocabulary.eos_ids:  # llguidance validates them as the end alone, even if they have a text
            return bool(self._matcher.mask()[token])
        return self._matcher.validate_tokens([token]) == 1

    def _legal(self) -> Mask:
        """Token mask ``[V]`` of the grammar alone, without the limit; computed once per state, not to be written to."""
        if self._mask is None:
            mask = self._matcher.mask()
            if self._matcher.is_error():
                reason = _llguidance_reason(self._matcher.get_error())
                problem = f"The grammar of {self._what} became too large to follow: {reason}."
                raise BadSchema(problem, hint=_SIMPLIFY_HINT)
            self._mask, self._few_legal = mask, int(np.count_nonzero(mask)) < _FEW_LEGAL * len(mask)
        return self._mask

    def _mask_that_can_finish(self, mask: Mask, logits: Tensor | None) -> Mask:
        path = self._completion(self._left or 0)
        if path is None:  # no completion is known
            return mask
        allowed = np.zeros_like(mask)
        allowed[self._next_of(path)] = True
        budget = SearchBudget(_MASK_SEARCH_STEPS)
        for at, token in enumerate(self._most_likely(mask, logits)):
            allowed[token] = self._can_finish_after(token, path, budget, self._failed_searches) or allowed[token]
            self._shortened |= at == 0 and logits is not None and not allowed[token]
        return allowed

    def _most_likely_legal(self, logits: Tensor) -> Iterator[int]:
        """The legal tokens, the most likely first, as ``_most_likely``: the mask is computed where none of a few is."""
        tried = set()
        for token in descending(logits, 0 if self._few_legal else _TRIED_BEFORE_MASK):
            tried.add(token)
            if self._is_legal(token):
                yield token
        yield from (token for token in self._most_likely(self._legal(), logits) if token not in tried)

    def _most_likely(self, mask: Mask, logits: Tensor | None) -> Iterator[int]:
        """The legal tokens that are tried near the limit, the most likely first; in order of ids without logits.

        Of those at -inf, which a server did not name, at most one.
        """
        legal = np.flatnonzero(mask)
        if logits is None:
            yield from map(int, legal[:MAX_TRIED_WITHOUT_LOGITS])
            return
        likely = torch.from_numpy(logits.detach().float().cpu().numpy().take(legal))
        best = int(legal[argmax(likely)])
        yield best  # mostly enough
        known = int((likely > -torch.inf).sum())
        values, indices = likely.topk(min(MAX_TRIED, known))
        found = legal[indices.numpy()]
        order = np.lexsort((found, -values.numpy()))  # topk leaves the order of ties open
        yield from (int(token) for token in found[order] if token != best)

    def _next_of(self, path: list[int]) -> list[int]:
        """What a known completion goes on with: its first token, or those that end the answer."""
        return path[:1] or [token for token in self._vocabulary.eos_ids if self._is_legal(token)]

    def _completion(self, left: int) -> list[int] | None:
        """A completion of the current state: the known one if it is still valid, else a new one."""
        known = self._known_completion
        if (
            known is None
            or len(known) > left
            or not (self._completion_holds or self._vocabulary.completes(self._matcher, known))
        ):
            self._known_completion = self._vocabulary.completion_search.find_completion(self._matcher, left)
            self._failed_searches = {}
        self._completion_holds = True
        return self._known_completion

    def _can_finish_after(
        self, token: int, path: list[int], budget: SearchBudget, failed_searches: dict[int, _FailedSearch]
    ) -> bool:
        """Whether a completion after a legal token is known or found.

        Args:
            token: legal next.
            path: completes the state before it.
            budget: of the search.
            failed_searches: by a mask's hash; one that failed is not repeated after another token that leaves the same
                mask and no more room.
        """
        if token in self._vocabulary.eos_ids or token in path[:1] or token in self._completions_after:
            return True
        if self._completes_after(token, path):
            return True
        left, steps = self._left or 0, budget.left
        state = self._after([token]) if left and steps > 0 else None
        if state is None:
            return False
        mask, spare = hash(state.compute_bitmask()), left - len(path)
        failed = failed_searches.get(mask)
        if failed is not None and spare <= failed.spare and left >= failed.retry_below:
            return False
        found = self._search_from(state, left - 1, budget, path)
        if found is not None:
            self._completions_after[token] = found
            self._learn_detour(found, path)
        elif budget.left > 0 or steps == _MASK_SEARCH_STEPS:  # not one that other searches left too few steps
            failed_searches[mask] = _FailedSearch(spare, 0 if budget.left > 0 else left // 2)
        return found is not None

    def _completes_after(self, token: int, path: list[int]) -> bool:
        """Whether a token is legal, and the completion of the state before it, or a detour to it, fits after it."""
        left = self._left or 0
        if token in self._vocabulary.eos_ids:
            return False
        for detour, dropped in self._detours:
            rest = [*detour, *path[dropped:]]
            if len(rest) < left:
                legal = self._vocabulary.count_completing(self._matcher, [token, *rest])
                if legal > 1 + len(rest):
                    self._completions_after[token] = rest
                    return True
                if not legal:
                    return False
        return False

    def _learn_detour(self, found: list[int], path: list[int]) -> None:
        """Keep how a completion that was searched for comes back to the known one, such as a value after a comma."""
        common = 0
        while common < min(len(found), len(path)) and found[-1 - common] == path[-1 - common]:
            common += 1
        detour = found[: len(found) - common], len(path) - common
        if common and len(detour[0]) <= _LONGEST_DETOUR and detour not in self._detours:
            learned = (detour, *self._detours[len(_DETOURS) :])
            self._detours = (*_DETOURS, *learned[:_MAX_DETOURS])

    def _completion_after_forced(self, tokens: list[int]) -> bool:
        """Whether a completion after the forced tokens is known or found."""
        path = self._known_completion
        left = self._left or 0
        if path is not None and path[: len(tokens)] == tokens and path == self._completion(left):
            return True
        state = self._after(tokens) if len(tokens) <= left else None
        budget = SearchBudget(_MASK_SEARCH_STEPS)
        found = self._search_from(state, left - len(tokens), budget, path or ()) if state is not None else None
        if found is not None:
            self._known_completion, self._completion_holds = tokens + found, True
            self._failed_searches = {}
        return found is not None

    def _after(self, tokens: list[int]) -> Matcher | None:
        """The grammar's state after these tokens; None where they are not legal."""
        state = self._matcher.deep_copy()
        return state if state.consume_tokens(tokens) else None

    def _search_from(self, state: Matcher, room: int, budget: SearchBudget, known: Sequence[int]) -> list[int] | None:
        """A completion of a state with at most so many tokens; one of a state nearby is ``known``."""
        if state.is_accepting():
            return []
        return self._vocabulary.completion_search.find_completion(
            state, room, known=known, first_found=True, budget=budget
        )


def tool_grammar(
    vocabulary: Vocabulary,
    tools: Sequence[Mapping[str, Any]],
    choice: Choice = "auto",
    *,
    parallel: bool = True,
    reply: Mapping[str, Any] | None = None,
) -> CompiledGrammar:
    """A grammar of text and Hermes tool calls.

    Args:
        vocabulary: of the model's tokenizer.
        tools: in OpenAI's form; their schemas are always enforced, so ``strict`` adds nothing.
        choice: ``"auto"`` (text, calls or both), ``"any"`` (calls only) or ``"none"`` (text only, as without tools).
        parallel: whether several calls are legal.
        reply: schema of an answer that is not a tool call, instead of free text.

    Raises:
        BadSchema: a tool's schema that cannot be expressed; the message names the tool.
    """
    functions = functions_of(tools)
    if choice == "none" or not functions:
        return CompiledGrammar(vocabulary, f"start: text\n{text_rule()}", margin=4, what="text")
    names = list(functions)
    arguments = [arguments_of(function) for function in functions.values()]
    rules = call_rules(vocabulary, names, [each.schema for each in arguments], several=parallel)
    replies = [reply_of(reply)] if reply is not None and choice == "auto" else []
    if choice == "auto":
        rules.append(auto_start(vocabulary, replies[0].schema if replies else None))
    else:
        rules.append("start: calls")
    longest_name = max(len(json.dumps(name).encode()) for name in names)
    margin = 96 + longest_name + 2 * max(longest_minimum_bytes(each.schema) for each in [*arguments, *replies])
    shortest = [each.shortest_value for each in arguments]
    hints = [
        call_texts(vocabulary, name, value.text)
        for name, value in zip(names, shortest, strict=True)
        if value.text is not None
    ]
    return CompiledGrammar(
        vocabulary,
        "\n".join(rules) + "\n",
        margin=margin,
        what="these tools" if len(names) > 1 else f"the arguments of tool {names[0]!r}",
        shortest_value=min(shortest, key=lambda each: each.size) if choice != "auto" else None,
        hints=hints if choice != "auto" else (),
    )


def json_grammar(vocabulary: Vocabulary, schema: Mapping[str, Any] | None = None) -> CompiledGrammar:
    """A grammar of one JSON value of a schema; of any JSON object if there is no schema.

    Raises:
        BadSchema: no answer can fit the schema.
    """
    ready = reply_of(schema or {"type": "object"})
    source = f"start: value\nvalue: {json_rule(ready.schema)}\n"
    hints = [[ready.shortest_value.text]] if ready.shortest_value.text is not None else []
    margin = 64 + 2 * longest_minimum_bytes(ready.schema)
    return CompiledGrammar(
        vocabulary, source, margin=margin, what="the output schema", shortest_value=ready.shortest_value, hints=hints
    )


def _llguidance_reason(error: str) -> str:
    """llguidance's error message without the quoted grammar."""
    first = error.strip().splitlines()[0]
    return first.split("failed to compile JSON schema: ")[-1].rstrip(".")
