"""Rendered prompts to token ids, so that text from outside never becomes a control token (prompt injection).

A rendered prompt is a ``TracedStr``: each character is the template's own or from outside.

* Only characters of the template's own form control tokens.
* If the tokenizer finds exactly these (nearly every prompt), the text is encoded directly.
* Otherwise each control token is replaced by an unguessable placeholder, and a copy of the tokenizer that has the
  placeholders in place of the control tokens encodes the whole. Text from outside cannot match a placeholder, and the
  tokenizer's rules for white space next to control tokens apply unchanged.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..errors import ConfigError, UnsafeWeights, first_line, is_rust_panic
from ..fork_safety import delay_fork
from .traced_text import template_spans

_SPACE = re.compile(r"[\s▁]*")
_HTML = re.compile(
    "</?(a|abbr|article|aside|b|blockquote|body|br|button|caption|center|cite|code|col|colgroup|dd|del|details|div|dl|dt"
    "|em|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i|img|input|ins|kbd|label|li|main|mark|nav|ol"
    "|option|p|pre|q|s|samp|section|select|small|span|strike|strong|sub|summary|sup|table|tbody|td|textarea|tfoot|th"
    "|thead|title|tr|tt|u|ul|var)>"
)
"""HTML tags; other names in angle brackets may be control tokens."""


class SafeEncoder:
    """Encodes rendered prompts.

    Control tokens are the added tokens that are special or named by the chat template, and all other added tokens
    except runs of white space and HTML tags.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        template: the chat template's source.

    Raises:
        ConfigError: a tokenizer without the ``tokenizers`` library behind it.
    """

    def __init__(self, tokenizer: Any, template: str = "") -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(tokenizer).__name__} is not a fast tokenizer.",
                hint="Convert it to tokenizer.json; only these can be encoded safely.",
            )
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        if self._backend.truncation or self._backend.padding:
            self._backend = Tokenizer.from_str(self._backend.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self.control = {i: token for i, token in added.items() if _is_control(token, template)}
        self._id_of = {token.content: i for i, token in self.control.items()}
        words = sorted(self._id_of, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(_pattern(self.control[self._id_of[w]]) for w in words) or r"(?!)")

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered prompt: the template's control tokens, and everything else as text.

        Args:
            rendered: a ``TracedStr`` if it contains text from outside; a plain string is all the template's own.

        Raises:
            UnsafeWeights: the tokenizer fails on it.
        """
        control_matches = list(self._template_control_tokens(rendered))
        rendered = str.__str__(rendered)
        if [match.span() for match in self._control_pattern.finditer(rendered)] == [
            match.span() for match in control_matches
        ]:
            ids = _encode_or_raise(self._backend, rendered)
            # a normalizer or the tokenizer's model may produce control tokens from other text
            if [i for i in ids if i in self.control] == [self._id_of[match[0]] for match in control_matches]:
                return ids
        copy, placeholders, ids_back = self._placeholder_tokenizer
        parts, last = [], 0
        for match in control_matches:
            parts += [rendered[last : match.start()], placeholders[match[0]]]
            last = match.end()
        ids = _encode_or_raise(copy, "".join([*parts, rendered[last:]]))
        return [ids_back.get(i, i) for i in ids]

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer itself puts before and after every text, such as BOS."""
        whole = self._backend.encode("a", add_special_tokens=True)
        added = whole.special_tokens_mask
        end = len(added) - added[::-1].index(0) if 0 in added else len(added)
        start = added.index(0) if 0 in added else end
        # one that has no embedding is no token of this tokenizer any more
        known = [[i for i in ids if self._backend.id_to_token(i)] for ids in (whole.ids[:start], whole.ids[end:])]
        return known[0], known[1]

    def _template_control_tokens(self, rendered: str) -> Iterator[re.Match[str]]:
        """The control tokens in the template's own characters."""
        text = str.__str__(rendered)
        for start, end in template_spans(rendered):
            for match in self._control_pattern.finditer(text, start, end):
                if not (
                    self.control[self._id_of[match[0]]].single_word and text[match.end() : match.end() + 1].isalnum()
                ):
                    yield match

    def fewest_tokens(self, rendered: str) -> int:
        """A lower bound of the number of tokens, without encoding the text."""
        return len(rendered) // self._longest_token

    @cached_property
    def _longest_token(self) -> int:
        return max(len(word) for word in self._backend.get_vocab())

    def grammar_tokenizer_json(self) -> str | None:
        """The tokenizer as JSON for llguidance, with control tokens that no text encodes to or is decoded from.

        Control tokens, except white space, get unguessable names and are marked special. Other added tokens in angle
        brackets become ordinary pieces. None for a tokenizer whose ids would change.
        """
        nonce = secrets.randbelow(10**18)
        names = {
            token.content: f"<|{nonce:018d}{i}|>" for i, token in self.control.items() if not token.content.isspace()
        }
        serialized = self._serialized_with_names(names)
        kept = []
        for token in serialized["added_tokens"]:
            if token["content"] in names.values():
                kept.append({**token, "special": True, "single_word": False, "normalized": False})
            elif not (token["content"].startswith("<") and token["content"] in serialized["model"]["vocab"]):
                kept.append(token)
        serialized["added_tokens"] = kept
        serialized["decoder"] = _replace_metaspace(serialized["decoder"])
        text = json.dumps(serialized)
        copy = Tokenizer.from_str(text)
        same = all(copy.token_to_id(name) == self._id_of[content] for content, name in names.items())
        return text if same else None

    @cached_property
    def _placeholder_tokenizer(self) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
        """A tokenizer with placeholders for the control tokens, the placeholders, and a map of ids that changed."""
        nonce = secrets.randbelow(10**18)
        placeholders = {word: f"\ue003{nonce:018d}{i}\ue004" for word, i in self._id_of.items()}
        serialized = self._serialized_with_names(placeholders)
        copy = Tokenizer.from_str(json.dumps(serialized))
        moved = {copy.token_to_id(stand_in): self._id_of[word] for word, stand_in in placeholders.items()}
        return copy, placeholders, {new: old for new, old in moved.items() if new != old and new is not None}

    def _serialized_with_names(self, names: Mapping[str, str]) -> dict[str, Any]:
        """The serialized tokenizer with some added tokens renamed; they keep their ids."""
        serialized: dict[str, Any] = json.loads(self._backend.to_str())
        serialized["post_processor"] = None
        for token in serialized["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        _rename_pieces(serialized["model"], names)
        vocabulary = serialized["model"]["vocab"]
        if isinstance(vocabulary, dict):  # keeps the ids of the added tokens
            vocabulary.update({token["content"]: token["id"] for token in serialized["added_tokens"]})
        return serialized


def _encode_or_raise(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text.

    Raises:
        UnsafeWeights: the tokenizer fails on it (a regular expression, for example).
    """
    try:
        with delay_fork:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except BaseException as error:
        if not (isinstance(error, Exception) or is_rust_panic(error)):
            raise
        raise UnsafeWeights(
            f"the model's tokenizer fails on a text of {len(text)} characters: {first_line(error)}.",
            hint="Use the tokenizer.json of the model's makers.",
        ) from error


def _is_control(token: AddedToken, template: str) -> bool:
    if _SPACE.fullmatch(token.content):
        return token.special and bool(token.content)
    return token.special or token.content in template or not _HTML.fullmatch(token.content)


def _replace_metaspace(decoder: Any) -> Any:
    """A serialized decoder with Metaspace as a Replace step, which llguidance supports."""
    if not isinstance(decoder, dict):
        return decoder
    if decoder.get("type") == "Metaspace":
        return {"type": "Replace", "pattern": {"String": decoder["replacement"]}, "content": " "}
    parts = decoder.get("decoders")
    return {**decoder, "decoders": [_replace_metaspace(each) for each in parts]} if parts else decoder


def _pattern(token: AddedToken) -> str:
    word = re.escape(token.content)
    return rf"(?<!\w){word}(?!\w)" if token.single_word else word


def _rename_pieces(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename pieces of a serialized tokenizer model, and remove the merges that would produce the old names."""
    renamed: Callable[[str], str] = lambda piece: names.get(piece, piece)  # noqa: E731
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[renamed(piece), score] for piece, score in vocabulary]
        return
    present = names.keys() & vocabulary.keys()
    model["vocab"] = {renamed(piece): i for piece, i in vocabulary.items()}
    if model.get("unk_token") in present:
        model["unk_token"] = names[model["unk_token"]]
    if present and "merges" in model:
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if not present & {*pair, "".join(pair)}]
