"""Reasoning before an answer: a grammar for the reasoning and its tags, followed by the answer's grammar.

undecided ──opening tag──> thought ──closing tag──> (bridge) ──> gap ──> the answer's grammar
    └───────────── any other token that the answer may begin with ────────────────────┘
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from functools import cached_property
from typing import Literal, Self
from weakref import WeakKeyDictionary, proxy

import torch
from torch import Tensor

from ..errors import ConfigError
from ..fork_safety import delay_fork
from ..formats.reasoning import ReasoningFormat, ReasoningPhase, Tag
from ..greedy import argmax
from .grammar import CompiledGrammar, GrammarState
from .vocabulary import Vocabulary

_TEXT_TOKENS = re.compile(r"[\s▁]+|</?[a-z]+[1-6]?>")
"""Added tokens that count as text: runs of white space, HTML tags."""

MIN_ANSWER_TOKENS = 16
"""Tokens that limited reasoning leaves for a free-text answer, if ``max_tokens`` permits."""

MAX_GAP_BYTES = 4
"""White space that is legal between reasoning and an answer whose grammar permits none."""


class ThinkingVocabulary:
    """A vocabulary's token masks and tag tokens for one reasoning format.

    Args:
        vocabulary: of the model's tokenizer.
        tokenizer: the tokenizer.
        format: the model's reasoning format.
    """

    def __init__(self, vocabulary: Vocabulary, tokenizer: object, format: ReasoningFormat) -> None:
        self.vocabulary: Vocabulary = proxy(vocabulary)  # a key of the cache that holds this object
        self.format = format
        added = tokenizer.added_tokens_decoder  # type: ignore[attr-defined]
        self.controls = {i for i, token in added.items() if token.special or not _TEXT_TOKENS.fullmatch(token.content)}
        self.controls |= vocabulary.eos_ids
        self._size = min(vocabulary.size, len(tokenizer))  # type: ignore[arg-type]
        self._completing: dict[tuple[Tag, int], dict[int, bytes]] = {}
        self._beginning: dict[tuple[Tag, int], list[int]] = {}

    @cached_property
    def spelled(self) -> list[bytes]:
        """The bytes of every token, by id; empty for control tokens."""
        decode = self.vocabulary.llguidance_tokenizer.decode_bytes
        return [b"" if i in self.controls else bytes(decode([i])) for i in range(self._size)]

    @cached_property
    def text(self) -> Tensor:
        """``[V]`` bool: tokens that are legal in reasoning: text, and the first token of a closing tag."""
        mask = torch.zeros(self.vocabulary.size, dtype=torch.bool)
        mask[: self._size] = True
        mask[[i for i in self.controls if i < self.vocabulary.size]] = False
        for tag in (self.format.closing, self.format.opening):  # some models repeat the opening tag
            if tag.by_token and (tag is self.format.closing or len(tag.ids) == 1):
                mask[tag.ids[0]] = True
        return mask

    @cached_property
    def whitespace(self) -> Tensor:
        """``[V]`` bool: tokens of at most ``MAX_GAP_BYTES`` of white space."""
        mask = torch.zeros(self.vocabulary.size, dtype=torch.bool)
        mask[[i for i, each in enumerate(self.spelled) if each and not each.strip() and len(each) <= MAX_GAP_BYTES]] = (
            True
        )
        return mask

    @cached_property
    def tokens_to_close(self) -> int:
        """Maximum number of tokens to close the reasoning, from any prefix of the closing tag, bridge included."""
        closing, bridge = self.format.closing, self.format.bridge
        letters = closing.text.encode()
        rests = [closing.ids] if closing.by_token else [self.ids_of(letters[at:]) for at in range(len(letters))]
        return max(map(len, rests)) + (len(bridge.ids) if bridge else 0)

    def completing(self, tag: Tag, matched: int) -> dict[int, bytes]:
        """Tokens that complete a plain-text tag of which ``matched`` bytes are there, with their bytes after it."""
        key = (tag, matched)
        if key not in self._completing:
            goal = tag.text.encode()
            prefix, last = goal[:matched], goal[-1:]
            found = ((i, each, (prefix + each).find(goal)) for i, each in enumerate(self.spelled) if last in each)
            self._completing[key] = {i: (prefix + each)[at + len(goal) :] for i, each, at in found if at >= 0}
        return self._completing[key]

    def beginning(self, tag: Tag, matched: int) -> list[int]:
        """Tokens that continue a plain-text tag of which ``matched`` bytes are there; white space may precede it."""
        key = (tag, matched)
        if key not in self._beginning:
            rest = tag.text.encode()[matched:]
            pieces = self.spelled if matched else [each.lstrip() for each in self.spelled]
            fits = (i for i, each in enumerate(pieces) if each and (rest.startswith(each) or each.startswith(rest)))
            self._beginning[key] = list(fits)
        return self._beginning[key]

    def ids_of(self, text: bytes) -> list[int]:
        """Token ids of a text, without control tokens."""
        llguidance_tokenizer = self.vocabulary.llguidance_tokenizer
        with delay_fork:
            ids = list(llguidance_tokenizer.tokenize_bytes(text))
            return (
                ids
                if bytes(llguidance_tokenizer.decode_bytes(ids)) == text
                else list(llguidance_tokenizer.greedy_tokenize(text))
            )


_THINKING_VOCABULARIES: WeakKeyDictionary[Vocabulary, dict[ReasoningFormat, ThinkingVocabulary]] = WeakKeyDictionary()


def cached_thinking_vocabulary(
    vocabulary: Vocabulary, tokenizer: object, format: ReasoningFormat
) -> ThinkingVocabulary:
    """The vocabulary's ``ThinkingVocabulary``, made once per format."""
    known = _THINKING_VOCABULARIES.setdefault(vocabulary, {})
    if format not in known:
        known[format] = ThinkingVocabulary(vocabulary, tokenizer, format)
    return known[format]


class ThinkThenAnswer:
    """The state of one generation that may reason before it answers; a ``Grammar``.

    In the reasoning all text is legal, and no control token except the closing tag. If the model's best token would
    end the turn or begin a tool call there, the closing tag is forced. It is also forced when the reasoning has
    ``limit`` tokens, and when a structured answer needs the remaining tokens.

    Args:
        thinking: the vocabulary.
        answer: the answer's grammar.
        phase: at the end of the prompt, "undecided" or "thought".
        room: maximum number of tokens of reasoning and answer together.
        limit: maximum number of reasoning tokens without tags; None leaves all but the answer's.
        forced: whether the answer must be a complete structure; otherwise the reasoning may use all tokens.

    Raises:
        ConfigError: the shortest answer does not fit.
    """

    def __init__(
        self,
        thinking: ThinkingVocabulary,
        answer: CompiledGrammar,
        *,
        phase: ReasoningPhase,
        room: int,
        limit: int | None = None,
        forced: bool = False,
    ) -> None:
        self._thinking, self._format, self._answer_grammar = thinking, thinking.format, answer
        self._tokens_left, self._thought_limit = room, limit
        self._phase: Literal["undecided", "thought", "gap", "answer"] = "undecided"
        self._dictated_tokens: list[int] = []  # tokens that the format forces next
        self._tag_prefix: list[int] = []  # tokens of an incomplete tag
        self._tag_bytes_matched = 0  # bytes of an incomplete plain-text tag
        self._thought_tokens = 0  # tokens
        self._gap_bytes = 0  # bytes of white space in the gap
        self._answer_state: GrammarState | None = None
        self._tag_only = False  # the answer cannot begin with the prefix of the tag
        self._can_follow: dict[bytes, bool] = {}
        self._reserved_tokens = self._tokens_to_reserve(forced, phase)
        self._may_think = room >= self._reserved_tokens + len(self._format.opening.ids)
        if phase == "thought":
            self._begin_thought()
        elif not self._may_think and self._format.bare is None:
            self._phase, self._gap_bytes = "gap", MAX_GAP_BYTES

    def _tokens_to_reserve(self, forced: bool, phase: ReasoningPhase) -> int:
        """Tokens reserved for closing the reasoning and for the answer; 0 if the reasoning may use all."""
        room, answer, bare = self._tokens_left, self._answer_grammar, self._format.bare
        closing = self._thinking.tokens_to_close
        if not forced:
            return closing + min(MIN_ANSWER_TOKENS, room // 2) if self._thought_limit is not None else 0
        if room >= 2 * (answer.margin + closing):
            return closing + answer.margin
        around = closing if phase == "thought" else len(bare.ids) if bare else 0
        if not around:
            answer.start(room)
        fewest = len(answer.shortest(room - around) or ()) or answer.min_tokens
        if not answer.fits(room - around):
            raise ConfigError(
                f"max_tokens={room} cannot hold an answer: the shortest has {fewest} tokens, "
                f"and what closes the thought before it {around}.",
                hint=f"Set max_tokens to {around + fewest} or more.",
            )
        return closing + max(fewest, min(room // 2, answer.margin))

    # ------------------------------------------------------------------ what may come

    @property
    def finished(self) -> bool:
        """Whether nothing more may come."""
        if self._dictated_tokens:
            return False
        return self._tokens_left <= 0 or (self._phase in ("gap", "answer") and self._started_answer().finished)

    @property
    def shortened(self) -> bool:
        """Whether the token limit has ruled out the most likely legal token of the answer somewhere."""
        return self._answer_state is not None and self._answer_state.shortened

    def forced(self) -> list[int]:
        """Tokens that must come next, with no choice in them."""
        if self._dictated_tokens:
            return list(self._dictated_tokens)
        if self.finished:
            return []
        if self._phase == "undecided":
            return self._common_continuation() if self._untagged_answer() is None else []
        if self._phase == "answer" or (self._phase == "gap" and not self._gap_is_open):
            return self._started_answer().forced()
        return []

    def allowed(self, logits: Tensor | None = None) -> Tensor:
        """Token mask ``[V]`` (bool, CPU).

        Args:
            logits: ``[V]``, the model's, unmasked: show whether it would end the reasoning.
        """
        if self._dictated_tokens:
            return self._mask_of(self._dictated_tokens[:1])
        if self._phase == "thought":
            mask = self._mask_in_thought
            if logits is not None and self._ends_thought(argmax(logits)):
                return self._mask_of(self._rest_of_closing(self._tag_bytes_matched)[:1])
            return mask
        return self._mask_with(lambda answer: answer.allowed(logits))

    def legal(self) -> Tensor:
        """Token mask ``[V]`` (bool, CPU), the answer's without the token limit."""
        if self._dictated_tokens or self._phase == "thought":
            return self.allowed()
        return self._mask_with(GrammarState.legal)

    def best(self, logits: Tensor, likeliest: int | None = None) -> int:
        """The most likely token that ``allowed(logits)`` permits, the first of equally likely ones.

        Args:
            logits: ``[V]``, the model's, unmasked.
            likeliest: their largest, where it is known.
        """
        if not self._dictated_tokens:
            if self._phase == "answer":
                return self._started_answer().best(logits, likeliest)
            if self._phase == "undecided" and (inner := self._untagged_answer()) is not None:
                permitted = sorted({inner.best(logits, likeliest), *self._opening_tokens()})
                return permitted[argmax(logits[permitted])]
            first = likeliest if likeliest is not None else argmax(logits)
            if self._phase == "thought" and self._mask_in_thought[first] and not self._ends_thought(first):
                return first
        return argmax(logits.masked_fill(~self.allowed(logits).to(logits.device), -torch.inf))

    def _ends_thought(self, token_id: int) -> bool:
        """Whether this token would end the turn, or begin what must follow the reasoning."""
        return token_id in self._thinking.controls and not self._thinking.text[token_id]

    def takes(self, token_id: int) -> bool:
        """Whether this token may come next."""
        if self.finished:
            return False
        if self._dictated_tokens:
            return token_id == self._dictated_tokens[0]
        if self._phase == "thought":
            return bool(self._mask_in_thought[token_id])
        if self._phase == "undecided":
            inner = self._untagged_answer()
            return token_id in self._opening_tokens() or (inner is not None and inner.takes(token_id))
        return self._started_answer().takes(token_id) or (
            self._gap_is_open and bool(self._thinking.whitespace[token_id])
        )

    def fork(self) -> Self:
        """An independent copy of the state."""
        copied = copy.copy(self)
        copied._dictated_tokens, copied._tag_prefix = list(self._dictated_tokens), list(self._tag_prefix)
        copied._answer_state = self._answer_state.fork() if self._answer_state is not None else None
        return copied

    # ------------------------------------------------------------------ what came

    def accept(self, token_id: int) -> None:
        """Take the next token, chosen or forced.

        Raises:
            ValueError: a token that is not legal here.
        """
        if self._dictated_tokens:
            if token_id != self._dictated_tokens[0]:
                raise ValueError(f"token {token_id} is not legal here")
            self._tokens_left -= 1
            self._dictated_tokens.pop(0)
            if not self._dictated_tokens:
                self._phase = "gap"
        elif self._phase == "thought":
            if not self._mask_in_thought[token_id]:
                raise ValueError(f"token {token_id} is not legal here")
            self._tokens_left -= 1
            self._accept_thought_token(token_id)
        elif self._phase == "undecided":
            self._accept_undecided(token_id)
        elif self._gap_is_open and self._thinking.whitespace[token_id]:
            self._tokens_left -= 1
            self._gap_bytes += len(self._thinking.spelled[token_id])
            self._answer_state = None  # started again, with fewer tokens left
        else:
            self._started_answer().accept(token_id)
            self._tokens_left -= 1
            self._phase = "answer"

    def _begin_thought(self) -> None:
        self._phase, self._tag_prefix, self._tag_bytes_matched, self._answer_state = "thought", [], 0, None
        self._close_in_time()

    def _close_in_time(self) -> None:
        full = self._thought_limit is not None and self._thought_tokens >= self._thought_limit
        if not self._dictated_tokens and (
            full or (self._reserved_tokens and self._tokens_left <= self._reserved_tokens)
        ):
            self._dictated_tokens = self._rest_of_closing(self._tag_bytes_matched) + self._bridge

    def _accept_thought_token(self, token_id: int) -> None:
        closing = self._format.closing
        if closing.by_token:
            if token_id == closing.ids[0]:
                self._end_thought(list(closing.ids[1:]))
                return
        else:
            completing = self._thinking.completing(closing, self._tag_bytes_matched)
            if token_id in completing:
                self._end_thought([])
                self._begin_answer_with(completing[token_id])
                return
            self._tag_bytes_matched = _overlap(
                closing.text.encode()[: self._tag_bytes_matched] + self._thinking.spelled[token_id], closing
            )
        self._thought_tokens += 1
        self._close_in_time()

    def _end_thought(self, rest: list[int]) -> None:
        self._dictated_tokens = rest + self._bridge
        if not self._dictated_tokens:
            self._phase = "gap"

    def _begin_answer_with(self, rest: bytes) -> None:
        """Bytes of a token after the closing tag begin the answer, without leading white space."""
        text = rest.lstrip()
        self._gap_bytes += len(rest) - len(text)
        if text:
            inner = self._started_answer()
            for token in self._thinking.ids_of(text):
                inner.accept(token)
            self._phase = "answer"

    def _accept_undecided(self, token_id: int) -> None:
        if any(ids[: len(self._tag_prefix) + 1] == [*self._tag_prefix, token_id] for ids in self._possible_tags()):
            self._tokens_left -= 1
            self._accept_tag_token(token_id)
            return
        inner = self._untagged_answer()
        taken, opens = inner is not None and inner.takes(token_id), token_id in self._opening_tokens()
        if not taken and not opens:
            raise ValueError(f"token {token_id} is not legal here")
        self._tokens_left -= 1
        if inner is not None and taken:
            inner.accept(token_id)
        piece = self._thinking.spelled[token_id]
        if opens:
            self._tag_only = not taken
            self._accept_tag_bytes(piece if self._tag_bytes_matched else piece.lstrip())
        elif self._tag_bytes_matched or not piece or piece.strip():
            self._phase = "answer"

    def _accept_tag_token(self, token_id: int) -> None:
        """Advance an incomplete tag of added tokens."""
        self._tag_prefix.append(token_id)
        if tuple(self._tag_prefix) == self._format.opening.ids:
            self._begin_thought()
        elif self._format.bare is not None and tuple(self._tag_prefix) == self._format.bare.ids:
            self._phase = "answer"

    def _accept_tag_bytes(self, piece: bytes) -> None:
        """Advance an incomplete opening tag in plain text; bytes after it are reasoning."""
        goal = self._format.opening.text.encode()
        seen = goal[: self._tag_bytes_matched] + piece
        if seen.startswith(goal):
            self._begin_thought()
            self._tag_bytes_matched = 0 if self._dictated_tokens else _overlap(seen[len(goal) :], self._format.closing)
        else:
            self._tag_bytes_matched = len(seen)

    # ------------------------------------------------------------------ parts

    def _possible_tags(self) -> list[list[int]]:
        """Token ids of the tags that are legal here and begin with the tokens so far."""
        tags = [self._format.opening if self._may_think else None, self._format.bare]
        tag_ids = [list(tag.ids) for tag in tags if tag is not None and tag.by_token]
        return [ids for ids in tag_ids if ids[: len(self._tag_prefix)] == self._tag_prefix]

    def _opening_tokens(self) -> set[int]:
        """Tokens that begin or continue a tag."""
        found = {ids[len(self._tag_prefix)] for ids in self._possible_tags()}
        if self._may_think and not self._format.opening.by_token:
            found |= set(self._thinking.beginning(self._format.opening, self._tag_bytes_matched))
        return found

    def _common_continuation(self) -> list[int]:
        """The next tokens that all possible tags have in common."""
        tag_ids = [ids[len(self._tag_prefix) :] for ids in self._possible_tags()]
        common = itertools.takewhile(lambda each: len(set(each)) == 1, zip(*tag_ids, strict=False))
        return [each[0] for each in common]

    def _untagged_answer(self) -> GrammarState | None:
        """The answer's state if the answer may begin without a tag; else None."""
        return None if self._format.bare is not None or self._tag_prefix or self._tag_only else self._started_answer()

    def _mask_with(self, of: Callable[[GrammarState], Tensor]) -> Tensor:
        """The mask outside a thought, given how the answer's is told."""
        if self._phase == "undecided":
            inner = self._untagged_answer()
            mask = of(inner).clone() if inner is not None else self._mask_of([])
            mask[list(self._opening_tokens())] = True
        else:
            mask = of(self._started_answer())
            if self._gap_is_open:
                mask = mask | self._thinking.whitespace
        return mask

    def _started_answer(self) -> GrammarState:
        if self._answer_state is None:
            self._answer_state = self._answer_grammar.start(max(self._tokens_left, 1))
        return self._answer_state

    @property
    def _bridge(self) -> list[int]:
        return list(self._format.bridge.ids) if self._format.bridge else []

    def _rest_of_closing(self, matched: int) -> list[int]:
        closing = self._format.closing
        return list(closing.ids) if closing.by_token else self._thinking.ids_of(closing.text.encode()[matched:])

    @property
    def _mask_in_thought(self) -> Tensor:
        """``[V]``: text; of tokens that complete a plain-text closing tag, those that the answer can continue."""
        closing, mask = self._format.closing, self._thinking.text
        if closing.by_token:
            return mask
        illegal = [
            i
            for i, rest in self._thinking.completing(closing, self._tag_bytes_matched).items()
            if rest.strip() and not self._may_follow(rest.lstrip())
        ]
        if illegal:
            mask = mask.clone()
            mask[illegal] = False
        return mask

    def _may_follow(self, text: bytes) -> bool:
        """Whether the answer's grammar permits this text at the beginning."""
        if self._format.bridge is not None or (
            self._reserved_tokens and self._tokens_left <= self._reserved_tokens + len(text)
        ):
            return False
        if text not in self._can_follow:
            state = self._answer_grammar.start()
            try:
                for token in self._thinking.ids_of(text):
                    state.accept(token)
                self._can_follow[text] = True
            except ValueError:
                self._can_follow[text] = False
        return self._can_follow[text]

    @property
    def _gap_is_open(self) -> bool:
        return (
            self._phase == "gap"
            and self._gap_bytes < MAX_GAP_BYTES
            and self._tokens_left > max(self._answer_grammar.margin, 1)
        )

    def _mask_of(self, ids: list[int]) -> Tensor:
        mask = torch.zeros(self._thinking.vocabulary.size, dtype=torch.bool)
        mask[ids] = True
        return mask


def _overlap(seen: bytes, tag: Tag) -> int:
    """Length of the longest suffix of ``seen`` that is a proper prefix of the tag, in bytes."""
    goal = tag.text.encode()
    return next((size for size in range(min(len(goal) - 1, len(seen)), 0, -1) if seen.endswith(goal[:size])), 0)
