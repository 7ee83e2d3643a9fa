"""What may be generated: free text, tool calls or JSON, by llguidance.

A grammar is compiled once per request and started once per generation. Masks apply before the top-K, so every
candidate is legal; tokens that are the only legal ones are forced and need no choice. With a token limit, what is
legal is also what can still be finished within it.

What is exact: every mask is llguidance's own; under a limit, each allowed token has a completion that was walked to
its end and fits. What is not: near the limit only the likeliest tokens are tried, and the shortest completion is
found by a search with a limit, so a longer than necessary one may end a value early.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from ..errors import BadSchema, ConfigError
from ..fork_safety import uncut
from ..formats.tool_calls import tag_ids
from ..tokenization.safe_encoding import SafeEncoder
from ..tokenization.vocabulary import filled
from .closing import ClosingOrder, Work
from .lark_rules import CHOICES, arguments_of, auto_start, call_rules, call_texts, functions_of, reply_of, said
from .matcher import Matcher
from .schema_rules import heaviest, json_rule
from .shortest_value import Least

Mask = npt.NDArray[np.bool_]

TRIED = 64
"""Near the limit: this many of the likeliest legal tokens are tried for a completion that fits."""

TRIED_BLINDLY = 2048
"""As many of the first legal tokens when no logits say which are likely."""

_WORK = 200  # steps of all searches for one mask, when the known completion does not fit behind a token
_BEYOND = 64  # tokens beyond a limit up to which the shortest answer is looked for, so that an error can name it
_FAR = 4096
_SIMPLER = "Simplify that part of the schema."


class Grammar(Protocol):
    """The state of one generation."""

    def allowed(self, logits: Tensor | None = None) -> Tensor | None:
        """``[V]`` bool on the CPU: tokens that are legal now; None permits all."""

    def forced(self) -> list[int]:
        """Tokens that must come next, with no choice in them."""

    def takes(self, token_id: int) -> bool:
        """Whether this token may come next."""

    def accept(self, token_id: int) -> None:
        """Take the next token, chosen or forced."""

    @property
    def finished(self) -> bool:
        """Whether nothing more may come."""

    def fork(self) -> Self:
        """A state of its own that begins here: what it takes, this one does not."""


class Vocabulary:
    """A tokenizer as llguidance reads it; made once per tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        size: number of logits of the model, the mask's width; by default what the tokenizer's ids need.
        eos_ids: tokens that end the answer; the tokenizer's own by default.

    Raises:
        ConfigError: a tokenizer of a kind that llguidance does not know.
    """

    def __init__(self, tokenizer: Any, size: int | None = None, eos_ids: Sequence[int] | None = None) -> None:
        self.tags = tag_ids(tokenizer)
        self.eos_ids = frozenset(eos_ids if eos_ids is not None else [tokenizer.eos_token_id])
        self.size = size or max(tokenizer.get_vocab().values()) + 1
        self.core = self._core(filled(tokenizer))
        added = tokenizer.added_tokens_decoder
        texts = ["" if i in added else self.core.decode_str([i]) for i in range(self.size)]
        self.longest = max(len(text.encode()) for text in texts)
        self.order = ClosingOrder(texts, enders={self.tags[1]} if self.tags[1] is not None else set())

    def _core(self, tokenizer: Any) -> LLTokenizer:
        """llguidance's copy of the tokenizer; what spells a control token there is text."""
        ends = sorted(self.eos_ids)
        described = SafeEncoder(tokenizer, str(tokenizer.chat_template or "")).apart()
        try:
            if described is not None:
                return LLTokenizer(described, n_vocab=self.size, eos_token=ends)
            core: LLTokenizer = from_tokenizer(tokenizer, n_vocab=self.size, eos_token=ends)
        except ValueError as error:
            raise ConfigError(
                f"A grammar cannot read this tokenizer: {error}.", hint="Take the tokenizer.json of the model's makers."
            ) from error
        return core

    def spelt_out(self, answers: Sequence[Sequence[str | int]]) -> list[list[int]]:
        """Answers given as texts and ids, as tokens."""
        encode = self.core.tokenize_str
        with uncut:
            return [
                [i for part in each for i in ([part] if isinstance(part, int) else encode(part))] for each in answers
            ]

    def mask(self, matcher: Any) -> Mask:
        """``[V]``: what the matcher's state allows."""
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, count=self.size, bitorder="little").view(np.bool_)


_VOCABULARIES: WeakKeyDictionary[Any, dict[Any, Vocabulary]] = WeakKeyDictionary()


def vocabulary(tokenizer: Any, size: int | None = None, eos_ids: Sequence[int] | None = None) -> Vocabulary:
    """The tokenizer's ``Vocabulary``, from the cache when it was made before."""
    known = _VOCABULARIES.setdefault(tokenizer, {})
    key = (size, tuple(sorted(eos_ids)) if eos_ids is not None else None)
    if key not in known:
        known[key] = Vocabulary(tokenizer, size, eos_ids)
    return known[key]


class CompiledGrammar:
    """A grammar over a vocabulary, ready to be started any number of times.

    Args:
        words: the vocabulary.
        source: llguidance's Lark dialect.
        margin: tokens that one more token may oblige the model to write, estimated from above.
        what: what the grammar is for, in errors.
        least: shortest JSON that every answer holds, where it must hold some.
        hints: short answers, perhaps, as texts and ids of control tokens.

    Raises:
        BadSchema: llguidance cannot express it.
    """

    def __init__(
        self,
        words: Vocabulary,
        source: str,
        *,
        margin: int,
        what: str,
        least: Least | None = None,
        hints: Sequence[Sequence[str | int]] = (),
    ) -> None:
        self.vocabulary, self.source, self.margin = words, source, margin
        self.what, self._least, self._hints = what, least, hints
        self._searched = 0
        self._shortest: list[int] | None = None
        self._matcher = Matcher(words.core, source)
        if self._matcher.is_error():
            error = _reason(self._matcher.get_error())
            raise BadSchema(f"No grammar can express {what}: {error}.", hint=_SIMPLER)

    def start(self, max_tokens: int | None = None) -> Generation:
        """A new generation.

        Args:
            max_tokens: tokens it may have; the answer will be whole within them. None: no limit.

        Raises:
            ConfigError: the shortest answer found does not fit.
        """
        if max_tokens is not None:
            self._check_room(max_tokens)
        return Generation(self, self._matcher.deep_copy(), max_tokens)

    def fits(self, tokens: int) -> bool:
        """Whether an answer may have as few tokens as this, as far as is known."""
        return self.least_tokens <= tokens and (tokens >= self.margin or len(self.shortest(tokens) or ()) <= tokens)

    def shortest(self, tokens: int) -> list[int] | None:
        """Tokens of the shortest answer found, without the end token; None when none was found.

        Args:
            tokens: how many matter: longer answers are looked for a little beyond these.
        """
        limit = tokens + max(tokens, _BEYOND)
        if self._shortest is None and self._searched < limit:
            self._searched = limit
            short = self.vocabulary.spelt_out(self._hints)
            known = min((each for each in short if _completes(self._matcher, each)), key=len, default=None)
            if known is not None:
                limit = min(limit, len(known) - 1)
            found = self.vocabulary.order.path(
                self._matcher, self.vocabulary.mask, limit, any_will_do=known is not None
            )
            self._shortest = found if found is not None else known
        return self._shortest

    @property
    def fewest_tokens(self) -> int:
        """Number of tokens of the shortest answer found; where none was, a number that none is shorter than."""
        found = self.shortest(min(4 * self.margin, _FAR))
        return len(found) if found is not None else self.least_tokens

    @property
    def least_tokens(self) -> int:
        """A number of tokens that no answer has less of."""
        return -(-self._least.size // self.vocabulary.longest) if self._least is not None else 0

    def _check_room(self, max_tokens: int) -> None:
        if self.fits(max_tokens):
            return
        known = self.shortest(max_tokens) if self.least_tokens <= max_tokens + _BEYOND else None
        fewest = len(known) if known is not None else self.least_tokens
        has = "has" if known is not None else "has at least"
        asked = self._least.asked() if self._least is not None else ""
        who = f" (most of it for {asked} in {self.what})" if asked and fewest > _BEYOND else ""
        raise ConfigError(
            f"max_tokens={max_tokens} cannot hold an answer: the shortest {has} {fewest} tokens{who}.",
            hint=f"Set max_tokens to {fewest} or more.",
        )


class Generation:
    """One generation under a grammar; a ``Grammar``."""

    def __init__(self, compiled: CompiledGrammar, matcher: Any, max_tokens: int | None) -> None:
        self._vocabulary, self._margin = compiled.vocabulary, compiled.margin
        self._matcher = matcher
        self._left = max_tokens
        # a known completion of the state, perhaps of an earlier one
        near = max_tokens is not None and max_tokens < compiled.margin
        self._path = compiled.shortest(max_tokens) if near and max_tokens is not None else None
        self._what = compiled.what
        self._behind: dict[int, list[int]] = {}  # completions found behind tokens that are legal now
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether nothing more may come."""
        return bool(self._ended or self._matcher.is_stopped())

    @property
    def _near_limit(self) -> bool:
        return self._left is not None and self._left < self._margin

    def forced(self) -> list[int]:
        """Tokens that must come next, with no choice in them."""
        if self.finished:
            return []
        tokens = list(self._matcher.compute_ff_tokens())
        if tokens and self._near_limit and not self._fits_after(tokens):
            return []  # the same text in other tokens would not leave room: then the mask leads the way
        return tokens

    def accept(self, token_id: int) -> None:
        """Take the next token.

        Raises:
            ValueError: a token that is not legal here.
        """
        if token_id in self._vocabulary.eos_ids and self._matcher.is_accepting():
            self._ended = True
            return
        if self.finished or not self._matcher.consume_token(token_id):
            raise ValueError(f"token {token_id} is not legal here")
        if self._left is not None:
            self._left -= 1
        if token_id in self._behind:
            self._path = self._behind[token_id]
        elif self._path and self._path[0] == token_id:
            self._path = self._path[1:]
        self._behind = {}

    def fork(self) -> Self:
        """A state of its own that begins here; with the same tokens it comes to the same decisions."""
        twin = copy.copy(self)
        twin._matcher, twin._behind = self._matcher.deep_copy(), dict(self._behind)
        return twin

    def takes(self, token_id: int) -> bool:
        """Whether this token may come next; near the token limit, whether the answer can be finished behind it.

        A token that ``allowed`` kept is taken, whatever logits it was given.
        """
        if self.finished or not self._vocabulary.mask(self._matcher)[token_id]:
            return False
        if not self._near_limit:
            return True
        left = self._left or 0
        path = self._completion(left)
        if path is None or self._leaves_room(token_id, path, left):
            return True
        return self._fits_somehow(token_id, left, Work(_WORK))

    def allowed(self, logits: Tensor | None = None) -> Tensor:
        """``[V]`` bool on the CPU: legal tokens; near the token limit, those that leave room to finish.

        Args:
            logits: ``[V]``, the model's; they say which tokens are worth trying near the limit.
        """
        mask = self._vocabulary.mask(self._matcher)
        if self._matcher.is_error():
            error = _reason(self._matcher.get_error())
            raise BadSchema(f"The grammar of {self._what} became too large to follow: {error}.", hint=_SIMPLER)
        if self._near_limit:
            mask = self._finishable(mask, logits)
        return torch.from_numpy(mask)

    def _finishable(self, mask: Mask, logits: Tensor | None) -> Mask:
        left = self._left or 0
        path = self._completion(left)
        if path is None:  # no way out is known, so none can be kept open
            return mask
        legal = np.flatnonzero(mask)
        if logits is not None:
            likely = logits.detach().float().cpu()[torch.from_numpy(legal)]
            legal = legal[likely.topk(min(TRIED, len(legal))).indices.numpy()]
        kept = np.zeros_like(mask)
        work = Work(_WORK)
        for token in legal[: TRIED if logits is not None else TRIED_BLINDLY].tolist():
            kept[token] = self._leaves_room(token, path, left) or self._fits_somehow(token, left, work)
        for token in path[:1] or [i for i in self._vocabulary.eos_ids if mask[i]]:
            kept[token] = True
        return kept

    def _completion(self, left: int) -> list[int] | None:
        """A completion of the present state: the known one, if it still is one, or a new one."""
        if self._path is None or len(self._path) > left or not _completes(self._matcher, self._path):
            self._path = self._vocabulary.order.path(self._matcher, self._vocabulary.mask, left)
        return self._path

    def _leaves_room(self, token: int, path: list[int], left: int) -> bool:
        """Whether the known completion goes on behind the token, or begins with it."""
        if token in self._vocabulary.eos_ids or token in path[:1]:
            return True
        return 1 + len(path) <= left and _completes(self._matcher, [token, *path])

    def _fits_somehow(self, token: int, left: int, work: Work) -> bool:
        found = self._search_behind([token], left, work)
        if found is not None:
            self._behind[token] = found
        return found is not None

    def _fits_after(self, tokens: list[int]) -> bool:
        """Whether a completion is known, or found, behind tokens that are forced."""
        path = self._path
        if path is not None and path[: len(tokens)] == tokens:
            return True
        found = self._search_behind(tokens, self._left or 0, Work(_WORK))
        if found is not None:
            self._path = tokens + found
        return found is not None

    def _search_behind(self, tokens: list[int], left: int, work: Work) -> list[int] | None:
        ahead = self._matcher.deep_copy()
        if left < len(tokens) or not ahead.consume_tokens(tokens):
            return None
        if ahead.is_accepting():
            return []
        room = left - len(tokens)
        return self._vocabulary.order.path(ahead, self._vocabulary.mask, room, any_will_do=True, work=work)


def _completes(matcher: Any, tokens: list[int]) -> bool:
    if matcher.validate_tokens(tokens) < len(tokens):
        return False
    ahead = matcher.deep_copy()
    return bool(ahead.consume_tokens(tokens) and ahead.is_accepting())


def tool_grammar(
    words: Vocabulary,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: str = "auto",
    *,
    parallel: bool = True,
    reply: Mapping[str, Any] | None = None,
) -> CompiledGrammar:
    """Text and Hermes tool calls.

    Args:
        words: the vocabulary.
        tools: in OpenAI's form; their schemas are always kept to, so ``strict`` adds nothing.
        tool_choice: ``"auto"`` (text, calls or both), ``"any"`` (calls alone), ``"none"`` (text alone), or a
            tool's name (one call of it).
        parallel: whether there may be several calls.
        reply: schema of an answer that is no call, in place of free text.

    Raises:
        BadSchema: a tool's schema that cannot be expressed; the message names the tool.
        ConfigError: a ``tool_choice`` that is none of these.
    """
    functions = functions_of(tools, tool_choice)
    if tool_choice == "none" or not functions:
        return CompiledGrammar(words, f"start: said\n{said()}", margin=4, what="text")
    named = tool_choice not in CHOICES
    chosen = [functions[tool_choice]] if named else list(functions.values())
    schemas = [arguments_of(function) for function in chosen]
    rules = call_rules(
        words,
        [function["name"] for function in chosen],
        [each.schema for each in schemas],
        several=parallel and not named,
    )
    ready = reply_of(reply) if reply is not None and tool_choice == "auto" else None
    said_instead = ready.schema if ready is not None else None
    rules.append(auto_start(words, said_instead) if tool_choice == "auto" else "start: calls")
    names = max(len(json.dumps(function["name"]).encode()) for function in chosen)
    margin = 96 + names + 2 * max(heaviest(each.schema) for each in [*schemas, *([ready] if ready is not None else [])])
    hints = [
        call_texts(words, function["name"], each.least.text)
        for function, each in zip(chosen, schemas, strict=True)
        if each.least.text is not None
    ]
    shortest = min((each.least for each in schemas), key=lambda each: each.size)
    what = "these tools" if len(chosen) > 1 else f"the arguments of tool {chosen[0]['name']!r}"
    return CompiledGrammar(
        words,
        "\n".join(rules) + "\n",
        margin=margin,
        what=what,
        least=shortest if tool_choice != "auto" else None,
        hints=hints if tool_choice != "auto" else (),
    )


def json_grammar(words: Vocabulary, schema: Mapping[str, Any] | None = None) -> CompiledGrammar:
    """An answer that is one JSON value of a schema; any JSON object when there is none.

    Raises:
        BadSchema: no answer can fit the schema.
    """
    ready = reply_of(schema or {"type": "object"})
    source = f"start: value\nvalue: {json_rule(ready.schema)}\n"
    hints = [[ready.least.text]] if ready.least.text is not None else []
    margin = 64 + 2 * heaviest(ready.schema)
    return CompiledGrammar(words, source, margin=margin, what="the output schema", least=ready.least, hints=hints)


def _reason(error: str) -> str:
    """llguidance's own words, without the grammar it quotes."""
    first = error.strip().splitlines()[0]
    return first.split("failed to compile JSON schema: ")[-1].rstrip(".")
