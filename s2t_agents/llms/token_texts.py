"""Token ids as text and back, for a completions server that takes text alone, or names tokens by their text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from ..errors import EscalationFailed
from .token_map import Side


class TokenTexts:
    """The tokens of a server's model, by its tokenizer.

    Args:
        side: that tokenizer.
        name: of the model, for errors.
    """

    def __init__(self, side: Side, name: str) -> None:
        self._side, self._name = side, name

    def prompt(self, ids: Sequence[int]) -> str:
        """A prompt as text, which the server will read as these very tokens.

        Raises:
            EscalationFailed: it would read others: text that spells a control token, or a spelling of its own.
        """
        tokenizer = self._side.tokenizer
        starts = (0, 1) if ids and ids[0] == tokenizer.bos_token_id else (0,)  # the server may put it in front itself
        for start in starts:
            text: str = tokenizer.decode(
                list(ids[start:]), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if tokenizer(text)["input_ids"] == list(ids):
                return text
        raise EscalationFailed(
            f"{self._name!r} takes text alone, and these {len(ids)} tokens written as text are not read as they are.",
            hint="Use a server that takes token ids as prompt, as vLLM does, or ChatJudge.",
        )

    def id_of(self, text: str) -> int | None:
        """The token of this text; None where none has it, or several have.

        Raises:
            EscalationFailed: a SentencePiece tokenizer, whose tokens some servers name without the space before them.
        """
        if not self._side.view.byte_level:
            raise EscalationFailed(
                f"{self._name!r} names tokens by their text, which does not tell those of SentencePiece apart.",
                hint="Use a server that knows return_tokens_as_token_ids, as vLLM does, or ChatJudge.",
            )
        return self._ids.get(text)

    @cached_property
    def _ids(self) -> dict[str, int | None]:
        found: dict[str, int | None] = dict(self._side.control)
        for i, data in enumerate(self._side.view.bytes_of):
            try:
                text = data.decode() if data else ""
            except UnicodeDecodeError:  # part of a character: servers do not say which
                continue
            if text:
                found[text] = None if text in found else i
        return found
