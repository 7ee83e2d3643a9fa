"""Think first, then answer: a grammar that begins behind the thought, with the room that is left.

undecided ──opening tag──> thought ──closing tag──> (bridge) ──> gap ──> the answer's own grammar
    └───────────── any other token that the answer may begin with ────────────────────┘
"""

from __future__ import annotations

import copy
import itertools
import re
from functools import cached_property
from typing import Literal, Self
from weakref import WeakKeyDictionary, proxy

import torch
from torch import Tensor

from ..errors import ConfigError
from ..fork_safety import uncut
from ..formats.reasoning import Place, ReasoningFormat, Tag
from .grammar import CompiledGrammar, Generation, Vocabulary

_TEXT = re.compile(r"[\s▁]+|</?[a-z]+[1-6]?>")
"""Added tokens that are text all the same: runs of white space, HTML tags."""

SOME = 16
"""Tokens that a limited thought leaves to an answer in free text, where ``max_tokens`` has them."""

GAP = 4
"""Characters of white space that may stand between a thought and an answer whose grammar wants none."""


class ThinkingVocabulary:
    """What a vocabulary's tokens mean within and around a thought; made once per tokenizer and format.

    Args:
        words: the vocabulary.
        tokenizer: of the same tokens.
        format: how its models think.
    """

    def __init__(self, words: Vocabulary, tokenizer: object, format: ReasoningFormat) -> None:
        self.words: Vocabulary = proxy(words)  # which keeps this, and must not be kept by it
        self.format = format
        added = tokenizer.added_tokens_decoder  # type: ignore[attr-defined]
        self.controls = {i for i, token in added.items() if token.special or not _TEXT.fullmatch(token.content)}
        self.controls |= words.eos_ids
        self._size = min(words.size, len(tokenizer))  # type: ignore[arg-type]
        self._completing: dict[tuple[Tag, int], dict[int, bytes]] = {}
        self._beginning: dict[tuple[Tag, int], list[int]] = {}

    @cached_property
    def spelled(self) -> list[bytes]:
        """The bytes of every token; none of control tokens."""
        decode = self.words.core.decode_bytes
        return [b"" if i in self.controls else bytes(decode([i])) for i in range(self._size)]

    @cached_property
    def text(self) -> Tensor:
        """``[V]`` bool: tokens that a thought may hold; its closing tag's first token, where it has one, too."""
        mask = torch.zeros(self.words.size, dtype=torch.bool)
        mask[: self._size] = True
        mask[[i for i in self.controls if i < self.words.size]] = False
        for tag in (self.format.closing, self.format.opening):  # some models open a thought again within it
            if tag.by_token and (tag is self.format.closing or len(tag.ids) == 1):
                mask[tag.ids[0]] = True
        return mask

    @cached_property
    def blank(self) -> Tensor:
        """``[V]`` bool: tokens of a little white space."""
        mask = torch.zeros(self.words.size, dtype=torch.bool)
        mask[[i for i, each in enumerate(self.spelled) if each and not each.strip() and len(each) <= GAP]] = True
        return mask

    @cached_property
    def tokens_to_close(self) -> int:
        """Most tokens that end a thought, wherever in the closing tag it stands, and come before the answer."""
        closing, bridge = self.format.closing, self.format.bridge
        letters = closing.text.encode()
        rests = [closing.ids] if closing.by_token else [self.ids_of(letters[at:]) for at in range(len(letters))]
        return max(map(len, rests)) + (len(bridge.ids) if bridge else 0)

    def completing(self, tag: Tag, matched: int) -> dict[int, bytes]:
        """Tokens that complete a spelt-out tag of which so many bytes are there, with what they hold behind it."""
        key = (tag, matched)
        if key not in self._completing:
            goal = tag.text.encode()
            begun, last = goal[:matched], goal[-1:]
            found = ((i, each, (begun + each).find(goal)) for i, each in enumerate(self.spelled) if last in each)
            self._completing[key] = {i: (begun + each)[at + len(goal) :] for i, each, at in found if at >= 0}
        return self._completing[key]

    def beginning(self, tag: Tag, matched: int) -> list[int]:
        """Tokens that go on with a spelt-out tag of which so many bytes are there; space may stand before it."""
        key = (tag, matched)
        if key not in self._beginning:
            rest = tag.text.encode()[matched:]
            pieces = self.spelled if matched else [each.lstrip() for each in self.spelled]
            fits = (i for i, each in enumerate(pieces) if each and (rest.startswith(each) or each.startswith(rest)))
            self._beginning[key] = list(fits)
        return self._beginning[key]

    def ids_of(self, text: bytes) -> list[int]:
        """Tokens of a text, none of which is a control token."""
        core = self.words.core
        with uncut:
            ids = list(core.tokenize_bytes(text))
            return ids if bytes(core.decode_bytes(ids)) == text else list(core.greedy_tokenize(text))


_KNOWN: WeakKeyDictionary[Vocabulary, dict[ReasoningFormat, ThinkingVocabulary]] = WeakKeyDictionary()


def thinking_vocabulary(words: Vocabulary, tokenizer: object, format: ReasoningFormat) -> ThinkingVocabulary:
    """The vocabulary's ``ThinkingVocabulary``, from the cache when it was made before."""
    known = _KNOWN.setdefault(words, {})
    if format not in known:
        known[format] = ThinkingVocabulary(words, tokenizer, format)
    return known[format]


class ThinkThenAnswer:
    """One generation that may think before it answers; a ``Grammar``.

    Inside the thought all text is legal and no control token is, but for the closing tag. A model that would rather
    end its turn there, or begin a call, has the thought closed for it. The thought is closed, too, when it has
    ``limit`` tokens, and when an answer that a grammar forces needs the room that is left.

    Args:
        thinking: the vocabulary.
        answer: the answer's grammar.
        place: where the prompt ends, "undecided" or "thought".
        room: tokens that the thought and the answer may have together.
        limit: tokens that the thought may have, tags not counted; None leaves it all but the answer's.
        forced: whether the answer has a form that must be whole; otherwise a thought may take all the room.

    Raises:
        ConfigError: the shortest answer does not fit.
    """

    def __init__(
        self,
        thinking: ThinkingVocabulary,
        answer: CompiledGrammar,
        *,
        place: Place,
        room: int,
        limit: int | None = None,
        forced: bool = False,
    ) -> None:
        self._thinking, self._format, self._compiled = thinking, thinking.format, answer
        self._left, self._limit = room, limit
        self._phase: Literal["undecided", "thought", "gap", "answer"] = "undecided"
        self._due: list[int] = []  # tokens that the format dictates
        self._spoken: list[int] = []  # of a tag that is under way
        self._matched = 0  # bytes of a spelt-out tag
        self._thought = 0  # tokens
        self._space = 0  # bytes of white space in the gap
        self._inner: Generation | None = None
        self._tag_only = False  # the answer cannot begin as the tag does
        self._follows: dict[bytes, bool] = {}
        self._reserve = self._reserved(forced, place)
        self._may_think = room >= self._reserve + len(self._format.opening.ids)
        if place == "thought":
            self._begin_thought()
        elif not self._may_think and self._format.bare is None:
            self._phase, self._space = "gap", GAP

    def _reserved(self, forced: bool, place: Place) -> int:
        """Tokens that close the thought and are the answer's; 0 where the thought may take all."""
        room, answer, bare = self._left, self._compiled, self._format.bare
        closing = self._thinking.tokens_to_close
        if not forced:
            return closing + min(SOME, room // 2) if self._limit is not None else 0
        if room >= 2 * (answer.margin + closing):
            return closing + answer.margin
        around = closing if place == "thought" else len(bare.ids) if bare else 0
        if not around:
            answer.start(room)
        fewest = len(answer.shortest(room - around) or ()) or answer.least_tokens
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
        if self._due:
            return False
        return self._left <= 0 or (self._phase in ("gap", "answer") and self._answer().finished)

    def forced(self) -> list[int]:
        """Tokens that must come next, with no choice in them."""
        if self._due:
            return list(self._due)
        if self.finished:
            return []
        if self._phase == "undecided":
            return self._dictated() if self._bare_answer() is None else []
        if self._phase == "answer" or (self._phase == "gap" and not self._gap_is_open):
            return self._answer().forced()
        return []

    def allowed(self, logits: Tensor | None = None) -> Tensor:
        """``[V]`` bool on the CPU: tokens that are legal now.

        Args:
            logits: ``[V]``, the model's; they say what it would do if it were free to.
        """
        if self._due:
            return self._only(self._due[:1])
        if self._phase == "thought":
            mask = self._in_thought
            if logits is not None and self._would_leave(int(logits.argmax())):
                return self._only(self._rest_of_closing(self._matched)[:1])
            return mask
        if self._phase == "undecided":
            return self._undecided(logits)
        mask = self._answer().allowed(logits)
        return mask | self._thinking.blank if self._gap_is_open else mask

    def _would_leave(self, token_id: int) -> bool:
        """Whether this token ends the turn, or begins what belongs behind the thought."""
        return token_id in self._thinking.controls and not self._thinking.text[token_id]

    def takes(self, token_id: int) -> bool:
        """Whether this token may come next."""
        if self.finished:
            return False
        if self._due:
            return token_id == self._due[0]
        if self._phase == "thought":
            return bool(self._in_thought[token_id])
        if self._phase == "undecided":
            inner = self._bare_answer()
            return token_id in self._openings() or (inner is not None and inner.takes(token_id))
        return self._answer().takes(token_id) or (self._gap_is_open and bool(self._thinking.blank[token_id]))

    def fork(self) -> Self:
        """A state of its own that begins here."""
        twin = copy.copy(self)
        twin._due, twin._spoken = list(self._due), list(self._spoken)
        twin._inner = self._inner.fork() if self._inner is not None else None
        return twin

    # ------------------------------------------------------------------ what came

    def accept(self, token_id: int) -> None:
        """Take the next token, chosen or forced.

        Raises:
            ValueError: a token that is not legal here.
        """
        if self._due:
            if token_id != self._due[0]:
                raise ValueError(f"token {token_id} is not legal here")
            self._left -= 1
            self._due.pop(0)
            if not self._due:
                self._phase = "gap"
        elif self._phase == "thought":
            if not self._in_thought[token_id]:
                raise ValueError(f"token {token_id} is not legal here")
            self._left -= 1
            self._think(token_id)
        elif self._phase == "undecided":
            self._decide(token_id)
        elif self._gap_is_open and self._thinking.blank[token_id]:
            self._left -= 1
            self._space += len(self._thinking.spelled[token_id])
            self._inner = None  # begins anew, with less room
        else:
            self._answer().accept(token_id)
            self._left -= 1
            self._phase = "answer"

    def _begin_thought(self) -> None:
        self._phase, self._spoken, self._matched, self._inner = "thought", [], 0, None
        self._close_in_time()

    def _close_in_time(self) -> None:
        full = self._limit is not None and self._thought >= self._limit
        if not self._due and (full or (self._reserve and self._left <= self._reserve)):
            self._due = self._rest_of_closing(self._matched) + self._bridge

    def _think(self, token_id: int) -> None:
        closing = self._format.closing
        if closing.by_token:
            if token_id == closing.ids[0]:
                self._end_thought(list(closing.ids[1:]))
                return
        else:
            completing = self._thinking.completing(closing, self._matched)
            if token_id in completing:
                self._end_thought([])
                self._take_rest(completing[token_id])
                return
            self._matched = _overlap(closing.text.encode()[: self._matched] + self._thinking.spelled[token_id], closing)
        self._thought += 1
        self._close_in_time()

    def _end_thought(self, rest: list[int]) -> None:
        self._due = rest + self._bridge
        if not self._due:
            self._phase = "gap"

    def _take_rest(self, rest: bytes) -> None:
        """What a token holds behind the closing tag is the answer's begin, once its space is off."""
        text = rest.lstrip()
        self._space += len(rest) - len(text)
        if text:
            inner = self._answer()
            for token in self._thinking.ids_of(text):
                inner.accept(token)
            self._phase = "answer"

    def _decide(self, token_id: int) -> None:
        if any(way[: len(self._spoken) + 1] == [*self._spoken, token_id] for way in self._ways()):
            self._left -= 1
            self._speak(token_id)
            return
        inner = self._bare_answer()
        taken, opens = inner is not None and inner.takes(token_id), token_id in self._openings()
        if not taken and not opens:
            raise ValueError(f"token {token_id} is not legal here")
        self._left -= 1
        if inner is not None and taken:
            inner.accept(token_id)
        piece = self._thinking.spelled[token_id]
        if opens:
            self._tag_only = not taken
            self._spell(piece if self._matched else piece.lstrip())
        elif self._matched or not piece or piece.strip():
            self._phase = "answer"

    def _speak(self, token_id: int) -> None:
        """A token of a tag of tokens."""
        self._spoken.append(token_id)
        if tuple(self._spoken) == self._format.opening.ids:
            self._begin_thought()
        elif self._format.bare is not None and tuple(self._spoken) == self._format.bare.ids:
            self._phase = "answer"

    def _spell(self, piece: bytes) -> None:
        """Some letters of a spelt-out opening tag, perhaps with the begin of the thought behind it."""
        goal = self._format.opening.text.encode()
        seen = goal[: self._matched] + piece
        if seen.startswith(goal):
            self._begin_thought()
            self._matched = 0 if self._due else _overlap(seen[len(goal) :], self._format.closing)
        else:
            self._matched = len(seen)

    # ------------------------------------------------------------------ parts

    def _ways(self) -> list[list[int]]:
        """Tags of tokens that may come, whole, of which what was spoken is the begin."""
        tags = [self._format.opening if self._may_think else None, self._format.bare]
        ways = [list(tag.ids) for tag in tags if tag is not None and tag.by_token]
        return [way for way in ways if way[: len(self._spoken)] == self._spoken]

    def _openings(self) -> set[int]:
        """Tokens that begin a tag, or go on with it."""
        found = {way[len(self._spoken)] for way in self._ways()}
        if self._may_think and not self._format.opening.by_token:
            found |= set(self._thinking.beginning(self._format.opening, self._matched))
        return found

    def _dictated(self) -> list[int]:
        """The tokens that all tags which may come go on with."""
        ways = [way[len(self._spoken) :] for way in self._ways()]
        common = itertools.takewhile(lambda each: len(set(each)) == 1, zip(*ways, strict=False))
        return [each[0] for each in common]

    def _bare_answer(self) -> Generation | None:
        """The answer's grammar, where the answer may begin without any tag."""
        return None if self._format.bare is not None or self._spoken or self._tag_only else self._answer()

    def _undecided(self, logits: Tensor | None) -> Tensor:
        inner = self._bare_answer()
        mask = inner.allowed(logits).clone() if inner is not None else self._only([])
        mask[list(self._openings())] = True
        return mask

    def _answer(self) -> Generation:
        if self._inner is None:
            self._inner = self._compiled.start(max(self._left, 1))
        return self._inner

    @property
    def _bridge(self) -> list[int]:
        return list(self._format.bridge.ids) if self._format.bridge else []

    def _rest_of_closing(self, matched: int) -> list[int]:
        closing = self._format.closing
        return list(closing.ids) if closing.by_token else self._thinking.ids_of(closing.text.encode()[matched:])

    @property
    def _in_thought(self) -> Tensor:
        """``[V]``: text, and of a spelt-out closing tag what the answer can go on from."""
        closing, mask = self._format.closing, self._thinking.text
        if closing.by_token:
            return mask
        illegal = [
            i
            for i, rest in self._thinking.completing(closing, self._matched).items()
            if rest.strip() and not self._may_follow(rest.lstrip())
        ]
        if illegal:
            mask = mask.clone()
            mask[illegal] = False
        return mask

    def _may_follow(self, text: bytes) -> bool:
        """Whether the answer may begin with this text."""
        if self._format.bridge is not None or (self._reserve and self._left <= self._reserve + len(text)):
            return False
        if text not in self._follows:
            state = self._compiled.start()
            try:
                for token in self._thinking.ids_of(text):
                    state.accept(token)
                self._follows[text] = True
            except ValueError:
                self._follows[text] = False
        return self._follows[text]

    @property
    def _gap_is_open(self) -> bool:
        return self._phase == "gap" and self._space < GAP and self._left > max(self._compiled.margin, 1)

    def _only(self, ids: list[int]) -> Tensor:
        mask = torch.zeros(self._thinking.words.size, dtype=torch.bool)
        mask[ids] = True
        return mask


def _overlap(seen: bytes, tag: Tag) -> int:
    """How many bytes of the tag the end of what was seen may be the begin of."""
    goal = tag.text.encode()
    return next((size for size in range(min(len(goal) - 1, len(seen)), 0, -1) if seen.endswith(goal[:size])), 0)
