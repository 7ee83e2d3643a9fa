"""Rendered prompts to token ids, so that text from outside stays text.

What a template renders is ``traced``: each character is the template's own or text from outside.

* A control token is one that the template's own characters alone spell.
* Where the tokenizer would find just these (nearly every prompt), the text is encoded the ordinary way.
* Elsewhere, each of these is swapped for a stand-in that nobody can guess, and a copy of the tokenizer that knows the
  stand-ins in place of the control tokens encodes the whole. In that copy no text from outside can match anything,
  and the tokenizer's rules on spaces next to control tokens apply unchanged.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..errors import ConfigError, UnsafeWeights
from ..fork_safety import uncut
from ..hub import first_line, panicked
from .traced_text import own_stretches

_SPACE = re.compile(r"[\s▁]*")
_HTML = re.compile(
    "</?(a|abbr|article|aside|b|blockquote|body|br|button|caption|center|cite|code|col|colgroup|dd|del|details|div|dl|dt"
    "|em|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i|img|input|ins|kbd|label|li|main|mark|nav|ol"
    "|option|p|pre|q|s|samp|section|select|small|span|strike|strong|sub|summary|sup|table|tbody|td|textarea|tfoot|th"
    "|thead|title|tr|tt|u|ul|var)>"
)
"""Elements of HTML: other names between such brackets may be control tokens."""


class SafeEncoder:
    """Encodes what a template rendered.

    Control tokens are all added tokens that are special or named by the chat template, and all others but runs of
    white space and HTML tags.

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
        self.control = {i: token for i, token in added.items() if _controls(token, template)}
        self._id_of = {token.content: i for i, token in self.control.items()}
        words = sorted(self._id_of, key=len, reverse=True)
        self._structure = re.compile("|".join(_pattern(self.control[self._id_of[w]]) for w in words) or r"(?!)")

    def encode(self, rendered: str) -> list[int]:
        """Ids of a rendered prompt: its own control tokens, and everything else as text.

        Args:
            rendered: traced, where text from outside is in it; a plain string is all the template's own.

        Raises:
            UnsafeWeights: the tokenizer's own rules fail on it.
        """
        own = list(self._own(rendered))
        rendered = str.__str__(rendered)
        if [match.span() for match in self._structure.finditer(rendered)] == [match.span() for match in own]:
            ids = _ids(self._backend, rendered)
            # a normalizer or the model itself may find control tokens where nobody spelt one
            if [i for i in ids if i in self.control] == [self._id_of[match[0]] for match in own]:
                return ids
        copy, stand_ins, ids_back = self._copy
        parts, last = [], 0
        for match in own:
            parts += [rendered[last : match.start()], stand_ins[match[0]]]
            last = match.end()
        ids = _ids(copy, "".join([*parts, rendered[last:]]))
        return [ids_back.get(i, i) for i in ids]

    def _own(self, rendered: str) -> Iterator[re.Match[str]]:
        """The control tokens that the template alone spells."""
        text = str.__str__(rendered)
        for start, end in own_stretches(rendered):
            for match in self._structure.finditer(text, start, end):
                if not (
                    self.control[self._id_of[match[0]]].single_word and text[match.end() : match.end() + 1].isalnum()
                ):
                    yield match

    def fewest_tokens(self, rendered: str) -> int:
        """A number of tokens that the text cannot be encoded in less than, without encoding it."""
        return len(rendered) // self._longest_token

    @cached_property
    def _longest_token(self) -> int:
        return max(len(word) for word in self._backend.get_vocab())

    def apart(self) -> str | None:
        """The tokenizer as JSON, for grammars: no text is ever encoded as a control token, nor decoded from one.

        Control tokens have names that nobody can guess, and are all special; white space is none of them. Harmless
        tokens in angle brackets are ordinary pieces. None for a tokenizer whose ids would not stay as they are.
        """
        nonce = secrets.randbelow(10**18)
        names = {
            token.content: f"<|{nonce:018d}{i}|>" for i, token in self.control.items() if not token.content.isspace()
        }
        described = self._renamed(names)
        kept = []
        for token in described["added_tokens"]:
            if token["content"] in names.values():
                kept.append({**token, "special": True, "single_word": False, "normalized": False})
            elif not (token["content"].startswith("<") and token["content"] in described["model"]["vocab"]):
                kept.append(token)
        described["added_tokens"] = kept
        described["decoder"] = _with_spaces(described["decoder"])
        text = json.dumps(described)
        copy = Tokenizer.from_str(text)
        same = all(copy.token_to_id(name) == self._id_of[content] for content, name in names.items())
        return text if same else None

    @cached_property
    def _copy(self) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
        """A tokenizer with stand-ins for the control tokens, the stand-ins, and its ids where they differ."""
        nonce = secrets.randbelow(10**18)
        stand_ins = {word: f"\ue003{nonce:018d}{i}\ue004" for word, i in self._id_of.items()}
        described = self._renamed(stand_ins)
        copy = Tokenizer.from_str(json.dumps(described))
        moved = {copy.token_to_id(stand_in): self._id_of[word] for word, stand_in in stand_ins.items()}
        return copy, stand_ins, {new: old for new, old in moved.items() if new != old and new is not None}

    def _renamed(self, names: Mapping[str, str]) -> dict[str, Any]:
        """The tokenizer, serialized, with other names for some added tokens, which keep their ids."""
        described: dict[str, Any] = json.loads(self._backend.to_str())
        described["post_processor"] = None
        for token in described["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        _rename(described["model"], names)
        vocabulary = described["model"]["vocab"]
        if isinstance(vocabulary, dict):  # so that every added token keeps its id
            vocabulary.update({token["content"]: token["id"] for token in described["added_tokens"]})
        return described


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text.

    Raises:
        UnsafeWeights: the tokenizer's own rules (its regular expressions, say) fail on it.
    """
    try:
        with uncut:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except BaseException as error:
        if not (isinstance(error, Exception) or panicked(error)):
            raise
        raise UnsafeWeights(
            f"the model's tokenizer fails on a text of {len(text)} characters: {first_line(error)}.",
            hint="Take the tokenizer.json of the model's makers.",
        ) from error


def _controls(token: AddedToken, template: str) -> bool:
    if _SPACE.fullmatch(token.content):
        return token.special and bool(token.content)
    return token.special or token.content in template or not _HTML.fullmatch(token.content)


def _with_spaces(decoder: Any) -> Any:
    """A serialized decoder in which pieces' stand-ins for spaces are replaced in words that llguidance reads."""
    if not isinstance(decoder, dict):
        return decoder
    if decoder.get("type") == "Metaspace":
        return {"type": "Replace", "pattern": {"String": decoder["replacement"]}, "content": " "}
    parts = decoder.get("decoders")
    return {**decoder, "decoders": [_with_spaces(each) for each in parts]} if parts else decoder


def _pattern(token: AddedToken) -> str:
    word = re.escape(token.content)
    return rf"(?<!\w){word}(?!\w)" if token.single_word else word


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename pieces of a serialized model, and forget the merges that would spell the old names."""
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
